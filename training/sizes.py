"""Custom Diffusion's augmentation: a concept is shown smaller and larger, in words too (Kumari et al. 2023, appendix B)."""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .dataset import Example, Framing

SMALL, LARGE = ("a far away ", "a very small "), ("a zoomed in ", "a close up ")
SHRUNK, ENLARGED, TOO_LARGE = 2 / 3, (1.2, 1.4), 0.6
"""Share of pictures that are shrunk, to a third at least, of which those above TOO_LARGE stay as they are; the others are
enlarged."""


def sized(examples: Sequence[Example], variants: int, seed: int) -> list[Example]:
    """Each picture so many times, each at a size and place of its own.

    A picture below 0.6 of its frame lies on an empty canvas, where nothing but the picture counts, and its caption says "a
    far away" or "a very small"; one above the frame is cut to it, "a zoomed in" or "a close up".

    Args:
        examples: of subjects; those of a class come as they are.
        variants: 0 leaves all as they are.
        seed: of the sizes.
    """
    if variants == 0:
        return list(examples)
    found = []
    for i, example in enumerate(examples):
        for k in range(1 if example.is_prior else variants):
            rng = np.random.default_rng([seed, 3, i, k])
            side = rng.uniform(1 / 3, 1) if rng.random() < SHRUNK else rng.uniform(*ENLARGED)
            if example.is_prior or TOO_LARGE <= side <= 1:
                found.append(example)
                continue
            framing = Framing(*(round(float(x), 4) for x in (side, rng.random(), rng.random())))
            words = str(rng.choice(SMALL if side < 1 else LARGE))
            texts = tuple(words + re.sub(r"^(a|an|the)\s+", "", text, flags=re.IGNORECASE) for text in example.captions)
            found.append(replace(example, framing=framing, captions=texts))
    return found
