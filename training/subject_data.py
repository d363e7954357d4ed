"""A data set for Subject-Diffusion: pictures with captions, and of each subject the word, the box, the mask and the crop.

    FOLDER/metadata.jsonl           a line for each picture (the layout of Hugging Face's image folders):
                                    {"file_name": "pictures/a.png", "text": "a dog and a cat",
                                     "subjects": [{"entity": "dog", "box": [left, top, right, bottom], "score": 0.7,
                                                   "mask": "masks/a-1.png", "crop": "crops/a-1.png"}, ...]}
    FOLDER/pictures, masks, crops   boxes are shares of the picture's sides; a mask has the picture's size, white is the
                                    subject; a crop is the subject alone, square, on a transparent ground: what the image
                                    encoder sees, from this picture or from another one of the same subject.

The rules say what of a detector's findings is kept, as the authors of Subject-Diffusion (arXiv:2307.11410) sorted theirs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .shared import PersonalizeError, box_of, call_of, cut_out

METADATA = "metadata.jsonl"
WHITE = 0.9
"""Near-white is above this in every channel."""


@dataclass(frozen=True)
class Entity:
    """A subject of a picture."""

    entity: str
    """Its word in the caption."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom, as shares of the picture's sides."""
    score: float
    mask: Path
    crop: Path


@dataclass(frozen=True)
class SubjectPicture:
    """A picture whose subjects are known."""

    path: Path
    text: str
    subjects: tuple[Entity, ...]


def write_picture(
    folder: Path,
    name: str,
    picture: Image.Image,
    text: str,
    found: Sequence[tuple[str, float, np.ndarray]],
    crops: Sequence[Image.Image] | None = None,
) -> SubjectPicture:
    """Add a picture to a data set; its line is written last, so that what is there is whole.

    Args:
        folder: of the data set.
        name: of the picture, without an ending.
        picture: RGB.
        text: its caption.
        found: of each subject its word, score, and mask [H, W] of bool, not empty.
        crops: of each; by default from this picture.
    """
    for part in ("pictures", "masks", "crops"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    path, subjects, lines = folder / "pictures" / f"{name}.png", [], []
    picture.save(path)
    for i, (word, score, mask) in enumerate(found, 1):
        files = {part: f"{part}s/{name}-{i}.png" for part in ("mask", "crop")}
        box = box_of(torch.from_numpy(mask))
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / files["mask"])
        crop = crop_of(picture, mask) if crops is None else crops[i - 1]
        crop.save(folder / files["crop"])
        shares = (box[0] / picture.width, box[1] / picture.height, box[2] / picture.width, box[3] / picture.height)
        subjects.append(Entity(word, shares, score, folder / files["mask"], folder / files["crop"]))
        lines.append({"entity": word, "box": [round(x, 6) for x in shares], "score": round(score, 4), **files})
    line = {"file_name": f"pictures/{name}.png", "text": text, "subjects": lines}
    with (folder / METADATA).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return SubjectPicture(path, text, tuple(subjects))


def read_subjects(folder: Path) -> list[SubjectPicture]:
    """A data set, checked.

    Raises:
        PersonalizeError: there is none, or something of it is wrong or missing: the first few are named.
    """
    path = folder / METADATA
    if not path.is_file():
        raise PersonalizeError(
            f"{folder} has no {METADATA}: it is no data set of pictures with their subjects' words, boxes, masks and crops."
        )
    found, problems = [], list[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(_read(folder, json.loads(line)))
        except PersonalizeError as error:
            problems.append(f"line {number}: {error}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"line {number} is not one of a data set ({type(error).__name__}: {error})")
    if problems:
        more = "" if len(problems) <= 3 else f"; and {len(problems) - 3} more"
        raise PersonalizeError(f"{path}: {'; '.join(problems[:3])}{more}.")
    if not found:
        raise PersonalizeError(f"{path} lists no pictures.")
    return found


def _read(folder: Path, line: dict[str, Any]) -> SubjectPicture:
    path, text = folder / line["file_name"], str(line["text"])
    subjects = tuple(
        Entity(
            str(one["entity"]),
            _box(one["box"]),
            float(one.get("score", 1.0)),
            folder / one["mask"],
            folder / one["crop"],
        )
        for one in line["subjects"]
    )
    for file in (path, *(x for one in subjects for x in (one.mask, one.crop))):
        if not file.is_file():
            raise PersonalizeError(f"{file.relative_to(folder)} is not there")
    if not subjects:
        raise PersonalizeError(f"{line['file_name']} has no subjects")
    for one in subjects:
        if not call_of(one.entity.lower()).search(text.lower()):
            raise PersonalizeError(f'"{one.entity}" is no word of the caption of {line["file_name"]}, "{text}"')
    return SubjectPicture(path, text, subjects)


def _box(numbers: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(x) for x in numbers)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise PersonalizeError(
            f"the box {list(numbers)} is no part of the picture: left, top, right, bottom from 0 to 1"
        )
    return left, top, right, bottom


def crop_of(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """The subject alone, RGBA, in the middle of a square as large as its box's longer side."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB"), np.float32) / 255)
    square = cut_out(pixels, torch.from_numpy(mask))
    return Image.fromarray((square * 255).round().byte().numpy())


@dataclass(frozen=True)
class Rules:
    """What is kept; as the authors' code has it."""

    longest_side: int = 600
    """Of a picture, pixels, at least."""
    white: float = 0.1
    """Share of near-white pixels, at most."""
    nouns: tuple[int, int] = (3, 8)
    """In the caption."""
    boxes: tuple[int, int] = (2, 8)
    """Found in a picture, before the rules for boxes."""
    overlap: float = 0.5
    """Intersection over union from which the less certain of two boxes is dropped."""
    area: tuple[float, float] = (0.08, 0.7)
    """Of a box, as a share of the picture."""
    aspect: tuple[float, float] = (0.3, 3.0)
    """Width over height of a box."""
    score: float = 0.3
    regions: int = 5
    """Different masks in a box, the background one of them, at most."""
    fill: float = 0.6
    """Share of a box that its largest region fills, at least."""
    contained: float = 0.8
    """Share of the smaller of two boxes that lies in the other, from which the less certain is dropped."""


@dataclass(frozen=True)
class Detection:
    """What a detector found: a word, where, and how certain it is."""

    label: str
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""
    score: float


def picture_fault(pixels: np.ndarray, rules: Rules) -> str:
    """Why a picture [H, W, 3] in 0..1 is dropped; nothing if it is not."""
    height, width = pixels.shape[:2]
    if max(height, width) < rules.longest_side:
        return "small"
    return "white" if (pixels > WHITE).all(2).mean() > rules.white else ""


def count_fault(count: int, limits: tuple[int, int], what: str) -> str:
    """Why so many nouns, or boxes, are wrong; nothing if they are not."""
    if count < limits[0]:
        return f"few {what}"
    return f"many {what}" if count > limits[1] else ""


def box_faults(caption: str, found: Sequence[Detection], regions: np.ndarray, rules: Rules) -> list[str]:
    """Why each detection is dropped; nothing where it is kept. The more certain goes first.

    Args:
        caption: of the picture.
        found: in the picture.
        regions: [H, W], 0 the background, i + 1 the mask of detection i.
        rules: the thresholds.
    """
    height, width = regions.shape
    faults, kept = [""] * len(found), list[Detection]()
    for i in sorted(range(len(found)), key=lambda i: -found[i].score):
        one = found[i]
        left, top, right, bottom = one.box
        area, aspect = _area(one.box), (right - left) / max(bottom - top, 1e-9)
        if not rules.area[0] < area / (height * width) < rules.area[1]:
            faults[i] = "area"
        elif not rules.aspect[0] < aspect < rules.aspect[1]:
            faults[i] = "aspect"
        elif one.score <= rules.score:
            faults[i] = "score"
        elif " " in one.label or not call_of(one.label).search(caption):
            faults[i] = "not a word of the caption"
        elif not _good_mask(regions, i, one.box, rules):
            faults[i] = "mask"
        elif any(_contained(one.box, other.box) > rules.contained for other in kept):
            faults[i] = "inside another"
        else:
            kept.append(one)
    return faults


def _good_mask(regions: np.ndarray, number: int, box: tuple[float, ...], rules: Rules) -> bool:
    """Whether a box shows few things, one of them for the most part, and a mask no larger than itself."""
    left, top, right, bottom = (int(x) for x in box)
    inside = regions[top:bottom, left:right]
    values, counts = np.unique(inside, return_counts=True)
    if not 2 <= len(values) <= rules.regions or counts.max() / _area(box) < rules.fill:
        return False
    return bool((inside == number + 1).any()) and int((regions == number + 1).sum()) <= _area(box)


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def _contained(one: Sequence[float], other: Sequence[float]) -> float:
    """The share of the smaller box that lies in the other."""
    shared = (max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3]))
    return _area(shared) / max(min(_area(one), _area(other)), 1e-9)
