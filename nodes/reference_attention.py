"""Which references a trained self-attention looks at: numbers, and a small picture."""

import torch
from comfy_api.latest import io
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..models.contact_sheet import truncate_text
from ..models.ip_adapter import IPAdapter
from ..models.references import References
from .ip_adapter import references_of, tensors_of
from .pictures import as_tensor
from .schema import EmbedsType, IPAdapterType, Node, ReferencesType, schema

CELL, LABEL, BAR = 34, 150, 160  # pixels: of a head's column, of the names, of the longest bar
MEAN, PER_HEAD = "mean of all heads", "each head"
INK, SHADE = (40, 40, 48), (36, 88, 180)


class ShowReferenceAttention(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeShowReferenceAttention",
            display_name="Show Reference Attention",
            description="Shows which references a trained self-attention looks at when it makes one image prompt of "
            "them all.",
            search_aliases=["attention weights", "aggregation", "which reference"],
            is_output_node=True,
            inputs=[
                IPAdapterType.Input(
                    "ip_adapter",
                    tooltip="From Load IP-Adapter, of a file that python -m training.ip_adapter wrote with "
                    "self-attention.",
                ),
                io.MultiType.Input(
                    "references",
                    types=[ReferencesType, EmbedsType],
                    tooltip="As Apply IP-Adapter gets them, weights included.",
                ),
                io.Combo.Input(
                    "heads",
                    options=[MEAN, PER_HEAD],
                    default=MEAN,
                    tooltip="The mean of all heads as bars, or a column for each head.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="picture",
                    tooltip="The shares as bars, or as a table whose darker cells are looked at more.",
                ),
                io.String.Output(
                    display_name="numbers",
                    tooltip="The shares, a line for each reference. Each head's sum to 1; a reference of weight 0 has "
                    "none.",
                ),
            ],
        )

    @classmethod
    def execute(cls, ip_adapter, references: References | Tensor, heads: str = MEAN) -> io.NodeOutput:
        adapter = IPAdapter.from_state(tensors_of(ip_adapter))
        given = references_of(references, adapter)
        with torch.inference_mode(False):
            shares = adapter.attended(given).T  # [n, heads]
        if heads == MEAN:
            shares = shares.mean(1, keepdim=True)
        names = [name or f"reference {i + 1}" for i, name in enumerate(given.names)]
        lines = [
            f"{name}: {', '.join(f'{share:.3f}' for share in row)}"
            for name, row in zip(names, shares.tolist(), strict=True)
        ]
        picture = draw_bars(names, shares[:, 0]) if heads == MEAN else draw_table(names, shares)
        return io.NodeOutput(picture, "\n".join(lines), ui={"text": ("\n".join(lines),)})


def draw_bars(names: list[str], shares: Tensor) -> Tensor:
    """A bar for each of n references, longest for the largest share: [1, h, w, 3]."""
    image, pen, font = _paper(LABEL + BAR + 60, 24 * len(names) + 12)
    for i, (name, share) in enumerate(zip(names, shares.tolist(), strict=True)):
        y = 6 + 24 * i
        pen.text((8, y + 4), truncate_text(name, LABEL - 16, font), fill=INK, font=font)
        length = BAR * share / max(float(shares.max()), 1e-9)
        pen.rectangle((LABEL, y + 3, LABEL + length, y + 20), fill=SHADE)
        pen.text((LABEL + length + 6, y + 4), f"{share:.2f}", fill=INK, font=font)
    return as_tensor(image)


def draw_table(names: list[str], shares: Tensor) -> Tensor:
    """A row for each of n references, a column for each head, darker where the share [n, heads] is larger."""
    image, pen, font = _paper(LABEL + CELL * shares.shape[1] + 8, 24 * (len(names) + 1) + 12)
    for head in range(shares.shape[1]):
        pen.text((LABEL + CELL * (head + 0.5), 8), str(head + 1), fill=INK, font=font, anchor="ma")
    for i, (name, row) in enumerate(zip(names, shares.tolist(), strict=True)):
        y = 30 + 24 * i
        pen.text((8, y + 4), truncate_text(name, LABEL - 16, font), fill=INK, font=font)
        for head, share in enumerate(row):
            x = LABEL + CELL * head
            colour = tuple(round(255 + (to - 255) * min(share, 1)) for to in SHADE)
            pen.rectangle((x, y, x + CELL - 2, y + 22), fill=colour)
            pen.text(
                (x + CELL / 2, y + 5), f"{share:.2f}", fill="white" if share > 0.5 else INK, font=font, anchor="ma"
            )
    return as_tensor(image)


def _paper(
    width: int, height: int
) -> tuple[Image.Image, ImageDraw.ImageDraw, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    image = Image.new("RGB", (width, height), "white")
    return image, ImageDraw.Draw(image), ImageFont.load_default(size=12)
