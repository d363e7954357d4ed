"""Sixty-four prompts on one sheet: 48 of one subject, 16 of two, the first fresh captions as they come."""

from pathlib import Path

import numpy as np
from PIL import Image

from .measure import fresh_captions
from .shipped import load_pocket

COLUMNS, GAP, SCALE = 12, 2, 2


def prompt_sheet(path: Path, weights: Path) -> None:
    """Write the sheet, and the prompts in its order as text beside it."""
    pocket = load_pocket(weights)
    single, pair = ([words.text for words in fresh_captions(count, n)] for count, n in ((48, 1), (16, 2)))
    rows = [*_rows(pocket.generate(single, 64, seed=1), COLUMNS), *_rows(pocket.generate(pair, 96, seed=2), 8)]
    width = max(row.width for row in rows)
    sheet = Image.new("RGB", (width, sum(row.height + GAP for row in rows) - GAP), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * (rows[0].height + GAP)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * SCALE, sheet.height * SCALE), Image.Resampling.BICUBIC).save(path, quality=88)
    path.with_suffix(".txt").write_text("\n".join([*single, *pair]) + "\n")
    print(f"{path}, prompts in {path.with_suffix('.txt').name}")


def _rows(pictures: np.ndarray, columns: int) -> list[Image.Image]:
    height, width = pictures.shape[1:3]
    full = 64 * COLUMNS + GAP * (COLUMNS - 1)
    step = (full - width) / (columns - 1)
    rows = []
    for start in range(0, len(pictures), columns):
        row = Image.new("RGB", (full, height), "white")
        for i, picture in enumerate(pictures[start : start + columns]):
            row.paste(Image.fromarray(picture), (round(i * step), 0))
        rows.append(row)
    return rows
