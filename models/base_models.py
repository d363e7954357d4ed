"""Base models: which family a network is of, and a fingerprint that tells one model from another.

A personalisation file says for which base it was made (`personalize.base_family`, `personalize.base_fingerprint`), so
that whoever loads it onto another is told.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

FAMILIES = {(320, 768): "sd15", (320, 1024): "sd2", (320, 2048): "sdxl", (96, 64): "pocket"}
"""By the UNet's first width and the width of the text features."""
TITLES = {"sd15": "SD1.5", "sd2": "SD2.x", "sdxl": "SDXL", "pocket": "the pocket model"}
TEXT_WIDTHS = {"sd15": (768,), "sd2": (1024,), "sdxl": (768, 1280), "pocket": (64,)}
"""Of the vectors of each text encoder's words."""
FINGERPRINTED = ("time_embed.0.bias", "time_embed.2.bias", "middle_block.0.in_layers.2.bias", "out.2.bias")
"""Small tensors of the UNet, by their single-file names, that no two trainings leave equal and no LoRA changes."""


def title_of(family: str) -> str:
    """What people call it; one of another size by its widths."""
    return TITLES.get(family, f"a base model of widths {family}")


def family_of_widths(width: int, context: int) -> str:
    """ "sd15", "sd2", "sdxl", "pocket", or for one of another size "WIDTHxCONTEXT"."""
    return FAMILIES.get((width, context), f"{width}x{context}")


def fingerprint(unet: Mapping[str, Tensor]) -> str:
    """Twelve hexadecimal digits from a UNet's tensors by single-file names, without "model.diffusion_model.".

    The same for a model in half and in full precision: the values are compared in half precision.
    """
    digest = hashlib.sha256()
    for name in FINGERPRINTED:
        digest.update(unet[name].detach().to("cpu", torch.float16).numpy().tobytes())
    return digest.hexdigest()[:12]
