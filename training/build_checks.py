"""What a build of a data set for Subject-Diffusion is told, and everything that can be wrong before a model loads."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .dataset import captions_of, visible_picture
from .look import check_same, check_writable, tell
from .options import option
from .shared import PLACEHOLDER, PersonalizeError, call_of, list_pictures, plural
from .subject_data import Rules, picture_fault
from .subject_models import check_processor, check_tagger
from .subject_progress import SETTINGS, Progress, check_begun

RULES = Rules()
ANYWAY = ("output_dir", "batch_size", "sheet")
"""Settings with which a build may go on otherwise than it began."""


@dataclass
class Building:
    """Pictures and models"""

    pictures: str | None = option(None, "folder with pictures; the text of NAME.txt beside NAME.jpg is its caption")
    output_dir: str | None = option(None, "folder for the data set")
    captioner: str | None = option(
        None, "BLIP-2, for pictures without a caption: a folder of transformers, or a hub id (needs the network)"
    )
    tagger: str = option(
        "en_core_web_sm", "spaCy pipeline that finds the nouns: the name of an installed one, or a folder"
    )
    detector: str | None = option(None, "Grounding DINO: a folder of transformers, or a hub id (needs the network)")
    segmenter: str | None = option(None, "SAM: a folder of transformers, or a hub id (needs the network)")
    batch_size: int = option(8, "pictures that a model sees at once", least=1)
    max_new_tokens: int = option(30, "of a caption, at most", least=1)
    shorter_side: int = option(800, "pixels; larger pictures are brought to this size in the data set", least=16)
    sheet: int = option(24, "pictures on the contact sheet, at most; 0 makes none", least=0)


@dataclass
class Thresholds:
    """What is kept"""

    longest_side: int = option(RULES.longest_side, "pixels that a picture's longer side has at least", least=1)
    white: float = option(RULES.white, "share of near-white pixels in a picture, at most", least=0, most=1)
    min_nouns: int = option(RULES.nouns[0], "nouns in a caption, at least", least=1)
    max_nouns: int = option(RULES.nouns[1], "and at most", least=1)
    box_threshold: float = option(0.25, "score of a box that Grounding DINO tells of, above", least=0, most=1)
    text_threshold: float = option(0.2, "score of a word that it takes as the box's label, above", least=0, most=1)
    min_boxes: int = option(RULES.boxes[0], "boxes that it tells of in a picture, at least", least=1)
    max_boxes: int = option(RULES.boxes[1], "and at most", least=1)
    overlap: float = option(
        RULES.overlap, "intersection over union above which the less certain of two boxes is dropped", least=0, most=1
    )
    mask_threshold: float = option(0.0, "logit of SAM above which a pixel is the subject's")
    min_area: float = option(RULES.area[0], "share of the picture that a box covers, above", least=0, most=1)
    max_area: float = option(RULES.area[1], "and below", least=0, most=1)
    min_aspect: float = option(RULES.aspect[0], "width over height of a box, above", least=0)
    max_aspect: float = option(RULES.aspect[1], "and below", least=0)
    score: float = option(RULES.score, "of a box that is kept, above", least=0, most=1)
    regions: int = option(RULES.regions, "different masks in a box, the background one of them, at most", least=2)
    fill: float = option(
        RULES.fill, "share of a box that its largest mask, or the background, fills, at least", least=0, most=1
    )
    contained: float = option(
        RULES.contained,
        "share of the smaller of two boxes in the other above which the less certain is dropped",
        least=0,
        most=1,
    )

    @property
    def rules(self) -> Rules:
        """As training.subject_data has them."""
        return Rules(
            longest_side=self.longest_side,
            white=self.white,
            nouns=(self.min_nouns, self.max_nouns),
            boxes=(self.min_boxes, self.max_boxes),
            overlap=self.overlap,
            area=(self.min_area, self.max_area),
            aspect=(self.min_aspect, self.max_aspect),
            score=self.score,
            regions=self.regions,
            fill=self.fill,
            contained=self.contained,
        )


@dataclass(frozen=True)
class Material:
    """What was found before anything is loaded."""

    paths: dict[str, Path]
    """All pictures, by name without ending."""
    captions: dict[str, str]
    """Of those that are not decided; empty where the picture has none."""
    faults: dict[str, str]
    """Why some of these are dropped."""
    progress: Progress


def look(building: Building, thresholds: Thresholds) -> Material:
    """Options, folders, models, pictures and captions, before anything is loaded.

    Raises:
        PersonalizeError: a sentence for each problem, a line each.
    """
    problems = list[str]()
    told = partial(tell, problems)
    problems += _threshold_problems(thresholds)
    told(_models, building)
    found = told(list_pictures, Path(building.pictures).expanduser()) if building.pictures else None
    paths: dict[str, Path] = told(_by_name, found) or {}
    progress = told(_progress, building, thresholds)
    captions, faults, rules = dict[str, str](), dict[str, str](), thresholds.rules
    waiting = [name for name in paths if progress is None or not progress.is_decided(name)]
    for name in tqdm(waiting, desc="Looking at the pictures", unit="", leave=False, disable=not waiting):
        text = told(_caption_of, paths[name])
        if text is not None:
            captions[name] = text
        if progress is not None and (name in progress.captions or name in progress.boxes):
            continue  # looked at before
        picture = told(visible_picture, paths[name])
        fault = "broken" if picture is None else picture_fault(picture.pixels.numpy(), rules)
        if fault:
            faults[name] = fault
    without = [name for name, text in captions.items() if not text and name not in faults]
    if progress is not None:
        without = [name for name in without if name not in progress.captions]
    if without and not building.captioner:
        problems.append(
            f"--captioner is missing, and {plural(len(without), 'picture has', 'pictures have')} no caption beside "
            f"{'it' if len(without) == 1 else 'them'} ({paths[without[0]].name}): "
            "name a BLIP-2, such as Salesforce/blip2-opt-2.7b, or write NAME.txt beside NAME.jpg."
        )
    if problems or progress is None:
        raise PersonalizeError("\n".join(dict.fromkeys(problems)))
    return Material(paths, captions, faults, progress)


def _threshold_problems(thresholds: Thresholds) -> list[str]:
    values = asdict(thresholds)
    problems = list[str]()
    for what in ("nouns", "boxes", "area", "aspect"):
        least, most = values[f"min_{what}"], values[f"max_{what}"]
        if least > most:
            problems.append(f"--min_{what} {least:g} is above --max_{what} {most:g}: nothing would be kept.")
    return problems


def _models(building: Building) -> None:
    problems = []
    needed = {"pictures": "the folder with pictures", "output_dir": "the folder for the data set"}
    needed |= {"detector": "a Grounding DINO, such as IDEA-Research/grounding-dino-tiny"}
    needed |= {"segmenter": "a SAM, such as facebook/sam-vit-huge"}
    problems += [f"--{name} is missing: {what}." for name, what in needed.items() if not getattr(building, name)]
    checks: list[tuple[Callable, tuple]] = [(check_tagger, (building.tagger,))]
    for name, model_type in {"captioner": "blip-2", "detector": "grounding-dino", "segmenter": "sam"}.items():
        if where := getattr(building, name):
            checks.append((check_processor, (where, f"--{name}", model_type, name != "segmenter")))
    for check, arguments in checks:
        try:
            check(*arguments)
        except PersonalizeError as error:
            problems.append(str(error))
    if problems:
        raise PersonalizeError("\n".join(problems))


def _by_name(paths: Sequence[Path] | None) -> dict[str, Path]:
    """By name without ending, which must be one picture's alone."""
    found, problems = dict[str, Path](), list[str]()
    for path in paths or ():
        if path.name.encode(errors="replace").decode() != path.name:
            problems.append(f"The file name {path.name!r} in {path.parent} is not UTF-8: rename it.")
        other = found.setdefault(path.stem.casefold(), path)
        if other != path:
            problems.append(
                f"{other.name} and {path.name} in {path.parent} have one name, which the data set gives to one picture: "
                "rename one of them."
            )
    if problems:
        raise PersonalizeError("\n".join(problems))
    return {path.stem: path for path in found.values()}


def _progress(building: Building, thresholds: Thresholds) -> Progress | None:
    """Of what the output folder holds."""
    if not building.output_dir:
        return None
    folder = Path(building.output_dir).expanduser()
    if building.pictures:
        read, output = Path(building.pictures).expanduser().resolve(), folder.resolve()
        if output.is_relative_to(read) or read.is_relative_to(output):
            inside = "in" if output.is_relative_to(read) else "around"
            raise PersonalizeError(
                f"--output_dir {folder} is {inside} --pictures {building.pictures}: use a folder apart from it, as what is "
                "written is not to be read."
            )
    check_writable(folder, "--output_dir")
    check_begun(folder)
    what = f"The data set in {folder} was begun"
    check_same(folder / SETTINGS, shared_settings(building, thresholds), what, "--output_dir")
    return Progress(folder)


def shared_settings(building: Building, thresholds: Thresholds) -> dict[str, Any]:
    """What a build must go on with as it began, of what it is told."""
    values = {**asdict(building), **asdict(thresholds)}
    if building.pictures:
        values["pictures"] = str(Path(building.pictures).expanduser().resolve())
    return {name: value for name, value in values.items() if name not in ANYWAY and value is not None}


def _caption_of(path: Path) -> str:
    """Of the file beside the picture; empty if there is none."""
    text = captions_of(path, ("",), "", "")[0]
    if call_of(PLACEHOLDER).search(text.lower()):
        raise PersonalizeError(
            f'The caption of {path.name} in {path.parent} has the word "{PLACEHOLDER}", by which Subject-Diffusion calls '
            "subjects: use another word."
        )
    return text
