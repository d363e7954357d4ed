"""Whole SD1.5 and SDXL models of random weights in their real sizes, as one file or as a diffusers folder."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from pack.training.base_model import CONFIGS, BaseModel
from pack.training.clip_tokenizer import clip_tokenizer
from pack.training.export import whole_checkpoint
from pack.training.shared import write_safetensors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


def assemble(family: str, unet, vae, text_encoder, text_encoder_2=None):
    """The family's pipeline of these networks, with its schedule and tokenizers."""
    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "tokenizer": clip_tokenizer()}
    folder = CONFIGS / family / "scheduler"
    if family == "sdxl":
        parts |= {"text_encoder_2": text_encoder_2, "tokenizer_2": clip_tokenizer("!")}
        return StableDiffusionXLPipeline(**parts, scheduler=EulerDiscreteScheduler.from_pretrained(folder))
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **none, scheduler=DDIMScheduler.from_pretrained(folder))


def random_pipeline(family: str, dtype: torch.dtype = torch.float32):
    """A pipeline of the family's configuration ("sd15" or "sdxl") in the precision given."""
    folder = CONFIGS / family
    torch.manual_seed(0)
    networks = [
        UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")).to(dtype),
        AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")).to(dtype),
        CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")).to(dtype),
    ]
    if family == "sdxl":
        config = CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
        networks.append(CLIPTextModelWithProjection(config).to(dtype))
    return assemble(family, *networks)


def write_single_file(pipeline, family: str, path: Path) -> Path:
    """As such models are published: one .safetensors."""
    tensors = whole_checkpoint(BaseModel(pipeline, path.name, family, None))
    write_safetensors(path, {name: value.detach() for name, value in tensors.items()}, {})
    return path
