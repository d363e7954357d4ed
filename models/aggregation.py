"""c_i = G(features of n references): how several reference pictures become one image condition.

The training-free aggregations. Each takes features [n, T, C] with a weight per reference and gives features
[m, T, C] with a weight per remaining row, so the same function serves before and after the image projection,
and a trained aggregation is one more callable of this signature.

A weight w means "as if this reference were given w times": in the average it counts w times; concatenated, its
tokens' logits get + log w; the maximum of a set does not change when an element is repeated, so there a weight
only decides whether the reference takes part (0 leaves it out, everywhere).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import PersonalizeError

Aggregation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def concatenate(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """All references side by side: attention chooses among n T tokens."""
    return features, weights


def average(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i w_i f_i / sum_i w_i, summed in float64 so that the order of the references does not show."""
    mean = torch.einsum("n,ntc->tc", weights.double(), features.double()) / weights.double().sum()
    return mean.to(features.dtype)[None], weights.new_ones(1)


def maximum(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """max_i f_i, element by element."""
    return features.amax(dim=0, keepdim=True), weights.new_ones(1)


AGGREGATIONS: dict[str, Aggregation] = {"concatenate": concatenate, "average": average, "max": maximum}


def select_references(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the references of weight 0 and check the rest.

    Args:
        features: [n, T, C].
        weights: [n], 0 or more.

    Raises:
        PersonalizeError: no references, a negative or non-finite weight, or all weights 0.
    """
    if features.shape[0] == 0:
        raise PersonalizeError("There are no references: give at least one picture.")
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        shown = ", ".join(f"{w:g}" for w in weights.tolist())
        raise PersonalizeError(f"Reference weights must be 0 or more, but they are {shown}.")
    keep = weights > 0
    if not bool(keep.any()):
        raise PersonalizeError(f"All {len(weights)} reference weights are 0: give at least one a weight above 0.")
    return features[keep], weights[keep]


def log_weights(weights: Tensor, tokens: int) -> Tensor | None:
    """Attention bias of m concatenated rows of `tokens` tokens: log w, [m * tokens]; None where all w are equal."""
    if bool((weights == weights[0]).all()):
        return None
    return weights.log().repeat_interleave(tokens)
