"""Putting trained files onto a MODEL and a CLIP, with every misfit told instead of logged."""

import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
from torch import Tensor

from ..models.base_models import FINGERPRINTED, family_of_widths, fingerprint, same_model, title_of
from ..models.checkpoints import read_header
from ..models.errors import PersonalizeError
from ..models.metadata import About, read_about
from ..models.weight_files import read_safetensors, read_weights

SUFFIXES = (
    ".lora_down.weight",
    ".lora_up.weight",
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_mid.weight",
    ".alpha",
    ".dora_scale",
    ".diff",
    ".diff_b",
    ".set_weight",
    ".w_norm",
    ".b_norm",
)
OURS = re.compile(rb'"personalize\.method"\s*:\s*"dreambooth"')
HEAD = 1 << 16
"""Bytes of a file in which our metadata tells the method."""
DIFFERENCE = (".diff", ".diff_b", ".lora_up.weight")
"""Endings of a difference's tensors; a whole checkpoint has none of them."""


def read_trained(path: Path) -> tuple[dict[str, Tensor], About | None]:
    """A file's tensors and, where we wrote it, what it says of itself.

    Raises:
        PersonalizeError: it is damaged, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        return tensors, read_about(metadata, path.name)
    weights = read_weights(path)
    weights = weights.get("string_to_param", weights)  # where A1111's Textual Inversion keeps its vectors
    return {key: value for key, value in weights.items() if isinstance(value, Tensor)}, None


def read_about_file(path: Path) -> About | None:
    """What a .safetensors file says of itself, from its header alone."""
    return read_about(read_header(path)[1], path.name) if path.suffix == ".safetensors" else None


def is_difference(path: Path) -> bool:
    """Whether a file holds a trained model's difference from its base, rather than a whole checkpoint."""
    return path.suffix == ".safetensors" and any(key.endswith(DIFFERENCE) for key in read_header(path)[0])


def is_dreambooth(path: Path) -> bool:
    """Whether our DreamBooth wrote a .safetensors file; fast enough to ask of thousands."""
    try:
        return path.suffix == ".safetensors" and _is_dreambooth(path, path.stat().st_mtime_ns)
    except OSError:
        return False


@cache
def _is_dreambooth(path: Path, changed: int) -> bool:
    with open(path, "rb") as file:
        return OURS.search(file.read(HEAD)) is not None


def family_of_model(model: Any) -> str:
    """The family of a MODEL's UNet; empty where it is no UNet."""
    config = model.model.model_config.unet_config
    if "model_channels" not in config or not config.get("context_dim"):
        return ""
    return family_of_widths(config["model_channels"], config["context_dim"])


def fingerprint_of_model(model: Any) -> str:
    """See models.base_models. Of the weights as they were loaded: while a model is in use, patches are in its weights."""
    weights = {}
    for name in FINGERPRINTED:
        before = model.backup.get(f"diffusion_model.{name}")
        weights[name] = comfy.utils.get_attr(model.model.diffusion_model, name) if before is None else before.weight
    return fingerprint(weights)


def check_base(model: Any, about: About | None, name: str, exactly: bool) -> None:
    """Whether a file is for this model.

    Args:
        model: the MODEL.
        about: what the file says of itself; None if it says nothing.
        name: the file's.
        exactly: whether it must be the very base, rather than one of its family.

    Raises:
        PersonalizeError: it is not.
    """
    if about is None:
        return
    family = family_of_model(model)
    if about.base_family and about.base_family != family:
        raise PersonalizeError(
            f"{name} was trained on {title_of(about.base_family)} ({about.base_name}), but the model is "
            f"{title_of(family) if family else 'no Stable Diffusion'}: load a {title_of(about.base_family)} checkpoint."
        )
    if about.base_fingerprint and not same_model(about.base_fingerprint, fingerprint_of_model(model)):
        if exactly:
            raise PersonalizeError(
                f"{name} is the difference of a trained model from {about.base_name}, and the model is another of its "
                f"family: load {about.base_name}."
            )
        logging.info("%s was trained on %s; on another checkpoint it may act differently.", name, about.base_name)


def apply_patches(
    model: Any, clip: Any, tensors: Mapping[str, Tensor], strengths: tuple[float, float], name: str
) -> tuple[Any, Any]:
    """The MODEL and the CLIP with a LoRA or a difference added.

    Args:
        model, clip: either may be None, and is then left out.
        tensors: of the file, in any naming that ComfyUI knows.
        strengths: for the model and for the CLIP.
        name: the file's.

    Raises:
        PersonalizeError: nothing in the file is for this model, or a tensor has another shape.
    """
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    if model is not None:
        ours = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        theirs = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    converted = comfy.lora_convert.convert_lora(dict(tensors))
    layers = {_layer(key) for key in converted}
    known = layers & (ours.keys() | theirs.keys())
    if not known:
        raise PersonalizeError(
            f"None of the {len(layers)} layers in {name} is in this model: it was made for another base model."
        )
    unknown = layers - known
    if unknown and clip is not None and model is not None:
        logging.warning("%s: %d of %d layers are not in this model and were left out.", name, len(unknown), len(layers))
    if model is not None:
        model = _patched(model, comfy.lora.load_lora(converted, ours, log_missing=False), strengths[0], name)
    if clip is not None:
        patches = comfy.lora.load_lora(converted, theirs, log_missing=False)
        clip = _patched(clip, patches, strengths[1], name)
    return model, clip


def _layer(key: str) -> str:
    return next((key.removesuffix(suffix) for suffix in SUFFIXES if key.endswith(suffix)), key)


def _patched(thing: Any, patches: Mapping[str, Any], strength: float, name: str) -> Any:
    """A clone of a MODEL or CLIP with the patches."""
    patcher = getattr(thing, "patcher", thing)
    shapes = {key: tuple(value.shape) for key, value in patcher.model.state_dict().items()}
    for key, patch in patches.items():
        target = key if isinstance(key, str) else key[0]
        shape = _shape_of(patch)
        if isinstance(key, str) and shape is not None and not _fits(shape, shapes.get(target, shape)):
            raise PersonalizeError(
                f"{target} is {shapes[target]} in this model, but {shape} in {name}: it was made for another base model."
            )
    clone = thing.clone()
    clone.add_patches(patches, strength)
    return clone


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Rows, and all the rest together: a convolution's change may be written as a matrix."""

    def flat(sizes: tuple[int, ...]) -> tuple[int, int]:
        count = 1
        for size in sizes[1:]:
            count *= size
        return sizes[0] if sizes else 1, count

    return flat(shape) == flat(wanted)


def _shape_of(patch: Any) -> tuple[int, ...] | None:
    """The shape of what a patch adds; None where only ComfyUI can tell."""
    if isinstance(patch, tuple) and patch[0] == "diff":
        return tuple(patch[1][0].shape)
    weights = getattr(patch, "weights", None)
    if getattr(patch, "name", "") == "lora" and weights is not None and weights[3] is None:
        up, down = weights[0], weights[1]
        return (up.shape[0], *down.shape[1:])
    return None
