"""Where the cross-attention layers of a Stable Diffusion UNet are, in the three numberings in use.

- ComfyUI's: a block ("input", "middle" or "output"), its id, and the layer's depth within the block.
- `transformer_index`: ComfyUI's count of spatial transformers in the order they run (input, middle, output).
- N of the IP-Adapter files (`ip_adapter.N.to_k_ip.weight`): the index among diffusers' attention processors, in
  the order down, up, middle; self-attention layers are even, cross-attention layers odd.

In diffusers, with r layers per block, down_blocks.B.attentions.A is input 1 + (r + 1) B + A and
up_blocks.B.attentions.A is output (r + 1) B + A.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .errors import PersonalizeError


class Layer(NamedTuple):
    """One cross-attention layer, as ComfyUI's patches address it."""

    block: str
    id: int
    depth: int


@dataclass(frozen=True)
class UNetLayout:
    """Depths of the spatial transformers: (block id, layers) for input and output, layers for the middle."""

    input: tuple[tuple[int, int], ...]
    middle: int
    output: tuple[tuple[int, int], ...]

    def _section(self, name: str) -> Iterator[Layer]:
        blocks = ((0, self.middle),) if name == "middle" else getattr(self, name)
        return (Layer(name, number, depth) for number, layers in blocks for depth in range(layers))

    def file_order(self) -> list[Layer]:
        """Layers in the order of the IP-Adapter files: layer i of this list is N = 2 i + 1."""
        return [layer for section in ("input", "output", "middle") for layer in self._section(section)]

    def transformer_indices(self) -> dict[Layer, int]:
        """ComfyUI's transformer_index of every layer."""
        order = [layer for section in ("input", "middle", "output") for layer in self._section(section)]
        blocks = list(dict.fromkeys((layer.block, layer.id) for layer in order))
        return {layer: blocks.index((layer.block, layer.id)) for layer in order}


SD15 = UNetLayout(input=tuple((i, 1) for i in (1, 2, 4, 5, 7, 8)), middle=1, output=tuple((i, 1) for i in range(3, 12)))
SDXL = UNetLayout(
    input=((4, 2), (5, 2), (7, 10), (8, 10)),
    middle=10,
    output=((0, 10), (1, 10), (2, 10), (3, 2), (4, 2), (5, 2)),
)

# Which transformers carry the style of a reference and which its composition, by transformer_index
# (InstantStyle, Wang et al. 2024, arXiv:2404.02733; for SD1.5 the split that the community settled on).
_STYLE: dict[UNetLayout, dict[int, float]] = {
    SD15: dict.fromkeys((*range(4), *range(9, 16)), 1.0),
    SDXL: {6: 1.0},
}
_COMPOSITION: dict[UNetLayout, dict[int, float]] = {SD15: {4: 0.25, 5: 1.0}, SDXL: {3: 1.0}}

LAYER_CHOICES = ("all", "style", "composition", "style and composition", "list")


def layer_weights(layout: UNetLayout, choice: str, listed: str = "") -> dict[Layer, float]:
    """The factor on lambda of every layer that takes part.

    Args:
        layout: the UNet's.
        choice: one of LAYER_CHOICES.
        listed: for "list", pairs of transformer_index and factor such as "3:2.5, 6, 7:0.5" (no factor means 1).

    Raises:
        PersonalizeError: a malformed list, an index the UNet does not have, or a preset for an unknown UNet.
    """
    indices = layout.transformer_indices()
    if choice == "all":
        return dict.fromkeys(indices, 1.0)
    if choice == "list":
        factors = _parse_list(listed, max(indices.values()))
    elif layout not in _STYLE:
        raise PersonalizeError(
            f'The layer preset "{choice}" is known for SD1.5 and SDXL only: choose "all", or "list" with '
            f"transformer indices 0 to {max(indices.values())}."
        )
    else:
        style, composition = _STYLE[layout], _COMPOSITION[layout]
        factors = {"style": style, "composition": composition, "style and composition": style | composition}[choice]
    return {layer: factors[index] for layer, index in indices.items() if index in factors}


def _parse_list(text: str, last: int) -> dict[int, float]:
    factors: dict[int, float] = {}
    for item in text.replace("\n", ",").split(","):
        if not item.strip():
            continue
        index, _, factor = item.partition(":")
        try:
            number, value = int(index), float(factor) if factor.strip() else 1.0
        except ValueError:
            number, value = -1, math.nan
        if not math.isfinite(value):
            raise PersonalizeError(
                f'"{item.strip()}" in the layer list is not an index with a factor: write for example "3:2.5, 6".'
            )
        if not 0 <= number <= last:
            raise PersonalizeError(f"Layer {number} is not in this model: its transformers are 0 to {last}.")
        factors[number] = value
    if not factors:
        raise PersonalizeError('The layer list is empty: write transformer indices, for example "3:2.5, 6".')
    return factors
