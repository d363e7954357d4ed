"""Pictures of two concepts side by side, so that both are learned in one picture, too (Cut-Mix; Han et al. 2023, SVDiff)."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .dataset import Example, Sizes

OPENING = re.compile(
    r"^([\w-]+ ){0,3}(photo|photograph|picture|image|painting|drawing|rendering|rendition|depiction) of ", re.IGNORECASE
)
NARROW = 0.75
"""Of each picture's width, what is seen of it beside another."""


def side_by_side(concepts: Sequence[Sequence[Example]], count: int, sizes: Sizes, seed: int) -> list[Example]:
    """Each picture so many times beside one of another concept, at random at its left or right.

    Of each picture the middle is seen, and the caption is that of the left picture, "and" that of the right one. Where the
    pictures meet, nothing counts.

    Args:
        concepts: each one's pictures, unframed.
        count: 0 for none.
        sizes: whose step sides are multiples of.
        seed: of what is beside what.
    """
    found = []
    for i, own in enumerate(concepts):
        others = [example for k, other in enumerate(concepts) if k != i for example in other]
        for k, example in enumerate(own if others else ()):
            for n in range(count):
                rng = np.random.default_rng([seed, 5, i, k, n])
                pair = [example, others[rng.integers(len(others))]]
                left, right = (pair[x] for x in rng.permutation(2))
                height = example.size[0]
                width = max(1, round(example.size[1] * NARROW / sizes.step)) * sizes.step
                texts = tuple(
                    f"{one}, and {_inner(other)}"
                    for one, other in zip(left.captions, itertools.cycle(right.captions), strict=False)
                )
                beside = replace(right, size=(height, width))
                found.append(replace(left, size=(height, 2 * width), captions=texts, beside=beside))
    return found


def _inner(caption: str) -> str:
    """Without "a photo of" and the like, which the caption that comes before says."""
    return OPENING.sub("", caption)
