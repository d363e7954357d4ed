"""What can be wrong with a training of Subject-Diffusion, before a model loads."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from .image_encoder import widths_of_encoder
from .options import SubjectDiffusion as Options
from .settings import Settings
from .shared import PLACEHOLDER, PersonalizeError, call_of, read_subject_diffusion
from .subject_data import read_subjects


def check_subject_options(options: Options, family: str | None) -> None:
    """Raises PersonalizeError, a line for each problem.

    Args:
        options: as the user gave them.
        family: of the base; None for a hub id.
    """
    problems = []
    if not options.image_encoder:
        problems.append("--image_encoder is missing: the CLIP image encoder, as in ComfyUI's models/clip_vision.")
    else:
        try:
            widths_of_encoder(options.image_encoder)
        except PersonalizeError as error:
            problems.append(str(error))
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
            good += 1
    many = sum(len(one.subjects) > most for one in pictures)
    if many:
        odd.append(
            f"{many} pictures in {folder} have more than --max_subjects {most} subjects: the first {most} are used."
        )
    return good, wrong, odd


def _opens(path: Path) -> bool:
    try:
        with Image.open(path) as file:
            file.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return False
    return True
