"""A contact sheet: references on top, below a labelled row for each method and a column for each prompt."""

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL, GAP, LINE, LABEL = 160, 12, 22, 230
SMALL, LARGE, MOST_LINES = 12, 16, 3
"""Sizes of letters, and how many lines a heading or the note may take."""
BACKGROUND, INK, FAINT, DOTS = "white", "#222222", "#666666", "..."


@dataclass(frozen=True)
class Layout:
    """Where everything of a sheet goes, in pixels."""

    columns: int
    shown: int
    """How many of the references."""
    left: int
    """Where the pictures begin."""
    heading: int
    """Height of the headings."""
    top: int
    """Where the first row begins."""
    foot: tuple[str, ...]
    """Lines of the note."""
    width: int
    height: int


def layout(
    rows: Sequence[int],
    labels: Sequence[Sequence[str]],
    headings: Sequence[str],
    references: int = 0,
    note: str = "",
    cell: int = CELL,
) -> Layout:
    """The places on a sheet as `contact_sheet` draws it, before anything is drawn.

    Args:
        rows: how many pictures each row has.
        references: how many there are.
        labels, headings, note, cell: as in `contact_sheet`.
    """
    columns = max(*rows, len(headings), 1)
    shown = min(references, columns)
    left = LABEL if any(map(any, labels)) or shown else GAP
    heading = MOST_LINES * LINE if any(headings) else 0
    top = (cell + GAP if shown else 0) + GAP + heading
    width = left + columns * (cell + GAP)
    foot = tuple(_fit(note, width - 2 * GAP, SMALL, MOST_LINES))
    height = top + len(rows) * (cell + GAP) + len(foot) * LINE
    return Layout(columns, shown, left, heading, top, foot, width, height)


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
        labels: texts of each row, the first its title; none at all leaves their column out. What does not fit is wrapped
            as far as the row's height goes, then shortened with dots, as headings and the note are.
        headings: of the columns, such as prompts; none leaves their line out.
        references: on top; none leaves their row out.
        note: for the foot.
        cell: pixels of the side of a picture's place.
    """
    place = layout(list(map(len, rows)), labels, headings, len(references), note, cell)
    sheet = Image.new("RGB", (place.width, place.height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)

    def put(column: int, y: int, picture: Image.Image) -> None:
        fitted = ImageOps.contain(picture.convert("RGB"), (cell, cell), Image.Resampling.LANCZOS)
        x = place.left + column * (cell + GAP)
        sheet.paste(fitted, (x + (cell - fitted.width) // 2, y + (cell - fitted.height) // 2))

    if place.shown:
        more = f" ({place.shown} of {len(references)})" if place.shown < len(references) else ""
        draw.text((GAP, GAP), f"References{more}", INK, _font(LARGE))
        for i, picture in enumerate(references[: place.shown]):
            put(i, GAP, picture)
    for i, text in enumerate(headings):
        for line, part in enumerate(_fit(text, cell, SMALL, MOST_LINES)):
            at = place.left + i * (cell + GAP), place.top - place.heading + line * (LINE - 4)
            draw.text(at, part, FAINT, _font(SMALL))
    for number, pictures in enumerate(rows):
        y = place.top + number * (cell + GAP)
        for line, (part, title) in enumerate(_label(labels[number] if number < len(labels) else (), cell)):
            draw.text((GAP, y + line * LINE), part, INK if title else FAINT, _font(LARGE if title else SMALL))
        for i, picture in enumerate(pictures):
            put(i, y, picture)
    for line, part in enumerate(place.foot):
        draw.text((GAP, place.height - (len(place.foot) - line) * LINE), part, FAINT, _font(SMALL))
    return sheet


def truncate_text(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A text of one line within so many pixels: of a longer one the beginning, and an ellipsis."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def _label(texts: Sequence[str], cell: int) -> Iterator[tuple[str, bool]]:
    """The lines of a row's label, at most as many as its height holds, and whether each is of its title.

    Every text has a line of its own; the lines that are left over are for texts that are too long for one.
    """
    room = max((cell + GAP) // LINE, 1)
    texts = texts if len(texts) <= room else [*texts[: room - 1], f"{texts[room - 1]} {DOTS}"]
    spare = room - len(texts)
    for number, text in enumerate(texts):
        lines = _fit(text, LABEL - 2 * GAP, SMALL if number else LARGE, 1 + spare) or [""]
        spare -= len(lines) - 1
        yield from ((line, number == 0) for line in lines)


def _fit(text: str, width: int, size: int, most: int) -> list[str]:
    """At most so many lines of a text, each within the width; the last ends with dots where there is more."""
    found = list(islice(_wrapped(_plain(text), width, size), most + 1))
    if len(found) <= most:
        return found
    last = found[most - 1]
    while last and _font(size).getlength(last.rstrip() + DOTS) > width:
        last = last[:-1]
    return [*found[: most - 1], last.rstrip() + DOTS]


def _wrapped(text: str, width: int, size: int) -> Iterator[str]:
    """Lines within the width, broken between words, and within a word that is too long for a line."""
    font, line = _font(size), ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if len(joined) <= width and font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            yield line
        line = ""
        for letter in word:
            if line and font.getlength(line + letter) > width:
                yield line
                line = ""
            line += letter
    if line:
        yield line


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "arial.ttf", "Helvetica.ttc"):
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _plain(text: str) -> str:
    """Pillow's own font has no accented letters: letters without their accents, for every font alike."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
