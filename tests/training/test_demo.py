"""The demo: every method on the same photographs, one sheet, one table."""

import sys

import numpy as np
import pytest
from finetuning import photos
from pack.models.contact_sheet import CELL, GAP, LABEL
from pack.training.demo import __main__ as demo
from pack.training.demo import headless, methods
from PIL import Image

ROWS = [
    "without",
    "IP-Adapter, self-attention",
    "Subject-Diffusion",
    "Textual Inversion",
    "LoRA",
    "Custom Diffusion",
    "DreamBooth",
]


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
        sheet[-34 - (len(ROWS) - i) * (CELL + GAP) :][: CELL // 2, LABEL : LABEL + CELL].tobytes()
        for i in range(len(ROWS))
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
        "a photo of a smiling ohwx, facing left, on a beach"
        in next((tmp_path / "out").glob("training-*/pictures/Text*/p0-s0.txt")).read_text()
    )


def test_a_mask_that_marks_nothing_is_told_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    place = photos(tmp_path / "mine", 2)
    first = min(place.glob("*.*"))
    faint = np.full((64, 64), 40, np.uint8)
    faint[0] = 90
    Image.fromarray(faint).save(place / f"{first.stem}-masklabel.png")
    assert run(monkeypatch, "--photos", place, "--output", tmp_path / "out") == 1
    assert capsys.readouterr().err == (
        f"The mask of {first.name} is nowhere above one half: mark the subject in it, or leave it out.\n"
    )
    assert not list((tmp_path / "out").glob("*/*"))


def test_a_folder_that_is_not_there(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--photos", tmp_path / "gone", "--output", tmp_path / "out") == 1
    assert capsys.readouterr().err == f"The folder {tmp_path / 'gone'} does not exist.\n"
