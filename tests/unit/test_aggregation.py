"""The training-free aggregations."""

import pytest
import torch
from pack.models.aggregation import AGGREGATIONS, log_weights, select_references
from pack.models.errors import PersonalizeError

FEATURES = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
ONES = torch.ones(5)


@pytest.mark.parametrize("name", ["average", "max"])
def test_order_does_not_matter_bit_for_bit(name):
    expected = AGGREGATIONS[name](FEATURES, ONES)[0]
    for seed in range(20):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(AGGREGATIONS[name](FEATURES[order], ONES)[0], expected)


@pytest.mark.parametrize("name", ["average", "max"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64])
def test_identical_references_equal_one(name, n):
    one = FEATURES[:1]
    features, weights = AGGREGATIONS[name](one.expand(n, -1, -1), torch.ones(n))
    assert torch.equal(features, one)
    assert weights.tolist() == [1]


def test_average_counts_weight_two_twice():
    weighted = AGGREGATIONS["average"](FEATURES, torch.tensor([2.0, 1, 1, 1, 1]))[0]
    doubled = AGGREGATIONS["average"](torch.cat((FEATURES[:1], FEATURES)), torch.ones(6))[0]
    torch.testing.assert_close(weighted, doubled)


def test_max_is_elementwise():
    assert torch.equal(AGGREGATIONS["max"](FEATURES, ONES)[0][0], FEATURES.max(dim=0).values)


def test_concatenate_keeps_every_reference():
    features, weights = AGGREGATIONS["concatenate"](FEATURES, ONES)
    assert torch.equal(features, FEATURES)
    assert torch.equal(weights, ONES)


def test_log_weights():
    assert log_weights(torch.full((3,), 0.7), 4) is None
    bias = log_weights(torch.tensor([2.0, 1.0]), 2)
    torch.testing.assert_close(bias, torch.tensor([2.0, 2.0, 1.0, 1.0]).log())


def test_weight_zero_leaves_a_reference_out():
    features, weights = select_references(FEATURES, torch.tensor([1.0, 0, 2, 0, 1]))
    assert torch.equal(features, FEATURES[[0, 2, 4]])
    assert weights.tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([], "no references"),
        ([0.0, 0.0], "All 2 reference weights are 0"),
        ([1.0, -1.0], "must be 0 or more, but they are 1, -1"),
        ([1.0, float("nan")], "nan"),
    ],
)
def test_bad_weights(weights, sentence):
    with pytest.raises(PersonalizeError, match=sentence):
        select_references(FEATURES[: len(weights)], torch.tensor(weights))
