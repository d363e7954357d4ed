"""Pictures side by side, with what is said of them."""

import numpy as np
import pytest
from pack.models.contact_sheet import CELL, GAP, LABEL, LINE, contact_sheet
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
