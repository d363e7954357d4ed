"""What a build of a data set dropped, and why; and a contact sheet of what it kept."""

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .build_checks import Thresholds
from .plots import COLOURS
from .shared import plural, write_whole
from .subject_data import METADATA, SubjectPicture, read_subjects
from .subject_progress import DROPPED

REPORT, SHEET = "report.md", "contact_sheet.png"
PICTURES = {
    "small": "its longer side has fewer than {longest_side} pixels (--longest_side)",
    "white": "more than {white:.0%} of it is near-white (--white)",
    "few nouns": "its caption has fewer than {min_nouns} nouns (--min_nouns)",
    "many nouns": "its caption has more than {max_nouns} nouns (--max_nouns)",
    "few boxes": "fewer than {min_boxes} boxes were found in it (--min_boxes, --box_threshold)",
    "many boxes": "more than {max_boxes} boxes were found in it (--max_boxes, --box_threshold)",
    "no subject": "the rules below drop all of its boxes",
}
"""Why a picture is dropped."""
BOXES = {
    "overlap": "it overlaps with a more certain one by more than {overlap:g} of their union (--overlap)",
    "area": "it covers no share of the picture between {min_area:g} and {max_area:g} (--min_area, --max_area)",
    "aspect": "its width over height is not between {min_aspect:g} and {max_aspect:g} (--min_aspect, --max_aspect)",
    "score": "its score is not above {score:g} (--score)",
    "not a word of the caption": "its label is not one noun of the caption (--text_threshold)",
    "mask": "its mask is not one thing within the box (--regions, --fill, --mask_threshold)",
    "inside another": "more than {contained:.0%} of it, or of a more certain one, lies in the other (--contained)",
}
"""Why a box is."""
COLUMNS, WIDTH, HEIGHT, GAP, TEXT = 4, 300, 240, 10, 13  # pixels
LINES, TINT = 3, 0.45  # lines of a caption at most; how much of its colour a mask gets


def write_report(folder: Path, lines: Iterable[Mapping[str, Any]], thresholds: Thresholds, sheet: int) -> str:
    """Write the report and the contact sheet of a data set; returns the report.

    Args:
        folder: of the data set.
        lines: of DROPPED.
        thresholds: with which it was built.
        sheet: pictures on the sheet, at most.
    """
    lines = list(lines)
    kept = read_subjects(folder) if (folder / METADATA).is_file() else []
    reasons = Counter(line["reason"] for line in lines if line["reason"])
    boxes = Counter(box["reason"] for line in lines for box in line["boxes"])
    words = Counter(one.entity.lower() for picture in kept for one in picture.subjects)
    subjects = ", ".join(f"{word} {count}" for word, count in words.most_common(10))
    parts = [
        "# Data set for Subject-Diffusion",
        f"{len(kept)} of {len(kept) + reasons.total()} pictures are kept, with {plural(words.total(), 'subject')}"
        + (f": {subjects}{', ...' if len(words) > 10 else ''}." if kept else "."),
        *(_table(*given, vars(thresholds)) for given in (("pictures", reasons, PICTURES), ("boxes", boxes, BOXES))),
        f"{DROPPED} names each of them." if lines else "",
    ]
    if not kept:
        parts.append("Nothing is kept: another value of what drops most may help, with another --output_dir.")
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_whole(folder / REPORT, text.encode())
    if kept and sheet:
        content = io.BytesIO()
        contact_sheet([kept[i * len(kept) // min(sheet, len(kept))] for i in range(min(sheet, len(kept)))]).save(
            content, "PNG"
        )
        write_whole(folder / SHEET, content.getvalue())
    return text


def _table(what: str, counts: Counter[str], meanings: Mapping[str, str], values: Mapping[str, Any]) -> str:
    if not counts:
        return ""
    rows = [
        f"| {reason} | {counts[reason]} | {meanings[reason].format(**values)} |"
        for reason in meanings
        if counts[reason]
    ]
    return "\n".join([f"| dropped {what} | {counts.total()} | why |", "|---|---|---|", *rows])


def contact_sheet(pictures: Sequence[SubjectPicture]) -> Image.Image:
    """Pictures side by side, on each its masks in colours and its boxes, below the caption and the words with their scores."""
    cells = [_cell(picture) for picture in pictures]
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (WIDTH + GAP) + GAP, rows * (cells[0].height + GAP) + GAP), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (GAP + i % columns * (WIDTH + GAP), GAP + i // columns * (cell.height + GAP)))
    return sheet


def _cell(one: SubjectPicture) -> Image.Image:
    with Image.open(one.path) as file:
        picture = file.convert("RGB")
    scale = min(WIDTH / picture.width, HEIGHT / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    pixels = np.asarray(picture.resize(size, Image.Resampling.LANCZOS), np.float32)
    for i, subject in enumerate(one.subjects):
        with Image.open(subject.mask) as file:
            mask = np.asarray(file.convert("L").resize(size, Image.Resampling.BILINEAR), np.float32)[..., None] / 255
        pixels = pixels + mask * TINT * (np.asarray(COLOURS[i % len(COLOURS)], np.float32) - pixels)
    shown = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    pen, font = ImageDraw.Draw(shown), ImageFont.load_default(size=TEXT)
    for i, subject in enumerate(one.subjects):
        corners = [share * side for share, side in zip(subject.box, (*size, *size), strict=True)]
        pen.rectangle([corners[0], corners[1], corners[2] - 1, corners[3] - 1], None, COLOURS[i % len(COLOURS)], 2)
    cell = Image.new("RGB", (WIDTH, HEIGHT + (LINES + 1) * (TEXT + 4)), "white")
    cell.paste(shown, ((WIDTH - size[0]) // 2, HEIGHT - size[1]))
    pen, y = ImageDraw.Draw(cell), HEIGHT + 2
    for line in _wrapped(one.text, font):
        pen.text((0, y), line, (30, 30, 30), font)
        y += TEXT + 4
    x = 0.0
    for i, subject in enumerate(one.subjects):
        word = f"{subject.entity} {subject.score:.2f}  "
        pen.text((x, y), word, COLOURS[i % len(COLOURS)], font)
        x += font.getlength(word)
    return cell


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """In lines that fit a cell; what is too long ends with an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= WIDTH or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], lines[LINES - 1] + " …"]
