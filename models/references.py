"""References: the image encoder's features of n pictures of one subject, with a weight each, and their file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .errors import PersonalizeError, plural
from .weight_files import read_safetensors, write_safetensors
from .words import parse_numbers

VIT_H, VIT_BIGG = "CLIP-ViT-H-14-laion2B-s32B-b79K", "CLIP-ViT-bigG-14-laion2B-39B-b160k"
"""The image encoders of nearly all adapters, and of the others, as they are published."""
ENCODER_ADVICE = f"use {VIT_H} (most adapters) or {VIT_BIGG}"
"""For who has none that is known, within a sentence."""
ENCODER_NAMES = {
    "pooled": {
        96: "the pocket model's (pocket_portraits_vision)",
        768: "CLIP ViT-L/14 (clip-vit-large-patch14)",
        1024: f"CLIP ViT-H ({VIT_H})",
        1280: f"CLIP ViT-bigG ({VIT_BIGG})",
    },
    "patches": {
        128: "the pocket model's (pocket_portraits_vision)",
        1024: "CLIP ViT-L/14 (clip-vit-large-patch14)",
        1280: f"CLIP ViT-H ({VIT_H})",
        1664: f"CLIP ViT-bigG ({VIT_BIGG})",
    },
}
"""Image encoders by the width of their pooled embedding and of their patch tokens."""

_TENSORS = ("pooled", "patches", "zero_patches", "weights")


@dataclass(frozen=True)
class References:
    """Encoded reference pictures."""

    pooled: Tensor
    """[n, D], the projected image embeddings."""
    patches: Tensor
    """[n, T, H], the penultimate layer's hidden states (class token and patches)."""
    zero_patches: Tensor
    """[T, H], the penultimate hidden states of an all-zero input: "no picture" for Plus adapters."""
    weights: Tensor
    """[n], 1 is ordinary, 2 counts twice, 0 leaves the reference out."""
    names: tuple[str, ...]
    """n names, for messages and labels."""

    def __len__(self) -> int:
        return self.pooled.shape[0]

    @property
    def encoder(self) -> str:
        """The image encoder, by the widths of its features."""
        known = ENCODER_NAMES["patches"].get(self.patches.shape[-1])
        if known and known == ENCODER_NAMES["pooled"].get(self.pooled.shape[-1]):
            return known
        return f"an encoder of widths {self.pooled.shape[-1]} (pooled) and {self.patches.shape[-1]} (patches)"

    def with_weights(self, weights: Sequence[float]) -> "References":
        return replace(self, weights=torch.tensor(weights, dtype=torch.float32))

    def save(self, path: Path) -> None:
        """Write a .safetensors file, atomically."""
        metadata = {"personalize.format": "1", "personalize.method": "references", "names": "\n".join(self.names)}
        write_safetensors(path, {name: getattr(self, name) for name in _TENSORS}, metadata)

    @classmethod
    def load(cls, path: Path) -> "References":
        """Raises PersonalizeError where the file is damaged or holds no references."""
        tensors, metadata = read_safetensors(path)
        if metadata.get("personalize.method") != "references" or any(name not in tensors for name in _TENSORS):
            raise PersonalizeError(f"{path.name} in {path.parent} holds no references: make one with Save References.")
        return cls(**{name: tensors[name] for name in _TENSORS}, names=tuple(metadata.get("names", "").split("\n")))


def parse_weights(text: str, names: Sequence[str]) -> list[float]:
    """Weights of the named references from text: nothing (all 1), one number for all, or one for each.

    Raises:
        PersonalizeError: not numbers, negative, or neither none, one nor as many as there are references.
    """
    weights = parse_numbers(text, "1, 1, 0.5")
    if any(not 0 <= weight < float("inf") for weight in weights):
        raise PersonalizeError(f'The weights "{text.strip()}" must be finite and 0 or more.')
    if len(weights) in (0, 1):
        return (weights or [1.0]) * len(names)
    if len(weights) != len(names):
        raise PersonalizeError(
            f"There are {len(weights)} weights for {plural(len(names), 'reference')} ({', '.join(names)}): give one "
            f"for each."
        )
    return weights
