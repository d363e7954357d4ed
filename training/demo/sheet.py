"""A contact sheet: references on top, results below, labelled."""

import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..shared import read_picture

CELL, GAP, LINE = 256, 16, 26
BACKGROUND, INK = "white", "#222222"


def contact_sheet(references: Sequence[Path], results: Sequence[tuple[str, Image.Image]], note: str) -> Image.Image:
    """References (at most eight shown) above labelled results.

    Args:
        references: picture files.
        results: label and picture of each.
        note: a line for the foot: what made them.
    """
    shown = list(references[:8])
    columns = max(len(shown), len(results))
    width = columns * (CELL + GAP) + GAP
    row = LINE + CELL + LINE + GAP
    sheet = Image.new("RGB", (width, 2 * row + LINE + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    more = f" ({len(shown)} of {len(references)})" if len(shown) < len(references) else ""
    draw.text((GAP, GAP // 2), f"References{more}", INK, _font(18))
    draw.text((GAP, row + GAP // 2), "Results", INK, _font(18))
    for i, path in enumerate(shown):
        pixels = (read_picture(path).pixels * 255).round().byte().numpy()
        _cell(sheet, draw, i, LINE + GAP // 2, Image.fromarray(pixels), _plain(path.name))
    for i, (label, picture) in enumerate(results):
        _cell(sheet, draw, i, row + LINE + GAP // 2, picture, label)
    draw.text((GAP, 2 * row + GAP // 2), note, INK, _font(14))
    return sheet


def _cell(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, column: int, top: int, picture: Image.Image, label: str
) -> None:
    left = GAP + column * (CELL + GAP)
    fitted = ImageOps.contain(picture.convert("RGB"), (CELL, CELL), Image.Resampling.LANCZOS)
    sheet.paste(fitted, (left + (CELL - fitted.width) // 2, top + (CELL - fitted.height) // 2))
    font = _font(14)
    while draw.textlength(label, font) > CELL and len(label) > 4:
        label = label[:-4] + "..."
    draw.text((left + (CELL - draw.textlength(label, font)) / 2, top + CELL + 4), label, INK, font)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "arial.ttf", "Helvetica.ttc"):
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _plain(text: str) -> str:
    """Pillow's own font has no accented letters: letters without their accents, for every font alike."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
