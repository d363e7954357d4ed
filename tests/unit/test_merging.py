"""The closed form of Custom Diffusion's merge against its own definition."""

import pytest
import torch
from pack.models.errors import PersonalizeError
from pack.models.merging import Merging

IN, OUT = 48, 20


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def features(rows, seed, kind="plain"):
    """Of captions: also such as lie along few directions, or are nearly alike."""
    if kind == "few directions":
        return numbers(rows, 7, seed=seed) @ numbers(7, IN, seed=99)
    scales = torch.logspace(0, -5, IN, dtype=torch.float64) if kind == "anisotropic" else 1
    return numbers(rows, IN, seed=seed) * scales + (30 if kind == "anisotropic" else 0)


@pytest.mark.parametrize("kind", ["plain", "few directions", "anisotropic"])
@pytest.mark.parametrize("rows", [200, 12])
def test_every_word_gives_what_its_concept_gives(kind, rows):
    words = [features(4, 10 + i, "anisotropic" if kind == "anisotropic" else "plain") for i in range(3)]
    base, trained = numbers(OUT, IN), [numbers(OUT, IN, seed=i) for i in (1, 2, 3)]
    merged, missed = Merging(features(rows, 5, kind), words)(base, trained)
    assert missed < 1e-8
    for own, one in zip(words, trained, strict=True):
        wanted = own @ one.T
        assert ((own @ merged.T - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 1e-8


def test_it_is_the_equation_where_that_can_be_computed():
    k, t = features(300, 5), [features(3, 6), features(2, 7)]
    base, trained = numbers(OUT, IN), [numbers(OUT, IN, seed=i) for i in (1, 2)]
    merged, _ = Merging(k, t)(base, trained)
    rows, v = torch.cat(t), torch.cat([own @ one.T for own, one in zip(t, trained, strict=True)])
    d = rows @ torch.linalg.inv(k.T @ k)
    expected = base + (v.T - base @ rows.T) @ torch.linalg.inv(d @ rows.T) @ d
    torch.testing.assert_close(merged, expected, rtol=1e-7, atol=1e-9)


def test_what_it_changes_of_everyday_captions_is_the_least():
    """Any other matrix that gives the words what they want changes the captions more."""
    k, t = features(300, 5), [features(3, 6)]
    base, trained = numbers(OUT, IN), [numbers(OUT, IN, seed=1)]
    merged, _ = Merging(k, t)(base, trained)
    free = torch.eye(IN, dtype=torch.float64) - torch.linalg.pinv(t[0]) @ t[0]
    change = ((merged - base) @ k.T).norm()
    for seed in range(20):
        other = merged + 0.1 * numbers(OUT, IN, seed=seed) @ free
        torch.testing.assert_close(t[0] @ other.T, t[0] @ merged.T)
        assert ((other - base) @ k.T).norm() > change


def test_untrained_concepts_change_nothing():
    base = numbers(OUT, IN).half()
    merged, missed = Merging(features(100, 5), [features(3, 6), features(2, 7)])(base, [base, base])
    torch.testing.assert_close(merged, base.double(), rtol=0, atol=1e-12)
    assert missed < 1e-12


def test_words_of_two_concepts_are_heard_once_from_the_first():
    shared = features(1, 8)
    t = [torch.cat([shared, features(2, 6)]), torch.cat([shared, features(2, 7)])]
    base, trained = numbers(OUT, IN), [numbers(OUT, IN, seed=i) for i in (1, 2)]
    merged, missed = Merging(features(100, 5), t)(base, trained)
    assert missed < 1e-8
    torch.testing.assert_close(shared @ merged.T, shared @ trained[0].T)
    torch.testing.assert_close(t[1][1:] @ merged.T, t[1][1:] @ trained[1].T)


def test_wishes_that_contradict_each_other_are_told():
    """Two words that are multiples of each other cannot give two unrelated things."""
    one = features(1, 6)
    base, trained = numbers(OUT, IN), [numbers(OUT, IN, seed=i) for i in (1, 2)]
    assert Merging(features(100, 5), [one, 2 * one])(base, trained)[1] > 0.1


def test_what_is_wrong_is_said():
    for words in ([], [features(3, 6), torch.zeros(0, IN)]):
        with pytest.raises(PersonalizeError, match="A concept has no words"):
            Merging(features(10, 5), words)
    with pytest.raises(PersonalizeError, match=r"widths \[5, 48\]: they are of different text encoders"):
        Merging(features(10, 5), [numbers(3, 5)])
