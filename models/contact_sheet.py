"""A contact sheet: references on top, below a labelled row for each method and a column for each prompt."""

import textwrap
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL, GAP, LINE, LABEL = 160, 12, 22, 230
BACKGROUND, INK, FAINT = "white", "#222222", "#666666"


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[Sequence[str]],
    headings: Sequence[str],
    references: Sequence[Image.Image] = (),
    note: str = "",
    cell: int = CELL,
) -> Image.Image:
    """References (as many as there is room for) above labelled rows; each picture fitted into its cell.

    Args:
        rows: pictures; a row may be shorter than others.
        labels: lines of each row, the first its title; none at all leaves their column out.
        headings: of the columns, such as prompts; none leaves their line out.
        references: on top; none leaves their row out.
        note: a line for the foot.
        cell: pixels of the side of a picture's place.
    """
    columns = max(*map(len, rows), len(headings), 1)
    shown = references[:columns]
    left = LABEL if any(map(any, labels)) or shown else GAP
    heading = 3 * LINE if any(headings) else 0
    top = (cell + GAP if shown else 0) + GAP + heading
    foot = LINE if note else 0
    width, height = left + columns * (cell + GAP), top + len(rows) * (cell + GAP) + foot
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)

    def put(column: int, y: int, picture: Image.Image) -> None:
        fitted = ImageOps.contain(picture.convert("RGB"), (cell, cell), Image.Resampling.LANCZOS)
        x = left + column * (cell + GAP)
        sheet.paste(fitted, (x + (cell - fitted.width) // 2, y + (cell - fitted.height) // 2))

    if shown:
        more = f" ({len(shown)} of {len(references)})" if len(shown) < len(references) else ""
        draw.text((GAP, GAP), f"References{more}", INK, _font(16))
        for i, picture in enumerate(shown):
            put(i, GAP, picture)
    for i, text in enumerate(headings):
        for line, part in enumerate(textwrap.wrap(_plain(text), max(cell // 6, 8))[:3]):
            draw.text((left + i * (cell + GAP), top - heading + line * (LINE - 4)), part, FAINT, _font(12))
    for number, pictures in enumerate(rows):
        y = top + number * (cell + GAP)
        for line, text in enumerate(labels[number] if number < len(labels) else ()):
            draw.text((GAP, y + line * LINE), _plain(text), FAINT if line else INK, _font(12 if line else 16))
        for i, picture in enumerate(pictures):
            put(i, y, picture)
    draw.text((GAP, height - LINE), _plain(note), FAINT, _font(12))
    return sheet


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "arial.ttf", "Helvetica.ttc"):
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _plain(text: str) -> str:
    """Pillow's own font has no accented letters: letters without their accents, for every font alike."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
