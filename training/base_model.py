"""A base model from one .safetensors file, offline: SD1.5, SDXL and the pocket model by the same code.

The family is told from the file's shapes, never from its name. Configurations and the tokenizer come with the pack
(`configs/`); a file with a TAESD-shaped VAE gets diffusers' AutoencoderTiny.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from .clip_tokenizer import clip_tokenizer
from .shared import VISION_CONFIG, PersonalizeError, read_safetensors

CONFIGS = Path(__file__).parent / "configs"
FAMILIES = {(320, 768): "sd15", (320, 2048): "sdxl", (96, 64): "pocket"}
"""By the UNet's first width and the width of the text features."""

_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
_CROSS = ".attn2.to_k.weight"
_TINY_VAE = "first_stage_model.taesd_"


def family_of(state: Mapping[str, Tensor], name: str) -> str:
    """ "sd15", "sdxl" or "pocket".

    Raises:
        PersonalizeError: not a single-file checkpoint of one of these; the message names the file.
    """
    if _CONV_IN not in state:
        raise PersonalizeError(f"{name} is not a checkpoint: it has no {_CONV_IN}.")
    width = state[_CONV_IN].shape[0]
    context = next((value.shape[1] for key, value in state.items() if key.endswith(_CROSS)), 0)
    if (width, context) not in FAMILIES:
        raise PersonalizeError(
            f"{name} is of a family that is not supported (UNet width {width}, text features of width {context}): "
            "SD1.5 and SDXL checkpoints, and the pocket model, are."
        )
    return FAMILIES[width, context]


def load_pipeline(
    path: Path, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The checkpoint as a diffusers pipeline on the CPU, without a safety checker; never touches the network.

    Raises:
        PersonalizeError: the file is missing, damaged, or of another family.
    """
    state, _ = read_safetensors(path)
    family = family_of(state, path.name)
    tokenizer = clip_tokenizer()
    parts: dict = {"tokenizer": tokenizer}
    if family == "sdxl":
        parts["tokenizer_2"] = tokenizer
    if any(key.startswith(_TINY_VAE) for key in state):
        parts["vae"] = tiny_vae(state, dtype)
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipeline = kind.from_single_file(
        str(path), config=str(CONFIGS / family), torch_dtype=dtype, local_files_only=True, **parts
    )
    v_prediction = "v_pred" in state
    if v_prediction != (pipeline.scheduler.config.prediction_type == "v_prediction"):
        kind_of = "v_prediction" if v_prediction else "epsilon"
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type=kind_of)
    return pipeline


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


def load_image_encoder(path: Path) -> CLIPVisionModelWithProjection:
    """A CLIP vision encoder whose file brings its configuration.

    Raises:
        PersonalizeError: the file is missing, damaged, or has no configuration.
    """
    state, metadata = read_safetensors(path)
    if VISION_CONFIG not in metadata:
        raise PersonalizeError(f"{path.name} has no {VISION_CONFIG} in its metadata: its architecture is not known.")
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**json.loads(metadata[VISION_CONFIG])))
    encoder.load_state_dict({name: value.float() for name, value in state.items()})
    return encoder.eval()
