"""Composable Diffusion (Liu et al. 2022, arXiv:2206.01714, eq. 11): several prompts joined by AND and NOT.

    eps = eps_u + sum_i w_i (eps_i - eps_u)

w_i is the guidance scale of concept i: a negative one is NOT. What holds of eps holds of the denoised picture, which is
eps scaled and shifted. (An average of conditionings is something else: it gives each of N concepts an Nth of the guidance,
and cannot subtract.)
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .errors import PersonalizeError, plural
from .words import parse_numbers

_BETWEEN = re.compile(r"\bAND\b|(?<!\\)\|")
_NOT = re.compile(r"\s*NOT\b\s*")
_WEIGHT = re.compile(r"(?<!\d)\s*(?<!\\):\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?i:nan|inf|infinity))\s*$")


@dataclass(frozen=True)
class Concept:
    """One prompt of several."""

    text: str
    weight: float
    """On the guidance scale; negative is NOT."""


def compose(negative: Tensor, concepts: Sequence[Tensor], scales: Sequence[float | Tensor]) -> Tensor:
    """eps_u + sum_i w_i (eps_i - eps_u), of noise or of denoised latents; all of one shape.

    Args:
        negative: of the negative prompt, or of none.
        concepts: of each concept.
        scales: w_i, guidance included; tensors where the pictures of a batch differ, [B, 1, 1, 1].
    """
    out = negative
    for concept, scale in zip(concepts, scales, strict=True):
        out = out + (concept - negative) * scale
    return out


def parse_concepts(text: str) -> list[Concept]:
    r"""The concepts of "a red cat AND a blue dog :0.8 AND NOT rain".

    Concepts are joined by AND, in capitals, or by |. One may begin with NOT, and end with a weight after a colon, which is 1
    without; a number right before the colon makes it a part of the text (16:9), and so does a backslash before : or |.

    Raises:
        PersonalizeError: there is no text, none between two ANDs or before a weight, or a weight that is none.
    """
    if not text.strip():
        raise PersonalizeError("The prompt is empty: write for example a red cat AND a blue dog.")
    return [_concept(part, number, text) for number, part in enumerate(_BETWEEN.split(text), 1)]


def parse_scales(text: str, count: int) -> list[float]:
    """Weights of so many concepts from text such as "1, 0.8, -1": nothing (all 1), or one for each.

    Raises:
        PersonalizeError: not finite numbers, or neither none nor as many as there are concepts.
    """
    weights = parse_numbers(text, "1, 0.8, -1")
    if not all(math.isfinite(weight) for weight in weights):
        raise PersonalizeError(f'The weights "{text.strip()}" are not finite: write for example "1, 0.8, -1".')
    if weights and len(weights) != count:
        are = "is" if len(weights) == 1 else "are"
        raise PersonalizeError(
            f"There {are} {plural(len(weights), 'weight')} for {plural(count, 'concept')}: give one for each."
        )
    return weights or [1.0] * count


def _concept(part: str, number: int, whole: str) -> Concept:
    words, sign, weight = part.strip(), 1.0, 1.0
    shown = whole.strip() if len(whole.strip()) <= 60 else f"{whole.strip()[:57]}..."
    if found := _WEIGHT.search(words):
        words, weight = words[: found.start()].rstrip(), float(found[1])
    if found := _NOT.match(words):
        words, sign = words[found.end() :], -1.0
    if not words.strip():
        raise PersonalizeError(f'Concept {number} of "{shown}" has no text: write words on both sides of AND and |.')
    if words.endswith(":") and not words.endswith("\\:"):
        raise PersonalizeError(
            f'Concept {number} of "{shown}" ends with a colon: write a weight after it, or no colon.'
        )
    if sign < 0 and weight < 0:
        raise PersonalizeError(f'Concept {number} of "{shown}" has NOT and a negative weight: write one of them.')
    if not math.isfinite(weight):
        raise PersonalizeError(f'Concept {number} of "{shown}" has the weight {weight:g}: it must be finite.')
    return Concept(words.replace("\\|", "|").replace("\\:", ":").strip(), sign * weight)
