"""Pictures side by side, with what is said of them."""

import numpy as np
import pytest
from pack.models.contact_sheet import CELL, DOTS, GAP, LABEL, LINE, contact_sheet, layout
from PIL import Image

LONG = "a prompt that is much too long for the width of its column, so that it goes on in the next lines"


def plain(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


@pytest.mark.parametrize("count", [1, 4, 12])
def test_it_has_room_for_any_number(count):
    references = [plain((20 * i, 100, 100), (40 + 20 * i, 60)) for i in range(count)]
    sheet = contact_sheet(
        [[plain("black", (512, 512))] * 4] * 3, [("a method", "0.5")] * 3, [LONG] * 4, references, "note"
    )
    assert sheet.width == LABEL + 4 * (CELL + GAP)


def test_each_picture_is_in_its_place_and_keeps_its_aspect():
    sheet = contact_sheet([[plain("red"), plain("lime", (64, 32))], [plain("blue")]], [], [], cell=64)
    assert sheet.size == (GAP + 2 * (64 + GAP), GAP + 2 * (64 + GAP))
    pixels = np.asarray(sheet)
    middle, next_ = GAP + 32, GAP + 64 + GAP + 32
    assert [tuple(pixels[y, x]) for y, x in ((middle, middle), (middle, next_), (next_, middle))] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
    ]
    assert tuple(pixels[next_, next_]) == (255, 255, 255), "nothing is there"
    assert tuple(pixels[GAP + 4, next_]) == (255, 255, 255), "twice as wide as high"


def test_labels_headings_and_the_note_are_written():
    rows = [[plain("white")]]
    bare = np.asarray(contact_sheet(rows, [("",)], [""]))
    assert (bare == 255).all()
    for sheet in (
        contact_sheet(rows, [("LoRA", "CLIP-I .8")], []),
        contact_sheet(rows, [], ["a cat"]),
        contact_sheet(rows, [], [], note="foot"),
    ):
        assert (np.asarray(sheet) != 255).any()
    assert contact_sheet(rows, [], ["a cat"]).height == CELL + 2 * GAP + 3 * LINE


def written(sheet):
    """Where there is ink, [h, w]; the pictures of these tests are white."""
    return (np.asarray(sheet) != 255).any(-1)


@pytest.mark.parametrize("cell", [32, 64, CELL])
@pytest.mark.parametrize("label", [[LONG], ["LoRA", LONG, LONG], ["LoRA", *["a number 0.5"] * 40], ["m" * 500]])
def test_a_label_stays_in_its_place(label, cell):
    rows = [[plain("white")] * 2] * 2
    ink = written(contact_sheet(rows, [label, [""]], [], cell=cell))
    assert ink.any()
    assert not ink[GAP + cell + GAP :].any(), "nothing in the next row"
    assert not ink[:, LABEL - GAP :].any(), "nothing under the pictures or in the gaps"


@pytest.mark.parametrize("cell", [32, CELL])
def test_headings_and_the_note_stay_in_their_places(cell):
    rows = [[plain("white")] * 3]
    ink = written(contact_sheet(rows, [], [LONG, "", "M" * 80], cell=cell))
    begins = [GAP + i * (cell + GAP) for i in range(4)]
    assert ink[:, begins[0] : begins[0] + cell].any()
    assert not ink[:, begins[0] + cell : begins[2]].any(), "nothing in the next column"
    assert not ink[:, begins[3] - GAP :].any()
    assert not ink[GAP + 3 * LINE :].any(), "nothing in the pictures"
    sheet = contact_sheet(rows, [], [], note=LONG * 9, cell=cell)
    foot = written(sheet)[GAP + cell + GAP :]
    assert sheet.height == GAP + cell + GAP + 3 * LINE
    assert [bool(foot[line * LINE : (line + 1) * LINE].any()) for line in range(3)] == [True] * 3
    assert not foot[:, -GAP:].any()


def test_what_does_not_fit_ends_with_dots(monkeypatch):
    said = []
    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", lambda _, at, text, *__: said.append((at, text)))
    rows = [[plain("white")]]
    contact_sheet(rows, [["LoRA", *map(str, range(9))]], [])
    assert [text for _, text in said] == ["LoRA", "0", "1", "2", "3", "4", f"5 {DOTS}"]
    said.clear()
    contact_sheet(rows, [[LONG * 9, "0.5"]], [])
    texts = [text for _, text in said]
    assert texts[0].startswith("a prompt that")
    assert texts[-2].endswith(DOTS)
    assert texts[-1] == "0.5", "each text keeps a line"
    assert len({at for at, _ in said}) == len(texts) == (CELL + GAP) // LINE
    said.clear()
    contact_sheet(rows, [["LoRA", "a text that goes on in the next of its lines, whole"]], [])
    assert " ".join(text for _, text in said) == "LoRA a text that goes on in the next of its lines, whole"


def test_the_size_is_known_before_anything_is_drawn():
    rows, labels, headings = [[plain("red")] * 3, [plain("blue")]], [["a", "b"], ["c"]], ["one", LONG]
    sheet = contact_sheet(rows, labels, headings, [plain("lime")] * 9, LONG * 5, 48)
    place = layout([3, 1], labels, headings, 9, LONG * 5, 48)
    assert sheet.size == (place.width, place.height)
    assert place.shown == 3
    assert layout([1], [], ["a"] * 5000).width == GAP + 5000 * (CELL + GAP)
