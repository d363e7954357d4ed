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

EVERYDAY = Path(__file__).with_name("everyday_captions.txt")
"""Two hundred captions, which come with the pack."""
RIDGE = 1e-10
"""Of the mean of K^T K's diagonal, added to it: K may have fewer rows than columns."""
ALIKE = 1e-4
"""Of a row's length: rows nearer than this say the same. To tell them apart would turn everything else upside down."""
DROPPED = 1e-6
"""Of the sum of K's squares."""


def _main_directions(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Of K^T K the eigenvectors [in, r] and values [r] that make up all but DROPPED of its trace: few, as features are alike."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    kept = values.cumsum(0) > DROPPED * values.sum()
    return vectors[:, kept], values[kept]


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
        rows = torch.cat([one.double() for one in words])
        owner = torch.cat([torch.full((len(one),), n) for n, one in enumerate(words)])
        near = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") <= ALIKE * rows.norm(dim=1)
        kept = [i for i in range(len(rows)) if not bool(near[i, :i].any())]
        self.words, self.owner = rows[kept], owner[kept]
        gram = everyday.double().T @ everyday.double()
        axes, values = _main_directions(gram)
        self.common = (axes * values.sqrt()).T
        """[r, in], with the K^T K of the main directions: ‖W0 K^T‖_F is found soon."""
        gram += torch.eye(len(gram), dtype=gram.dtype) * (RIDGE * gram.diagonal().mean()).clamp(min=1e-300)
        d = torch.cholesky_solve(self.words.T, torch.linalg.cholesky(gram)).T
        self.reach = torch.linalg.pinv(d @ self.words.T, hermitian=True) @ d
        """(d T^T)^-1 d, [S, in]; words that say the same twice count once."""
        self.back = torch.linalg.pinv(self.reach)
        rare = everyday.double() - everyday.double() @ axes @ axes.T
        self.rarely = self.reach @ rare.T
        """Where `reach` acts in the other directions of K."""

    def wanted(self, trained: Sequence[Tensor]) -> Tensor:
        """V [S, out], of W_n of each concept [out, in]."""
        own = [self.words[self.owner == n] @ matrix.double().T for n, matrix in enumerate(trained)]
        return torch.cat(own)

    def __call__(self, base: Tensor, wanted: Tensor) -> Tensor:
        """W in float64, of W0 [out, in] and V."""
        before = base.double()
        return before + (wanted - self.words @ before.T).T @ self.reach

    def missed(self, weight: Tensor, wanted: Tensor) -> float:
        """The largest ‖W t - v‖ / ‖v‖ of all words."""
        far = (self.words @ weight.double().T - wanted).norm(dim=1)
        return float((far / wanted.norm(dim=1).clamp(min=torch.finfo(torch.double).tiny)).max())

    def disturbed(self, change: Tensor, base: Tensor) -> float:
        """‖(W - W0) K^T‖_F / ‖W0 K^T‖_F: what changes of everyday captions, of a W - W0 that is a product with `reach`."""
        # Nothing cancels in this one: fp32 is enough, and faster.
        whole = (self.common.float() @ base.float().T).norm().double()
        often = (self.common @ change.double().T).norm()
        rarely = ((change.double() @ self.back) @ self.rarely).norm()
        return float(often.hypot(rarely) / whole.clamp(min=torch.finfo(torch.double).tiny))


FRAMES = ("", "a photo of ")
"""What may stand before the words of a concept."""


def prompts_of(called: str) -> list[str]:
    """In which texts a concept shall be itself, of the words that call it: one for each of FRAMES."""
    return [f"{frame}{called}" for frame in FRAMES]


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


def unique_rows(states: Tensor, ends: Sequence[int], starts: Sequence[int] | None = None) -> Tensor:
    """The features of texts, each once, of the places from `starts` to `ends`.

    Args:
        states: of the texts, [n, T, width].
        ends: the first token that ends each.
        starts: by default behind the token that begins each. A concept's words start behind their frame, whose tokens do
            not see them: what they give is everybody's, and no concept's own (Adobe's code leaves them out, too).
    """
    begins = [1] * len(ends) if starts is None else starts
    rows = [one[start : end + 1] for one, start, end in zip(states, begins, ends, strict=True)]
    return torch.unique(torch.cat(rows), dim=0)


def check_parts(concepts: Mapping[str, Mapping[str, Tensor]], calls: Sequence[Sequence[str]]) -> None:
    """Whether files can be merged.

    Args:
        concepts: what each file changes, by layer, by its name.
        calls: how its concepts are called.

    Raises:
        PersonalizeError: a file names no words, two files one, or one changes a layer that reads something else than text.
    """
    heard: dict[str, str] = {}
    for (name, changes), own in zip(concepts.items(), calls, strict=True):
        if not own:
            raise PersonalizeError(f"{name} names no words that call its concepts, so that it cannot be merged.")
        for call in own:
            if call in heard:
                raise PersonalizeError(
                    f"{heard[call]} and {name} are both called by {call!r}: train one with another --output_name or trigger."
                )
            heard[call] = name
        if other := [layer for layer in changes if not layer.endswith(("_attn2_to_k.weight", "_attn2_to_v.weight"))]:
            raise PersonalizeError(
                f"{name} changes {other[0]}, which does not read the text, so that it cannot be merged: train it with "
                "--train_layers kv."
            )


@dataclass(frozen=True)
class Merged:
    """Several concepts in one."""

    changes: dict[str, Tensor]
    """W - W0 by the layer's name, as it was rounded."""
    missed: float
    """The largest relative distance of a word's output from what its concept gives, with the changes as they are."""
    disturbed: float
    """The largest relative change of what a layer gives on everyday captions."""

    @property
    def report(self) -> str:
        """For the user."""
        return (
            f"{len(self.changes)} layers merged: on the concepts' words they miss their own by {self.missed:.1e} at most, on "
            f"everyday captions they change by {self.disturbed:.1e} at most"
        )


def merge_changes(
    base: Callable[[str], Tensor],
    concepts: Sequence[Mapping[str, Tensor]],
    everyday: Tensor,
    words: Sequence[Tensor],
    dtype: torch.dtype,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Merged:
    """Args:
        base: W0 [out, in] of a layer.
        concepts: W_n - W0 by layer, of each file.
        everyday, words: see `Merging`; words of each file.
        dtype: what the changes are rounded to.
        progress: wraps the layers' names.

    Raises:
        PersonalizeError: the features are of another text encoder than the layers read, or a result is not finite.
    """
    merging, merged = Merging(everyday, words), dict[str, Tensor]()
    missed = disturbed = 0.0
    for layer in progress(sorted({layer for changes in concepts for layer in changes})):
        before = base(layer).double()
        if before.shape[1] != everyday.shape[1]:
            raise PersonalizeError(
                f"The model reads text features of width {before.shape[1]}, but the text encoders give {everyday.shape[1]}: "
                "take both from one checkpoint."
            )
        trained = [before + changes[layer].to(before) if layer in changes else before for changes in concepts]
        wanted = merging.wanted(trained)
        change = (merging(before, wanted) - before).to(dtype)
        if not change.isfinite().all():
            raise PersonalizeError(f"Merged, {layer} has numbers that are not finite in {dtype}: merge in float32.")
        merged[layer] = change
        missed = max(missed, merging.missed(before + change.double(), wanted))
        disturbed = max(disturbed, merging.disturbed(change, before))
    return Merged(merged, missed, disturbed)
