"""Base models: which family a network is of, and a fingerprint that tells one model from another.

A personalisation file says for which base it was made (`personalize.base_family`, `personalize.base_fingerprint`), so
that whoever loads it onto another is told.
"""

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
SAMPLED = 16
"""Values of each of them in a fingerprint."""
ROUNDING = (
    (torch.float8_e5m2, 3 * 2**-4, 2**-10),
    (torch.float8_e4m3fn, 2**-4, 2**-10),
    (torch.bfloat16, 2**-8, 2**-25),
)
"""Precisions, the coarsest first, and by how much one changes a value at most: a share of it, and a constant.

Half a step between neighbours. What is in e5m2 may have been in e4m3 before, what is in bf16 in fp16.
"""


def title_of(family: str) -> str:
    """What people call it; one of another size by its widths."""
    return TITLES.get(family, f"a base model of widths {family}")


def family_of_widths(width: int, context: int) -> str:
    """ "sd15", "sd2", "sdxl", "pocket", or for one of another size "WIDTHxCONTEXT"."""
    return FAMILIES.get((width, context), f"{width}x{context}")


def fingerprint(unet: Mapping[str, Tensor]) -> str:
    """Sixteen values of each of those tensors in bf16, as hexadecimal digits; `same_model` compares two.

    Args:
        unet: the tensors by single-file names, without "model.diffusion_model.", in any precision.
    """
    parts = []
    for name in FINGERPRINTED:
        values = unet[name].detach().flatten()
        parts.append(values[:: max(1, len(values) // SAMPLED)][:SAMPLED].to("cpu", torch.float32))
    return torch.cat(parts).bfloat16().view(torch.uint8).numpy().tobytes().hex()


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints can be of one model, read in whatever precisions.

    Fine-tunes of one base are told apart where any of the values moved by more than rounding moves it: 2^-8 of itself in
    fp32, fp16 and bf16, 2^-4 of itself and 0.001 where either model is in fp8 (e4m3). Not told apart are models that
    differ by less, and those that differ only in their text encoders or their VAE.
    """
    if len(one) != len(other):
        return False
    a, b = (torch.frombuffer(bytearray.fromhex(digits), dtype=torch.bfloat16).float() for digits in (one, other))
    return bool(((a - b).abs() <= 1.1 * (_rounding(a) + _rounding(b))).all())  # it may have been rounded more than once


def _rounding(values: Tensor) -> Tensor:
    """How far each may be from what it was before it was rounded."""
    for dtype, relative, least in ROUNDING:
        if torch.equal(values.to(dtype).float(), values):
            return values.abs() * relative + least
    raise ValueError("fingerprints are in bf16")
