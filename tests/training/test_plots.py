"""Bars and lines are where their numbers say."""

import numpy as np
import pytest
from pack.training.plots import (
    BAR,
    COLOURS,
    GREY,
    INK,
    PALE,
    Mark,
    bar_plot,
    line_plot,
    number,
    shortened,
    ticks,
    width_of,
)
from PIL import Image


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (1, 1), (-3, -3), (0.471, 0.93), (0, 12345), (-0.0006, 0.0015), (0, 0.3), (0.999, 1.001)]
)
def test_ticks_are_round_and_hold_everything(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low <= high <= marks[-1]
    assert 2 <= len(marks) <= 7
    steps = np.diff(marks)
    np.testing.assert_allclose(steps, steps[0])
    assert f"{steps[0]:.6e}"[:8] in ("1.000000", "2.000000", "5.000000")


def test_numbers_have_three_digits():
    assert [number(x) for x in (0.73219, 12.349, 0.00012, 15234.6, -1, 0)] == [
        "0.732",
        "12.3",
        "0.00012",
        "15235",
        "-1",
        "0",
    ]


def test_long_names_keep_their_end():
    assert shortened("lora", 100) == "lora"
    short = shortened("a/very/long/path/of/folders/lora", 100)
    assert short.startswith("…")
    assert short.endswith("lora")
    assert width_of(short) <= 100


def columns(path, colour):
    """The columns of a picture in which a colour is found, by row."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    found = (abs(pixels - colour).max(2) < 12).nonzero()
    return {row: found[1][found[0] == row] for row in np.unique(found[0])}


def test_bars_are_as_long_as_their_numbers(tmp_path):
    path = tmp_path / "bars.png"
    bar_plot(path, "FID", {"one": Mark(4.0, (3.0, 5.0)), "two": Mark(-2.0), "real": Mark(2.0)}, ["real"])
    assert Image.open(path).size[0] == 900
    blue, grey, ink = (columns(path, colour) for colour in (COLOURS[0], GREY, INK))
    middles = [56 + (i + 0.5) * BAR for i in range(3)]
    one, two = (blue[int(middle) + 8] for middle in middles[:2])  # beside the interval
    real = grey[int(middles[2]) + 8]
    zero, unit = real.min(), (real.max() - real.min()) / 2
    assert (one.min(), one.max()) == pytest.approx((zero, zero + 4 * unit), abs=2)
    assert (two.min(), two.max()) == pytest.approx((zero - 2 * unit, zero), abs=2)
    caps = [c for c in ink[int(middles[0]) - 5] if c > zero]
    assert (caps[0], caps[-1]) == pytest.approx((zero + 3 * unit, zero + 5 * unit), abs=3)


def test_lines_rise_with_their_numbers(tmp_path):
    def line(*values):
        return [(x, Mark(v, (v - 0.05, v + 0.05))) for x, v in zip((1, 2, 4), values, strict=True)]

    line_plot(
        tmp_path / "lines.png",
        "Likeness",
        {"a": line(0.2, 0.4, 0.6), "b": line(0.8, 0.8, 0.8)},
        "references",
        "likeness",
    )
    first, second = (columns(tmp_path / "lines.png", colour) for colour in COLOURS[:2])
    plot = {row: c[c < 700] for row, c in first.items()}
    places = np.array([(row, c.mean()) for row, c in plot.items() if len(c)])
    assert np.corrcoef(places.T)[0, 1] < -0.95  # higher to the right, at lower rows
    widest = max(second, key=lambda row: len(second[row]))
    assert widest < places[:, 0].min() + 20
    assert columns(tmp_path / "lines.png", PALE)


def test_a_single_point_is_drawn(tmp_path):
    line_plot(tmp_path / "new" / "one.png", "", {"a": [(4, Mark(0.0))]}, "n", "v")
    assert columns(tmp_path / "new" / "one.png", COLOURS[0])
