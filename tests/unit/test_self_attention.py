"""Self-attention over the references: as average pooling until it is trained, and a function of a weighted set after."""

import pytest
import torch
from pack.models.aggregation import AGGREGATIONS, SelfAttentionAggregator
from pack.models.errors import PersonalizeError
from pack.models.ip_adapter import IPAdapter, read_ip_adapter
from pack.models.references import References
from structural.adapters import random_adapter, save_adapter

SHAPES = {"base": (1, 96), "plus, patches": (257, 64), "plus, tokens": (16, 48)}  # tokens a picture, width
VARIANTS = {"base": ("base", 1024, "features"), "plus": ("plus", 1280, "tokens"), "patches": ("plus", 1280, "features")}


def made(width, gate=True, inner=32, heads=4, depth=2):
    torch.manual_seed(0)
    aggregator = SelfAttentionAggregator(width, inner, heads, depth).requires_grad_(False)
    if gate:
        aggregator.gate.copy_(torch.randn(width))
    return aggregator


def features_of(n, tokens, width):
    return torch.randn(n, tokens, width, generator=torch.Generator().manual_seed(1))


def references(n, pooled=1024, patches=1280, tokens=5):
    generator = torch.Generator().manual_seed(3)
    features = [torch.randn(n, *size, generator=generator) for size in ((pooled,), (tokens, patches))]
    return References(*features, torch.zeros(tokens, patches), torch.ones(n), tuple(f"{i}.png" for i in range(n)))


def with_aggregator(kind, width, stage, gate=True):
    """An adapter's tensors, and the aggregator in them."""
    state = random_adapter(kind, width, 768, [8] * 4)
    aggregator = made(width if stage == "features" else 768, gate, inner=64)
    state["aggregator"] = {f"{stage}.{name}": value for name, value in aggregator.state_dict().items()}
    return state, aggregator


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64])
@pytest.mark.parametrize("kind", SHAPES)
def test_untrained_it_is_average_pooling_bit_for_bit(kind, n):
    tokens, width = SHAPES[kind]
    features, weights = features_of(n, tokens, width), torch.rand(n) + 0.5
    result, left = made(width, gate=False).aggregate(features, weights)
    assert torch.equal(result, AGGREGATIONS["average"](features, weights)[0])
    assert left.tolist() == [1]


@pytest.mark.parametrize("n", [2, 5, 64])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_order_of_the_references_means_nothing(kind, n):
    tokens, width = SHAPES[kind]
    aggregator, features, weights = made(width), features_of(n, tokens, width), torch.rand(n) + 0.5
    expected = aggregator.aggregate(features, weights)[0]
    assert not torch.allclose(expected, AGGREGATIONS["average"](features, weights)[0], atol=0.1)
    order = torch.randperm(n)
    assert (aggregator.aggregate(features[order], weights[order])[0] - expected).abs().max() < 1e-6 * (
        1 + expected.abs().max()
    )


@pytest.mark.parametrize("kind", SHAPES)
def test_weight_two_is_the_reference_twice(kind):
    tokens, width = SHAPES[kind]
    aggregator, features = made(width), features_of(4, tokens, width)
    weighted = aggregator.aggregate(features, torch.tensor([2.0, 1, 1, 0.5]))[0]
    doubled = aggregator.aggregate(torch.cat((features[:1], features)), torch.tensor([1.0, 1, 1, 1, 0.5]))[0]
    assert (weighted - doubled).abs().max() < 1e-6 * (1 + weighted.abs().max())


@pytest.mark.parametrize("kind", SHAPES)
def test_padding_changes_nothing(kind):
    tokens, width = SHAPES[kind]
    aggregator, features = made(width), features_of(6, tokens, width)
    batch, weights = features.expand(2, -1, -1, -1).clone(), torch.ones(2, 6)
    weights[0, 2:] = 0
    batch[0, 2:] = torch.nan  # whatever stands there
    both = aggregator(batch, weights)
    for row, n in enumerate((2, 6)):
        alone = aggregator.aggregate(features[:n], torch.ones(n))[0][0]
        assert (both[row] - alone).abs().max() < 1e-6 * (1 + alone.abs().max())


def test_a_single_reference_can_be_changed_too():
    aggregator, one = made(96), features_of(1, 1, 96)
    assert not torch.allclose(aggregator.aggregate(one, torch.ones(1))[0], one, atol=0.1)


def test_what_a_head_looks_at_sums_to_one_and_follows_the_weights():
    aggregator, features = made(96), features_of(5, 1, 96)
    shares = aggregator.attended(features, torch.ones(5))
    assert shares.shape == (4, 5)
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    heavy = aggregator.attended(features, torch.tensor([1e6, 1, 1, 1, 1]))
    assert (heavy[:, 0] > 0.999).all()


def test_what_it_looks_at_is_what_the_pooling_uses():
    aggregator, features = made(96, depth=0), features_of(5, 1, 96)
    aggregator.pool.to_k.weight.mul_(30)  # so that each head looks at few
    shares = aggregator.attended(features, torch.ones(5)).sum(0)
    whole = aggregator.aggregate(features, torch.ones(5))[0] - features.mean(0)

    def change_without(i):
        weights = torch.ones(5)
        weights[i] = 1e-6
        return (aggregator.aggregate(features, weights)[0] - features.mean(0) - whole).abs().mean()

    assert change_without(shares.argmin()) < change_without(shares.argmax())


def test_gradients_reach_every_weight_once_the_gate_is_open():
    aggregator = made(48).requires_grad_(True)
    aggregator(features_of(3, 16, 48)[None], torch.ones(1, 3)).square().mean().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in aggregator.parameters())


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="a width of 10 does not divide into 4 heads"):
        SelfAttentionAggregator(8, 10, 4, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_a_file_and_back(variant, tmp_path):
    kind, width, stage = VARIANTS[variant]
    state, aggregator = with_aggregator(kind, width, stage)
    adapter = IPAdapter.from_state(read_ip_adapter(save_adapter(state, tmp_path / "a.safetensors")))
    given = references(3)
    prompt = adapter.image_prompt(given, "self-attention", "before projection")
    features = given.pooled[:, None] if kind == "base" else given.patches
    if stage == "features":
        tokens = adapter.tokens(aggregator.aggregate(features, torch.ones(3))[0])
    else:
        tokens = aggregator.aggregate(adapter.tokens(features), torch.ones(3))[0]
    torch.testing.assert_close(prompt.keys[0], tokens[0] @ state["ip_adapter"]["1.to_k_ip.weight"].T)
    assert prompt.bias is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_untrained_in_an_adapter_it_gives_the_averages_image_prompt(variant):
    kind, width, stage = VARIANTS[variant]
    adapter = IPAdapter.from_state(with_aggregator(kind, width, stage, gate=False)[0])
    given = references(4).with_weights([1, 2, 0, 0.5])
    pooling = "before projection" if stage == "features" else "after projection"
    ours, average = adapter.image_prompt(given, "self-attention"), adapter.image_prompt(given, "average", pooling)
    for a, b in zip((*ours.keys, *ours.values), (*average.keys, *average.values), strict=True):
        assert torch.equal(a, b)


def test_other_aggregations_work_with_such_a_file():
    state, _ = with_aggregator("base", 1024, "features")
    given = references(3)
    plain = IPAdapter.from_state({part: state[part] for part in ("image_proj", "ip_adapter")})
    for name in AGGREGATIONS:
        a, b = (adapter.image_prompt(given, name) for adapter in (IPAdapter.from_state(state), plain))
        assert torch.equal(a.keys[0], b.keys[0])


def test_shares_of_references_that_are_left_out_are_zero():
    adapter = IPAdapter.from_state(with_aggregator("base", 1024, "features")[0])
    shares = adapter.attended(references(3).with_weights([1, 0, 1]))
    assert (shares[:, 1] == 0).all()
    torch.testing.assert_close(shares.sum(1), torch.ones(4))


def test_a_file_without_says_so():
    adapter = IPAdapter.from_state(random_adapter("base", 1024, 768, [8] * 4))
    for ask in (lambda: adapter.image_prompt(references(2), "self-attention"), lambda: adapter.attended(references(2))):
        with pytest.raises(PersonalizeError, match=r"has no self-attention.*choose concatenate.*training\.ip_adapter"):
            ask()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.pop("features.pool.to_q.weight"), "incomplete aggregator"),
        (lambda tensors: tensors.pop("features.heads"), "incomplete aggregator"),
        (lambda tensors: tensors.update({"features.gate": torch.zeros(7)}), "incomplete aggregator"),
        (lambda tensors: tensors.update({"features.heads": torch.tensor(5)}), "does not divide into 5 heads"),
        (
            lambda tensors: [tensors.update({k.replace("features", "pixels"): tensors.pop(k)}) for k in list(tensors)],
            r"unknown kind \(pixels\)",
        ),
    ],
)
def test_damaged_aggregators_are_named(change, sentence, tmp_path):
    state, _ = with_aggregator("base", 1024, "features")
    change(state["aggregator"])
    with pytest.raises(PersonalizeError, match=rf"broken\.safetensors.*{sentence}"):
        read_ip_adapter(save_adapter(state, tmp_path / "broken.safetensors"))


def test_an_aggregator_of_another_adapter_is_told():
    state, _ = with_aggregator("base", 1280, "features")
    other = random_adapter("base", 1024, 768, [8] * 4) | {"aggregator": state["aggregator"]}
    with pytest.raises(PersonalizeError, match="aggregator of width 1280, features of width 1024"):
        IPAdapter.from_state(other)


@pytest.mark.parametrize(("name", "value"), [("heads", 0), ("heads", -8), ("gate", torch.nan)])
def test_weights_that_are_none_are_not_taken(name, value):
    state = {key: tensor.clone() for key, tensor in made(96).state_dict().items()}
    state[name].fill_(value)
    with pytest.raises(ValueError, match="heads, or weights that are no numbers"):
        SelfAttentionAggregator.from_tensors(state)
