"""The judge: reads every attribute of a subject and its scene from 64 x 64 pixels, and knows who is who.

A picture of two is read as two windows, its left and its right 64 columns.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .data import TRAIN, VALIDATION, Pictures
from .device import tensor_of
from .encoders import contrast, reading_loss
from .labels import SCENE_NAMES, SCENE_SIZES, SUBJECT_NAMES, SUBJECT_SIZES, cached_labels
from .loop import Run, autocast, train
from .vae import to_tensor

NAMES = (*SUBJECT_NAMES, *SCENE_NAMES)
SIZES = (*SUBJECT_SIZES, *SCENE_SIZES)
WIDTHS = (32, 64, 96, 128, 160)
IDENTITY = 64
IDENTITY_SCALE = 12.0
"""Of the cosines of likeness vectors, in the loss that taught them."""


class Block(nn.Module):
    """A residual block that halves the picture."""

    def __init__(self, wide: int, out: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(wide, out, 3, 2, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.skip = nn.Conv2d(wide, out, 1, 2)
        self.norm, self.out_norm = nn.GroupNorm(8, out), nn.GroupNorm(8, out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(torch.relu(self.norm(self.first(x))))
        return torch.relu(self.out_norm(h + self.skip(x)))


class Judge(nn.Module):
    """[n, 3, 64, 64] in -1..1 -> 160 features, logits of each attribute, and a likeness vector."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, 1, 1)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in itertools.pairwise(WIDTHS)))
        self.heads = nn.Linear(WIDTHS[-1], sum(SIZES))
        self.identity = nn.Linear(WIDTHS[-1], IDENTITY)

    def features(self, x: Tensor) -> Tensor:
        """[n, 160], for the Fréchet distance."""
        return self.blocks(torch.relu(self.stem(x))).mean((2, 3))

    def read(self, features: Tensor) -> tuple[Tensor, ...]:
        """Logits [n, values] of each of NAMES."""
        return self.heads(features).split(SIZES, dim=1)

    def likeness(self, features: Tensor) -> Tensor:
        """[n, 64] of length 1: the cosine of two pictures tells whether they show the same identity."""
        return normalize(self.identity(features), dim=1)

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        features = self.features(x)
        return self.read(features), self.likeness(features)


def windows(pictures: Tensor) -> Iterator[Tensor]:
    """The squares of a picture [n, 3, 64, 64 or 96] that show its subjects, from left to right."""
    yield pictures[..., :64]
    if pictures.shape[-1] > 64:
        yield pictures[..., -64:]


def _soften(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Some pictures a little blurred or noisy, as a decoder makes them."""
    amount = tensor_of(rng.uniform(0, 0.6, size=(len(x), 1, 1, 1)) * (rng.random((len(x), 1, 1, 1)) < 0.5))
    x = torch.lerp(x, nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False), amount.float())
    return x + torch.randn_like(x) * 0.05 * tensor_of(rng.random((len(x), 1, 1, 1))).float()


class Windows:
    """The pictures of a seed as windows with their labels [n, 26]."""

    def __init__(self, folder: Path, seed: int, count: int):
        self.pictures = Pictures(folder, seed, count)
        names = {"single": self.pictures.single_index, "pair": self.pictures.pair_index}
        self.labels = {}
        for name, index in names.items():
            subjects, scenes = cached_labels(folder, seed, index, f"{name}-{seed}-{count}")
            around = np.broadcast_to(scenes[:, None], (*subjects.shape[:2], scenes.shape[1]))
            self.labels[name] = tensor_of(np.concatenate([subjects, around], 2)).long()

    def single(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pictures [n, 3, 64, 64] and labels of some rows of the single pictures."""
        return to_tensor(self.pictures.single[rows]), self.labels["single"][rows, 0]

    def pair(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Left windows, then right windows of some rows of the pairs, [2 n, 3, 64, 64], and labels."""
        x = torch.cat(list(windows(to_tensor(self.pictures.pair[rows]))))
        return x, torch.cat([self.labels["pair"][rows, 0], self.labels["pair"][rows, 1]])


def train_judge(run: Run) -> Judge:
    """Train, or go on training; prints the accuracy on pictures never seen."""
    torch.manual_seed(0)
    judge, seen = Judge(), Windows(run.folder, TRAIN, run.pictures)
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def step(_number: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        a, b = seen.pictures.twins(run.batch // 3, rng)
        c = rng.choice(len(seen.pictures.pair), size=run.batch // 6, replace=False)
        parts = [seen.single(a), seen.single(b), seen.pair(c)]
        x, labels = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        x = _soften(x, rng).contiguous(memory_format=torch.channels_last)
        with autocast():
            features = judge.features(x)
        features = features.float()
        reading = reading_loss(judge.read(features), labels)
        who = judge.likeness(features[: 2 * len(a)])
        same = contrast(who[: len(a)], who[len(a) :], torch.tensor(IDENTITY_SCALE))
        return reading + 0.1 * same, {"reading": reading.item(), "same": same.item()}

    train(judge, step, run, "judge")
    for name, (right, of) in count_right(judge, Windows(run.folder, VALIDATION, min(4000, run.pictures))).items():
        print(f"judge, {name}: {right / of:.2%} of {of}")
    return judge


@torch.no_grad()
def count_right(judge: Judge, fresh: Windows) -> dict[str, tuple[int, int]]:
    """For each attribute, how many visible ones were read rightly, and of how many."""
    right, of = np.zeros(len(NAMES), int), np.zeros(len(NAMES), int)
    for get, size in ((fresh.single, len(fresh.pictures.single)), (fresh.pair, len(fresh.pictures.pair))):
        for start in range(0, size, 100):
            x, labels = get(np.arange(start, min(start + 100, size)))
            for i, logits in enumerate(judge(x)[0]):
                known = labels[:, i] >= 0
                right[i] += int((logits.argmax(1) == labels[:, i])[known].sum())
                of[i] += int(known.sum())
    return {name: (int(r), int(n)) for name, r, n in zip(NAMES, right, of, strict=True) if n}
