"""Reading photographs as people have them, and framing them for an image encoder."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import PersonalizeError

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"))
UNREADABLE = frozenset((".heic", ".heif", ".jxl", ".cr2", ".nef", ".arw", ".dng"))
"""Pictures too, but not for Pillow: they are named rather than silently left out."""
MASK_ENDING = "-masklabel"
"""`photo-masklabel.png` beside `photo.jpg` is its mask (white is the subject)."""
SMALLEST_SIDE = 16
"""Pixels; below this there is nothing to recognise."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FRAMINGS = ("crop", "pad")


@dataclass(frozen=True)
class Picture:
    """A photograph, and optionally where its subject is."""

    pixels: Tensor
    """[H, W, 3], RGB, 0..1."""
    mask: Tensor | None
    """[H, W], 0..1, 1 is the subject."""
    name: str


def list_pictures(folder: Path) -> list[Path]:
    """The picture files of a folder in alphabetical order, without hidden files and masks.

    Raises:
        PersonalizeError: the folder does not exist or has no pictures.
    """
    if not folder.is_dir():
        raise PersonalizeError(f"{folder} is no folder." if folder.exists() else f"The folder {folder} does not exist.")
    paths = picture_paths(folder)
    if not paths:
        inside = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and picture_paths(path)]
        if inside:
            raise PersonalizeError(
                f"The folder {folder} has no pictures itself, but folders with pictures ({', '.join(inside[:3])}): name "
                "one of these."
            )
        raise PersonalizeError(f"The folder {folder} has no pictures ({', '.join(sorted(SUFFIXES))}).")
    return paths


def picture_paths(folder: Path) -> list[Path]:
    """The same of a folder that exists; it may have none."""
    paths = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES | UNREADABLE
        and not path.name.startswith(".")
        and not path.stem.endswith(MASK_ENDING)
    ]
    return sorted(paths, key=lambda path: path.name.casefold())


def read_picture(path: Path) -> Picture:
    """Read a photograph upright (EXIF orientation) as RGB; its mask is its alpha channel or its mask file.

    Grey, palette, CMYK and 16-bit files are converted; of an animation the first picture is taken.

    Raises:
        PersonalizeError: the file cannot be read; the message names it.
    """
    pixels = _read(path)
    mask = pixels[..., 3] if pixels.shape[-1] == 4 else None
    companion = path.with_name(f"{path.stem}{MASK_ENDING}.png")
    if companion.is_file():
        mask = _read(companion)[..., :3].mean(dim=-1)
    return replace(make_picture(pixels[..., :3], mask, f"{path.name} in {path.parent}"), name=path.name)


def _read(path: Path) -> Tensor:
    """[H, W, 3] or, with an alpha channel, [H, W, 4]; 0..1."""
    where = f"{path.name} in {path.parent} cannot be read as a picture"
    if path.suffix.lower() in UNREADABLE:
        raise PersonalizeError(f"{where}: save it as JPEG or PNG ({path.suffix} needs other software).")
    try:
        with Image.open(path) as file:
            image = _eight_bit(ImageOps.exif_transpose(file))
            has_alpha = "A" in image.getbands() or "transparency" in image.info
            array = np.asarray(image.convert("RGBA" if has_alpha else "RGB"), dtype=np.float32) / 255
    except UnidentifiedImageError:
        raise PersonalizeError(f"{where} (it is damaged or of an unknown type).") from None
    except (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise PersonalizeError(f"{where} ({reason}).") from None
    return torch.from_numpy(array)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Deep grey pictures as 8 bit; deep colour Pillow converts itself."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image, dtype=np.float32)
    # A 16-bit file says so; 32-bit and float files hold 0..1, 0..255 or 0..65535, which only their values tell.
    full = 65535.0 if image.mode.startswith("I;16") else next((n for n in (1.0, 255.0) if values.max() <= n), 65535.0)
    return Image.fromarray((values / full * 255).round().clip(0, 255).astype(np.uint8))


def make_picture(pixels: Tensor, mask: Tensor | None, name: str) -> Picture:
    """Check a picture and its mask and bring them together.

    Args:
        pixels: [H, W, 3], grey [H, W, 1], or [H, W, 4] whose fourth channel is used as mask where none is given.
        mask: [h, w] of the same aspect; it is resized; one that is zero or one everywhere is no mask.
        name: for messages.

    Raises:
        PersonalizeError: too small, not finite, or a mask of another aspect.
    """
    height, width = pixels.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise PersonalizeError(f"{name} is {width}x{height} pixels: at least {SMALLEST_SIDE} on each side are needed.")
    if not bool(torch.isfinite(pixels).all()):
        raise PersonalizeError(f"{name} has values that are not numbers (NaN or infinite): check the node before.")
    if pixels.shape[-1] == 1:
        pixels = pixels.expand(-1, -1, 3)
    if pixels.shape[-1] == 4 and mask is None:
        mask = pixels[..., 3]
    pixels = pixels[..., :3].float().clamp(0, 1)
    if mask is not None and bool((mask == mask.flatten()[0]).all()) and float(mask.flatten()[0]) in (0.0, 1.0):
        mask = None
    if mask is not None:
        mask = _fit_mask(mask.float().clamp(0, 1), height, width, name)
    return Picture(pixels, mask, name)


def _fit_mask(mask: Tensor, height: int, width: int, name: str) -> Tensor:
    if not bool(torch.isfinite(mask).all()):
        raise PersonalizeError(f"The mask of {name} has values that are not numbers (NaN or infinite).")
    if not same_aspect(mask.shape[0], mask.shape[1], height, width):
        raise PersonalizeError(
            f"The mask of {name} is {mask.shape[1]}x{mask.shape[0]} but the picture is {width}x{height}: a mask must "
            "have its picture's aspect."
        )
    resized = F.interpolate(mask[None, None], (height, width), mode="bilinear", antialias=True)
    return resized[0, 0].clamp(0, 1)


def same_aspect(height: int, width: int, other_height: int, other_width: int) -> bool:
    """Whether two sizes are scaled versions of each other, give or take rounding to a pixel of the smaller one."""
    slack = 1 + max(other_height / height, other_width / width, 1.0)
    return abs(other_width * height / width - other_height) <= slack or (
        abs(other_height * width / height - other_width) <= slack
    )


def frame_picture(
    picture: Picture, framing: str, size: int, fill: tuple[float, ...] | list[float] = CLIP_MEAN
) -> Tensor:
    """What the image encoder sees: a square of `size` pixels, [size, size, 3].

    Args:
        picture: with a mask, everything but the subject is painted in `fill` and the subject is centred and fills
            the square.
        framing: "crop", the largest centred square; "pad", the whole picture with borders of `fill`.
        size: pixels.
        fill: RGB; the encoder's mean colour becomes zero when it normalises.
    """
    colour = torch.tensor(fill, dtype=torch.float32)
    pixels, margin = picture.pixels, 0.0
    if picture.mask is not None:
        pixels, margin = _isolate(pixels, picture.mask, colour), 0.05
    elif framing == "crop":
        return _centre_crop(pixels, size)
    height, width = pixels.shape[:2]
    side = max(height, width) + 2 * round(margin * max(height, width))
    canvas = colour.expand(side, side, 3).clone()
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    return _resize(canvas, size, size)


def crop_square(picture: Picture, side: float, across: float, down: float) -> Picture:
    """A square of a picture; of one with a mask, of the subject alone, on the image encoder's mean colour.

    Args:
        picture: whole.
        side: of the square, above 0 to 1, as a share of the picture's shorter one.
        across, down: where it is: 0 at the left and at the top, 1 at the right and at the bottom.
    """
    pixels = picture.pixels
    if picture.mask is not None:
        pixels = _isolate(pixels, picture.mask, torch.tensor(CLIP_MEAN))
    height, width = pixels.shape[:2]
    size = max(1, round(side * min(height, width)))
    top, left = round(down * (height - size)), round(across * (width - size))
    return Picture(pixels[top : top + size, left : left + size], None, picture.name)


def cover_picture(pixels: Tensor, height: int, width: int) -> Tensor:
    """[H, W, C] resized until it covers `height` x `width`, and the middle of it cut out."""
    scale = max(height / pixels.shape[0], width / pixels.shape[1])
    resized = _resize(pixels, max(height, round(pixels.shape[0] * scale)), max(width, round(pixels.shape[1] * scale)))
    top, left = (resized.shape[0] - height) // 2, (resized.shape[1] - width) // 2
    return resized[top : top + height, left : left + width]


def box_of(inside: Tensor) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in pixels, the last two exclusive, of what is true in [H, W].

    Raises:
        ValueError: nothing is.
    """
    rows, columns = inside.any(dim=1).nonzero().flatten().tolist(), inside.any(dim=0).nonzero().flatten().tolist()
    if not rows:
        raise ValueError("an empty mask has no box")
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def subject_region(pixels: Tensor, mask: Tensor | None) -> Tensor:
    """Where the subject of a picture is, [H, W] bool: where its mask is above one half, or without one everywhere.

    Args:
        pixels: [H, W, 3].
        mask: [H, W], 0..1.
    """
    return torch.ones(pixels.shape[:2], dtype=torch.bool) if mask is None else mask > 0.5


def cut_out(pixels: Tensor, inside: Tensor) -> Tensor:
    """What is inside, alone in the middle of a square as large as its box's longer side.

    Args:
        pixels: [H, W, 3], RGB, 0..1.
        inside: [H, W], bool, not empty.

    Returns:
        [S, S, 4]: the fourth channel is 1 inside; outside, all are 0.
    """
    left, top, right, bottom = box_of(inside)
    alpha = inside[top:bottom, left:right, None].to(pixels)
    height, width, side = bottom - top, right - left, max(bottom - top, right - left)
    above, before = round((side - height) / 2), round((side - width) / 2)
    square = pixels.new_zeros(side, side, 4)
    square[above : above + height, before : before + width] = torch.cat(
        [pixels[top:bottom, left:right] * alpha, alpha], -1
    )
    return square


def on_ground(square: Tensor, size: int, ground: Tensor | None = None) -> Tensor:
    """What was cut out as an image encoder sees it: [S, S, 4] -> [size, size, 3], in steps of 1/255 as ComfyUI has them.

    Args:
        square: as of `cut_out`: colours are multiplied by the fourth channel.
        size: pixels.
        ground: what it stands on, [size, size, 3]; white by default.
    """
    planes = rearrange(square, "h w c -> 1 c h w")
    resized = rearrange(F.interpolate(planes, (size, size), mode="bicubic", antialias=True), "1 c h w -> h w c")
    colours, alpha = resized[..., :3], resized[..., 3:]
    whole = colours + (1 - alpha) * (1 if ground is None else ground)
    return (whole.clamp(0, 1) * 255).round() / 255


def _isolate(pixels: Tensor, mask: Tensor, colour: Tensor) -> Tensor:
    """The subject's bounding box, on a plain background."""
    pixels = pixels * mask[..., None] + colour * (1 - mask[..., None])
    left, top, right, bottom = box_of(mask > 0.5 * mask.max())
    return pixels[top:bottom, left:right]


def _centre_crop(pixels: Tensor, size: int) -> Tensor:
    """Shorter side to `size`, then the centre: the preprocessing of CLIP."""
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    resized = _resize(pixels, round(scale * height), round(scale * width))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    if pixels.shape[:2] == (height, width):
        return pixels
    batch = rearrange(pixels, "h w c -> 1 c h w")
    resized = F.interpolate(batch, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return rearrange(resized, "1 c h w -> h w c")
