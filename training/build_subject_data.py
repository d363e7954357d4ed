"""A folder of pictures to a data set for Subject-Diffusion: captions, and of each subject the word, box, mask and crop.

    python -m training.build_subject_data --pictures PICTURES --output_dir FOLDER --captioner Salesforce/blip2-opt-2.7b \\
        --detector IDEA-Research/grounding-dino-tiny --segmenter facebook/sam-vit-huge

Beside NAME.jpg may lie NAME.txt, its caption; where there is none, BLIP-2 writes one. A tagger finds the nouns, Grounding
DINO their boxes, SAM the masks, and rules say what is kept, as the authors of Subject-Diffusion (arXiv:2307.11410) sorted
their pictures. The models work one after another, each on all pictures, so that only one is in memory. A build that was
stopped goes on with the same command, and loses the batch at which it was; pictures that come into the folder later are
added in the same way. --output_dir becomes what --instance_data_dir of training.subject_diffusion takes, with report.md
and dropped.jsonl, which say what was dropped and why, and contact_sheet.png, which shows some of what was kept.

The rules are made for large collections: with --min_nouns 1 --min_boxes 1 few pictures of single subjects stay, too.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.ops import nms
from tqdm import tqdm

from .build_checks import Building, Material, Thresholds, look, shared_settings
from .dataset import visible_picture
from .look import alone, remember
from .settings import exit_status, make_groups, read_values
from .shared import PersonalizeError
from .subject_data import Detection, Rules, box_faults, count_fault, write_picture
from .subject_models import Captioner, Detector, Segmenter, Tagger, release_memory
from .subject_progress import SETTINGS, DroppedBox
from .subject_report import write_report


def main(arguments: list[str] | None = None) -> int:
    """What `python -m training.build_subject_data` does; returns the exit status: 1 if something is wrong, and was said."""

    def work() -> None:
        groups = (Building, Thresholds)
        given, values = read_values(groups, "python -m training.build_subject_data", __doc__ or "", arguments)
        building, thresholds = make_groups(groups, {**values, **given})
        print(build(building, thresholds))

    return exit_status(work)


def build(building: Building, thresholds: Thresholds) -> str:
    """Make the data set, or go on making it; returns the report.

    Raises:
        PersonalizeError: whatever the user can mend, a line for each problem.
        OSError: a file cannot be written.
    """
    material = look(building, thresholds)
    with alone(material.progress.folder):
        return _build(building, thresholds, material)


def _build(building: Building, thresholds: Thresholds, material: Material) -> str:
    progress = material.progress
    remember(progress.folder / SETTINGS, shared_settings(building, thresholds), "--output_dir")
    progress.drop((material.paths[name], fault, material.captions[name], ()) for name, fault in material.faults.items())
    try:
        for stage in (caption, detect, segment):
            stage(building, thresholds, material)
            release_memory()  # of the stage's model, before the next one comes
    except torch.OutOfMemoryError:
        raise PersonalizeError(
            f"There is not enough memory for {building.batch_size} pictures at once: use a lower --batch_size, and the "
            "same command goes on."
        ) from None
    report = write_report(progress.folder, progress.lines.values(), thresholds, building.sheet)
    progress.end()
    return report


def caption(building: Building, thresholds: Thresholds, material: Material) -> None:
    """BLIP-2 writes the captions that are missing."""
    progress = material.progress
    waiting = [
        name
        for name, text in material.captions.items()
        if not text and name not in progress.captions and not progress.is_decided(name)
    ]
    if not waiting:
        return
    captioner = Captioner(building.captioner or "", building.max_new_tokens)
    for names in _batches(waiting, building.batch_size, "Writing captions"):
        texts = captioner([open_picture(material.paths[name], building.shorter_side) for name in names])
        progress.add_captions(dict(zip(names, texts, strict=True)))


def detect(building: Building, thresholds: Thresholds, material: Material) -> None:
    """The tagger finds the nouns, and Grounding DINO boxes of them."""
    progress, limits = material.progress, thresholds.rules.nouns
    waiting = [name for name in material.captions if name not in progress.boxes and not progress.is_decided(name)]
    if not waiting:
        return
    texts = [text_of(material, name) for name in waiting]
    nouns = dict(zip(waiting, Tagger(building.tagger)(texts), strict=True))
    faults = {name: fault for name in waiting if (fault := count_fault(len(nouns[name]), limits, "nouns"))}
    progress.drop((material.paths[name], fault, text_of(material, name), ()) for name, fault in faults.items())
    waiting = [name for name in waiting if name not in faults]
    if not waiting:
        return
    detector = Detector(building.detector or "", thresholds.box_threshold, thresholds.text_threshold)
    for names in _batches(waiting, building.batch_size, "Finding boxes"):
        pictures = [open_picture(material.paths[name], building.shorter_side) for name in names]
        found = detector(pictures, [nouns[name] for name in names])
        progress.add_boxes(dict(zip(names, found, strict=True)))


def segment(building: Building, thresholds: Thresholds, material: Material) -> None:
    """SAM finds the masks of the boxes, and the rules decide."""
    progress, rules = material.progress, thresholds.rules
    boxes = {name: found for name, found in progress.boxes.items() if name in material.paths}
    faults = {name: count_fault(len(found), rules.boxes, "boxes") for name, found in boxes.items()}
    progress.drop(
        (material.paths[name], fault, text_of(material, name), ())
        for name, fault in faults.items()
        if fault and not progress.is_decided(name)
    )
    good = [name for name, fault in faults.items() if not fault]
    size = building.batch_size
    batches = [good[i : i + size] for i in range(0, len(good), size)]  # the same ones when it goes on
    waiting = [names for names in batches if not all(map(progress.is_decided, names))]
    if not waiting:
        return
    segmenter = Segmenter(building.segmenter or "", thresholds.mask_threshold)
    with tqdm(total=sum(map(len, waiting)), desc="Finding masks", unit=" pictures") as bar:
        for names in waiting:
            pictures = [open_picture(material.paths[name], building.shorter_side) for name in names]
            order = [suppress(boxes[name], rules.overlap) for name in names]
            found = [[boxes[name][i] for i in places] for name, places in zip(names, order, strict=True)]
            masks = segmenter(pictures, [[one.box for one in own] for own in found])
            for name, picture, places, own in zip(names, pictures, order, masks, strict=True):
                if not progress.is_decided(name):
                    decide(material, name, picture, places, own, rules)
                bar.update()


def decide(
    material: Material, name: str, picture: Image.Image, order: Sequence[int], masks: np.ndarray, rules: Rules
) -> None:
    """Write a picture into the data set, or why it is not.

    A subject gets all of its mask that is in its box, also where another one lies on it, which may have been dropped.

    Args:
        material: of the build.
        name: of the picture, without ending.
        picture: RGB.
        order: which of its boxes no other one suppresses, the more certain first.
        masks: of these, [boxes, H, W] of bool.
        rules: what is kept.
    """
    path, text, progress = material.paths[name], text_of(material, name), material.progress
    found = [progress.boxes[name][i] for i in order]
    regions = np.zeros((picture.height, picture.width), int)
    for i, mask in enumerate(masks, 1):
        regions[mask] = i  # the less certain on top, as in the authors' code
    faults = box_faults(text, found, regions, rules)
    dropped = [DroppedBox(one, "overlap") for i, one in enumerate(progress.boxes[name]) if i not in order]
    dropped += [DroppedBox(one, fault) for one, fault in zip(found, faults, strict=True) if fault]
    kept = [(one.label, one.score, within(masks[i], one.box)) for i, one in enumerate(found) if not faults[i]]
    if dropped or not kept:
        progress.drop([(path, "" if kept else "no subject", text, dropped)])
    if kept:
        write_picture(progress.folder, name, picture, text, kept)
        progress.kept.add(name)


def within(mask: np.ndarray, box: tuple[float, ...]) -> np.ndarray:
    """The part of a mask [H, W] that is in a box: SAM's may have specks anywhere, which would make the subject's box large."""
    inside = np.zeros_like(mask)
    left, top, right, bottom = (int(x) for x in (*box[:2], *np.ceil(box[2:])))
    inside[top:bottom, left:right] = mask[top:bottom, left:right]
    return inside


def suppress(found: Sequence[Detection], overlap: float) -> list[int]:
    """Non-maximum suppression over all labels: the places of the boxes that stay, the more certain first."""
    boxes, scores = torch.tensor([one.box for one in found]), torch.tensor([one.score for one in found])
    return nms(boxes, scores, overlap).tolist()


def text_of(material: Material, name: str) -> str:
    """A picture's caption: its own, else BLIP-2's."""
    return material.captions.get(name) or material.progress.captions.get(name, "")


def open_picture(path: Path, shorter_side: int) -> Image.Image:
    """RGB, upright, without what is transparent; a larger one is shrunk until its shorter side has so many pixels.

    Raises:
        PersonalizeError: it cannot be read.
    """
    pixels = visible_picture(path).pixels
    picture = Image.fromarray((pixels * 255).round().byte().numpy())
    scale = shorter_side / min(picture.size)
    if scale >= 1:
        return picture
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)


def _batches(names: Sequence[str], size: int, title: str) -> Iterator[Sequence[str]]:
    with tqdm(total=len(names), desc=title, unit=" pictures") as bar:
        for start in range(0, len(names), size):
            yield names[start : start + size]
            bar.update(len(names[start : start + size]))


if __name__ == "__main__":
    sys.exit(main())
