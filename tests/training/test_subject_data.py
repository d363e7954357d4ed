"""The data sets of Subject-Diffusion: what is kept, and the files."""

import json

import numpy as np
import pytest
import torch
from pack.models.errors import PersonalizeError
from pack.models.pictures import box_of
from pack.training.subject_data import (
    METADATA,
    Detection,
    Rules,
    box_faults,
    count_fault,
    crop_of,
    picture_fault,
    read_subjects,
    write_picture,
)
from PIL import Image

SIZE = 100
CAPTION = "a dog and a cat beside a ball"


def regions_of(*boxes, less=0):
    """A map with a mask for each box, so many pixels smaller all around."""
    regions = np.zeros((SIZE, SIZE), int)
    for i, (left, top, right, bottom) in enumerate(boxes, 1):
        regions[top + less : bottom - less, left + less : right - less] = i
    return regions


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([("dog", (10, 10, 60, 60), 0.9)], [""]),
        ([("dog", (10, 10, 38, 38), 0.9)], ["area"]),  # 7.84 %
        ([("dog", (10, 10, 39, 39), 0.9)], [""]),  # 8.41 %
        ([("dog", (0, 0, 90, 80), 0.9)], ["area"]),  # 72 %
        ([("dog", (0, 0, 90, 77), 0.9)], [""]),  # 69 %
        ([("dog", (10, 5, 36, 95), 0.9)], ["aspect"]),  # 0.289
        ([("dog", (10, 5, 38, 95), 0.9)], [""]),  # 0.311
        ([("dog", (5, 10, 95, 40), 0.9)], ["aspect"]),  # 3 is too much
        ([("dog", (5, 10, 95, 41), 0.9)], [""]),  # 2.9
        ([("dog", (10, 10, 60, 60), 0.3)], ["score"]),
        ([("dog", (10, 10, 60, 60), 0.31)], [""]),
        ([("horse", (10, 10, 60, 60), 0.9)], ["not a word of the caption"]),
        ([("dog and", (10, 10, 60, 60), 0.9)], ["not a word of the caption"]),
        ([("side", (10, 10, 60, 60), 0.9)], ["not a word of the caption"]),  # of beside
        ([("ball", (10, 10, 60, 60), 0.9)], [""]),
        ([("dog", (10, 10, 60, 60), 0.9), ("cat", (12, 12, 58, 58), 0.8)], ["", "inside another"]),
        ([("dog", (10, 10, 60, 60), 0.8), ("cat", (12, 12, 58, 58), 0.9)], ["inside another", ""]),
        ([("dog", (0, 0, 80, 80), 0.9), ("cat", (10, 10, 45, 45), 0.8)], ["", "inside another"]),  # a small one
        ([("dog", (0, 0, 50, 50), 0.9), ("cat", (20, 0, 70, 50), 0.8)], ["", ""]),  # 60 %
        ([("dog", (0, 0, 45, 45), 0.9), ("cat", (50, 50, 95, 95), 0.8)], ["", ""]),
    ],
)
def test_which_boxes_are_kept(found, expected):
    detections = [Detection(*one) for one in found]
    regions = regions_of(*(one.box for one in detections), less=1)
    if len(found) > 1 and "inside another" in expected:  # the inner mask must not hide the outer one's
        regions = regions_of(*(one.box for one in detections), less=1)
        left, top, right, bottom = detections[0].box
        regions[top + 1 : bottom - 1, left + 1 : (left + right) // 2] = 1
    assert box_faults(CAPTION, detections, regions, Rules(fill=0.4)) == expected


@pytest.mark.parametrize(
    ("paint", "expected"),
    [
        (lambda regions: None, "mask"),  # the background alone
        (lambda regions: regions.__setitem__((slice(10, 60), slice(10, 60)), 1), "mask"),  # the mask alone
        (lambda regions: regions.__setitem__((slice(10, 50), slice(10, 50)), 1), ""),  # 64 % of the box
        (lambda regions: regions.__setitem__((slice(10, 60), slice(10, 37)), 1), "mask"),  # 54 and 46 %
        (lambda regions: regions.__setitem__((slice(0, 58), slice(5, 65)), 1), "mask"),  # larger than the box
        (lambda regions: regions.__setitem__((slice(10, 50), slice(10, 50)), 2), "mask"),  # another's mask
    ],
)
def test_which_masks_are_kept(paint, expected):
    regions = np.zeros((SIZE, SIZE), int)
    paint(regions)
    assert box_faults(CAPTION, [Detection("dog", (10, 10, 60, 60), 0.9)], regions, Rules()) == [expected]


def test_a_box_with_many_masks_is_not_kept():
    regions = np.zeros((SIZE, SIZE), int)
    regions[10:50, 10:60] = 1
    for i in range(4):
        regions[51:55, 10 + 4 * i : 12 + 4 * i] = i + 2
    assert box_faults(CAPTION, [Detection("dog", (10, 10, 60, 60), 0.9)], regions, Rules()) == ["mask"]
    assert box_faults(CAPTION, [Detection("dog", (10, 10, 60, 60), 0.9)], regions, Rules(regions=6)) == [""]


@pytest.mark.parametrize(
    ("height", "width", "white", "expected"),
    [(600, 10, 0, ""), (10, 600, 0, ""), (599, 599, 0, "small"), (600, 600, 0.09, ""), (600, 600, 0.11, "white")],
)
def test_which_pictures_are_kept(height, width, white, expected):
    pixels = np.full((height, width, 3), 0.5, np.float32)
    pixels.reshape(-1, 3)[: round(height * width * white)] = 0.95
    assert picture_fault(pixels, Rules()) == expected
    pixels[..., 0] = 0.89  # yellow is not white
    assert picture_fault(pixels, Rules()) != "white"


def test_how_many_nouns():
    counts = {count: count_fault(count, (3, 8), "nouns") for count in (2, 3, 8, 9)}
    assert counts == {2: "few nouns", 3: "", 8: "", 9: "many nouns"}


def made(folder, name="a"):
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    one, other = np.zeros((30, 40), bool), np.zeros((30, 40), bool)
    one[5:15, 2:12], other[10:30, 20:36] = True, True
    return picture, write_picture(folder, name, picture, CAPTION, [("dog", 0.9, one), ("cat", 0.8, other)])


def test_what_is_written_is_read(tmp_path):
    picture, written = made(tmp_path)
    made(tmp_path, "b")
    read = read_subjects(tmp_path)
    assert [one.path.name for one in read] == ["a.png", "b.png"]
    assert read[0].text == written.text == CAPTION
    for before, after in zip(written.subjects, read[0].subjects, strict=True):
        assert after.box == pytest.approx(before.box, abs=1e-6)
        assert (after.entity, after.score, after.mask, after.crop) == (
            before.entity,
            before.score,
            before.mask,
            before.crop,
        )
    assert read[0].subjects[0].box == pytest.approx((2 / 40, 5 / 30, 12 / 40, 15 / 30), abs=1e-6)
    mask = np.asarray(Image.open(read[0].subjects[1].mask)) > 127
    assert box_of(torch.from_numpy(mask)) == (20, 10, 36, 30)
    crop = np.asarray(Image.open(read[0].subjects[1].crop))
    assert crop.shape == (20, 20, 4)
    assert (crop[:, :2, 3] == 0).all()
    assert np.array_equal(crop[:, 2:18, :3], np.asarray(picture)[10:30, 20:36])


def test_a_crop_shows_the_subject_alone():
    picture = Image.new("RGB", (20, 20), "red")
    mask = np.zeros((20, 20), bool)
    mask[0:10, 0:10] = mask[5:15, 5:15] = True
    crop = np.asarray(crop_of(picture, mask))
    assert crop.shape == (15, 15, 4)
    assert crop[14, 0, 3] == 0
    assert crop[7, 7].tolist() == [255, 0, 0, 255]
    with pytest.raises(ValueError, match="empty mask"):
        crop_of(picture, np.zeros((20, 20), bool))


def test_what_is_wrong_with_a_data_set_is_told(tmp_path):
    with pytest.raises(PersonalizeError, match=r"has no metadata.jsonl: it is no data set of pictures with"):
        read_subjects(tmp_path)
    made(tmp_path)
    good = json.loads((tmp_path / METADATA).read_text())

    def told(change):
        line = json.loads(json.dumps(good))
        change(line)
        (tmp_path / METADATA).write_text(json.dumps(line) + "\n")
        with pytest.raises(PersonalizeError) as error:
            read_subjects(tmp_path)
        return str(error.value)

    assert "line 1: masks/none.png is not there." in told(lambda x: x["subjects"][0].update(mask="masks/none.png"))
    assert "is no part of the picture" in told(lambda x: x["subjects"][0].update(box=[0.5, 0, 0.4, 1]))
    assert "is no part of the picture" in told(lambda x: x["subjects"][0].update(box=[0.5, 0, 1.4, 1]))
    for word in ("horse", "side"):
        said = told(lambda x, word=word: x["subjects"][0].update(entity=word))
        assert f'"{word}" is no word of the caption of pictures/a.png, "{CAPTION}"' in said
    assert "mask" in told(lambda x: x["subjects"][0].update(entity="DOG", mask="masks/none.png")), "of any case"
    assert "has no subjects" in told(lambda x: x.update(subjects=[]))
    assert "line 1 is not one of a data set (KeyError: 'text')" in told(lambda x: x.pop("text"))
    (tmp_path / METADATA).write_text("{\n\n")
    with pytest.raises(PersonalizeError, match="line 1 is not one of a data set"):
        read_subjects(tmp_path)
    (tmp_path / METADATA).write_text("\n")
    with pytest.raises(PersonalizeError, match="lists no pictures"):
        read_subjects(tmp_path)
