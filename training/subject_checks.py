"""What can be wrong with a training of Subject-Diffusion, before a model loads."""

from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.ops import box_iou
from tqdm import tqdm

from .dataset import upright_size
from .image_encoder import widths_of_encoder
from .look import tell
from .options import SubjectDiffusion as Options
from .settings import Settings
from .shared import PLACEHOLDER, PersonalizeError, call_of, plural, read_subject_diffusion
from .subject_data import Entity, SubjectPicture, read_subjects
from .subject_diffusion import told_whole

TOO_LONG = "CLIP reads 77 tokens, of a caption and of what names its subjects behind it"
SAME = 0.5
"""Intersection over union of a subject's box and its mask's, at least."""


def check_subject_options(options: Options, family: str | None) -> None:
    """Raises PersonalizeError, a line for each problem.

    Args:
        options: as the user gave them.
        family: of the base; None for a hub id.
    """
    problems: list[str] = []
    tell(problems, widths_of_encoder, options.image_encoder)
    if options.subject_diffusion is not None:
        try:
            read_subject_diffusion(Path(options.subject_diffusion).expanduser())
        except PersonalizeError as error:
            problems.append(str(error))
    if family == "sdxl":
        problems.append("Subject-Diffusion is for base models with one text encoder, as SD1.5 and SD2: SDXL has two.")
    dropped = options.text_dropout + options.subject_dropout + options.both_dropout
    if dropped >= 1:
        problems.append(f"--text_dropout, --subject_dropout and --both_dropout are {dropped:g} together: less than 1.")
    if problems:
        raise PersonalizeError("\n".join(problems))


def look_at_subjects(folder: Path, settings: Settings, quiet: bool) -> tuple[int, list[str], list[str]]:
    """Open every picture, mask and crop of a data set: how many pictures are good, what is wrong, and what is odd."""
    try:
        pictures = read_subjects(folder)
    except PersonalizeError as error:
        return 0, [str(error)], []
    good, wrong, odd, most = 0, list[str](), list[str](), settings.method.max_subjects
    placeholder = call_of(PLACEHOLDER)
    for one in tqdm(pictures, desc=f"Looking at {folder.name}", unit="", disable=quiet, leave=False):
        bad = [path for path in (one.path, *(x for s in one.subjects for x in (s.mask, s.crop))) if not _opens(path)]
        wrong += [f"{path.name} in {path.parent} cannot be read as a picture." for path in bad]
        if placeholder.search(one.text.lower()):
            wrong.append(f'The caption of {one.path.name} has the placeholder "{PLACEHOLDER}": "{one.text}".')
        elif not bad:
            problems = [problem for subject in one.subjects if (problem := _mask_problem(one, subject))]
            wrong += problems
            good += not problems
    long = len(pictures) - len(told_whole(pictures, most))
    if long == len(pictures):
        wrong.append(f"All captions in {folder} are too long with their subjects: {TOO_LONG}.")
    elif long:
        one, several = f"caption in {folder} is too long with its", f"captions in {folder} are too long with their"
        left = f"subjects, and {'is' if long == 1 else 'are'} left out"
        odd.append(f"{plural(long, one, several)} {left}: {TOO_LONG}.")
    many = sum(len(one.subjects) > most for one in pictures)
    if many:
        have = plural(many, f"picture in {folder} has", f"pictures in {folder} have")
        odd.append(f"{have} more than --max_subjects {plural(most, 'subject')}: the first {most} are used.")
    return good, wrong, odd


def _mask_problem(picture: SubjectPicture, subject: Entity) -> str:
    """A sentence where a mask is of another size than its picture, empty, or elsewhere than its box."""
    height, width = upright_size(picture.path)
    with Image.open(subject.mask) as mask:
        size, found = mask.size, mask.convert("L").point(lambda value: 255 * (value > 127)).getbbox()
    name = f"The mask {subject.mask.name} of {picture.path.name}"
    if size != (width, height):
        return f"{name} is {size[0]} x {size[1]}, the picture {width} x {height}: they must be of one size."
    if found is None:
        return f'{name} is empty: white is where "{subject.entity}" is.'
    sides = torch.tensor([width, height, width, height])
    overlap = float(box_iou(torch.tensor([subject.box]) * sides, torch.tensor([found]).float()))
    return "" if overlap > SAME else f'{name} shows "{subject.entity}" elsewhere than its box {list(subject.box)}.'


def _opens(path: Path) -> bool:
    try:
        with Image.open(path) as file:
            file.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return False
    return True
