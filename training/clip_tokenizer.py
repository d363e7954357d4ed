"""The tokenizer of CLIP, offline: 49,408 tokens, built from the merges alone.

`configs/clip_merges.txt` is OpenAI's byte-pair list (MIT licence).
"""

from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

MERGES = Path(__file__).parent / "configs" / "clip_merges.txt"
LENGTH = 77


END = "<|endoftext|>"


def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    """A new one each time, since who gets it may add words: 77 tokens, padded with `pad`.

    SD1.5 and SDXL's first encoder pad with the end, OpenCLIP's (SD2.x, SDXL's second) with "!", their first token.
    """
    merges = [tuple(line.split()) for line in MERGES.read_text(encoding="utf-8").splitlines()[1:]]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH, pad_token=pad)
