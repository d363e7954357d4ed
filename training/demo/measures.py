"""What the demo's pictures are worth, by the judge of the pocket model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..features import JudgeEye
from ..pocket.measure import VALUES, read
from ..shared import likeness, likeness_among, read_picture
from .methods import PROMPTS


@dataclass(frozen=True)
class Score:
    """Of one row."""

    likeness: float
    """Mean cosine of the judge's identity features to those of the photographs."""
    following: float
    """Share of poses, expressions and backgrounds that are read as the prompts say."""


def score(rows: Sequence[Sequence[Sequence[Image.Image]]], references: Sequence[Path]) -> tuple[list[Score], float]:
    """Of each row, whose pictures come by prompt; and the likeness of the photographs to each other."""
    eye = JudgeEye()

    @torch.no_grad()
    def who(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        return eye.pictures(pictures)["who"]

    own = who([read_picture(path).pixels for path in references])
    whose, scores = torch.zeros(len(own), dtype=torch.int64), []
    for row in rows:
        pictures = np.stack([np.asarray(one.convert("RGB")) for some in row for one in some])
        drawn = who([torch.from_numpy(picture) / 255 for picture in pictures])
        wishes = [wished for wished, some in zip(PROMPTS, row, strict=True) for _ in some]
        (seen,) = read(eye.judge, pictures)
        right = [
            VALUES[name][seen[name][i]] == value for i, wished in enumerate(wishes) for name, value in wished.items()
        ]
        alike = likeness(drawn, own, whose.new_zeros(len(drawn)), whose)
        scores.append(Score(float(alike.mean()), float(np.mean(right))))
    return scores, float(likeness_among(own, whose).nan_to_num(0).mean())  # a single photograph has no other
