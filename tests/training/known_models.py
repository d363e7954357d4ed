"""Pictures of which everything is known, and models that say it, for the tests of building data sets."""

import json

import numpy as np
import pytest
from pack.training import build_checks
from pack.training import build_subject_data as module
from pack.training.build_checks import Building, Thresholds
from pack.training.settings import make_groups
from pack.training.subject_data import Detection
from pack.training.subject_models import NO_NOUN
from PIL import Image

NOUNS = ("dog", "cat", "ball", "grass", "sofa", "tree", "car")
SIZE = (60, 40)  # width, height
DOG, CAT, BALL = (2.0, 2.0, 22.0, 32.0), (30.0, 4.0, 54.0, 28.0), (4.0, 6.0, 21.0, 31.0)
TEXT = "A Dog and a cat beside a ball"
# number, which is the colour of the first pixel: name, caption, what is found
PICTURES = {
    10: ("good", TEXT, [("cat", CAT, 0.8), ("Dog", DOG, 0.9), ("Dog", (3.0, 2.0, 23.0, 32.0), 0.7)]),
    20: ("small", TEXT, []),
    30: ("white", TEXT, []),
    40: ("few_nouns", "A dog on the grass", []),
    50: ("many_nouns", "dog cat ball grass sofa tree car dog cat", []),
    60: ("few_boxes", TEXT, [("Dog", DOG, 0.9)]),
    70: ("many_boxes", TEXT, [("Dog", (i, 0.0, i + 9.0, 30.0), 0.9) for i in range(9)]),
    80: ("no_subject", TEXT, [("Dog", (0.0, 0.0, 8.0, 8.0), 0.9), ("cat", (0.0, 20.0, 60.0, 39.0), 0.8)]),
    90: ("one_subject", TEXT, [
        ("Dog", DOG, 0.9), ("ball", BALL, 0.85), ("cat dog", CAT, 0.8), (NO_NOUN, (25.0, 2.0, 45.0, 20.0), 0.29),
    ]),
    95: ("inside", TEXT, [
        ("cat", (1.0, 1.0, 31.0, 39.0), 0.95), ("Dog", (18.0, 2.0, 58.0, 38.0), 0.9), ("ball", (22.0, 6.0, 40.0, 26.0), 0.8),
    ]),
    100: ("unlike.its-name", "the Dog, the cat and the ball", [("cat", CAT, 0.6), ("ball", DOG, 0.5)]),
}  # fmt: skip
FAST = {"longest_side": 50, "shorter_side": 40, "batch_size": 3}


def picture_of(number):
    """Noise, but for the first pixel."""
    name = PICTURES[number][0]
    size = (40, 30) if name == "small" else SIZE
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 200, (size[1], size[0], 3), dtype=np.uint8)
    if name == "white":
        pixels[:20] = 250
    pixels[0, 0] = number
    return Image.fromarray(pixels)


def inner(box):
    """The mask that the segmenter gives: all of a box but two pixels at each side, and a speck far away."""
    left, top, right, bottom = (int(x) for x in box)
    mask = np.full((SIZE[1], SIZE[0]), left == 1)  # all of the picture, far more than the box, in one case
    mask[top + 2 : bottom - 2, left + 2 : right - 2] = True
    mask[-1, -1] = True
    return mask


def number_of(picture):
    return picture.getpixel((0, 0))[0]


class Fakes:
    """Models that know the truth, and remember what they saw."""

    def __init__(self, monkeypatch):
        self.seen = {"captioner": [], "detector": [], "segmenter": []}
        self.loaded = []
        for name in ("Captioner", "Tagger", "Detector", "Segmenter"):
            monkeypatch.setattr(module, name, self.loader(name))
        monkeypatch.setattr(module, "release_memory", lambda: None)  # there is none, and it is slow
        for check in ("check_processor", "check_tagger"):
            monkeypatch.setattr(build_checks, check, lambda *arguments: None)

    def loader(self, name):
        def load(*arguments):
            self.loaded.append((name, *arguments))
            return getattr(self, name.lower())

        return load

    def captioner(self, pictures):
        self.seen["captioner"] += [number_of(one) for one in pictures]
        return [PICTURES[number_of(one)][1] for one in pictures]

    def tagger(self, texts):
        return [[word for word in text.replace(",", "").split() if word.lower() in NOUNS] for text in texts]

    def detector(self, pictures, nouns):
        self.seen["detector"] += [number_of(one) for one in pictures]
        for one, words in zip(pictures, nouns, strict=True):
            assert words == self.tagger([PICTURES[number_of(one)][1]])[0]
        return [[Detection(*found) for found in PICTURES[number_of(one)][2]] for one in pictures]

    def segmenter(self, pictures, boxes):
        self.seen["segmenter"] += [number_of(one) for one in pictures]
        return [np.stack([inner(box) for box in own]) for own in boxes]


@pytest.fixture
def fakes(monkeypatch):
    return Fakes(monkeypatch)


@pytest.fixture
def given(tmp_path):
    """A folder with PICTURES."""
    folder = tmp_path / "all" / "given"
    folder.mkdir(parents=True)
    for number, (name, _, _) in PICTURES.items():
        picture_of(number).save(folder / f"{name}.png")
    return folder


def groups(given, output, **values):
    named = {
        "captioner": "a/b",
        "detector": "c/d",
        "segmenter": "e/f",
        "pictures": str(given),
        "output_dir": str(output),
    }
    return make_groups((Building, Thresholds), {**named, **FAST, **values})


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
