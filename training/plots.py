"""Figures with their intervals as pictures: bars of methods, and lines over a number."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SUPERSAMPLING = 2
COLOURS = ((36, 88, 180), (214, 92, 40), (46, 140, 90), (150, 70, 160), (190, 150, 30), (70, 150, 180), (120, 120, 126))
GREY, INK, PALE = (176, 178, 184), (50, 50, 54), (228, 228, 232)
WIDTH, BAR, MARGIN, TEXT = 900, 34, 24, 15  # pixels


@dataclass(frozen=True)
class Mark:
    """A value and, where it is known, the interval around it."""

    value: float
    interval: tuple[float, float] | None = None

    @property
    def reach(self) -> tuple[float, ...]:
        """All that must be on the picture."""
        return (self.value, *(self.interval or ()))


def number(value: float) -> str:
    """Three digits, as in tables and on axes."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most so many steps between them; the first and last may lie outside."""
    span = high - low if high > low else max(abs(high), 1.0)
    size = 10.0 ** math.floor(math.log10(span / most))
    for step in (size, 2 * size, 5 * size, 10 * size, 20 * size):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]


class _Canvas:
    """Drawing in pixels of the picture, on one that is larger, so that edges are smooth."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING), "white")
        self.pen = ImageDraw.Draw(self.image)

    def line(self, points: Sequence[tuple[float, float]], fill, width: float = 1) -> None:
        self.pen.line([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points], fill, round(width * SUPERSAMPLING))

    def box(self, left: float, top: float, right: float, bottom: float, fill) -> None:
        corners = (min(left, right), top, max(left, right), bottom)
        self.pen.rectangle([value * SUPERSAMPLING for value in corners], fill)

    def dot(self, x: float, y: float, radius: float, fill) -> None:
        corners = (x - radius, y - radius, x + radius, y + radius)
        self.pen.ellipse([value * SUPERSAMPLING for value in corners], fill)

    def text(self, x: float, y: float, words: str, anchor: str = "lm", fill=INK, size: int = TEXT) -> None:
        font = ImageFont.load_default(size=size * SUPERSAMPLING)
        self.pen.text((x * SUPERSAMPLING, y * SUPERSAMPLING), words, fill, font, anchor)

    def upright(self, x: float, y: float, words: str) -> None:
        """Words that run upwards, their middle at (x, y)."""
        font = ImageFont.load_default(size=TEXT * SUPERSAMPLING)
        left, top, right, bottom = map(int, font.getbbox(words))
        label = Image.new("RGB", (right - left + 4, bottom - top + 8), "white")
        ImageDraw.Draw(label).text((2 - left, 4 - top), words, INK, font)
        label = label.rotate(90, expand=True)
        self.image.paste(label, (int(x * SUPERSAMPLING) - label.width // 2, int(y * SUPERSAMPLING) - label.height // 2))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.image.reduce(SUPERSAMPLING).save(path)


def width_of(words: str) -> float:
    """Pixels."""
    return ImageFont.load_default(size=TEXT * SUPERSAMPLING).getlength(words) / SUPERSAMPLING


def shortened(words: str, most: float) -> str:
    """With its beginning left out if it is longer than so many pixels: ends of paths tell them apart."""
    if width_of(words) <= most:
        return words
    while len(words) > 1 and width_of("…" + words) > most:
        words = words[1:]
    return "…" + words


def bar_plot(path: Path, title: str, marks: Mapping[str, Mark], pale: Sequence[str] = ()) -> None:
    """A bar with its interval for each method, as a PNG.

    Args:
        path: where it goes.
        title: over the bars.
        marks: by method.
        pale: methods in grey, for comparison.
    """
    names = {name: shortened(name, WIDTH / 3) for name in marks}
    left = MARGIN + max(map(width_of, names.values())) + 12
    scale = ticks(min(0.0, *(min(m.reach) for m in marks.values())), max(0.0, *(max(m.reach) for m in marks.values())))
    right = WIDTH - MARGIN - 70  # for the numbers behind the bars
    top, bottom = 56, 56 + len(marks) * BAR
    canvas = _Canvas(WIDTH, bottom + 40)
    canvas.text(MARGIN, 24, title, size=TEXT + 3)

    def at(value: float) -> float:
        return left + (value - scale[0]) / (scale[-1] - scale[0]) * (right - left)

    for value in scale:
        canvas.line([(at(value), top - 4), (at(value), bottom + 4)], PALE if value else GREY)
        canvas.text(at(value), bottom + 18, number(value), "mm", fill=(100, 100, 104), size=TEXT - 2)
    for i, (name, mark) in enumerate(marks.items()):
        middle = top + (i + 0.5) * BAR
        canvas.text(left - 12, middle, names[name], "rm")
        canvas.box(
            at(0), middle - BAR * 0.32, at(mark.value), middle + BAR * 0.32, GREY if name in pale else COLOURS[0]
        )
        if mark.interval:
            ends = [at(value) for value in mark.interval]
            canvas.line([(ends[0], middle), (ends[1], middle)], INK, 1.5)
            for end in ends:
                canvas.line([(end, middle - 6), (end, middle + 6)], INK, 1.5)
        canvas.text(max(at(0), *map(at, mark.reach)) + 8, middle, number(mark.value))
    canvas.save(path)


def line_plot(
    path: Path, title: str, series: Mapping[str, Sequence[tuple[float, Mark]]], x_label: str, y_label: str
) -> None:
    """Values with their intervals over a number, a line for each name, as a PNG.

    Args:
        path: where it goes.
        title: over the lines.
        series: (x, value) pairs, by name, in the order of x.
        x_label, y_label: of the axes.
    """
    points = [point for line in series.values() for point in line]
    across = sorted({x for x, _ in points})
    values = [value for _, mark in points for value in mark.reach]
    up = ticks(min(values), max(values))
    legend = max(width_of(shortened(name, WIDTH / 4)) for name in series) + 34
    left, right, top, bottom = MARGIN + 76, WIDTH - MARGIN - legend - 12, 56, 420
    canvas = _Canvas(WIDTH, bottom + 68)
    canvas.text(MARGIN, 24, title, size=TEXT + 3)

    def at(x: float, value: float) -> tuple[float, float]:
        along = (x - across[0]) / (across[-1] - across[0]) if len(across) > 1 else 0.5
        return left + 14 + along * (right - left - 28), bottom - (value - up[0]) / (up[-1] - up[0]) * (bottom - top)

    for value in up:
        y = at(across[0], value)[1]
        canvas.line([(left, y), (right, y)], PALE if value else GREY)
        canvas.text(left - 8, y, number(value), "rm", fill=(100, 100, 104), size=TEXT - 2)
    last = -1000.0
    for x in across if len(across) <= 12 else ticks(across[0], across[-1], 10)[1:-1]:
        place = at(x, up[0])[0]
        if place - last > width_of(number(x)) + 8:  # else the numbers would run into each other
            canvas.line([(place, bottom), (place, bottom + 5)], GREY)
            canvas.text(place, bottom + 18, number(x), "mm", fill=(100, 100, 104), size=TEXT - 2)
            last = place
    canvas.text((left + right) / 2, bottom + 46, x_label, "mm")
    canvas.upright(MARGIN - 2, (top + bottom) / 2, y_label)
    for i, (name, line) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        aside = (
            5 * (i - (len(series) - 1) / 2) if len(across) <= 12 else 0.0
        )  # so that intervals do not cover each other
        placed = [(at(x, mark.value)[0] + aside, at(x, mark.value)[1], mark) for x, mark in line]
        canvas.line([(x, y) for x, y, _ in placed], colour, 2)
        for (x, y, mark), (at_x, _) in zip(placed, line, strict=True):
            if mark.interval:
                ends = [at(at_x, value)[1] for value in mark.interval]
                canvas.line([(x, ends[0]), (x, ends[1])], colour, 1.2)
                for end in ends:
                    canvas.line([(x - 4, end), (x + 4, end)], colour, 1.2)
            canvas.dot(x, y, 3.5, colour)
        y = top + 10 + i * 24
        canvas.line([(right + 16, y), (right + 38, y)], colour, 2)
        canvas.dot(right + 27, y, 3.5, colour)
        canvas.text(right + 46, y, shortened(name, WIDTH / 4))
    canvas.save(path)
