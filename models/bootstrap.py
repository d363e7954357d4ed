"""How far a measure can be trusted: intervals by drawing identities again, and of the difference of two methods.

Pictures of one identity are alike, so that not they are drawn but identities, with all their pictures (the cluster
bootstrap; Davison and Hinkley 1997, section 3.8).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .measures import Statistic

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A measured number, and what it would have been with other identities."""

    value: float
    draws: Tensor
    """[draws]; empty where there is only one group, which says nothing about others."""
    groups: tuple[str, ...]
    """The identities' names."""
    seed: int
    least: float = -math.inf
    """What the number cannot be below."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The middle 95 % of the draws. Where their mean lies beside the value by more than chance, they are moved there.

        A picture that is drawn twice makes a set less varied than it is: the draws of FID lie too high, those of IS too
        low, of a plain mean nowhere else. What they are moved by may be more than the number is, so that the interval is
        cut at the least it can be. None without draws.
        """
        draws = self.draws[self.draws.isfinite()]
        if not len(draws):
            return None
        bias = draws.mean() - self.value
        if bias.abs() > 3 * draws.std(correction=0) / len(draws) ** 0.5:
            draws = draws - bias
        low, high = torch.quantile(draws, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
        return max(low.item(), self.least), max(high.item(), self.least)


def resamples(groups: int, draws: int, seed: int) -> Iterator[Tensor]:
    """How often each group is drawn, [groups] float64, `draws` times; the same seed gives the same."""
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield torch.from_numpy(rng.multinomial(groups, np.full(groups, 1 / groups)).astype(np.float64))


def bootstrap(
    groups: Sequence[str],
    statistic: Statistic,
    draws: int = 1000,
    seed: int = 0,
    watch: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
    least: float = -math.inf,
) -> Estimate:
    """The statistic with every group once, and as often as each is drawn.

    Args:
        groups: names of the identities, in the order of the statistic's weights.
        statistic: see models.measures.
        draws: how many.
        seed: of them: what is to be compared must have the same.
        watch: passes the draws on, as a progress bar does.
        least: what the statistic cannot be below, as a distance not below zero.
    """
    value = statistic(torch.ones(len(groups), dtype=torch.float64))
    drawn = watch(resamples(len(groups), draws if len(groups) > 1 else 0, seed))
    numbers = torch.tensor([statistic(weights) for weights in drawn], dtype=torch.float64)
    return Estimate(value, numbers, tuple(groups), seed, least)


def bootstrap_difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b over the same identities, drawn together: what is hard for one method is mostly hard for the other, so that
    this interval is narrower than two that are laid side by side.

    Raises:
        ValueError: they are of other identities or draws.
    """
    if (a.groups, a.seed) != (b.groups, b.seed):
        raise ValueError("Only estimates of the same identities and draws can be compared.")
    count = min(len(a.draws), len(b.draws))  # a shorter row of draws is the beginning of the longer one
    return Estimate(a.value - b.value, a.draws[:count] - b.draws[:count], a.groups, a.seed)
