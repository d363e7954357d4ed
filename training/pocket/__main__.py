"""Train and measure the pocket model, part by part, from nothing.

    python -m training.pocket vae        1. VAE
    python -m training.pocket encoders   2. text and image encoder
    python -m training.pocket judge      3. judge
    python -m training.pocket unet       4. UNet (after 1 and 2)
    python -m training.pocket adapter    5. IP-Adapter (after 4)
    python -m training.pocket export     6. write models/pocket
    python -m training.pocket measure    7. count what it can do
    python -m training.pocket sheet      8. sixty-four prompts as a picture
    python -m training.pocket restore    the shipped weights as checkpoints, to go on from them
    python -m training.pocket photos     a few pictures of one subject, to try personalisation on
    python -m training.pocket identities a folder for each of many subjects, to train and to measure an IP-Adapter on
    python -m training.pocket subjects   pictures with words, boxes and masks of their subjects, for Subject-Diffusion

Each training uses a GPU where there is one, and resumes from the checkpoint in --folder, to which it also writes a log
in JSON lines. Trainings need timm; measure and sheet also torch-fidelity.
"""

import argparse
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

# Before torch: threads that spin while they wait slow down what else the machine does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ..shared import POCKET, PersonalizeError, plural
from .attributes import LOGO_COLOURS, LOGO_PLACES, LOGO_SHAPES, NEW_LOGO_SHAPES, NEW_STYLES, STYLES, Logo
from .photos import write_identities, write_photos
from .subject_set import write_subjects

PARTS = {  # steps, batch, minutes on two CPU cores
    "vae": (4600, 16, 40),
    "encoders": (2200, 128, 20),
    "judge": (9000, 120, 55),
    "unet": (30000, 64, 550),
    "adapter": (11000, 64, 80),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.pocket", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "part", choices=(*PARTS, "export", "measure", "sheet", "restore", "photos", "identities", "subjects")
    )
    parser.add_argument("--folder", type=Path, default=Path("pocket-runs"), help="pictures, checkpoints and logs")
    parser.add_argument("--steps", type=_at_least(1), help="trainings: optimiser steps in all")
    parser.add_argument("--batch", type=_at_least(1), help="trainings: pictures a step")
    parser.add_argument(
        "--pictures", type=_at_least(1), default=100_000, help="trainings: pictures to draw and train on"
    )
    parser.add_argument(
        "--save-minutes", type=_at_least(0, float), default=3.0, help="trainings: minutes between checkpoints"
    )
    parser.add_argument(
        "--weights", type=Path, default=POCKET, help="measure, sheet, restore: what export wrote; models/pocket"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="where export writes (models/pocket, in place of the weights there), sheet (sheet.png in --folder), "
        "photos (photos), identities (identities) or subjects (subjects)",
    )
    parser.add_argument(
        "--identity",
        type=_at_least(0),
        default=0,
        help="photos: the number of the subject; identities, subjects: of the first",
    )
    parser.add_argument(
        "--count",
        type=_at_least(1),
        default=10,
        help="photos, identities: how many of each subject; subjects: pictures",
    )
    parser.add_argument("--identities", type=_at_least(1), default=100, help="identities: how many")
    parser.add_argument(
        "--crop",
        nargs=2,
        type=_at_least(0, float),
        metavar=("SMALLEST", "LARGEST"),
        help="identities: keep a random square of each picture, with a side between these shares of the picture's",
    )
    parser.add_argument(
        "--whole", type=_at_least(0, float), default=0.0, help="identities: with --crop, this share stays whole"
    )
    parser.add_argument("--style", choices=(*STYLES, *NEW_STYLES), help="photos: many subjects in one style")
    parser.add_argument("--logo", help="photos: many subjects with one mark, as shape:colour:place, moon:red:shirt")
    options = parser.parse_args()
    try:
        _run(parser, options)
    except (OSError, PersonalizeError) as error:
        raise SystemExit(str(error)) from None


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    folder, part, weights = options.folder.expanduser(), options.part, options.weights.expanduser()
    output = None if options.output is None else options.output.expanduser()
    if part == "photos":
        if options.style is not None and options.logo is not None:
            parser.error("--style and --logo are two things to learn: give one of them.")
        logo = None if options.logo is None else _logo(parser, options.logo)
        output = output or Path("photos")
        paths = write_photos(output, options.identity, options.count, options.style, logo)
        print(f"{plural(len(paths), 'picture')} with captions in {output}")
        return
    if part == "identities":
        output = output or Path("identities")
        crop = None if options.crop is None else (options.crop[0], options.crop[1])
        if crop is not None and not 0 < crop[0] <= crop[1] <= 1:
            parser.error(f"--crop {crop[0]:g} {crop[1]:g} are no two shares: above 0, at most 1, the smaller first.")
        if options.whole > (1 if crop else 0):
            parser.error(f"--whole {options.whole:g} is no share, at most 1, of what --crop would cut.")
        written = write_identities(output, options.identity, options.identities, options.count, crop, options.whole)
        print(f"{len(written)} folders of {options.count} pictures in {output}")
        return
    if part == "subjects":
        output = output or Path("subjects")
        print(f"{write_subjects(output, options.identity, options.count)} pictures in {output}")
        return
    needed = ("timm", "torch_fidelity") if part in ("measure", "sheet") else ("timm",)
    missing = [name.replace("_", "-") for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{part} needs {' and '.join(missing)}: pip install {' '.join(missing)}.")
    if part in PARTS:
        import torch

        from .device import DEVICE
        from .loop import Run

        steps, batch, minutes = PARTS[part]
        steps, batch = options.steps or steps, options.batch or batch
        if options.pictures < 8 * batch:
            parser.error(f"--pictures {options.pictures} is too few for a batch of {batch}: draw at least {8 * batch}.")
        print(f"{part}: {steps} steps of {batch}; {PARTS[part][0]} steps take about {minutes} min on two CPU cores.")
        torch.set_default_device(DEVICE)
        _trainer(part)(Run(folder, steps, batch, options.pictures, options.save_minutes))
    elif part == "export":
        from .export import export

        export(folder, output or POCKET)
    elif part == "restore":
        from .restore import restore

        restore(folder, weights)
    elif part == "measure":
        from .measure import measure

        measure(folder, weights)
    else:
        from .sheet import prompt_sheet

        path = output or folder / "sheet.png"
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            parser.error(f"--output {path} is no picture: give it a name that ends with .png or .jpg.")
        prompt_sheet(path, weights)


def _at_least(least: int, kind: type = int) -> Callable[[str], float]:
    """An argument's type: a number that is not too small."""

    def number(text: str) -> float:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    number.__name__ = "whole number" if kind is int else "number"  # argparse: invalid whole number value
    return number


def _logo(parser: argparse.ArgumentParser, text: str) -> Logo:
    shapes = (*LOGO_SHAPES, *NEW_LOGO_SHAPES)
    parts = text.split(":")
    if len(parts) != 3 or not all(p in of for p, of in zip(parts, (shapes, LOGO_COLOURS, LOGO_PLACES), strict=True)):
        parser.error(
            f"--logo {text} is not shape:colour:place, where the shape is one of {', '.join(shapes)}, the colour of "
            f"{', '.join(LOGO_COLOURS)}, the place of {', '.join(LOGO_PLACES)}."
        )
    return Logo(*parts)


def _trainer(part: str):
    if part == "vae":
        from .vae import train_vae as train
    elif part == "encoders":
        from .encoders import train_encoders as train
    elif part == "judge":
        from .judge import train_judge as train
    elif part == "unet":
        from .unet import train_unet as train
    else:
        from .adapter import train_adapter as train
    return train


if __name__ == "__main__":
    main()
