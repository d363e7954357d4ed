"""The tokenizer built from the merges alone."""

import pytest
from pack.training.clip_tokenizer import clip_tokenizer

# Of openai/clip-vit-large-patch14.
KNOWN = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "A Smiling woman, 42!!": [320, 9200, 2308, 267, 275, 273, 748],
    "": [],
}


@pytest.mark.parametrize("text", KNOWN)
def test_known_texts(text):
    tokens = clip_tokenizer()(text, padding="max_length", truncation=True).input_ids
    assert tokens == [49406, *KNOWN[text], *[49407] * (76 - len(KNOWN[text]))]


def test_words_that_one_learns_are_not_in_another():
    first = clip_tokenizer()
    first.add_tokens(["<learned-0>"])
    assert len(first) == 49409
    assert len(clip_tokenizer()) == 49408
    assert clip_tokenizer("!")("a", padding="max_length").input_ids == [49406, 320, 49407, *[0] * 74]


def test_the_size_and_the_length():
    assert len(clip_tokenizer()) == 49408
    assert len(clip_tokenizer()("cat " * 200, truncation=True).input_ids) == 77
