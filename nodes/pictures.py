"""Pictures as several nodes take them: on growing inputs, or in a folder; and drawn ones as the host has them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..models.errors import PersonalizeError, plural
from ..models.pictures import Picture, make_picture

MOST = 50


def growing_pictures(name: str, prefix: str, tooltip: str) -> Any:
    """An input that grows: {prefix}0, {prefix}1 and so on, each a picture or a batch."""
    picture = io.Image.Input(prefix, tooltip="A picture or a batch, of any size.")
    return io.Autogrow.Input(
        name,
        template=io.Autogrow.TemplatePrefix(picture, prefix=prefix, min=0, max=MOST),
        tooltip=f"{tooltip}; a new input appears as you connect one.",
    )


def folder_of_pictures(tooltip: str) -> Any:
    """A folder's name, for `nodes.folders.find_pictures`."""
    return io.String.Input(
        "folder",
        default="",
        placeholder="a folder of pictures",
        tooltip=f"A folder of pictures inside ComfyUI's input folder, or its full path, {tooltip}.",
    )


def number_of(slot: str) -> int:
    """Of image12 the 12."""
    return int("".join(character for character in slot if character.isdigit()))


def connected(images: dict[str, Tensor | None], masks: dict[str, Tensor | None] | None = None) -> Iterator[Picture]:
    """The pictures of a growing input in their order, each batch taken apart; mask3 is for image3.

    Raises:
        PersonalizeError: what is connected is no picture, or a mask has none.
    """
    masks = masks or {}
    unused = [slot for slot in masks if images.get(f"image{number_of(slot)}") is None and masks[slot] is not None]
    if unused:
        raise PersonalizeError(f"{unused[0]} has no picture: connect image{number_of(unused[0])}, or remove the mask.")
    for slot, batch in sorted(images.items(), key=lambda item: number_of(item[0])):
        if batch is None:
            continue
        check_batch(batch, slot)
        mask = masks.get(f"mask{number_of(slot)}")
        mask = None if mask is None else mask.reshape(-1, *mask.shape[-2:])
        if mask is not None and mask.shape[0] not in (1, batch.shape[0]):
            raise PersonalizeError(
                f"mask{number_of(slot)} has {mask.shape[0]} masks but {slot} has "
                f"{plural(batch.shape[0], 'picture')}: give one mask "
                "for all, or one for each."
            )
        for index, pixels in enumerate(batch.cpu()):
            name = slot if batch.shape[0] == 1 else f"{slot}[{index}]"
            own = None if mask is None else mask[index % mask.shape[0]].cpu()
            yield make_picture(pixels, own, name)


def check_batch(batch: Tensor, slot: str) -> None:
    """Raises PersonalizeError where it is no batch of pictures."""
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4):
        raise PersonalizeError(
            f"{slot} has the shape {tuple(batch.shape)}, but pictures are [batch, height, width, 3]: check the node "
            "it comes from."
        )
    if not batch.numel():
        raise PersonalizeError(f"{slot} has no pictures: check the node it comes from.")
    if not bool(torch.isfinite(batch).all()):
        raise PersonalizeError(f"{slot} has values that are not numbers (NaN or infinite): check the node before.")


def as_image(pixels: Tensor) -> Image.Image:
    """[H, W, 1, 3 or 4] in 0..1 as Pillow's in RGB."""
    colours = pixels[..., :3].expand(-1, -1, 3)
    return Image.fromarray((colours.clamp(0, 1) * 255).round().byte().cpu().numpy())


def as_tensor(image: Image.Image) -> Tensor:
    """Pillow's as the host's batch of one, [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255)[None]
