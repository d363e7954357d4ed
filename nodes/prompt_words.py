"""The words of a prompt, and which tokens of ComfyUI's CLIP they are."""

from collections.abc import Mapping, Sequence
from typing import Any

from comfy.sd1_clip import escape_important, token_weights, unescape_important

from ..models.attend_and_excite import WINDOW
from ..models.errors import PersonalizeError
from ..models.words import words_in


def tokens_of(tokenized: Mapping[str, Sequence[Sequence[tuple]]]) -> list[Any]:
    """A prompt's tokens, window after window, each with those that begin and end it and fill it up.

    Args:
        tokenized: as CLIP gives them; where there are several text encoders, they have the same tokens.

    Raises:
        PersonalizeError: it is not a CLIP of Stable Diffusion.
    """
    windows = next((tokenized[name] for name in ("l", "g", "h") if name in tokenized), None)
    if windows is None or any(len(window) != WINDOW for window in windows):
        raise PersonalizeError("The words of a prompt are known for the CLIP of SD1.5, SD2 and SDXL only.")
    return [token for window in windows for token, *_ in window]


def phrases_of(clip, phrases: Sequence[str]) -> dict[str, list[Any]]:
    """The tokens of each word or phrase alone, without those that begin, end and fill its window."""
    found = {}
    for phrase in phrases:
        tokens = tokens_of(clip.tokenize(phrase))
        found[phrase] = tokens[1 : end_of(clip, tokens)]
    return found


def end_of(clip, tokens: Sequence[Any]) -> int:
    """The place of the first token that ends a prompt's text."""
    end = tokens_of(clip.tokenize(""))[1]
    return next(i for i, token in enumerate(tokens) if isinstance(token, int) and token == end)


def words_of(prompt: str) -> list[str]:
    """A prompt's words, without weights and brackets."""
    plain = "".join(text for text, _ in token_weights(escape_important(prompt), 1.0))
    return words_in(unescape_important(plain))
