"""A folder of pictures and captions as training examples, and their order.

Which examples a step sees is a function of the seed and the step's number alone, so that a run that was stopped goes on
as if it had not been, and two processes see together what one with twice the batch sees.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets
from PIL import Image, ImageOps
from torch import Tensor

from .options import Data
from .shared import MASK_ENDING, PersonalizeError, Picture, cover_picture, list_pictures, read_picture

CAPTION = ".txt"


@dataclass(frozen=True)
class Framing:
    """A picture smaller than its frame, on an empty canvas, or larger, cut to it."""

    side: float
    """Of the frame's sides, the picture's: 0.5 is half as high and half as wide."""
    across: float
    down: float
    """Where: from 0, at the left and top, to 1."""


@dataclass(frozen=True)
class Example:
    """One picture with its caption, as the training will see it."""

    path: Path
    captions: tuple[str, ...]
    """One of them in each step."""
    size: tuple[int, int]
    """Height and width in pixels."""
    is_prior: bool = False
    """A picture of the class, for prior preservation."""
    mirrored: bool = False
    framing: Framing | None = None


@dataclass(frozen=True)
class Sizes:
    """Which sizes pictures are brought to."""

    resolution: int
    """Of a square, in pixels."""
    step: int
    """Sides are multiples of this."""
    buckets: bool
    """Several aspects, or squares only."""

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """The size, height and width, for a picture of another."""
        if not self.buckets:
            return self.resolution, self.resolution
        options = generate_aspect_ratio_buckets(self.resolution, self.step)
        return options[find_nearest_bucket(height / max(height, width), width / max(height, width), options)]


def captions_of(path: Path, templates: Sequence[str], trigger: str, class_name: str) -> tuple[str, ...]:
    """The text of `NAME.txt` beside the picture, else the templates; `{trigger}` and `{class}` are put in.

    Raises:
        PersonalizeError: the caption is not UTF-8, or empty.
    """
    file = path.with_suffix(CAPTION)
    if file.is_file():
        try:
            text = " ".join(file.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError:
            raise PersonalizeError(f"The caption {file.name} in {file.parent} is not UTF-8: save it as that.") from None
        except OSError as error:
            raise PersonalizeError(f"The caption {file.name} in {file.parent} cannot be read ({error}).") from None
        if not text:
            raise PersonalizeError(f"The caption {file.name} in {file.parent} is empty: write one, or delete the file.")
        templates = (text,)
    return tuple(fill_in(template, trigger, class_name) for template in templates)


def fill_in(text: str, trigger: str, class_name: str) -> str:
    """`{trigger}` and `{class}` replaced; without a trigger, its place is closed."""
    if not trigger:
        text = text.replace("{trigger} ", "")
    return text.replace("{trigger}", trigger).replace("{class}", class_name)


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture, from its header and EXIF orientation.

    Raises:
        PersonalizeError: it cannot be read.
    """
    try:
        with Image.open(path) as file:
            width, height = ImageOps.exif_transpose(file).size if file.getexif().get(0x0112, 1) > 4 else file.size
    except Exception:  # whatever is wrong with it, reading it whole says so in one sentence
        height, width = read_picture(path).pixels.shape[:2]
    return height, width


def find_examples(folder: Path, data: Data, sizes: Sizes, templates: Sequence[str]) -> list[Example]:
    """Every picture of the subject's folder, repeats and mirror images included.

    Raises:
        PersonalizeError: there are none, or one cannot be read.
    """
    examples = []
    for path in list_pictures(folder):
        texts = captions_of(path, templates, data.trigger, data.class_name)
        size = sizes.nearest(*upright_size(path))
        for mirrored in (False, True) if data.random_flip else (False,):
            examples += [Example(path, texts, size, False, mirrored)] * data.repeats
    return examples


def find_priors(folder: Path, data: Data, sizes: Sequence[tuple[int, int]]) -> list[Example]:
    """Every picture of the class, in each of the sizes that the subject's pictures have.

    Raises:
        PersonalizeError: there are none, or a caption cannot be read.
    """
    return [
        Example(path, captions_of(path, (data.class_prompt,), data.trigger, data.class_name), size, True)
        for path in list_pictures(folder)
        for size in sorted(set(sizes))
    ]


def load_pixels(example: Example) -> tuple[Tensor, Tensor | None]:
    """What the VAE encodes, [3, H, W] in -1..1, and the mask [1, H, W] in 0..1, if any; before it is framed."""
    picture = visible_picture(example.path)
    planes = picture.pixels if picture.mask is None else torch.cat([picture.pixels, picture.mask[..., None]], -1)
    framed = cover_picture(planes, *example.size).permute(2, 0, 1)
    if example.mirrored:
        framed = framed.flip(-1)
    return framed[:3] * 2 - 1, framed[3:] if picture.mask is not None else None


def reframe(planes: Tensor, framing: Framing) -> tuple[Tensor, Tensor]:
    """Planes [C, H, W] in their frame, zero around, and where they are, [1, H, W] of 0 and 1."""
    height, width = planes.shape[1:]
    h, w = max(1, round(height * framing.side)), max(1, round(width * framing.side))
    sized = torch.nn.functional.interpolate(planes[None], (h, w), mode="bilinear", antialias=True)[0]
    top, left = round(abs(height - h) * framing.down), round(abs(width - w) * framing.across)
    if framing.side > 1:
        return sized[:, top : top + height, left : left + width], torch.ones(1, height, width)
    canvas, inside = torch.zeros_like(planes), torch.zeros(1, height, width)
    canvas[:, top : top + h, left : left + w] = sized
    inside[:, top : top + h, left : left + w] = 1
    return canvas, inside


def visible_picture(path: Path) -> Picture:
    """The picture; what an alpha channel makes invisible is white, whatever colours the file has there.

    Raises:
        PersonalizeError: it cannot be read.
    """
    picture = read_picture(path)
    if picture.mask is not None and not mask_file(path).is_file():
        alpha = picture.mask[..., None]
        picture = replace(picture, pixels=picture.pixels * alpha + (1 - alpha))
    return picture


def mask_file(path: Path) -> Path:
    """Where a picture's mask lies, if it has one beside it."""
    return path.with_name(f"{path.stem}{MASK_ENDING}.png")


class Order:
    """Which examples each batch holds.

    Every epoch shuffles the examples and cuts each group of equal size into batches; the last batch of a group is filled
    up from its beginning. With prior preservation a batch holds as many pictures of the class as of the subject.
    """

    def __init__(self, examples: Sequence[Example], batch: int, seed: int):
        """Args:
        examples: of the subject, and of the class.
        batch: pictures of the subject in a batch, over all processes.
        seed: of the shuffling.
        """
        self.batch, self.seed = batch, seed
        self.groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.priors: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, example in enumerate(examples):
            (self.priors if example.is_prior else self.groups)[example.size].append(i)
        self.length = sum(-(-len(group) // batch) for group in self.groups.values())
        """Batches in an epoch."""

    def __call__(self, number: int) -> list[int]:
        """The examples of batch `number`, counted from the first epoch's first: the subject's, then the class's."""
        epoch, position = divmod(number, self.length)
        size, own = self._epoch(epoch)[position]
        return own + self._prior(size, number)

    @lru_cache(maxsize=2)  # noqa: B019 - lives as long as the training
    def _epoch(self, epoch: int) -> list[tuple[tuple[int, int], list[int]]]:
        rng = np.random.default_rng([self.seed, 0, epoch])
        batches = []
        for size, group in sorted(self.groups.items()):
            order = [group[i] for i in rng.permutation(len(group))]
            for start in range(0, len(order), self.batch):
                chosen = order[start : start + self.batch]
                while len(chosen) < self.batch:
                    chosen += order[: self.batch - len(chosen)]
                batches.append((size, chosen))
        return [batches[i] for i in rng.permutation(len(batches))]

    def _prior(self, size: tuple[int, int], number: int) -> list[int]:
        """As many of the class, of the same size."""
        group = self.priors.get(size, [])
        if not group:
            return []
        rng = np.random.default_rng([self.seed, 1, number])
        return [group[i] for i in rng.choice(len(group), size=self.batch, replace=len(group) < self.batch)]
