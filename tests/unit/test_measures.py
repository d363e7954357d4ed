"""FID, KID, IS and cosines against torch-fidelity, against their definitions, and their intervals against simulation."""

import math

import numpy as np
import pytest
import torch
from pack.models.bootstrap import bootstrap, bootstrap_difference, resamples
from pack.models.measures import (
    Statistics,
    frechet_between_groups,
    frechet_by_group,
    frechet_distance,
    frechet_within_groups,
    identity_logits,
    inception_score,
    kernel_by_group,
    kernel_distance,
    likeness,
    likeness_among,
    likeness_to_others,
    mean_by_group,
    paired_cosines,
    same_span,
    score_between_groups,
    score_by_group,
    uniform_inception_score,
    uniform_score_by_group,
)

DOUBLE = torch.float64


def features(n, d, seed, shift=0.0):
    """[n, d] with correlated columns of very different size, as a network's."""
    made = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=DOUBLE) / d**0.5
    sizes = torch.logspace(0, -3, d, dtype=DOUBLE)
    return torch.randn(n, d, generator=made, dtype=DOUBLE) * sizes @ mixing + shift


def fid(a, b):
    return frechet_distance(Statistics.of(a), Statistics.of(b))


def exact_fid(a, b):
    """By the nuclear norm of X_a X_b^T, without any covariance: right however few rows there are."""
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    shared = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    traces = sum(x.square().sum() for x in centred)
    return ((a.mean(0) - b.mean(0)).square().sum() + traces - 2 * shared).item()


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 24), (2000, 500, 160)])
def test_fid_is_torch_fidelitys(n, m, d):
    metric = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = features(n, d, 1), features(m, d, 2, shift=0.1)
    theirs = metric.fid_statistics_to_metric(*map(metric.fid_features_to_statistics, (a, b)), False)
    assert fid(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert fid(a, b) == pytest.approx(exact_fid(a, b), rel=1e-7)


@pytest.mark.parametrize(("n", "m"), [(40, 30), (30, 400), (400, 30), (2, 3), (40, 40)])
def test_fid_of_fewer_pictures_than_features(n, m):
    a, b = features(n, 160, 1), features(m, 160, 2, shift=0.1)
    assert fid(a, b) == pytest.approx(exact_fid(a, b), rel=1e-7)
    assert fid(*same_span(a, b)) == pytest.approx(exact_fid(a, b), rel=1e-7)
    assert same_span(a, b)[0].shape[1] == min(160, n + m)


@pytest.mark.parametrize("n", [30, 161, 900])
def test_fid_to_itself_is_zero(n):
    a = features(n, 160, 1)
    assert abs(fid(a, a)) < 1e-6 * a.var(0).sum()


def test_fid_of_features_that_are_always_zero_or_alike():
    a, b = features(300, 40, 1), features(200, 40, 2, shift=0.1)
    for x in (a, b):
        x[:, ::3], x[:, 1] = 0, x[:, 2]
    assert fid(a, b) == pytest.approx(exact_fid(a, b), rel=1e-7)
    assert abs(fid(a, a)) < 1e-6 * a.var(0).sum()


def test_fid_of_known_normals():
    """Between normals of covariance 4 I and I, d apart in one direction: d² + k (2 - 1)²."""
    a, b = Statistics(torch.zeros(3), 4 * torch.eye(3), 100), Statistics(torch.tensor([0, 2.0, 0]), torch.eye(3), 100)
    assert frechet_distance(a, b) == pytest.approx(4 + 3, rel=1e-6)


@pytest.mark.parametrize("subsets", [1, 7])
def test_kid_is_torch_fidelitys(subsets):
    metric = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = features(120, 24, 1), features(90, 24, 2, shift=0.1)
    theirs = metric.kid_features_to_metric(a, b, kid_subsets=subsets, kid_subset_size=50, verbose=False)
    assert kernel_distance(a, b, subsets, 50) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)


def test_kid_of_all_pairs_is_the_unbiased_estimate():
    a, b = features(9, 5, 1), features(7, 5, 2, shift=0.3)

    def mean(x, y, same):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not same or i != j]
        return sum((x[i] @ y[j] / 5 + 1).item() ** 3 for i, j in pairs) / len(pairs)

    assert kernel_distance(a, b) == pytest.approx(mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False), rel=1e-9)
    # of the same distribution it is zero on average, whatever the number of pictures
    same = [kernel_distance(features(10, 5, i), features(20, 5, 1000 + i)) for i in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 300**0.5


@pytest.mark.parametrize("splits", [1, 10])
def test_is_is_torch_fidelitys(splits):
    metric = pytest.importorskip("torch_fidelity.metric_isc")
    logits = torch.randn(203, 12, generator=torch.Generator().manual_seed(1)) * 4
    theirs = metric.isc_features_to_metric(logits, splits=splits)
    ours = inception_score(logits, splits)
    assert ours.mean().item() == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours.std(correction=0).item() == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-12)


def test_the_uniform_prior_rewards_collapse_and_the_inception_score_does_not():
    classes = 8
    sure = 50 * torch.eye(classes)
    collapsed = sure[:1].repeat(classes, 1)
    assert inception_score(sure).item() == pytest.approx(classes, rel=1e-6)
    assert uniform_inception_score(sure) == pytest.approx(classes, rel=1e-6)
    assert inception_score(collapsed).item() == pytest.approx(1, rel=1e-6)
    assert uniform_inception_score(collapsed) == pytest.approx(classes, rel=1e-6)
    for seed in range(20):
        logits = torch.randn(30, classes, generator=torch.Generator().manual_seed(seed)) * seed / 4
        assert uniform_inception_score(logits) >= inception_score(logits).item() - 1e-9
    # every class as frequent as any other: the rows of a circulant
    row = torch.randn(classes, generator=torch.Generator().manual_seed(1))
    circulant = torch.stack([row.roll(i) for i in range(classes)])
    assert uniform_inception_score(circulant) == pytest.approx(inception_score(circulant).item(), rel=1e-9)


def test_over_identities_the_score_sees_who_is_shown():
    """The less a picture shows one of the set, the lower: strangers and one person again and again have 1."""
    own = torch.eye(6, dtype=DOUBLE)[:4][torch.arange(4).repeat_interleave(5)]
    whose, stranger = torch.arange(4).repeat_interleave(5), torch.eye(6, dtype=DOUBLE)[4].expand(20, 6)

    def logits(pictures):
        return identity_logits(pictures, 3 * own, whose, 12.0)

    def score(pictures):
        return inception_score(logits(pictures)).item()

    assert torch.allclose(logits(2 * own), 12 * own[:, :4], atol=1e-12)
    assert 3.99 < score(own) < 4
    assert score(own) > score(own + 2 * stranger) > score(own + 4 * stranger) > score(stranger)
    assert score(stranger) == pytest.approx(1)
    assert score(own[:1].expand(20, 6)) == pytest.approx(1)


def test_exchanged_identities_show_within_and_between_only():
    """Real pictures, each under the next identity's name or under any: FID of all is 0 and IS as high, but they are wrong."""
    whose = torch.arange(5).repeat_interleave(30)
    real = features(150, 8, 1) + 3 * features(5, 8, 2)[whose]
    logits = 9 * real
    ones = torch.ones(5, dtype=DOUBLE)
    for exchanged in (real.roll(30, 0), real[torch.randperm(150, generator=torch.Generator().manual_seed(3))]):
        assert abs(frechet_by_group(exchanged, whose, real, whose)(ones)) < 1e-6
        assert frechet_within_groups(exchanged, whose, real, whose)(ones) > 1
        assert inception_score(9 * exchanged).item() == pytest.approx(inception_score(logits).item())
    assert abs(frechet_between_groups(real.roll(30, 0), whose, real, whose)(ones)) < 1e-6
    assert score_between_groups(9 * real.roll(30, 0), whose)(ones) == pytest.approx(
        score_between_groups(logits, whose)(ones)
    )
    assert frechet_between_groups(exchanged, whose, real, whose)(ones) > 1  # the pictures of a name are a crowd
    assert score_between_groups(9 * exchanged, whose)(ones) < 0.8 * score_between_groups(logits, whose)(ones)


def test_measures_within_and_between_are_their_definitions():
    a, b = features(80, 6, 1), features(80, 6, 2, shift=0.5)
    parts = [i == GROUPS for i in range(3)]
    ones = torch.ones(3, dtype=DOUBLE)
    each = [exact_fid(a[part], b[part]) for part in parts]
    assert frechet_within_groups(a, GROUPS, b, GROUPS)(ones) == pytest.approx(np.mean(each), rel=1e-7)
    weighted = (2 * each[0] + each[2]) / 3
    assert frechet_within_groups(a, GROUPS, b, GROUPS)(WEIGHTS) == pytest.approx(weighted, rel=1e-7)
    means = [torch.stack([x[part].mean(0) for part in parts]) for x in (a, b)]
    assert frechet_between_groups(a, GROUPS, b, GROUPS)(ones) == pytest.approx(exact_fid(*means), rel=1e-6)
    p = (9 * a).softmax(1)
    groups = [p[part].mean(0) for part in parts]
    sizes = torch.stack([part.sum() for part in parts]) / 80

    def divergence(p, q):
        return (p * (p / q).log()).sum(-1)

    between = math.exp(sum(w * divergence(g, p.mean(0)) for w, g in zip(sizes, groups, strict=True)))
    within = math.exp(sum(divergence(p[part], g).sum() for part, g in zip(parts, groups, strict=True)) / 80)
    assert score_between_groups(9 * a, GROUPS)(ones) == pytest.approx(between, rel=1e-9)
    assert between * within == pytest.approx(inception_score(9 * a).item(), rel=1e-9)


def test_impossible_classes_are_no_nan():
    logits = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    assert inception_score(logits).item() == pytest.approx(2)
    assert uniform_inception_score(logits) == pytest.approx(2)


def test_cosines_are_means_over_pairs():
    real, generated = features(5, 8, 1), features(4, 8, 2)
    groups, groups_real = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1, 2])

    def cosine(a, b):
        return torch.nn.functional.cosine_similarity(a, b, dim=0).item()

    to_own = [[0, 1], [0, 1], [2, 3], [4]]
    expected = [np.mean([cosine(g, real[j]) for j in js]) for g, js in zip(generated, to_own, strict=True)]
    assert likeness(generated, real, groups, groups_real).tolist() == pytest.approx(expected)
    among = likeness_among(real, groups_real)
    assert among[:4].tolist() == pytest.approx([cosine(real[0], real[1])] * 2 + [cosine(real[2], real[3])] * 2)
    assert among[4].isnan()
    others = likeness_to_others(generated, real, groups, groups_real)
    of_first = [np.mean([cosine(generated[0], real[j]) for j in js]) for js in ([2, 3], [4])]
    assert others[0].item() == pytest.approx(np.mean(of_first))
    assert paired_cosines(generated, 3 * generated).tolist() == pytest.approx([1] * 4)


GROUPS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2] * 8)  # pictures of three identities
WEIGHTS = torch.tensor([2.0, 0.0, 1.0], dtype=DOUBLE)


def repeated(x):
    """The rows as often as WEIGHTS says."""
    return x.repeat_interleave(WEIGHTS[GROUPS].long(), 0)


@pytest.mark.parametrize("d", [6, 200], ids=["by sums", "by rows, in their span"])
def test_fid_by_group_is_fid_of_repeated_pictures(d):
    a, b = features(80, d, 1), features(80, d, 2, shift=2)
    both, one = (frechet_by_group(a, GROUPS, b, other)(WEIGHTS) for other in (GROUPS, None))
    assert both == pytest.approx(exact_fid(repeated(a), repeated(b)), rel=1e-7)
    assert one == pytest.approx(exact_fid(repeated(a), b), rel=1e-7)


def test_kid_by_group_has_no_pair_of_a_picture_and_itself():
    a, b = features(80, 6, 1), features(80, 6, 2, shift=0.5)
    ones = torch.ones(3, dtype=DOUBLE)
    assert kernel_by_group(a, GROUPS, b, GROUPS)(ones) == pytest.approx(kernel_distance(a, b), rel=1e-9)
    twice = torch.tensor([2.0, 2.0, 2.0], dtype=DOUBLE)
    rows = a.repeat(2, 1)
    kernel = (rows @ rows.T / 6 + 1) ** 3
    other = ~torch.eye(80, dtype=bool).repeat(2, 2)
    of_b = (b @ b.T / 6 + 1) ** 3
    between = (a @ b.T / 6 + 1) ** 3
    expected = kernel[other].mean() + of_b[~torch.eye(80, dtype=bool)].mean() - 2 * between.mean()
    assert kernel_by_group(a, GROUPS, b, None)(twice) == pytest.approx(expected.item(), rel=1e-9)


def test_scores_and_means_by_group():
    logits = features(80, 6, 1) * 9
    assert score_by_group(logits, GROUPS)(WEIGHTS) == pytest.approx(inception_score(repeated(logits)).item())
    assert uniform_score_by_group(logits, GROUPS)(WEIGHTS) == pytest.approx(uniform_inception_score(repeated(logits)))
    counts = (logits[:, 1] > 0).double()
    right = repeated(logits[:, 0]).sum() / repeated(counts).sum()
    assert mean_by_group(logits[:, 0], GROUPS, counts)(WEIGHTS) == pytest.approx(right.item())
    assert math.isnan(mean_by_group(0 * counts, GROUPS, 0 * counts)(WEIGHTS))


def identities(count, pictures, seed, spread=1.0, noise=0.3):
    """Values [count * pictures] whose true mean is 5, alike within an identity; and the groups."""
    rng = np.random.default_rng(seed)
    values = 5 + spread * rng.standard_normal((count, 1)) + noise * rng.standard_normal((count, pictures))
    return torch.from_numpy(values.ravel()), torch.arange(count).repeat_interleave(pictures)


def names(count):
    return [f"identity {i}" for i in range(count)]


def test_resamples_are_those_of_the_seed():
    one, again, other = (torch.stack(list(resamples(9, 5, seed))) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one.sum(1), torch.full((5,), 9.0, dtype=DOUBLE))
    assert torch.equal(torch.stack(list(resamples(9, 3, 1))), one[:3])


def test_intervals_cover_the_truth_because_identities_are_drawn():
    covered = {"identities": 0, "pictures": 0}
    for seed in range(150):
        values, groups = identities(25, 4, seed)
        for how, of in (("identities", groups), ("pictures", torch.arange(100))):
            low, high = bootstrap(names(int(of.max()) + 1), mean_by_group(values, of), 200, seed).interval
            covered[how] += low < 5 < high
    assert 0.87 < covered["identities"] / 150 < 0.99  # of 25 identities a percentile interval covers about 93 %
    assert covered["pictures"] / 150 < 0.75  # as if there were four times as many


def test_intervals_lie_around_measures_that_repetition_biases():
    groups = torch.arange(30).repeat_interleave(4)
    a, b = features(120, 10, 1), features(120, 10, 2)
    sure = 20 * torch.randn(120, 200, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))  # nearly all different
    for statistic, sign in ((frechet_by_group(a, groups, b, groups), 1), (score_by_group(sure, groups), -1)):
        estimate = bootstrap(names(30), statistic, 200)
        low, high = estimate.interval
        assert low < estimate.value < high
        assert sign * (estimate.draws.mean() - estimate.value) > (high - low) / 10  # where it would lie without moving


def test_an_interval_leaves_out_what_cannot_be():
    groups, x = torch.arange(30).repeat_interleave(4), features(120, 10, 1)
    alike = frechet_by_group(x, groups, x, (groups + 1) % 30)  # the same pictures, each under another name
    low, high = bootstrap(names(30), alike, 200).interval
    assert low < -0.01 < high
    assert bootstrap(names(30), alike, 200, least=0).interval == (0, high)


def test_differences_over_the_same_identities_are_narrower():
    values, groups = identities(30, 4, 1)
    better = values + 0.1 + 0.05 * torch.randn(120, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    one, two = (bootstrap(names(30), mean_by_group(x, groups), 500) for x in (values, better))
    (low, high), (low_1, high_1) = (estimate.interval for estimate in (bootstrap_difference(two, one), one))
    assert two.interval[0] < high_1  # side by side they cannot be told apart
    assert 0 < low < 0.1 < high < 0.2
    assert high - low < (high_1 - low_1) / 5
    (low, high) = bootstrap_difference(one, one).interval
    assert low == high == 0
    for other in (
        bootstrap(names(30), mean_by_group(values, groups), 500, seed=1),
        bootstrap(names(31)[1:], mean_by_group(values, groups), 500),
    ):
        with pytest.raises(ValueError, match="same identities"):
            bootstrap_difference(one, other)


def test_one_identity_says_nothing_of_others():
    estimate = bootstrap(["only"], mean_by_group(torch.ones(4), torch.zeros(4, dtype=torch.int64)))
    assert (estimate.value, estimate.interval) == (1.0, None)
