"""What the network is told in each step beside the caption, as the loop and the samples ask for it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from .dataset import Example


class Conditioning(Protocol):
    """Of a method that conditions on pictures."""

    material: dict[str, str]
    """Digests of what the training depends on beside base and pictures, by what it is."""

    def early_loss(self, examples: Sequence[Example], number: int, places: Sequence[int]) -> Tensor | None:
        """The loss of batch `number` where it needs no UNet, else None."""

    def tell(self, examples: Sequence[Example], number: int, places: Sequence[int]) -> list[bool]:
        """Tell the network about a batch; returns of each picture whether it gets its caption. Below 0 it is measured."""

    def loss_beside(self, examples: Sequence[Example], number: int, places: Sequence[int]) -> Tensor | None:
        """What is added to the noise's loss, if anything, after the UNet ran."""

    def showing(self, references: Sequence[Path]) -> AbstractContextManager:
        """A block in which the network is told of references, for a guided batch, [without, with]."""

    def frame(self, references: Sequence[Path], resolution: int) -> tuple[int, int]:
        """Height and width of a sample that shows references; `resolution` is a square's side."""

    def said(self, references: Sequence[Path], prompt: str) -> str:
        """A sample's prompt, of references, as the text encoder is to read it."""
