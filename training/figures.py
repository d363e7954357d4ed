"""From what networks say of pictures to figures with intervals, and to differences of methods."""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .picture_sets import PictureSet, numbered
from .shared import (
    Estimate,
    Statistic,
    bootstrap,
    bootstrap_difference,
    frechet_between_groups,
    frechet_by_group,
    frechet_within_groups,
    identity_logits,
    inception_score,
    kernel_by_group,
    likeness,
    likeness_among,
    likeness_to_others,
    mean_by_group,
    paired_cosines,
    score_between_groups,
    score_by_group,
    uniform_score_by_group,
)
from .truth import Counts, count_attributes, count_following

WIDE, WIDE_DRAWS = 512, 100
"""Features wider than this are drawn again less often for FID: a draw takes seconds."""
PARTS = 10  # of the pictures, for the usual way to report IS


@dataclass(frozen=True)
class Kind:
    """A figure, for people."""

    title: str
    better: str
    """"higher", "lower", or "" where neither is."""
    meaning: str
    least: float = -math.inf
    """What it cannot be below."""


KINDS = {
    "fid": Kind(
        "FID",
        "lower",
        "Fréchet distance between the features of generated and real pictures; depends on how many there are",
        0,
    ),
    "kid": Kind("KID", "lower", "kernel distance between the same features; does not depend on how many there are, and may fall below zero"),
    "wcfid": Kind(
        "FID within identities",
        "lower",
        "WCFID: the mean over the identities of FID between an identity's generated and its real pictures, which depends on "
        "how many each has; FID over all pictures does not see whose picture is whose",
        0,
    ),
    "bcfid": Kind("FID between identities", "lower", "BCFID: FID between the means of the identities, whoever is whose", 0),
    "is": Kind(
        "IS",
        "higher",
        "inception score: pictures of a clear class each, and of many classes together, be they the right ones or not",
        1,
    ),
    "bcis": Kind(
        "IS between identities",
        "higher",
        "BCIS: the part of IS that comes from the identities: pictures of one agree on their classes, and others have others",
        1,
    ),
    "identity_is": Kind(
        "IS over identities",
        "higher",
        "inception score whose classes are the identities of the real pictures, by the judge's identity features: pictures "
        "that show one of them clearly, and all of them alike",
        1,
    ),
    "uniform_is": Kind(
        "uniform-prior IS",
        "",
        "only how clear the class of each picture is; not the inception score: one picture again and again has as much",
        1,
    ),
    "likeness": Kind("likeness", "higher", "mean cosine of the judge's identity features to the identity's real pictures"),
    "likeness_to_others": Kind("likeness to others", "lower", "the same to the real pictures of all other identities"),
    "attributes": Kind("attributes", "higher", "share of the identity's visible attributes, but its kind, that the judge reads"),
    "prompt_following": Kind(
        "prompt following", "higher", "share of what NAME.json says the prompt asked for that the judge sees"
    ),
    "clip_i": Kind("CLIP-I", "higher", "mean cosine of CLIP's image features to the identity's real pictures"),
    "clip_t": Kind("CLIP-T", "higher", "mean cosine of CLIP's features of picture and prompt (NAME.txt)"),
    "dino": Kind("DINO", "higher", "mean cosine of DINO's features to the identity's real pictures"),
}  # fmt: skip


@dataclass(frozen=True)
class Views:
    """What the networks say of a set of pictures, rows in the order of its paths; what was not asked for is missing."""

    pictures: PictureSet
    main: Mapping[str, Tensor]
    """Of the judge (features, logits, who, seen) or of Inception (features, logits)."""
    clip: Tensor | None = None
    """[n, d]"""
    texts: Tensor | None = None
    """[n, d] of the prompts; rows of those that are missing are NaN."""
    dino: Tensor | None = None
    """[n, d]"""
    wishes: Sequence[Mapping[str, str]] = ()
    """What each prompt asked for; see training.truth."""


@dataclass(frozen=True)
class Figure:
    """A measured number."""

    estimate: Estimate
    n: int
    """Pictures that it is of."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What it is made of, or another way to report it."""

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        low, high = self.estimate.interval or (None, None)
        said = {"value": self.estimate.value, "low": low, "high": high, "pictures": self.n}
        drawn = {"groups": len(self.estimate.groups), "draws": len(self.estimate.draws)}
        return said | drawn | ({"parts": dict(self.parts)} if self.parts else {})


@dataclass(frozen=True)
class _Measure:
    """How a figure comes about."""

    statistic: Statistic
    n: int
    parts: Mapping[str, float] = field(default_factory=dict)
    most_draws: int | None = None


def measure(
    views: Views, real: Views, known: Mapping[str, Mapping[str, str]], draws: int, seed: int
) -> dict[str, Figure]:
    """Every figure that there is something for.

    Args:
        views: of a method, or `real` itself, for what a perfect method would reach.
        real: of the real pictures.
        known: attributes by identity.
        draws, seed: of the intervals.
    """
    measures = _distances(views, real) | _scores(views, real) | _likenesses(views, real) | _judged(views, known)
    groups, figures = views.pictures.groups, dict[str, Figure]()
    for name in KINDS:
        if (found := measures.get(name)) is not None:
            count = min(draws, found.most_draws or draws)
            title = f"{views.pictures.name}, {KINDS[name].title}"
            bar = partial(tqdm, desc=title, total=count if len(groups) > 1 else 0, unit=" draws", leave=False)
            estimate = bootstrap(groups, found.statistic, count, seed, bar, KINDS[name].least)
            figures[name] = Figure(estimate, found.n, found.parts)
    return figures


def _distances(views: Views, real: Views) -> dict[str, _Measure]:
    """FID and KID; identities are drawn for generated and real pictures together if both sets have the same."""
    mine, theirs, n = views.main["features"], real.main["features"], len(views.pictures.paths)
    if views is real or min(n, len(theirs)) < 2:
        return {}
    same = not views.pictures.flat and views.pictures.groups == real.pictures.groups
    given = mine, views.pictures.group_numbers(), theirs, real.pictures.group_numbers() if same else None
    width = min(mine.shape[1], n + len(theirs))
    fid = _Measure(frechet_by_group(*given), n, most_draws=WIDE_DRAWS if width > WIDE else None)
    measures = {"fid": fid, "kid": _Measure(kernel_by_group(*given), n)}
    if same and len(views.pictures.groups) > 1:
        whole = mine, given[1], theirs, real.pictures.group_numbers()
        if min(int(numbers.bincount().min()) for numbers in (whole[1], whole[3])) > 1:
            measures["wcfid"] = _Measure(frechet_within_groups(*whole), n)
        measures["bcfid"] = _Measure(frechet_between_groups(*whole), n)
    return measures


def _scores(views: Views, real: Views) -> dict[str, _Measure]:
    logits, groups = views.main["logits"], views.pictures.group_numbers()
    n, parts = len(logits), dict[str, float]()
    if n < 2:
        return {}
    if n >= 10 * PARTS:
        scores = inception_score(logits, PARTS)
        mean, deviation = scores.mean().item(), scores.std(correction=0).item()
        parts = {f"mean of {PARTS} parts": mean, f"deviation of {PARTS} parts": deviation}
    uniform = _Measure(uniform_score_by_group(logits, groups), n)
    measures = {"is": _Measure(score_by_group(logits, groups), n, parts), "uniform_is": uniform}
    if not views.pictures.flat and len(views.pictures.groups) > 1:
        measures["bcis"] = _Measure(score_between_groups(logits, groups), n)
    names = list(real.pictures.identities)
    if "who" in views.main and len(names) > 1:
        from .pocket.judge import IDENTITY_SCALE

        whose = numbered(real.pictures.whose, names)
        who = identity_logits(views.main["who"], real.main["who"], whose, IDENTITY_SCALE)
        measures["identity_is"] = _Measure(score_by_group(who, groups), n)
    return measures


def _likenesses(views: Views, real: Views) -> dict[str, _Measure]:
    """Cosines to real pictures, by the judge, CLIP and DINO, and to prompts."""
    names = list(real.pictures.identities)
    whose, whose_real = numbered(views.pictures.whose, names), numbered(real.pictures.whose, names)
    pairs = {
        "likeness": (views.main.get("who"), real.main.get("who")),
        "clip_i": (views.clip, real.clip),
        "dino": (views.dino, real.dino),
    }
    values = {}
    for name, (mine, theirs) in pairs.items():
        if mine is not None and theirs is not None:
            values[name] = (
                likeness_among(theirs, whose_real) if views is real else likeness(mine, theirs, whose, whose_real)
            )
    mine, theirs = pairs["likeness"]
    if mine is not None and theirs is not None and len(names) > 1:
        values["likeness_to_others"] = likeness_to_others(mine, theirs, whose, whose_real)
    if views.clip is not None and views.texts is not None:
        values["clip_t"] = paired_cosines(views.clip, views.texts)
    return _means({name: {name: value} for name, value in values.items()}, views.pictures)


def _judged(views: Views, known: Mapping[str, Mapping[str, str]]) -> dict[str, _Measure]:
    """What the judge reads, against what is known."""
    if "seen" not in views.main:
        return {}
    seen, whose = views.main["seen"], views.pictures.whose
    wishes = views.wishes or [{}] * len(whose)
    counts = {
        "attributes": count_attributes(seen, whose, known, wishes),
        "prompt_following": count_following(seen, wishes),
    }
    return _means(counts, views.pictures)


def _means(counted: Mapping[str, Counts], pictures: PictureSet) -> dict[str, _Measure]:
    """Means of what is not NaN, over all parts of a figure together, but for an identity's kind, which prompts name."""
    measures = {}
    for name, counts in counted.items():
        rows = [values for part, values in counts.items() if part != "kind"]
        if not rows or not bool((known := torch.stack(rows).isfinite()).any()):
            continue
        totals = torch.stack(rows).nan_to_num().sum(0)
        parts = {part: values.nanmean().item() for part, values in counts.items()} if len(counts) > 1 else {}
        statistic = mean_by_group(totals, pictures.group_numbers(), known.sum(0))
        measures[name] = _Measure(statistic, int(known.any(0).sum()), parts)
    return measures


def differences(figures: Mapping[str, Mapping[str, Figure]]) -> list[dict[str, Any]]:
    """Of every two methods over the same identities: each figure's difference, its interval, and whether that leaves out
    zero."""
    found = []
    for one, two in itertools.combinations(figures, 2):
        for name in KINDS:
            a, b = figures[one].get(name), figures[two].get(name)
            if a is None or b is None or a.estimate.groups != b.estimate.groups:
                continue
            difference = bootstrap_difference(a.estimate, b.estimate)
            if difference.interval is not None:
                low, high = difference.interval
                found.append(
                    {
                        "figure": name,
                        "of": one,
                        "against": two,
                        "difference": difference.value,
                        "low": low,
                        "high": high,
                    }
                    | {"apart": not low <= 0 <= high}
                )
    return found


def remarks(methods: Sequence[Views], real: Views) -> list[str]:
    """What a reader must know to take the figures for what they are."""
    said, width = [], real.main["features"].shape[1]
    sizes = {views.pictures.name: len(views.pictures.paths) for views in (*methods, real)}
    n_real = sizes[real.pictures.name]
    few, narrow, within = (defaultdict[int, list[str]](list) for _ in range(3))
    for views in methods:
        name, n = views.pictures.name, sizes[views.pictures.name]
        if min(n, n_real) < 2:
            said.append(
                f"FID and KID of {name} are left out: {n} generated and {n_real} real pictures are no distribution; at least "
                "2 of each are needed."
            )
        elif min(n, n_real) < width + 1:
            few[n].append(name)
        if n < 2:
            said.append(f"IS of {name} is left out: it needs at least 2 pictures, and there is one.")
        groups = len(views.pictures.groups)
        if groups == 1:
            said.append(
                f"{name} has no intervals: there is one {'picture' if views.pictures.flat else 'identity'} only."
            )
        elif groups < 10:
            narrow[groups].append(name)
        shown, there = views.pictures.identities, real.pictures.identities
        if not views.pictures.flat and len(shown) < len(there):
            said.append(
                f"{name} shows {len(shown)} of the {len(there)} identities of the real pictures: its FID and KID are against "
                "them all, and FID within and between identities are left out."
            )
        elif 1 < (least := min(len(one) for one in (*shown.values(), *there.values()))) <= width and groups > 1:
            within[least].append(name)
    for n, names in few.items():
        said.append(
            f"FID of {', '.join(names)} is of {n} generated and {n_real} real pictures, but {width} features need "
            f"{width + 1} of each: it is too high, and to be compared with FIDs of as many pictures only; KID is not "
            "affected."
        )
    for n, names in within.items() if not real.pictures.flat else ():
        said.append(
            f"FID within identities of {', '.join(names)} is of as few as {n} pictures of an identity: it is too high in the "
            "same way."
        )
    for n, names in narrow.items():
        what = "pictures" if real.pictures.flat else "identities"
        said.append(
            f"The intervals of {', '.join(names)} are of {n} {what} only, and rather too narrow: 10 or more are better."
        )
    if min(width, n_real + max(sizes[views.pictures.name] for views in methods)) > WIDE:
        said.append(f"FID's intervals are of at most {WIDE_DRAWS} draws, each of which takes seconds.")
    if len({sizes[views.pictures.name] for views in methods}) > 1:
        counts = ", ".join(f"{views.pictures.name} {sizes[views.pictures.name]}" for views in methods)
        said.append(f"The methods have different numbers of pictures ({counts}): their FID and IS cannot be compared.")
    if real.pictures.flat:
        said.append(
            "The folders have no folders for identities: all pictures are taken as one subject's, and intervals tell how "
            "other pictures of it would do, not other subjects."
        )
    if len({views.pictures.groups for views in methods}) > 1:
        said.append(
            "Methods with other identities than each other (or, of one subject, other file names) are not compared."
        )
    return said


def is_finite(figure: Figure) -> bool:
    """Whether it can be shown."""
    return math.isfinite(figure.estimate.value)
