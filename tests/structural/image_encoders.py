"""CLIP image encoders of random weights in the published sizes, as folders and as files in models/clip_vision."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "projection_dim": 1024,
    "patch_size": 14,
    "image_size": 224,
    "hidden_act": "gelu",
}
"""CLIP-ViT-H-14-laion2B-s32B-b79K."""


def random_encoder() -> CLIPVisionModelWithProjection:
    """A ViT-H with random weights in half precision."""
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_H)).half()


def write_file(encoder: CLIPVisionModelWithProjection, path: Path) -> Path:
    """As it is published: the tensors alone, without a configuration."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in encoder.state_dict().items()}, path)
    return path
