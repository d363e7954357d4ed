"""Composable Diffusion: the formula, and the prompts that are joined by AND and NOT."""

import pytest
import torch
from pack.models.composable_diffusion import Concept, compose, parse_concepts, parse_scales
from pack.models.errors import PersonalizeError

GOOD = {
    "a red cat": [("a red cat", 1)],
    "a red cat AND a blue dog": [("a red cat", 1), ("a blue dog", 1)],
    "a red cat AND a blue dog :0.8 AND NOT rain": [("a red cat", 1), ("a blue dog", 0.8), ("rain", -1)],
    "a red cat|a blue dog": [("a red cat", 1), ("a blue dog", 1)],
    "a red cat | NOT rain | snow:2": [("a red cat", 1), ("rain", -1), ("snow", 2)],
    "NOT rain": [("rain", -1)],
    "NOT rain :0.5": [("rain", -0.5)],
    "rain :-0.5": [("rain", -0.5)],
    "a cat:+1.5": [("a cat", 1.5)],
    "a cat : .5": [("a cat", 0.5)],
    "a cat :2.": [("a cat", 2)],
    "a cat :1e-1": [("a cat", 0.1)],
    "a cat :0": [("a cat", 0)],
    "  a cat \n AND\n a dog ": [("a cat", 1), ("a dog", 1)],
    "a (red:1.2) cat AND a dog": [("a (red:1.2) cat", 1), ("a dog", 1)],
    "a (red cat:1.2) :0.7": [("a (red cat:1.2)", 0.7)],
    "a screen of 16:9": [("a screen of 16:9", 1)],
    "a screen of 16:9 :2": [("a screen of 16:9", 2)],
    r"a face \:3 AND a cat": [("a face :3", 1), ("a cat", 1)],
    r"this \| that | a cat": [("this | that", 1), ("a cat", 1)],
    "cats and dogs": [("cats and dogs", 1)],
    "BRANDY AND SAND": [("BRANDY", 1), ("SAND", 1)],
    "a NOTE AND NOTHING": [("a NOTE", 1), ("NOTHING", 1)],
    "a sign that says NOT": [("a sign that says NOT", 1)],
    "title: a cat": [("title: a cat", 1)],
    "a sign: infinite": [("a sign: infinite", 1)],
    "a sign\\: nan": [("a sign: nan", 1)],
    "embedding:dog AND a cat": [("embedding:dog", 1), ("a cat", 1)],
    "ein Mädchen AND 一只猫 :2": [("ein Mädchen", 1), ("一只猫", 2)],
    "a AND b AND c AND d | e": [(letter, 1) for letter in "abcde"],
}
BAD = {
    "": "is empty",
    " \n ": "is empty",
    "a cat AND": "Concept 2",
    "AND a cat": "Concept 1",
    "a cat AND AND a dog": "Concept 2",
    "a cat | | a dog": "Concept 2",
    "a cat AND :0.5": "has no text",
    "a cat AND NOT": "has no text",
    "NOT :2": "has no text",
    "a cat AND a dog :": "ends with a colon",
    "NOT rain :-1": "NOT and a negative weight",
    "a cat :1e999": "must be finite",
    "a cat :nan": "Concept 1 of .* has the weight nan: it must be finite",
    "a cat AND NOT a dog : -Infinity": "NOT and a negative weight",
    "a cat AND a dog : Inf": "Concept 2 of .* has the weight inf: it must be finite",
}


@pytest.mark.parametrize("text", GOOD)
def test_concepts(text):
    assert parse_concepts(text) == [Concept(words, weight) for words, weight in GOOD[text]]


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_list_of_concepts(text):
    with pytest.raises(PersonalizeError, match=BAD[text]):
        parse_concepts(text)


def test_the_formula():
    negative, a, b = torch.randn(3, 2, 4, 6, 5, dtype=torch.float64).unbind()
    expected = negative + 7.5 * (a - negative) - 3 * (b - negative)
    torch.testing.assert_close(compose(negative, [a, b], [7.5, -3.0]), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(compose(negative, [a], [7.5]), negative + (a - negative) * 7.5)  # guidance, bit for bit
    assert torch.equal(compose(negative, [], []), negative)


@pytest.mark.parametrize(
    ("text", "weights"), [("", [1, 1, 1]), (" ", [1, 1, 1]), ("1, .8,-1", [1, 0.8, -1]), ("1;2 3", [1, 2, 3])]
)
def test_scales(text, weights):
    assert parse_scales(text, 3) == weights


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1, x, 2", "not numbers"),
        ("1 nan 1", "not finite"),
        ("1", "There is 1 weight for 3 concepts:"),
        ("1 2 3 4", "4"),
    ],
)
def test_what_are_no_scales(text, sentence):
    with pytest.raises(PersonalizeError, match=sentence):
        parse_scales(text, 3)
