"""Words of a prompt and their tokens."""

import pytest
import torch
from pack.models.errors import PersonalizeError
from pack.models.words import find_words, parse_words, places_of

VECTOR = torch.ones(4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat dog", ["cat", "dog"]),
        ("cat, dog\nbowl,,", ["cat", "dog", "bowl"]),
        ('cat, "yellow bowl" hat', ["cat", "yellow bowl", "hat"]),
        ("“yellow bowl”, cat", ["yellow bowl", "cat"]),
        ("cat cat", ["cat"]),
        ("embedding:dog ohwx", ["embedding:dog", "ohwx"]),
        ("  ", []),
        ("it's", ["it's"]),
    ],
)
def test_words(text, words):
    assert parse_words(text) == words


@pytest.mark.parametrize(("text", "sentence"), [('cat, "yellow bowl', "no end"), ('cat, ""', "nothing between")])
def test_quotes_that_hold_nothing(text, sentence):
    with pytest.raises(PersonalizeError, match=sentence):
        parse_words(text)


@pytest.mark.parametrize(
    ("phrase", "places"),
    [
        ([5], [[1], [4]]),
        ([5, 6], [[1, 2]]),
        ([7], []),
        ([], []),
        ([VECTOR], [[5]]),
        ([5, VECTOR], [[4, 5]]),
        ([9] * 9, []),
    ],
)
def test_places(phrase, places):
    assert places_of([0, 5, 6, 8, 5, VECTOR, 9], phrase) == places


def test_words_that_are_not_there_are_told_with_those_that_are():
    assert find_words([0, 5, 6, 5, 1], {"a": [5], "b": [6]}, ["a", "b", "a"]) == [[1], [3], [2]]
    with pytest.raises(PersonalizeError, match=r'"dog" is not in the prompt, whose words are: a, cat\.'):
        find_words([0, 5, 6, 1], {"cat": [6], "dog": [7]}, ["a", "cat", "a"])
    with pytest.raises(PersonalizeError, match='"dog" and "red hat" are not'):
        find_words([0, 5, 6, 1], {"dog": [7], "red hat": [8, 9]}, ["a"])
