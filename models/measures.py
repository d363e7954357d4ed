"""The field's measures of generated pictures, from features of any network: FID, KID, IS, cosines.

Each comes twice: as a function of features, and as a `Statistic`, which gives the same number when each group of pictures
(those of one identity) counts as often as it is told; `models.bootstrap` makes intervals of that. All in float64.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

Statistic = Callable[[Tensor], float]
"""A number of a set of pictures, from how often each of its groups counts, [groups] float64."""
BLOCK = 1024  # rows of a kernel matrix at a time
SEED = 2020  # torch-fidelity's, of what it draws
MOST = 2**26  # numbers kept of products by group, half a gigabyte


@dataclass(frozen=True)
class Statistics:
    """Of features [n, d]: what the Fréchet distance looks at."""

    mean: Tensor
    """[d]"""
    covariance: Tensor
    """[d, d], unbiased."""
    n: float

    @classmethod
    def of(cls, features: Tensor, weights: Tensor | None = None) -> "Statistics":
        """Of [n, d], each row once, or as often as `weights` [n] says; of one row the covariance is zero."""
        x = features.double()
        w = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double()
        n = w.sum().item()
        mean = w @ x / n
        x = (x - mean) * w.sqrt()[:, None]
        return cls(mean, x.T @ x / max(n - 1, 1), n)

    @cached_property
    def root(self) -> Tensor:
        """[d, r] with root root^T = covariance: Cholesky's, which is the soonest found; where the covariance is singular
        the eigenvectors', r its rank: what is not above the rounding of its largest eigenvalue is none."""
        if self.n > len(self.mean):
            factor, failed = torch.linalg.cholesky_ex(self.covariance)
            if not failed:
                return factor
        values, vectors = torch.linalg.eigh(self.covariance)
        real = values > values.abs().max() * len(values) * torch.finfo(values.dtype).eps
        return vectors[:, real] * values[real].sqrt()


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """FID when the features are Inception's (Heusel et al. 2017, eq. 6).

    |m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½). The eigenvalues of C_a C_b are those of the symmetric R^T C_b R, where
    R R^T = C_a: real and never below zero, which those of the product itself are only but for rounding, of which the
    square root makes much. R is taken of the set with fewer pictures, so that no eigenvalue is zero but for rounding.
    """
    few, many = (a, b) if a.n < min(b.n, len(a.mean)) else (b, a)
    values = torch.linalg.eigvalsh(few.root.T @ many.covariance @ few.root)
    shared = values.clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * shared
    return distance.item()


def same_span(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of features [n, d] in an orthonormal basis of what they span together, where that is less than d.

    No distance or product of two of them changes, and the Fréchet distance of few pictures is found much sooner.
    """
    both = torch.cat([a, b]).double()
    if len(both) >= both.shape[1]:
        return a.double(), b.double()
    basis = torch.linalg.qr(both.T).Q
    return a.double() @ basis, b.double() @ basis


def _by_group(rows: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sums [count, ...] of the rows [n, ...] of each group; `groups` [n] int64."""
    return torch.zeros(count, *rows.shape[1:], dtype=torch.float64).index_add_(0, groups, rows.double())


def frechet_by_group(a: Tensor, groups: Tensor, b: Tensor, groups_b: Tensor | None) -> Statistic:
    """FID between features a [n, d] and b [m, d].

    Args:
        groups: [n] int64, which group each row of a is of.
        groups_b: [m], likewise of b: then these count as often; None: b stays as it is.
    """
    a, b = same_span(a, b)
    count = int(groups.max()) + 1
    of_a = _statistics_by_group(a, groups, count)
    if groups_b is None:
        reference = Statistics.of(b)
        return lambda weights: frechet_distance(of_a(weights), reference)
    of_b = _statistics_by_group(b, groups_b, count)
    return lambda weights: frechet_distance(of_a(weights), of_b(weights))


def _statistics_by_group(x: Tensor, groups: Tensor, count: int) -> Callable[[Tensor], Statistics]:
    width = x.shape[1]
    # reading the sums takes longer than multiplying the rows, or they need too much memory
    if 8 * count > len(x) or count * width**2 > MOST:
        return lambda weights: Statistics.of(x, weights[groups])
    centre = x.mean(0)  # so that the products' sums do not drown the covariance
    x = x - centre
    sizes, sums = _by_group(torch.ones(len(x)), groups, count), _by_group(x, groups, count)
    products = torch.zeros(count, width, width, dtype=torch.float64)
    for group in range(count):
        rows = x[groups == group]
        products[group] = rows.T @ rows

    def statistics(weights: Tensor) -> Statistics:
        n = (weights @ sizes).item()
        mean = weights @ sums / n
        product = (weights @ products.flatten(1)).view(width, width)
        return Statistics(mean + centre, (product - n * torch.outer(mean, mean)) / max(n - 1, 1), n)

    return statistics


def frechet_within_groups(a: Tensor, groups: Tensor, b: Tensor, groups_b: Tensor) -> Statistic:
    """WCFID (Benny et al. 2020, arXiv:2004.12361, section 4.2): the mean over the groups of FID between a group's pictures
    in a and those of the same group in b, of which each has two or more. FID of all pictures together is zero where every
    picture shows another group's identity than it should; this is not.

    The arguments are those of `frechet_by_group`.
    """
    count = int(groups.max()) + 1
    pairs = [same_span(a[groups == i], b[groups_b == i]) for i in range(count)]
    distances = [frechet_distance(Statistics.of(x), Statistics.of(y)) for x, y in pairs]
    found = torch.tensor(distances, dtype=torch.float64)
    return lambda weights: (weights @ found / weights.sum()).item()


def frechet_between_groups(a: Tensor, groups: Tensor, b: Tensor, groups_b: Tensor) -> Statistic:
    """BCFID (Benny et al. 2020, section 4.2): FID between the means of the groups in a and in b, whoever is whose.

    The arguments are those of `frechet_by_group`.
    """
    count = int(groups.max()) + 1
    ones = torch.ones(len(a)), torch.ones(len(b))
    sizes_a, sizes_b = _by_group(ones[0], groups, count), _by_group(ones[1], groups_b, count)
    means_a, means_b = _by_group(a, groups, count) / sizes_a[:, None], _by_group(b, groups_b, count) / sizes_b[:, None]
    alone = torch.arange(count)
    return frechet_by_group(means_a, alone, means_b, alone)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """[n, m] of features [n, d] and [m, d]."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


def kernel_distance(a: Tensor, b: Tensor, subsets: int = 0, size: int = 1000) -> float:
    """KID when the features are Inception's (Bińkowski et al. 2018, section 4): the unbiased estimate of the squared
    maximum mean discrepancy with the kernel (x·y / d + 1)³.

    Args:
        a, b: [n, d], [m, d], at least two rows each.
        subsets: 0 takes all pairs of rows; else the mean over so many random subsets of `size` rows, whose expectation
            that is: torch-fidelity draws them alike.
    """
    if subsets:
        rng = np.random.RandomState(SEED)
        values = []
        for _ in range(subsets):
            one, two = (x[torch.from_numpy(rng.choice(len(x), size, replace=False))] for x in (a, b))
            values.append(kernel_distance(one, two))
        return float(np.mean(values))
    alone = torch.zeros(len(a), dtype=torch.int64)
    return kernel_by_group(a, alone, b, torch.zeros(len(b), dtype=torch.int64))(torch.ones(1, dtype=torch.float64))


def kernel_by_group(a: Tensor, groups: Tensor, b: Tensor, groups_b: Tensor | None) -> Statistic:
    """KID between features a and b; the arguments are those of `frechet_by_group`. A picture that counts twice makes no
    pair with itself."""
    count = int(groups.max()) + 1
    others = torch.zeros(len(b), dtype=torch.int64) if groups_b is None else groups_b
    count_b = 1 if groups_b is None else count
    within_a = _kernel_sums(a, a, groups, groups, count, count)
    within_b = _kernel_sums(b, b, others, others, count_b, count_b)
    between = _kernel_sums(a, b, groups, others, count, count_b)
    self_a, self_b = (_by_group(_kernel_diagonal(x), g, n) for x, g, n in ((a, groups, count), (b, others, count_b)))
    size_a, size_b = (_by_group(torch.ones(len(g)), g, n) for g, n in ((groups, count), (others, count_b)))

    def mean_within(w: Tensor, sums: Tensor, own: Tensor, sizes: Tensor) -> Tensor:
        pairs = (w @ sizes).square() - w.square() @ sizes
        return (w @ sums @ w - w.square() @ own) / pairs

    def distance(weights: Tensor) -> float:
        v = torch.ones(1, dtype=torch.float64) if groups_b is None else weights
        across = weights @ between @ v / ((weights @ size_a) * (v @ size_b))
        within = mean_within(weights, within_a, self_a, size_a) + mean_within(v, within_b, self_b, size_b)
        return (within - 2 * across).item()

    return distance


def _kernel_diagonal(x: Tensor) -> Tensor:
    return (x.double().square().sum(1) / x.shape[1] + 1) ** 3


def _kernel_sums(x: Tensor, y: Tensor, groups_x: Tensor, groups_y: Tensor, count_x: int, count_y: int) -> Tensor:
    """[count_x, count_y] sums of the kernel over the pairs of two groups."""
    sums = torch.zeros(count_x, count_y, dtype=torch.float64)
    for start in range(0, len(x), BLOCK):
        some = slice(start, start + BLOCK)
        columns = _by_group(_kernel(x[some], y).T, groups_y, count_y)
        sums += _by_group(columns.T, groups_x[some], count_x)
    return sums


def inception_score(logits: Tensor, splits: int = 1) -> Tensor:
    """IS, [splits]: exp E KL(p(y|x) || p(y)), where p(y) is the mean of p(y|x) (Salimans et al. 2016, section 4).

    Args:
        logits: [n, classes].
        splits: into how many parts the pictures are cut, in random order, as torch-fidelity does; reported is usually the
            mean of ten. A score is at most the number of pictures in its part, and at most that of classes.
    """
    order = torch.from_numpy(np.random.RandomState(SEED).permutation(len(logits)))
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    parts = [logits[order[start:end]] for start, end in itertools.pairwise(bounds)]
    scores = [score_by_group(part, torch.zeros(len(part), dtype=torch.int64))(_ONE) for part in parts]
    return torch.tensor(scores, dtype=torch.float64)


def uniform_inception_score(logits: Tensor) -> float:
    """Uniform-prior IS: exp E KL(p(y|x) || uniform) = C exp(-E H(p(y|x))), C classes. **Not** the inception score.

    It says only how sure the classifier is of each picture: never less than IS, equal where every class is as frequent,
    and as high for a model that draws one and the same picture again and again, which IS punishes.
    """
    return uniform_score_by_group(logits, torch.zeros(len(logits), dtype=torch.int64))(_ONE)


_ONE = torch.ones(1, dtype=torch.float64)


def score_by_group(logits: Tensor, groups: Tensor) -> Statistic:
    """`inception_score` of all pictures together; `groups` as in `frechet_by_group`."""
    return _score(*_class_sums(logits, groups))


def score_between_groups(logits: Tensor, groups: Tensor) -> Statistic:
    """BCIS (Benny et al. 2020, arXiv:2004.12361, section 4.1): exp E KL(p(y|group) || p(y)): whether the pictures of a
    group agree on their classes, and other groups have others. IS is this times WCIS, the score within the groups."""
    sizes, marginals, _ = _class_sums(logits, groups)
    within = marginals / sizes[:, None]
    return _score(sizes, marginals, sizes * torch.xlogy(within, within).sum(1))


def _score(sizes: Tensor, marginals: Tensor, negative_entropies: Tensor) -> Statistic:
    """From sums by group: pictures, p(y|x), and Σ_y p log p of whatever p is to be told apart from the marginal."""

    def score(weights: Tensor) -> float:
        n = weights @ sizes
        marginal = weights @ marginals / n
        return (weights @ negative_entropies / n - torch.xlogy(marginal, marginal).sum()).exp().item()

    return score


def uniform_score_by_group(logits: Tensor, groups: Tensor) -> Statistic:
    """`uniform_inception_score`; `groups` as in `frechet_by_group`."""
    sizes, _, negative_entropies = _class_sums(logits, groups)
    classes = logits.shape[1]
    return lambda weights: classes * math.exp(weights @ negative_entropies / (weights @ sizes))


def _class_sums(logits: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each group: pictures, sum of p(y|x) [groups, classes], and of Σ_y p log p."""
    count, log_p = int(groups.max()) + 1, logits.double().log_softmax(1)
    p = log_p.exp()
    # not p * log_p, which is no number where a class is impossible
    return _by_group(torch.ones(len(p)), groups, count), _by_group(p, groups, count), _by_group(
        torch.xlogy(p, p).sum(1), groups, count
    )  # fmt: skip


def mean_of(statistics: Sequence[Statistic]) -> Statistic:
    """Of several sets of pictures of the same groups, the mean of their numbers."""
    return lambda weights: sum(statistic(weights) for statistic in statistics) / len(statistics)


def mean_by_group(totals: Tensor, groups: Tensor, counts: Tensor | None = None) -> Statistic:
    """Mean of what pictures have: the sum of totals [n] over that of counts [n] (1 each by default); NaN of nothing."""
    count = int(groups.max()) + 1
    sums = _by_group(totals, groups, count)
    of = _by_group(torch.ones(len(totals)) if counts is None else counts, groups, count)
    return lambda weights: (weights @ sums / (weights @ of)).item()


def likeness(generated: Tensor, real: Tensor, groups: Tensor, groups_real: Tensor) -> Tensor:
    """[n] mean cosine of each generated picture to the real ones of its identity: CLIP-I and DINO, whose mean over
    pictures is that over pairs where all have as many (Ruiz et al. 2023, section 4.1).

    Args:
        generated, real: features [n, d], [m, d].
        groups, groups_real: [n], [m] int64, whom each shows; NaN for whom no real picture shows.
    """
    cosines = normalize(generated.double(), dim=1) @ normalize(real.double(), dim=1).T
    same = (groups[:, None] == groups_real).double()
    return (cosines * same).sum(1) / same.sum(1)


def likeness_among(real: Tensor, groups: Tensor) -> Tensor:
    """[m] mean cosine of each picture to the others of its identity: what a perfect method would reach; NaN for the only
    one."""
    cosines = normalize(real.double(), dim=1)
    same = (groups[:, None] == groups).double().fill_diagonal_(0)
    return (cosines @ cosines.T * same).sum(1) / same.sum(1)


def likeness_to_others(generated: Tensor, real: Tensor, groups: Tensor, groups_real: Tensor) -> Tensor:
    """[n] mean cosine of each generated picture to the real ones of all other identities, each of which counts alike."""
    cosines = normalize(generated.double(), dim=1) @ normalize(real.double(), dim=1).T
    members = one_hot(groups_real).double()
    by_identity = cosines @ (members / members.sum(0).clamp(min=1))
    other = (members.sum(0) > 0) & (groups[:, None] != torch.arange(members.shape[1]))
    return (by_identity * other).sum(1) / other.sum(1)


def identity_logits(generated: Tensor, real: Tensor, groups_real: Tensor, scale: float) -> Tensor:
    """[n, identities] logits of who a picture shows, for `score_by_group`: cosine to the middle of each identity's real
    pictures times the `scale` that the features were trained with (a nearest class mean; Snell et al. 2017, equation 2).

    Args:
        generated, real: features [n, d], [m, d].
        groups_real: [m] int64, of 0 to identities - 1, each of which has a picture.
    """
    middles = _by_group(normalize(real.double(), dim=1), groups_real, int(groups_real.max()) + 1)
    return scale * normalize(generated.double(), dim=1) @ normalize(middles, dim=1).T


def paired_cosines(pictures: Tensor, texts: Tensor) -> Tensor:
    """[n] cosine of each picture's features [n, d] and its prompt's: CLIP-T is their mean."""
    return (normalize(pictures.double(), dim=1) * normalize(texts.double(), dim=1)).sum(1)
