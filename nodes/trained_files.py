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
import torch
from torch import Tensor

from ..models.base_models import FINGERPRINTED, family_of_widths, fingerprint, same_model, title_of
from ..models.checkpoints import read_header
from ..models.delta import CHANGES
from ..models.errors import PersonalizeError
from ..models.file_kinds import kind_of, taken_for
from ..models.metadata import About, read_about
from ..models.weight_files import check_finite, read_safetensors, read_weights

OURS = re.compile(rb'"personalize\.method"\s*:\s*"dreambooth"')
HEAD = 1 << 16
"""Bytes of a file in which our metadata tells the method."""


def read_trained(path: Path) -> tuple[dict[str, Tensor], About | None]:
    """A file's tensors and, where we wrote it, what it says of itself.

    Raises:
        PersonalizeError: it is damaged, holds more than tensors, or numbers that are not finite.
    """
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        about = read_about(metadata, path.name)
    else:
        weights = read_weights(path)
        weights = weights.get("string_to_param", weights)  # where A1111's Textual Inversion keeps its vectors
        tensors, about = {key: value for key, value in weights.items() if isinstance(value, Tensor)}, None
    check_finite(tensors, path.name)
    return tensors, about


def read_about_file(path: Path) -> About | None:
    """What a .safetensors file says of itself, from its header alone."""
    return read_about(read_header(path)[1], path.name) if path.suffix == ".safetensors" else None


def is_difference(path: Path) -> bool:
    """Whether a file holds a trained model's difference from its base, rather than a whole checkpoint."""
    return path.suffix == ".safetensors" and any(key.endswith(CHANGES) for key in read_header(path)[0])


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
    """See models.base_models."""
    return fingerprint({name: as_loaded(model, f"diffusion_model.{name}") for name in FINGERPRINTED})


def as_loaded(patcher: Any, key: str) -> Tensor:
    """A weight of a MODEL or a CLIP's patcher as it was loaded: while it is in use, patches are in its weights."""
    before = patcher.backup.get(key)
    return comfy.utils.get_attr(patcher.model, key) if before is None else before.weight


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
            f"{title_of(family) if family else 'no Stable Diffusion'}: load a checkpoint of {title_of(about.base_family)}."
        )
    if about.base_fingerprint and not same_model(about.base_fingerprint, fingerprint_of_model(model)):
        if exactly:
            raise PersonalizeError(
                f"{name} is the difference of a trained model from {about.base_name}, and the model is another of its "
                f"family: load {about.base_name}."
            )
        logging.info("%s was trained on %s; on another checkpoint it may act differently.", name, about.base_name)


class _Watched(dict[str, Tensor]):
    """A file's tensors, and which of them were taken."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__(tensors)
        self.taken: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.taken.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.taken.add(key)
        return super().get(key, default)


def apply_patches(
    model: Any, clip: Any, tensors: Mapping[str, Tensor], strengths: tuple[float, float], name: str
) -> tuple[Any, Any]:
    """The MODEL and the CLIP with a LoRA or a difference added.

    Args:
        model, clip: either may be None, and is then left out.
        tensors: of the file, of any trainer that ComfyUI knows.
        strengths: for the model and for the CLIP.
        name: the file's.

    Raises:
        PersonalizeError: nothing in the file is for this model, or a tensor has another shape.
    """
    file = _Watched(comfy.lora_convert.convert_lora(dict(tensors)))
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    try:
        if model is not None:
            ours = comfy.lora.load_lora(file, comfy.lora.model_lora_keys_unet(model.model, {}), log_missing=False)
        if clip is not None:
            keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
            theirs = comfy.lora.load_lora(file, keys, log_missing=False)
    except KeyError as error:
        raise PersonalizeError(f"{name} is not whole: it lacks {error.args[0]}.") from None
    if not ours and not theirs:
        kind = kind_of(file, None)
        if kind is not None and kind[1] != "loras":
            raise taken_for("a LoRA", name, file, None)
        raise PersonalizeError(
            f"None of the {len(file)} tensors in {name} is for this model: it was made for another base model."
        )
    left = sorted(file.keys() - file.taken)
    if left and clip is not None and model is not None:
        logging.warning(
            "%s: %d of %d tensors are not for this model and were left out, such as %s.",
            name,
            len(left),
            len(file),
            left[0],
        )
    if model is not None:
        model = _patched(model, ours, strengths[0], name)
    if clip is not None:
        clip = _patched(clip, theirs, strengths[1], name)
    return model, clip


def _patched(thing: Any, patches: Mapping[Any, Any], strength: float, name: str) -> Any:
    """A clone of a MODEL or CLIP with the patches."""
    patcher = getattr(thing, "patcher", thing)
    shapes = {key: tuple(value.shape) for key, value in patcher.model.state_dict().items()}
    for key, patch in patches.items():
        if not isinstance(key, str):  # of a part of a weight
            continue
        if key not in shapes:
            logging.warning("%s: %s is not in this model and was left out.", name, key)
        elif not _fits(patch, shapes[key], key):
            shape = _shape_of(patch)
            raise PersonalizeError(
                f"{key} is {shapes[key]} in this model, but {shape or 'of another shape'} in {name}: "
                "it was made for another base model."
            )
    clone = thing.clone()
    clone.add_patches(patches, strength)
    return clone


def _fits(patch: Any, shape: tuple[int, ...], key: str) -> bool:
    """Whether ComfyUI can add a patch to a weight of this shape: where not, it makes no change of it."""
    if isinstance(patch, tuple) and patch[0] == "set":
        return bool(patch[1][0].shape == shape)
    if getattr(patch, "name", "") in ("oft", "boft"):  # which look at the values
        blocks = patch.weights[0]
        return bool(blocks.shape[-3] * blocks.shape[-1] == shape[0])
    changes: list[Tensor] = []

    def pass_on(change: Tensor) -> Tensor:
        changes.append(change)
        return change

    try:
        comfy.lora.calculate_weight([(1.0, patch, 1.0, None, pass_on)], torch.zeros(shape, device="meta"), key)
    except RuntimeError:
        return False
    return bool(changes)


def _shape_of(patch: Any) -> tuple[int, ...] | None:
    """The shape of what a patch adds; None where only ComfyUI can tell."""
    if isinstance(patch, tuple):
        return tuple(patch[1][0].shape)
    if patch.name == "lora" and patch.weights[3] is None:
        up, down = patch.weights[:2]
        return (up.shape[0], *down.shape[1:])
    return None
