"""What the training loop asks of a method, and what the methods share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .base_model import BaseModel
from .conditioning import Conditioning
from .options import IPAdapter, TextualInversion
from .settings import Settings
from .shared import About

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Method(Protocol):
    """A way to personalise a base model: what of it trains, and which files come out.

    Made with the base model's networks on their device. A method changes them in place: what trains requires a gradient and is
    in fp32.
    """

    name: str
    """One of models.metadata.FOLDERS."""

    groups: list[dict[str, Any]]
    """The optimiser's: `params`, `lr`, and `names` of the parameters."""
    trains_text: bool
    """Whether captions must be read anew in each step."""
    writes_all: bool
    """Whether `write` writes also the networks that do not train."""
    conditioning: Conditioning | None
    """What the network is told in each step beside the caption, if anything."""

    def spoken(self, text: str) -> str:
        """A caption as the tokenizer is to read it."""

    def write(self, folder: Path, name: str, about: About) -> list[Path]:
        """Write the result as `folder/name...`, read it back, check it."""


TEMPLATES = ("a photo of {trigger} {class}",)
CLASS_TEMPLATES = ("a photo of a {class}",)
WORD_TEMPLATES = {
    "object": (
        "a photo of {trigger}",
        "a rendering of {trigger}",
        "a cropped photo of {trigger}",
        "the photo of {trigger}",
        "a close-up photo of {trigger}",
        "a bright photo of {trigger}",
        "a dark photo of {trigger}",
        "a good photo of {trigger}",
        "a picture of {trigger}",
    ),
    "style": (
        "a painting in the style of {trigger}",
        "a rendering in the style of {trigger}",
        "a picture in the style of {trigger}",
        "a cropped painting in the style of {trigger}",
        "a close-up painting in the style of {trigger}",
        "a bright painting in the style of {trigger}",
        "a dark painting in the style of {trigger}",
    ),
}


def templates_of(settings: Settings) -> tuple[str, ...]:
    """Captions of pictures that bring none; one of them in each step."""
    if settings.data.instance_prompt is not None:
        return (settings.data.instance_prompt,)
    if isinstance(settings.method, TextualInversion):
        return WORD_TEMPLATES[settings.method.learnable_property]
    if isinstance(settings.method, IPAdapter):
        return CLASS_TEMPLATES
    return TEMPLATES


def group_of(modules: Sequence[tuple[str, nn.Module]], rate: float) -> dict[str, Any]:
    """An optimiser's group of everything in `modules` that requires a gradient."""
    named = [
        (f"{prefix}.{name}", parameter)
        for prefix, module in modules
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    return {"params": [p for _, p in named], "lr": rate, "names": [n for n, _ in named]}


def groups_of(base: BaseModel, text: Sequence[tuple[str, nn.Module]], settings: Settings) -> list[dict[str, Any]]:
    """The optimiser's groups of a UNet, and of the text encoders `text` if those train."""
    unet = group_of([("unet", base.pipeline.unet)], settings.rate)
    return [unet, group_of(text, settings.text_rate)] if text else [unet]


def text_modules(base: BaseModel) -> list[tuple[str, Any]]:
    """The text encoders, named."""
    return [("text_encoder" if i == 0 else f"text_encoder_{i + 1}", te) for i, te in enumerate(base.text_encoders)]


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of each of a network's tensors, by name."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
