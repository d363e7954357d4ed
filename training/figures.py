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

from .figure_kinds import KINDS
from .picture_sets import PictureSet, numbered, show_the_same
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
    mean_of,
    paired_cosines,
    plural,
    score_between_groups,
    score_by_group,
    uniform_score_by_group,
)
from .truth import Counts, count_attributes, count_following

WIDE, WIDE_DRAWS = 512, 100
"""Features wider than this are drawn again less often for FID: a draw takes seconds."""
SEED_DRAWS = 400
"""Of FID by seed, each of which is several distances."""
PARTS = 10  # of the pictures, for the usual way to report IS


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
    measures = (
        _distances(views, real)
        | _scores(views, real)
        | _by_seed(views, real)
        | _likenesses(views, real)
        | _judged(views, known)
    )
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


def _by_seed(views: Views, real: Views) -> dict[str, _Measure]:
    """FID and IS of the pictures of one seed at a time, each of which shows the same prompts of the same identities."""
    seeds, of_real, n = views.pictures.by_seed(), real.pictures.by_seed(), len(views.pictures.paths)
    if views.pictures.flat or len(seeds) < 2 or not show_the_same(seeds):
        return {}
    paired = show_the_same(of_real) and seeds.keys() <= of_real.keys()
    same = views.pictures.groups == real.pictures.groups
    groups, whose = views.pictures.group_numbers(), real.pictures.group_numbers() if same else None
    scores, distances, width = list[Statistic](), list[Statistic](), 0
    for seed, places in seeds.items():
        mine = torch.tensor(list(places.values()))
        theirs = torch.tensor(list(of_real[seed].values()) if paired else range(len(real.pictures.paths)))
        features, others = views.main["features"][mine], real.main["features"][theirs]
        width = max(width, min(features.shape[1], len(features) + len(others)))
        scores.append(score_by_group(views.main["logits"][mine], groups[mine]))
        if views is not real and min(len(features), len(others)) > 1:
            distances.append(frechet_by_group(features, groups[mine], others, None if whose is None else whose[theirs]))
    measures = {"seed_is": _Measure(mean_of(scores), n)}
    if distances:
        draws = WIDE_DRAWS if width > WIDE else SEED_DRAWS
        measures["seed_fid"] = _Measure(mean_of(distances), n, most_draws=draws)
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


def remarks(methods: Sequence[Views], real: Views, draws: int) -> list[str]:
    """What a reader must know to take the figures for what they are, if they were drawn again so often."""
    said, width = [], real.main["features"].shape[1]
    sizes = {views.pictures.name: len(views.pictures.paths) for views in (*methods, real)}
    n_real = sizes[real.pictures.name]
    few, narrow, within = (defaultdict[int, list[str]](list) for _ in range(3))
    seeded = defaultdict[int, list[str]](list)
    for views in methods:
        name, n = views.pictures.name, sizes[views.pictures.name]
        if min(n, n_real) < 2:
            said.append(
                f"FID and KID of {name} are left out: {n} generated and {plural(n_real, 'real picture')} are no "
                f"distribution; at least "
                "2 of each are needed."
            )
        elif min(n, n_real) < width + 1:
            few[n].append(name)
        seeds = views.pictures.by_seed()
        if not views.pictures.flat and len(seeds) > 1:
            if not show_the_same(seeds):
                said.append(
                    f"FID and IS by seed of {name} are left out: its {len(seeds)} seeds do not show the same prompts of the "
                    "same identities."
                )
            elif len(seeds) * width >= n:
                seeded[n // len(seeds)].append(name)
        if n < 2:
            said.append(f"IS of {name} is left out: it needs at least 2 pictures, and there is one.")
        groups = len(views.pictures.groups)
        if groups == 1:
            said.append(
                f"{name} has no intervals: there is one {'picture' if views.pictures.flat else 'identity'} only."
            )
        elif groups < 10 and draws:
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
    for n, names in seeded.items():
        said.append(
            f"FID by seed of {', '.join(names)} is of {plural(n, 'picture')} a seed, but {width} features need "
            f"{width + 1}: it is too "
            "high, and to be compared with that of as many pictures a seed only."
        )
    for n, names in within.items() if not real.pictures.flat else ():
        said.append(
            f"FID within identities of {', '.join(names)} is of as few as {n} pictures of an identity, but {width} features "
            f"need {width + 1}: it is too high, and to be compared with that of as many pictures only."
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
