"""A base model from one file, a diffusers folder or a hub id: SD1.5, SD2.x, SDXL and the pocket model by the same code.

From one file it works offline: the family is told from the file's shapes, never from its name; configurations and the
tokenizer come with the pack (`configs/`); a file with a TAESD-shaped VAE gets diffusers' AutoencoderTiny. The network
is touched only for a hub id.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor

from .clip_tokenizer import clip_tokenizer
from .shared import (
    UNET_PREFIX,
    PersonalizeError,
    family_of_widths,
    fingerprint,
    plural,
    read_safetensors,
    read_weights,
    single_file_names,
    tiny_vae_tensors,
    vae_tensors,
)

CONFIGS = Path(__file__).parent / "configs"
OFFLINE = {"sd15", "sd2", "sdxl", "pocket"}
"""Families whose configuration comes with the pack."""
VAE_SCALE = 8
"""Pixels a latent along each side, in all of them."""
PIPELINES = (StableDiffusionPipeline, StableDiffusionXLPipeline)
Pipeline = Any
"""One of PIPELINES."""

_CONV_IN = f"{UNET_PREFIX}input_blocks.0.0.weight"
_CROSS = ".attn2.to_k.weight"
_VAE = "first_stage_model."
_TINY_VAE = f"{_VAE}taesd_"
_SD2_NORM = f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_V = 0.09
"""Standard deviation of that bias above which an SD2.x predicts v: no key of the file says it (ComfyUI's rule)."""


@dataclass
class BaseModel:
    """A base model, loaded."""

    pipeline: Pipeline
    name: str
    """Of the file, folder or hub id."""
    family: str
    """Of models.base_models: "sd15", "sdxl", ..."""
    file: Path | None
    """Where it came from, if that was one file."""

    @property
    def layout(self) -> str:
        """ "sd", "sd2" or "sdxl": which text encoders it has, and how single files name them."""
        if isinstance(self.pipeline, StableDiffusionXLPipeline):
            return "sdxl"
        return "sd2" if self.family == "sd2" else "sd"

    @property
    def text_encoders(self) -> list[Any]:
        """One or two; None where it was freed."""
        two = [self.pipeline.text_encoder_2] if self.layout == "sdxl" else []
        return [self.pipeline.text_encoder, *two]

    @property
    def tokenizers(self) -> list[Any]:
        """One for each text encoder."""
        return [self.pipeline.tokenizer, *([self.pipeline.tokenizer_2] if self.layout == "sdxl" else [])]

    @property
    def v_prediction(self) -> bool:
        """Whether the network predicts v rather than the noise."""
        return self.pipeline.scheduler.config.prediction_type == "v_prediction"

    @property
    def size_step(self) -> int:
        """Pixels of which the sides of a picture are multiples."""
        return self.pipeline.vae_scale_factor * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)

    def unet_names(self) -> dict[str, str]:
        """Single-file name of each of the UNet's parameters."""
        unet = self.pipeline.unet
        return single_file_names(list(unet.state_dict()), unet.config.layers_per_block)

    def fingerprint(self) -> str:
        """See models.base_models."""
        state = self.pipeline.unet.state_dict()
        return fingerprint(
            {single.removeprefix(UNET_PREFIX): state[name] for name, single in self.unet_names().items()}
        )


def load_base(
    where: str,
    dtype: torch.dtype = torch.float32,
    prediction_type: str = "auto",
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
) -> BaseModel:
    """A base model, on the CPU, without a safety checker.

    Args:
        where: a file, a folder in diffusers' layout, or a hub id such as "owner/name".
        dtype: of the UNet and the text encoders; the VAE is always in fp32, as SDXL's overflows in fp16.
        prediction_type: "auto" takes what the file says, else "epsilon" or "v_prediction".
        revision, variant: of a hub id; variant also of a folder.
        vae: another VAE: a folder, or a file.

    Raises:
        PersonalizeError: nothing there, damaged, or of another family.
    """
    hush()
    path, other = Path(where).expanduser(), None if vae is None else Path(vae).expanduser()
    if path.is_file():
        pipeline, file = load_pipeline(path, dtype, other), path
    else:
        pipeline, file = _load_folder(where, path, dtype, revision, variant), None
        if other is not None:
            pipeline.vae = load_vae(other, "sdxl" if isinstance(pipeline, StableDiffusionXLPipeline) else "sd15")
    pipeline.vae.to(torch.float32)
    if prediction_type != "auto":
        _predict(pipeline, prediction_type)
    unet = pipeline.unet.config
    family = family_of_widths(unet.block_out_channels[0], unet.cross_attention_dim)
    base = BaseModel(pipeline, path.name if file or path.is_dir() else where, family, file)
    for tokenizer in base.tokenizers:  # `run.too_long` says which captions are too long, and what comes of it
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return base


def hush() -> None:
    """No progress bars and advice from diffusers while it loads."""
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()


def is_hub_id(where: str) -> bool:
    """Whether that can be "owner/name", rather than a file or folder that is not there."""
    owner = where.partition("/")[0]
    known = not where.endswith((".safetensors", ".ckpt", ".pt", ".bin")) and not Path(owner).is_dir()
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", where) is not None and known


def size_step_of(family: str) -> int:
    """Pixels of which the sides of a picture are multiples, for a family whose configuration comes with the pack."""
    widths = json.loads((CONFIGS / family / "unet" / "config.json").read_text())["block_out_channels"]
    return VAE_SCALE * 2 ** (len(widths) - 1)


def text_layers_of(family: str) -> int:
    """Of the text encoder of a family whose configuration comes with the pack."""
    return json.loads((CONFIGS / family / "text_encoder" / "config.json").read_text())["num_hidden_layers"]


def unet_blocks_of(family: str) -> list[str]:
    """The UNet's, by diffusers' names."""
    blocks = range(len(json.loads((CONFIGS / family / "unet" / "config.json").read_text())["block_out_channels"]))
    return [*(f"down_blocks.{i}" for i in blocks), "mid_block", *(f"up_blocks.{i}" for i in blocks)]


def _load_folder(where: str, path: Path, dtype: torch.dtype, revision: str | None, variant: str | None) -> Pipeline:
    local = path.is_dir()
    if not local and not is_hub_id(where):
        raise PersonalizeError(f"{where} is no file, no folder, and no hub id (owner/name).")
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(path) if local else where,
            torch_dtype=dtype,
            revision=revision,
            variant=variant,
            local_files_only=local,
            **({"safety_checker": None} if _wants_checker(path) else {}),
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        kind = "folder" if local else "hub id"
        raise PersonalizeError(f"The {kind} {where} cannot be loaded as a base model: {reason}") from None
    if not isinstance(pipeline, PIPELINES):
        raise PersonalizeError(f"{where} is a {type(pipeline).__name__}; SD1.5, SD2.x and SDXL models are supported.")
    return pipeline


def _wants_checker(path: Path) -> bool:
    index = path / "model_index.json"
    return not index.is_file() or "safety_checker" in index.read_text(encoding="utf-8")


def _predict(pipeline: Pipeline, kind: str) -> None:
    if pipeline.scheduler.config.prediction_type != kind:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type=kind)


def load_vae(path: Path, family: str) -> AutoencoderKL | AutoencoderTiny:
    """A VAE by itself: a folder, or a file, in diffusers' or the single-file layout.

    Args:
        path: of it.
        family: "sd15" or "sdxl", whose scale a file's latents get.

    Raises:
        PersonalizeError: it cannot be loaded.
    """
    try:
        if path.is_dir():
            return AutoencoderKL.from_pretrained(str(path), torch_dtype=torch.float32, local_files_only=True)
        config = str(CONFIGS / family / "vae")
        return AutoencoderKL.from_single_file(
            str(path), config=config, torch_dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, SingleFileComponentError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PersonalizeError(f"{path} cannot be loaded as a VAE: {reason}") from None


def widths_of(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """The UNet's first width and the width of the text features, from a single file's tensors or their shapes."""
    context = next((value.shape[1] for key, value in state.items() if key.endswith(_CROSS)), 0)
    return state[_CONV_IN].shape[0], context


def family_of(state: Mapping[str, Tensor], name: str) -> str:
    """ "sd15", "sd2", "sdxl" or "pocket".

    Raises:
        PersonalizeError: not a single-file checkpoint of one of these; the message names the file.
    """
    if _CONV_IN not in state and any("lora_" in key for key in state):
        raise PersonalizeError(f"{name} is a LoRA, not a checkpoint: move it to models/loras, and name the base model.")
    if _CONV_IN not in state:
        raise PersonalizeError(f"{name} is not a checkpoint: it has no {_CONV_IN}.")
    width, context = widths_of(state)
    family = family_of_widths(width, context)
    if family not in OFFLINE:
        raise PersonalizeError(
            f"{name} is of a family that is not supported (UNet width {width}, text features of width {context}): "
            "SD1.5, SD2.x and SDXL checkpoints, and the pocket model, are."
        )
    channels = state[_CONV_IN].shape[1]
    if family != "pocket" and channels != 4:
        raise PersonalizeError(
            f"{name} takes {channels} channels (an inpainting or editing model): use a plain text-to-image checkpoint."
        )
    return family


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .ckpt file.

    Raises:
        PersonalizeError: the file is missing or damaged, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    weights = read_weights(path)
    return {key: value for key, value in weights.get("state_dict", weights).items() if isinstance(value, Tensor)}


def load_pipeline(path: Path, dtype: torch.dtype = torch.float32, vae: Path | None = None) -> Pipeline:
    """The checkpoint as a diffusers pipeline on the CPU, without a safety checker; never touches the network.

    Args:
        path: of a .safetensors or .ckpt file.
        dtype: of its parts.
        vae: another VAE, as `load_vae` takes it; the file then needs none.

    Raises:
        PersonalizeError: the file is missing, damaged, incomplete, or of another family.
    """
    state = read_checkpoint(path)
    family = family_of(state, path.name)
    if vae is None and not any(key.startswith(_VAE) for key in state):
        raise PersonalizeError(f"{path.name} has no VAE: give one with --vae_path, or take a whole checkpoint.")
    other = None if vae is None else load_vae(vae, "sdxl" if family == "sdxl" else "sd15")
    try:
        pipeline = _assembled(path, state, family, dtype, other)
    except (KeyError, ValueError, RuntimeError, SingleFileComponentError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise _incomplete(path, _missing(state, family, other is not None), reason) from None
    for encoder in (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)):
        gone = [name for name, value in encoder.named_parameters() if value.is_meta] if encoder is not None else []
        if gone:
            raise _incomplete(path, [f"the text encoder's {gone[0]}", *gone[1:]])
    _predict(pipeline, "v_prediction" if predicts_v(state, family) else "epsilon")
    if "ztsnr" in state:
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )
    return pipeline


def _assembled(path: Path, state: Mapping[str, Tensor], family: str, dtype: torch.dtype, vae: Any) -> Pipeline:
    """The pipeline as diffusers makes it; what a damaged file lacks is an error of any kind, or stays on "meta"."""
    parts: dict = {"tokenizer": clip_tokenizer("!") if family == "sd2" else clip_tokenizer()}
    if family == "sdxl":
        parts["tokenizer_2"] = clip_tokenizer("!")
    if vae is not None:
        parts["vae"] = vae
    elif any(key.startswith(_TINY_VAE) for key in state):
        parts["vae"] = tiny_vae(state, dtype)
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    options = {"config": str(CONFIGS / family), "torch_dtype": dtype, "local_files_only": True}
    if path.suffix == ".safetensors":  # each maps the file for itself, so that each can be freed alone
        parts["unet"] = UNet2DConditionModel.from_single_file(str(path), subfolder="unet", **options)
        if "vae" not in parts:
            parts["vae"] = AutoencoderKL.from_single_file(str(path), subfolder="vae", **options)
    return kind.from_single_file(str(path), **options, **parts)


def _missing(state: Mapping[str, Tensor], family: str, without_vae: bool) -> list[str]:
    """The tensors of the UNet and the VAE that a single file lacks, by its names."""
    unet_kind, vae_kind = UNet2DConditionModel, AutoencoderKL
    with torch.device("meta"):
        unet = unet_kind.from_config(unet_kind.load_config(CONFIGS / family, subfolder="unet"))
        names = [*single_file_names(list(unet.state_dict()), unet.config.layers_per_block).values()]
        if any(key.startswith(_TINY_VAE) for key in state):
            names += [] if without_vae else tiny_vae_tensors(AutoencoderTiny().state_dict())
        elif not without_vae:
            vae = vae_kind.from_config(vae_kind.load_config(CONFIGS / family, subfolder="vae"))
            names += vae_tensors(vae.state_dict())
    return [name for name in names if name not in state]


def _incomplete(path: Path, missing: list[str], reason: str = "") -> PersonalizeError:
    if not missing:
        return PersonalizeError(f"{path.name} in {path.parent} cannot be loaded ({reason}): take another checkpoint.")
    more = f" and {plural(len(missing) - 1, 'other tensor')}" * (len(missing) > 1)
    return PersonalizeError(
        f"{path.name} in {path.parent} is incomplete ({missing[0]}{more} not in it): take a whole checkpoint."
    )


def predicts_v(state: Mapping[str, Tensor], family: str) -> bool:
    """Whether a single file's network predicts v: it says so, or its weights do."""
    if family == "sd2" and _SD2_NORM in state:
        return bool(state[_SD2_NORM].float().std(unbiased=False) > _SD2_V)
    return "v_pred" in state


def tiny_vae(state: Mapping[str, Tensor], dtype: torch.dtype) -> AutoencoderTiny:
    """The TAESD-shaped VAE of a checkpoint."""
    channels = state[f"{_TINY_VAE}decoder.1.weight"].shape[1]
    vae = AutoencoderTiny(latent_channels=channels, scaling_factor=1.0)
    vae.load_state_dict({name: value.to(dtype) for name, value in _tiny_names(state).items()}, assign=True)
    return vae.eval()


def _tiny_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers has no module for the decoder's clamp, so its numbers are one lower there."""
    renamed = {}
    for key, value in state.items():
        if key.startswith(_TINY_VAE):
            side, number, rest = key.removeprefix(_TINY_VAE).split(".", 2)
            renamed[f"{side}.layers.{int(number) - (side == 'decoder')}.{rest}"] = value
    return renamed
