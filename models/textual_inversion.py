"""Textual Inversion (Gal et al. 2022, arXiv:2208.01618): a new word is a few learned vectors of the text encoder.

The file: `emb_params` [n, width] for one text encoder, `clip_l` [n, 768] and `clip_g` [n, 1280] for SDXL's two. ComfyUI
takes both as `embedding:name`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .errors import PersonalizeError

ONE, TWO = ("emb_params",), ("clip_l", "clip_g")


class LearnedWord(nn.Module):
    """A token embedding in whose place some ids have learned vectors; all other rows are the frozen table's.

    Args:
        table: the text encoder's token embedding, [vocabulary, width].
        ids: of the word's tokens, the first of them anywhere after the table's last row.
        vectors: [n, width], what they start as.
    """

    def __init__(self, table: nn.Embedding, ids: Sequence[int], vectors: Tensor):
        super().__init__()
        self.table = table
        self.first, self.count = ids[0], len(ids)
        if list(ids) != list(range(ids[0], ids[0] + len(ids))) or ids[0] < table.num_embeddings:
            raise ValueError(
                f"the ids of a learned word follow each other after the table's {table.num_embeddings} rows"
            )
        self.vectors = nn.Parameter(vectors.detach().clone().float())

    @property
    def weight(self) -> Tensor:
        """The table's, for code that asks for its type or device."""
        return self.table.weight

    @property
    def usual_norm(self) -> float:
        """Of the table's rows, their length on average."""
        return self.table.weight.detach().float().norm(dim=1).mean().item()

    def forward(self, ids: Tensor) -> Tensor:
        """[..., width] of ids [...]."""
        known = ids < self.first
        rows = self.table(torch.where(known, ids, torch.zeros_like(ids)))
        learned = nn.functional.embedding((ids - self.first).clamp(0, self.count - 1), self.vectors)
        return torch.where(known[..., None], rows, learned.to(rows.dtype))


def word_tensors(vectors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The file's tensors, of the vectors [n, width] for each text encoder."""
    return dict(zip(ONE if len(vectors) == 1 else TWO, vectors, strict=True))


def read_word(tensors: Mapping[str, Tensor], widths: Sequence[int], name: str, base: str) -> list[Tensor]:
    """The vectors for each text encoder from a file of any tool.

    Args:
        tensors: of the file: `emb_params`; `clip_l` and `clip_g`; or one tensor of any name, as diffusers writes it.
        widths: of the base's text encoders, such as (768,) or (768, 1280).
        name: the file's.
        base: what people call the base model.

    Raises:
        PersonalizeError: the file is for another base.
    """
    found = {key: value.reshape(-1, value.shape[-1]) for key, value in tensors.items() if value.ndim in (1, 2)}
    if not found:
        raise PersonalizeError(f"{name} is not a Textual Inversion: it has no [vectors, width] tensor.")
    keys = TWO if len(widths) == 2 else ("emb_params", "clip_l", *found)
    chosen = (
        [found[key] for key in TWO if key in found] if len(widths) == 2 else [found[k] for k in keys if k in found][:1]
    )
    if tuple(value.shape[1] for value in chosen) != tuple(widths):
        has = " and ".join(map(str, sorted({value.shape[1] for value in found.values()})[:3]))
        raise PersonalizeError(
            f"{name} has vectors of width {has}, but {base} needs {' and '.join(map(str, widths))}: "
            "it was made for another base model."
        )
    return chosen
