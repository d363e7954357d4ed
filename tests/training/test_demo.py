"""The demo without ComfyUI, and its contact sheet."""

import sys

import numpy as np
import pytest
from pack.training.demo import __main__ as demo
from pack.training.demo import headless
from pack.training.demo.sheet import contact_sheet
from PIL import Image


def test_headless_ends_with_a_contact_sheet(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(headless, "STEPS", 2)
    monkeypatch.setattr(demo, "find_comfyui", lambda: None)
    monkeypatch.setattr(sys, "argv", ["demo", "--output", str(tmp_path)])
    assert demo.main() == 0
    assert "contact_sheet.png" in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "contact_sheet.png")).std() > 20


def test_the_aggregations_give_different_pictures(root, monkeypatch):
    monkeypatch.setattr(headless, "STEPS", 2)
    results = headless.in_diffusers(root / "workflows" / "example_photos", "a cat")
    assert [label for label, _ in results] == [f"{name}, weight 0.8" for name in ("average", "max", "concatenate")]
    assert len({picture.tobytes() for _, picture in results}) == 3


def test_a_folder_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--photos", str(tmp_path / "gone")])
    assert demo.main() == 1
    assert capsys.readouterr().err == f"The folder {tmp_path / 'gone'} does not exist.\n"


@pytest.mark.parametrize("count", [1, 5, 12])
def test_the_sheet_has_room_for_any_number(tmp_path, count):
    for i in range(count):
        Image.new("RGB", (40 + 20 * i, 60), (20 * i, 100, 100)).save(tmp_path / f"{i:02}.png")
    results = [
        ("a label that is much too long for the width of its cell, so it is cut", Image.new("RGB", (512, 512)))
    ] * 3
    sheet = contact_sheet(sorted(tmp_path.iterdir()), results, "note")
    assert sheet.width == max(min(count, 8), 3) * 272 + 16
