"""Learn a new word (Textual Inversion): a file of a few kilobytes, for looks and styles rather than details.

    python -m training.textual_inversion --pretrained_model_name_or_path MODEL --instance_data_dir PICTURES \\
        --output_dir FOLDER

Only the vectors of the new word train (Gal et al. 2022); in ComfyUI's prompts it is called as embedding:NAME.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base_model import BaseModel
from .conditioning import Conditioning
from .methods import PRECISIONS, text_modules
from .options import TextualInversion
from .settings import Settings
from .shared import (
    About,
    LearnedWord,
    PersonalizeError,
    call_of,
    read_safetensors,
    read_word,
    title_of,
    word_tensors,
    write_safetensors,
)

NOISE = 0.1  # of the vectors' size, so that several that start from one word are not the same


class TextualInversionMethod:
    """A learned word in each text encoder."""

    name = "textual_inversion"
    conditioning: Conditioning | None = None

    def __init__(self, base: BaseModel, settings: Settings):
        self.base, self.settings = base, settings
        options: TextualInversion = settings.method
        self.tokens = [f"<learned-{i}>" for i in range(options.num_vectors)]
        base.pipeline.unet.requires_grad_(False)
        self.words = add_words(base, self.tokens, lambda tokenizer, table: self._start(tokenizer, table, options))
        names = [f"{name}.vectors" for name, _ in text_modules(base)]
        vectors = [word.vectors for word in self.words]
        self.trains_text, self.writes_all = True, False
        self.groups = [{"params": vectors, "lr": settings.rate, "names": names, "weight_decay": 0.0, "words": True}]

    def _start(self, tokenizer, table, options: TextualInversion) -> torch.Tensor:
        text = options.initializer_token or self.settings.data.class_name
        known = tokenizer(text, add_special_tokens=False).input_ids
        if not known:
            raise PersonalizeError(f"initializer_token is {text!r}, which the tokenizer reads as nothing: use a word.")
        rows = table.weight.detach()[[known[i % len(known)] for i in range(options.num_vectors)]].float().cpu()
        generator = torch.Generator().manual_seed(self.settings.training.seed)
        noise = torch.randn(rows.shape, generator=generator) * rows.std(dim=1, keepdim=True) * NOISE
        first = torch.arange(options.num_vectors)[:, None] < len(known)
        return torch.where(first, rows, rows + noise).to(table.weight.device)

    def spoken(self, text: str) -> str:
        """The trigger becomes the word's tokens."""
        return call_of(self.settings.data.trigger).sub("".join(self.tokens), text)

    def write(self, folder: Path, name: str, about: About) -> list[Path]:
        """NAME.safetensors."""
        path, dtype = folder / f"{name}.safetensors", PRECISIONS[self.settings.output.save_precision]
        tensors = word_tensors([word.vectors.detach().cpu().to(dtype) for word in self.words])
        write_safetensors(path, tensors, about.as_metadata())
        widths = [word.table.embedding_dim for word in self.words]
        read_word(read_safetensors(path)[0], widths, path.name, title_of(self.base.family))
        return [path]


def add_words(
    base: BaseModel, tokens: Sequence[str], start: Callable[[Any, nn.Embedding], Tensor]
) -> list[LearnedWord]:
    """Give each text encoder, frozen, tokens with vectors that are learned.

    Args:
        base: whose tokenizers and text encoders are changed in place.
        tokens: n new ones.
        start: of a tokenizer and its encoder's embedding what the vectors start as, [n, width].
    """
    words = []
    for tokenizer, (_, encoder) in zip(base.tokenizers, text_modules(base), strict=True):
        encoder.requires_grad_(False)
        table = encoder.get_input_embeddings()
        rows = start(tokenizer, table)
        tokenizer.add_tokens(list(tokens))
        words.append(LearnedWord(table, tokenizer.convert_tokens_to_ids(list(tokens)), rows))
        encoder.set_input_embeddings(words[-1])
        find_the_end(encoder, tokenizer.eos_token_id)
    return words


def find_the_end(encoder, end: int) -> None:
    """Old configurations let the encoder take the largest id for the end of the text, which a new word's would be."""
    encoder.config.eos_token_id = end
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = end


if __name__ == "__main__":
    from .run import main

    sys.exit(main("textual_inversion", __doc__))
