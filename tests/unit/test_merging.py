"""The closed form of Custom Diffusion's merge against its own definition."""

import pytest
import torch
from pack.models.errors import PersonalizeError
from pack.models.merging import Merging, check_parts, merge_changes, read_captions

IN, OUT = 48, 20


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def features(rows, seed, kind="plain"):
    """Of captions: also such as lie along few directions, or are nearly alike."""
    if kind == "few directions":
        return numbers(rows, 7, seed=seed) @ numbers(7, IN, seed=99)
    scales = torch.logspace(0, -5, IN, dtype=torch.float64) if kind == "anisotropic" else 1
    return numbers(rows, IN, seed=seed) * scales + (30 if kind == "anisotropic" else 0)


def merge(k, t, base, trained):
    """W, and by how much it misses."""
    merging = Merging(k, t)
    wanted = merging.wanted(trained)
    merged = merging(base, wanted)
    return merged, merging.missed(merged, wanted)


@pytest.mark.parametrize("kind", ["plain", "few directions", "anisotropic"])
@pytest.mark.parametrize("rows", [200, 12])
def test_every_word_gives_what_its_concept_gives(kind, rows):
    words = [features(4, 10 + i, "anisotropic" if kind == "anisotropic" else "plain") for i in range(3)]
    base, trained = numbers(OUT, IN), [numbers(OUT, IN, seed=i) for i in (1, 2, 3)]
    merged, missed = merge(features(rows, 5, kind), words, base, trained)
    assert missed < 1e-8
    for own, one in zip(words, trained, strict=True):
        wanted = own @ one.T
        assert ((own @ merged.T - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 1e-8


def test_it_is_the_equation_where_that_can_be_computed():
    k, t = features(300, 5), [features(3, 6), features(2, 7)]
    base, trained = numbers(OUT, IN), [numbers(OUT, IN, seed=i) for i in (1, 2)]
    merged, _ = merge(k, t, base, trained)
    rows, v = torch.cat(t), torch.cat([own @ one.T for own, one in zip(t, trained, strict=True)])
    d = rows @ torch.linalg.inv(k.T @ k)
    expected = base + (v.T - base @ rows.T) @ torch.linalg.inv(d @ rows.T) @ d
    torch.testing.assert_close(merged, expected, rtol=1e-7, atol=1e-9)


def test_what_it_changes_of_everyday_captions_is_the_least():
    """Any other matrix that gives the words what they want changes the captions more."""
    k, t = features(300, 5), [features(3, 6)]
    base, trained = numbers(OUT, IN), [numbers(OUT, IN, seed=1)]
    merged, _ = merge(k, t, base, trained)
    free = torch.eye(IN, dtype=torch.float64) - torch.linalg.pinv(t[0]) @ t[0]
    change = ((merged - base) @ k.T).norm()
    for seed in range(20):
        other = merged + 0.1 * numbers(OUT, IN, seed=seed) @ free
        torch.testing.assert_close(t[0] @ other.T, t[0] @ merged.T)
        assert ((other - base) @ k.T).norm() > change


def test_untrained_concepts_change_nothing():
    base = numbers(OUT, IN).half()
    merged, missed = merge(features(100, 5), [features(3, 6), features(2, 7)], base, [base, base])
    torch.testing.assert_close(merged, base.double(), rtol=0, atol=1e-12)
    assert missed < 1e-12


def test_words_of_two_concepts_are_heard_once_from_the_first():
    shared = features(1, 8)
    t = [torch.cat([shared, features(2, 6)]), torch.cat([shared, features(2, 7)])]
    base, trained = numbers(OUT, IN), [numbers(OUT, IN, seed=i) for i in (1, 2)]
    merged, missed = merge(features(100, 5), t, base, trained)
    assert missed < 1e-8
    torch.testing.assert_close(shared @ merged.T, shared @ trained[0].T)
    torch.testing.assert_close(t[1][1:] @ merged.T, t[1][1:] @ trained[1].T)


def test_wishes_that_contradict_each_other_are_told():
    """Two words that are multiples of each other cannot give two unrelated things."""
    one = features(1, 6)
    base, trained = numbers(OUT, IN), [numbers(OUT, IN, seed=i) for i in (1, 2)]
    assert merge(features(100, 5), [one, 2 * one], base, trained)[1] > 0.1


@pytest.mark.parametrize("apart", [0, 1e-12, 1e-6])
def test_words_that_are_alike_but_for_rounding_do_not_turn_everything_upside_down(apart):
    shared = features(3, 8)
    t = [torch.cat([shared, features(1, 6)]), torch.cat([shared * (1 + apart * numbers(3, IN)), features(1, 7)])]
    base, k = numbers(OUT, IN), features(100, 5)
    trained = [base + 0.1 * numbers(OUT, IN, seed=i) for i in (1, 2)]
    merging = Merging(k, t)
    merged, missed = merge(k, t, base, trained)
    assert len(merging.words) == 5
    assert missed < 1e-8
    assert merging.disturbed(merged - base, base) < 0.1


@pytest.mark.parametrize("kind", ["plain", "few directions", "anisotropic"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_changes_of_everyday_captions_is_told_as_it_is(kind, dtype):
    base, k = numbers(OUT, IN), features(200, 5, kind)
    t = [features(3, 10 + i, "anisotropic" if kind == "anisotropic" else "plain") for i in range(2)]
    trained = [base + 0.1 * numbers(OUT, IN, seed=i) for i in (1, 2)]
    merging = Merging(k, t)
    change = (merging(base, merging.wanted(trained)) - base).to(dtype)
    told = ((change.double() @ k.T).norm() / (base @ k.T).norm()).item()
    assert merging.disturbed(change, base) == pytest.approx(told, rel=1e-4, abs=1e-7)


def test_layers_are_merged_one_by_one_and_reported_as_they_are_rounded():
    k, t = features(100, 5), [features(2, 6), features(2, 7)]
    base = {name: numbers(OUT, IN, seed=i) for i, name in enumerate("ab")}
    concepts = [
        {"a": 0.1 * numbers(OUT, IN, seed=9), "b": 0.1 * numbers(OUT, IN, seed=8)},
        {"a": 0.1 * numbers(OUT, IN, seed=7)},
    ]
    seen = []
    exact = merge_changes(base.get, concepts, k, t, torch.float64, lambda names: seen.append(list(names)) or seen[-1])
    half = merge_changes(base.get, concepts, k, t, torch.float16)
    assert seen == [["a", "b"]]
    for name in "ab":
        trained = [base[name] + own.get(name, 0) for own in concepts]
        torch.testing.assert_close(base[name] + exact.changes[name], merge(k, t, base[name], trained)[0])
        assert torch.equal(half.changes[name], exact.changes[name].half())
    assert exact.missed < 1e-9
    assert 1e-6 < half.missed < 1e-3
    assert exact.disturbed == pytest.approx(half.disturbed, rel=1e-3)
    assert half.report.startswith(
        f"2 layers merged: on the concepts' words they miss their own by {half.missed:.1e} at most"
    )


def test_what_is_wrong_is_said():
    with pytest.raises(PersonalizeError, match="reads text features of width 48, but the text encoders give 9"):
        merge_changes(
            lambda _: numbers(OUT, IN), [{"a": numbers(OUT, IN)}], numbers(9, 9), [numbers(1, 9)], torch.float32
        )
    key = "lora_unet_x_attn2_to_k.weight"
    check_parts({"one": {key: 0}, "two": {key: 0}}, [["a dog"], ["a cat"]])
    with pytest.raises(PersonalizeError, match="one and two are both called by 'a dog': train one with another"):
        check_parts({"one": {key: 0}, "two": {key: 0}}, [["a dog"], ["a cat", "a dog"]])
    with pytest.raises(PersonalizeError, match="two names no words that call its concepts"):
        check_parts({"one": {key: 0}, "two": {key: 0}}, [["a dog"], []])
    with pytest.raises(PersonalizeError, match=r"lora_unet_x_attn2_to_q\.weight, which does not read the text"):
        check_parts({"one": {"lora_unet_x_attn2_to_q.weight": 0}}, [["a dog"]])
    for words in ([], [features(3, 6), torch.zeros(0, IN)]):
        with pytest.raises(PersonalizeError, match="A concept has no words"):
            Merging(features(10, 5), words)
    with pytest.raises(PersonalizeError, match=r"widths \[5, 48\]: they are of different text encoders"):
        Merging(features(10, 5), [numbers(3, 5)])


def test_captions_that_cannot_be_read(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("\n \n a cat \n\na dog\n")
    assert read_captions(path) == ["a cat", "a dog"]
    path.write_text(" \n\n")
    with pytest.raises(PersonalizeError, match=r"captions\.txt has no captions: write one into each line\.$"):
        read_captions(path)
    path.write_bytes(b"\xff\xfe\xfa")
    for gone in (path, tmp_path / "gone.txt"):
        with pytest.raises(PersonalizeError, match=rf"^The captions .*{gone.name} cannot be read \("):
            read_captions(gone)
