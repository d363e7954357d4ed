"""The demo: every method on the same photographs, one sheet, one table."""

import sys

import numpy as np
import pytest
from finetuning import photos
from pack.training.demo import __main__ as demo
from pack.training.demo import headless, methods
from pack.training.demo.sheet import CELL, GAP, LABEL, contact_sheet
from PIL import Image

ROWS = ["without", "IP-Adapter, self-attention", "Textual Inversion", "LoRA", "Custom Diffusion", "DreamBooth"]


@pytest.fixture
def quick(monkeypatch):
    """Few steps, one picture of each prompt, no ComfyUI."""
    monkeypatch.setattr(methods, "STEPS", 2)
    monkeypatch.setattr(headless, "SAMPLING", headless.Sampling(64, 2, 4.0))
    monkeypatch.setattr(demo, "EACH", 1)
    monkeypatch.setattr(demo, "find_comfyui", lambda: None)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["demo", *map(str, arguments)])
    return demo.main()


def test_it_ends_with_a_sheet_and_a_table(quick, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--output", tmp_path) == 0
    said = capsys.readouterr().out
    assert "5 photographs of a woman" in said
    assert f"Contact sheet: {tmp_path / 'contact_sheet.png'}" in said
    rows = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [*ROWS, "the photographs to each other"]
    sheet = np.asarray(Image.open(tmp_path / "contact_sheet.png").convert("RGB"))
    cells = [
        sheet[-34 - (6 - i) * (CELL + GAP) :][: CELL // 2, LABEL : LABEL + CELL].tobytes() for i in range(len(ROWS))
    ]
    assert len(set(cells)) == len(ROWS), "the methods give different pictures"
    (training,) = tmp_path.glob("training-*")
    for method, file in (("lora", "demo_lora"), ("dreambooth", "demo_dreambooth"), ("textual_inversion", "demo_tex")):
        assert f"{training / method / file}" in said


def test_a_second_run_takes_what_is_there(quick, tmp_path, monkeypatch, capsys):
    place = photos(tmp_path / "mine", 2)
    monkeypatch.setattr(methods, "TITLES", {"textual_inversion": "Textual Inversion"})
    common = ["--photos", place, "--class_name", "cat", "--output", tmp_path / "out"]
    assert run(monkeypatch, *common) == 0
    (file,) = (tmp_path / "out").glob("training-*/*/demo_*.safetensors")
    before = file.stat().st_mtime_ns
    assert run(monkeypatch, *common) == 0
    assert file.stat().st_mtime_ns == before
    assert (
        "a photo of a smiling ohwx cat"
        in next((tmp_path / "out").glob("training-*/pictures/Text*/p0-s0.txt")).read_text()
    )


def test_a_folder_that_is_not_there(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--photos", tmp_path / "gone", "--output", tmp_path / "out") == 1
    assert capsys.readouterr().err == f"The folder {tmp_path / 'gone'} does not exist.\n"


@pytest.mark.parametrize("count", [1, 4, 12])
def test_the_sheet_has_room_for_any_number(tmp_path, count):
    for i in range(count):
        Image.new("RGB", (40 + 20 * i, 60), (20 * i, 100, 100)).save(tmp_path / f"{i:02}.png")
    picture = Image.new("RGB", (512, 512))
    prompts = ["a prompt that is much too long for the width of its column, so that it goes on in the next lines"] * 4
    sheet = contact_sheet(sorted(tmp_path.iterdir()), [("a method", "0.5")] * 3, prompts, [[picture] * 4] * 3, "note")
    assert sheet.width == LABEL + 4 * (CELL + GAP) + GAP
