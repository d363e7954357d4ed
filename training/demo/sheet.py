"""A contact sheet: photographs on top, below a row for each method and a column for each prompt."""

import textwrap
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..shared import read_picture

CELL, GAP, LINE, LABEL = 160, 12, 22, 230
BACKGROUND, INK, FAINT = "white", "#222222", "#666666"


def contact_sheet(
    references: Sequence[Path],
    labels: Sequence[Sequence[str]],
    prompts: Sequence[str],
    rows: Sequence[Sequence[Image.Image]],
    note: str,
) -> Image.Image:
    """Photographs (as many as there is room for) above labelled rows.

    Args:
        references: picture files.
        labels: lines of each row, the first its title.
        prompts: of the columns.
        rows: their pictures.
        note: a line for the foot: what made them.
    """
    columns = max(len(prompts), 1)
    shown = list(references[:columns])
    width = LABEL + columns * (CELL + GAP) + GAP
    top = CELL + 2 * GAP + 3 * LINE
    sheet = Image.new("RGB", (width, top + len(rows) * (CELL + GAP) + LINE + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    more = f" ({len(shown)} of {len(references)})" if len(shown) < len(references) else ""
    draw.text((GAP, GAP), f"Photographs{more}", INK, _font(16))
    for i, path in enumerate(shown):
        pixels = (read_picture(path).pixels * 255).round().byte().numpy()
        _cell(sheet, i, GAP, Image.fromarray(pixels))
    for i, prompt in enumerate(prompts):
        for line, text in enumerate(textwrap.wrap(_plain(prompt), 26)[:3]):
            draw.text((_left(i), CELL + 2 * GAP + line * (LINE - 4)), text, FAINT, _font(12))
    for number, (lines, pictures) in enumerate(zip(labels, rows, strict=True)):
        y = top + number * (CELL + GAP)
        for line, text in enumerate(lines):
            draw.text((GAP, y + line * LINE), text, FAINT if line else INK, _font(12 if line else 16))
        for i, picture in enumerate(pictures):
            _cell(sheet, i, y, picture)
    draw.text((GAP, sheet.height - LINE), _plain(note), FAINT, _font(12))
    return sheet


def _left(column: int) -> int:
    return LABEL + column * (CELL + GAP)


def _cell(sheet: Image.Image, column: int, top: int, picture: Image.Image) -> None:
    fitted = ImageOps.contain(picture.convert("RGB"), (CELL, CELL), Image.Resampling.LANCZOS)
    sheet.paste(fitted, (_left(column) + (CELL - fitted.width) // 2, top + (CELL - fitted.height) // 2))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "arial.ttf", "Helvetica.ttc"):
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _plain(text: str) -> str:
    """Pillow's own font has no accented letters: letters without their accents, for every font alike."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
