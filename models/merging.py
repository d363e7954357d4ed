"""Several concepts in one set of weights, in closed form (Kumari et al. 2023, arXiv:2212.04488, eq. 4 to 6).

Of a matrix W0 that reads text features, and matrices W_n in which each concept n was trained:

    W = argmin ‖W K^T - W0 K^T‖_F  so that  W T^T = V^T
      = W0 + (V^T - W0 T^T) (d T^T)^-1 d,   d = T (K^T K)^-1

K are the features of everyday captions, which shall stay what they were; T those of each concept's own words, in which W
gives V, what the concept's W_n gives there. In float64: the features of one text are so alike that fp32 misses V.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import PersonalizeError

RIDGE = 1e-10
"""Of the mean squared feature, added to the diagonal of K^T K: K may have fewer rows than columns."""
EVERYDAY = Path(__file__).with_name("everyday_captions.txt")
"""Two hundred captions, which came with the pack."""
PASSES = 3
"""A solution's remaining error is solved for again."""


class Merging:
    """For all matrices that read the same features.

    Args:
        everyday: K, [R, in].
        words: T of each concept, [S_n, in]. Rows that come again are left out: the first concept that has them is heard.

    Raises:
        PersonalizeError: there are no words, or of another width.
    """

    def __init__(self, everyday: Tensor, words: Sequence[Tensor]):
        if not words or any(not len(one) for one in words):
            raise PersonalizeError(
                "A concept has no words: give each the words that call it, such as its trigger and class."
            )
        widths = {one.shape[1] for one in (everyday, *words)}
        if len(widths) > 1:
            raise PersonalizeError(f"The features have widths {sorted(widths)}: they are of different text encoders.")
        k, rows = everyday.double(), torch.cat([one.double() for one in words])
        owner = torch.cat([torch.full((len(one),), n) for n, one in enumerate(words)])
        kept = [i for i in range(len(rows)) if not any(torch.equal(rows[i], rows[j]) for j in range(i))]
        self.words, self.owner = rows[kept], owner[kept]
        gram = k.T @ k
        gram += torch.eye(len(gram), dtype=k.dtype) * (RIDGE * k.square().sum() / len(gram)).clamp(min=1e-300)
        d = torch.cholesky_solve(self.words.T, torch.linalg.cholesky(gram)).T
        self.reach = torch.linalg.pinv(d @ self.words.T, hermitian=True) @ d
        """(d T^T)^-1 d, [S, in]; words that say the same twice count once."""

    def __call__(self, base: Tensor, trained: Sequence[Tensor]) -> tuple[Tensor, float]:
        """W, and how far it is from what was asked.

        Args:
            base: W0, [out, in].
            trained: W_n of each concept, [out, in].

        Returns:
            W in float64, and the largest ‖W t - v‖ / ‖v‖ of all rows.
        """
        before = base.double()
        merged, words, reach = before, self.words.to(before), self.reach.to(before)
        own = [words[(self.owner == n).to(words.device)] @ matrix.to(words).T for n, matrix in enumerate(trained)]
        wanted = torch.cat(own)
        for _ in range(PASSES):
            merged = merged + (wanted - words @ merged.T).T @ reach
        missed = (words @ merged.T - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=torch.finfo(torch.double).tiny)
        return merged, float(missed.max())


def prompts_of(called: str) -> tuple[str, str]:
    """In which texts a concept shall be itself, of the words that call it."""
    return called, f"a photo of {called}"


def read_captions(path: Path = EVERYDAY) -> list[str]:
    """A caption in each line.

    Raises:
        PersonalizeError: the file is missing, or has none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise PersonalizeError(f"The captions {path} cannot be read ({error}).") from None
    if not any(lines):
        raise PersonalizeError(f"{path} has no captions: write one into each line.")
    return [line for line in lines if line]


def unique_rows(states: Tensor, ends: Sequence[int]) -> Tensor:
    """The features of texts [n, T, width] from behind the token that begins each to the first that ends it, each once."""
    return torch.unique(torch.cat([one[1 : end + 1] for one, end in zip(states, ends, strict=True)]), dim=0)


@dataclass(frozen=True)
class Merged:
    """Several concepts in one."""

    changes: dict[str, Tensor]
    """W - W0 by the layer's name, in float64."""
    missed: float
    """The largest relative distance of a word's output from what its concept gives."""


def merge_changes(
    base: Callable[[str], Tensor],
    concepts: Mapping[str, Mapping[str, Tensor]],
    everyday: Tensor,
    words: Sequence[Tensor],
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Merged:
    """Args:
        base: W0 [out, in] of a layer.
        concepts: W_n - W0 by layer, of each file by its name.
        everyday, words: see `Merging`; words of each file.
        progress: wraps the layers' names.

    Raises:
        PersonalizeError: a file has a layer that reads something else than text.
    """
    layers = sorted({layer for changes in concepts.values() for layer in changes})
    for name, changes in concepts.items():
        if other := [layer for layer in changes if not layer.endswith(("_attn2_to_k.weight", "_attn2_to_v.weight"))]:
            raise PersonalizeError(
                f"{name} changes {other[0]}, which does not read the text, so that it cannot be merged: train it with "
                "--train_layers kv."
            )
    merging, merged, missed = Merging(everyday, words), dict[str, Tensor](), 0.0
    for layer in progress(layers):
        before = base(layer).double()
        trained = [before + changes[layer].to(before) if layer in changes else before for changes in concepts.values()]
        weight, far = merging(before, trained)
        merged[layer], missed = weight - before, max(missed, far)
    return Merged(merged, missed)
