"""What users write into a line: words of a prompt, and which of its tokens they are; numbers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .errors import PersonalizeError

TRIGGER = "ohwx"
"""What calls a subject where nobody chose a word: a rare one, of which the models know nothing."""
_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”|([^\s,"“”]+)')


def parse_words(text: str) -> list[str]:
    """`cat, "yellow bowl" hat` -> cat; yellow bowl; hat. Blanks, commas and lines part words, quotes hold phrases together.

    Raises:
        PersonalizeError: a quote without its end, or with nothing in it.
    """
    if text.count('"') % 2 or text.count("“") != text.count("”"):
        raise PersonalizeError(f'A quote has no end in {text.strip()!r}: write for example cat, "yellow bowl".')
    words = ["".join(groups).strip() for groups in _QUOTED.findall(text)]
    if not all(words):
        raise PersonalizeError(
            f'There is nothing between two quotes in {text.strip()!r}: write for example "yellow bowl".'
        )
    return list(dict.fromkeys(words))


def words_in(prompt: str) -> list[str]:
    """A prompt's words, without the marks around them."""
    return [word for word in (part.strip(".,;:!?\"'()") for part in prompt.split()) if word]


def call_of(word: str) -> re.Pattern[str]:
    """Where a text has it as a word, or as words, of its own."""
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")


def parse_numbers(text: str, example: str) -> list[float]:
    """Weights parted by commas, semicolons or blanks.

    Raises:
        PersonalizeError: one is no number.
    """
    try:
        return [float(item) for item in text.replace(",", " ").replace(";", " ").split()]
    except ValueError:
        raise PersonalizeError(
            f'The weights "{text.strip()}" are not numbers: write for example "{example}".'
        ) from None


def _same(one: Any, other: Any) -> bool:
    """Tokens are numbers, or vectors where a learned word is called."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        return both and one.shape == other.shape and bool(torch.equal(one, other))
    return one == other


def places_of(prompt: Sequence[Any], phrase: Sequence[Any]) -> list[list[int]]:
    """Where the tokens of a phrase stand in those of a prompt: the places of its tokens, every time it comes."""
    last = len(prompt) - len(phrase)
    starts = [i for i in range(last + 1) if all(_same(prompt[i + j], token) for j, token in enumerate(phrase))]
    return [list(range(i, i + len(phrase))) for i in starts] if phrase else []


def find_words(prompt: Sequence[Any], phrases: Mapping[str, Sequence[Any]], listed: Sequence[str]) -> list[list[int]]:
    """The places of each word or phrase, every time it comes as one of its own.

    Args:
        prompt: tokens, those that begin and end the text counted.
        phrases: the tokens of each word or phrase alone, without those.
        listed: the prompt's words, for the message.

    Raises:
        PersonalizeError: one is not in the prompt.
    """
    found = {name: places_of(prompt, tokens) for name, tokens in phrases.items()}
    if missing := [name for name, places in found.items() if not places]:
        which = " and ".join(f'"{name}"' for name in missing)
        words = ", ".join(dict.fromkeys(listed)) or "none"
        raise PersonalizeError(
            f"{which} {'is' if len(missing) == 1 else 'are'} not in the prompt, whose words are: {words}."
        )
    return [place for places in found.values() for place in places]
