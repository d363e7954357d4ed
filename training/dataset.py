"""A folder of pictures and captions as training examples, and their order.

Which examples a step sees is a function of the seed and the step's number alone, so that a run that was stopped goes on
as if it had not been, and two processes see together what one with twice the batch sees.
"""

import random
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
ORDERS = 4
"""Of a caption's parts."""


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
    beside: "Example | None" = None
    """At the right of this one, in the same frame; its size is its part of that."""


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


def orders_of(caption: str) -> list[str]:
    """A caption as it is, and with what is between its commas in other orders; the same at each call."""
    parts, rng = caption.split(", "), random.Random(caption)
    return [caption, *(", ".join(rng.sample(parts, len(parts))) for _ in range(ORDERS - 1))]


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
        if data.shuffle_captions:
            texts = tuple(order for text in texts for order in orders_of(text))
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
    if example.beside is not None:
        (height, width), beside = example.size, example.beside
        left = replace(example, size=(height, width - beside.size[1]), beside=None)
        (pixels, mask), (others, other) = load_pixels(left), load_pixels(beside)
        if mask is not None or other is not None:
            both = ((pixels, mask), (others, other))
            mask = torch.cat([torch.ones_like(x[:1]) if m is None else m for x, m in both], -1)
        return torch.cat([pixels, others], -1), mask
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
    """Which examples each batch holds, all of one size.

    The examples of a size come one after the other, in a new random order each time that all were shown, and batches are
    cut from that, so that one may hold the end of one such order and the beginning of the next. The sizes take turns so
    that every example is shown as often as any other: in as many batches as the subject has examples, each as often as
    a batch is large. In every epoch a size with n examples has n / batch batches, or where that is no whole number the
    next one below or above, at random: examples that fill whole batches are shown once in every epoch, others once on
    average. This is exact over a round, which has as many batches as there are examples; of the very first batches, over
    many seeds, some examples get more than others where sizes have fewer than fill a batch. With prior preservation a
    batch holds as many pictures of the class as of the subject.
    """

    def __init__(self, examples: Sequence[Example], batch: int, seed: int):
        """Args:
        examples: of the subject, and of the class.
        batch: pictures of the subject in a batch, over all processes.
        seed: of the shuffling.
        """
        self.batch, self.seed = batch, seed
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.priors: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, example in enumerate(examples):
            (self.priors if example.is_prior else groups)[example.size].append(i)
        self.groups = sorted(groups.items())
        self.ends = np.cumsum([len(group) for _, group in self.groups])
        self.count = int(self.ends[-1])
        """Examples of the subject, and batches in a round, which has as many epochs as a batch has places."""
        self.shuffled: dict[int, tuple[int, np.ndarray]] = {}

    def batches(self, epochs: int) -> int:
        """How many so many epochs have on average, rounded up."""
        return -(-epochs * self.count // self.batch)

    def __call__(self, number: int) -> list[int]:
        """The examples of batch `number`, counted from the first epoch's first: the subject's, then the class's."""
        round_, place = divmod(number, self.count)
        turns, before = self._turns(round_)
        which = int(turns[place])
        size, group = self.groups[which]
        start = (round_ * len(group) + int(before[place])) * self.batch
        shown = [divmod(i, len(group)) for i in range(start, start + self.batch)]
        return [group[self._shuffled(which, time)[i]] for time, i in shown] + self._prior(size, number)

    @lru_cache(maxsize=2)  # noqa: B019 - lives as long as the training
    def _turns(self, round_: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each batch of a round the number of its group, and how many batches of the round that had before.

        An epoch lays the groups on a line, n / batch long each, and counts the whole numbers on it after a shift. Over the
        round's epochs every shift comes once, so that each group gets n batches of the round's.
        """
        rng, turns = np.random.default_rng([self.seed, 0, round_]), []
        for shift in rng.permutation(self.batch):
            counts = np.diff((self.ends + shift) // self.batch, prepend=0)
            turns.append(rng.permutation(np.repeat(np.arange(len(counts)), counts)))
        whose = np.concatenate(turns)
        before = np.zeros_like(whose)
        for which in range(len(self.groups)):
            before[whose == which] = np.arange(len(self.groups[which][1]))
        return whose, before

    def _shuffled(self, which: int, time: int) -> np.ndarray:
        """The random order in which a group's examples are shown for the `time`-th time, of which the last is kept."""
        if self.shuffled.get(which, (-1,))[0] != time:
            rng = np.random.default_rng([self.seed, 4, which, time])
            self.shuffled[which] = time, rng.permutation(len(self.groups[which][1]))
        return self.shuffled[which][1]

    def _prior(self, size: tuple[int, int], number: int) -> list[int]:
        """As many of the class, of the same size."""
        group = self.priors.get(size, [])
        if not group:
            return []
        rng = np.random.default_rng([self.seed, 1, number])
        return [group[i] for i in rng.choice(len(group), size=self.batch, replace=len(group) < self.batch)]
