"""A folder of pictures becomes a data set for Subject-Diffusion, with models that say what is known."""

import shutil

import numpy as np
import pytest
from known_models import CAT, DOG, PICTURES, SIZE, TEXT, files_of, groups, inner, lines_of, picture_of
from pack.training import build_subject_data as module
from pack.training.build_checks import Thresholds
from pack.training.build_subject_data import build, open_picture
from pack.training.subject_data import METADATA, Rules, crop_of, read_subjects
from pack.training.subject_models import NO_NOUN
from PIL import Image


def test_the_data_set_is_what_the_models_said(given, tmp_path, fakes):
    output = tmp_path / "out"
    report = build(*groups(given, output))
    read = read_subjects(output)
    assert [one.path.name for one in read] == ["good.png", "inside.png", "one_subject.png", "unlike.its-name.png"]
    good, inside, one, other = read
    assert good.text == one.text == TEXT
    assert [(s.entity, s.score) for s in good.subjects] == [("Dog", 0.9), ("cat", 0.8)]
    assert [(s.entity, s.score) for s in one.subjects] == [("Dog", 0.9)]
    assert [(s.entity, s.score) for s in inside.subjects] == [("Dog", 0.9)]
    assert [(s.entity, s.score) for s in other.subjects] == [("cat", 0.6), ("ball", 0.5)]
    assert np.array_equal(np.asarray(Image.open(good.path)), np.asarray(picture_of(10)))
    for subject, box in zip(good.subjects, (DOG, CAT), strict=True):
        mask = inner(box)
        mask[-1, -1] = False  # the speck is outside of the box
        assert np.array_equal(np.asarray(Image.open(subject.mask)), mask * np.uint8(255))
        assert np.array_equal(np.asarray(Image.open(subject.crop)), np.asarray(crop_of(picture_of(10), mask)))
        left, top, right, bottom = box
        shares = ((left + 2) / 60, (top + 2) / 40, (right - 2) / 60, (bottom - 2) / 40)
        assert subject.box == pytest.approx(shares, abs=1e-6)
    names = {path.name for path in output.iterdir() if path.name != ".lock"}
    assert names == {
        METADATA,
        "pictures",
        "masks",
        "crops",
        "dropped.jsonl",
        "report.md",
        "contact_sheet.png",
        "settings.json",
    }
    assert report == (output / "report.md").read_text()


def test_why_what_is_dropped(given, tmp_path, fakes):
    report = build(*groups(given, tmp_path / "out"))
    dropped = {line["file_name"].removesuffix(".png"): line for line in lines_of(tmp_path / "out" / "dropped.jsonl")}
    reasons = {name: line["reason"] for name, line in dropped.items()}
    plain = ("small", "white", "few_nouns", "many_nouns", "few_boxes", "many_boxes", "no_subject")
    assert reasons == {name: name.replace("_", " ") for name in plain} | {"good": "", "inside": "", "one_subject": ""}
    boxes = {
        name: [(box["entity"], box["reason"]) for box in line["boxes"]]
        for name, line in dropped.items()
        if line["boxes"]
    }
    assert boxes == {
        "good": [("Dog", "overlap")],
        "inside": [("cat", "mask"), ("ball", "inside another")],
        "no_subject": [("Dog", "area"), ("cat", "aspect")],
        "one_subject": [("ball", "overlap"), ("cat dog", "not a word of the caption"), (NO_NOUN, "score")],
    }
    assert dropped["good"]["boxes"][0] == {
        "entity": "Dog",
        "box": [3.0, 2.0, 23.0, 32.0],
        "score": 0.7,
        "reason": "overlap",
    }
    assert dropped["few_nouns"]["text"] == "A dog on the grass"
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in report.splitlines() if line.startswith("|")]
    assert rows == [
        ["dropped pictures", "7"],
        ["---", "---"],
        *([name.replace("_", " "), "1"] for name in plain),
        ["dropped boxes", "8"],
        ["---", "---"],
        ["overlap", "2"],
        ["area", "1"],
        ["aspect", "1"],
        ["score", "1"],
        ["not a word of the caption", "1"],
        ["mask", "1"],
        ["inside another", "1"],
    ]
    assert "4 of 11 pictures are kept, with 6 subjects: dog 3, cat 2, ball 1." in report
    assert "its caption has fewer than 3 nouns (--min_nouns)" in report


def test_a_model_sees_only_what_is_left(given, tmp_path, fakes):
    build(*groups(given, tmp_path / "out", max_new_tokens=12, text_threshold=0.1, mask_threshold=0.5))
    assert fakes.loaded == [("Captioner", "a/b", 12), ("Tagger", "en_core_web_sm"), ("Detector", "c/d", 0.25, 0.1), ("Segmenter", "e/f", 0.5)]  # fmt: skip
    everything = sorted(PICTURES, key=lambda number: PICTURES[number][0])
    captioned = [number for number in everything if number not in (20, 30)]
    detected = [number for number in captioned if number not in (40, 50)]
    assert fakes.seen == {
        "captioner": captioned,
        "detector": detected,
        "segmenter": [number for number in detected if number not in (60, 70)],
    }


def test_thresholds_are_the_rules():
    assert Thresholds().rules == Rules()
    names = ("longest_side", "white", "min_nouns", "max_nouns", "min_boxes", "max_boxes", "overlap", "min_area", "max_area",
             "min_aspect", "max_aspect", "score", "regions", "fill", "contained")  # fmt: skip
    rules = Thresholds(**{name: i for i, name in enumerate(names)}).rules
    assert rules == Rules(0, 1, (2, 3), (4, 5), 6, (7, 8), (9, 10), 11, 12, 13, 14)


def test_other_thresholds_keep_more(given, tmp_path, fakes):
    changed = {"min_nouns": 1, "max_nouns": 9, "min_boxes": 1, "max_boxes": 9, "min_area": 0.01, "max_aspect": 4}
    changed |= {"white": 1, "overlap": 0.9, "contained": 1, "score": 0.2}
    report = build(*groups(given, tmp_path / "out", **changed))
    kept = {one.path.stem: [s.entity for s in one.subjects] for one in read_subjects(tmp_path / "out")}
    assert kept["few_boxes"] == ["Dog"]
    assert kept["no_subject"] == ["Dog", "cat"]
    assert "few nouns" not in report
    assert "few boxes" in report  # what has no boxes at all


def test_captions_beside_the_pictures_are_used(given, tmp_path, fakes):
    for number, (name, text, _) in PICTURES.items():
        if number != 10:
            (given / f"{name}.txt").write_text(text)
    build(*groups(given, tmp_path / "mixed"))
    assert fakes.seen["captioner"] == [10]
    (given / "good.txt").write_text(f" {TEXT}\n")
    fakes.loaded.clear()
    build(*groups(given, tmp_path / "out", captioner=None))
    assert "Captioner" not in [name for name, *_ in fakes.loaded]
    assert files_of(tmp_path / "out")[METADATA] == files_of(tmp_path / "mixed")[METADATA]


def test_two_of_a_word_and_masks_over_each_other(tmp_path, fakes, monkeypatch):
    """The rules see the less certain mask on top; what is written is all of a mask in its box."""
    given = tmp_path / "given"
    given.mkdir()
    picture_of(10).save(given / "a.png")
    outer, on_top, beside = (0.0, 0.0, 40.0, 30.0), (30.0, 10.0, 50.0, 30.0), (42.0, 0.0, 58.0, 20.0)
    found = [("cat", outer, 0.9), ("cat", on_top, 0.8), ("ball", beside, 0.7)]
    monkeypatch.setitem(PICTURES, 10, ("a", TEXT, found))
    seen = []
    rules = module.box_faults
    monkeypatch.setattr(module, "box_faults", lambda *given: seen.append(given[2]) or rules(*given))
    build(*groups(given, tmp_path / "out", fill=0.5))
    (one,) = read_subjects(tmp_path / "out")
    assert [subject.entity for subject in one.subjects] == ["cat", "cat", "ball"]
    (regions,) = seen
    assert regions[15, 35] == 2  # in both masks
    assert np.asarray(Image.open(one.subjects[0].mask))[15, 35] == 255
    assert np.asarray(Image.open(one.subjects[1].mask))[15, 35] == 255


def test_large_pictures_are_shrunk(given, tmp_path, fakes):
    large = picture_of(10).resize((600, 400), Image.Resampling.NEAREST)
    large.paste((10, 0, 0), (0, 0, 60, 60))
    large.save(given / "good.png")
    assert open_picture(given / "good.png", 100).size == (150, 100)
    assert open_picture(given / "good.png", 400).size == (600, 400)
    build(*groups(given, tmp_path / "out"))
    good = read_subjects(tmp_path / "out")[0]
    assert Image.open(good.path).size == Image.open(good.subjects[0].mask).size == SIZE


def test_what_is_transparent_is_white(tmp_path):
    picture = picture_of(10).convert("RGBA")
    picture.putalpha(Image.fromarray(np.uint8([[0, 255]]).repeat(20, 0).repeat(30, 1).repeat(2, 0)))
    picture.save(tmp_path / "a.png")
    pixels = np.asarray(open_picture(tmp_path / "a.png", 800))
    assert (pixels[:, :30] == 255).all()
    assert np.array_equal(pixels[:, 30:], np.asarray(picture_of(10))[:, 30:])


def test_the_contact_sheet_shows_boxes_and_masks(given, tmp_path, fakes):
    output = tmp_path / "out"
    build(*groups(given, output))
    sheet = np.asarray(Image.open(output / "contact_sheet.png").convert("RGB")).astype(int)
    blue, orange = (36, 88, 180), (214, 92, 40)
    for colour in (blue, orange):
        assert (np.abs(sheet - colour).sum(2) < 12).sum() > 200
    shutil.rmtree(output)
    build(*groups(given, output, sheet=0))
    assert not (output / "contact_sheet.png").exists()


def test_nothing_is_kept(given, tmp_path, fakes):
    report = build(*groups(given, tmp_path / "out", longest_side=100))
    assert "0 of 11 pictures are kept, with 0 subjects." in report
    assert "Nothing is kept" in report
    assert fakes.loaded == []
    assert not (tmp_path / "out" / METADATA).exists()
