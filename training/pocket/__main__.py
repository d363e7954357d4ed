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

Each training resumes from the checkpoint in --folder, to which it also writes a log in JSON lines.
"""

import argparse
import importlib.util
import os
from pathlib import Path

from .attributes import LOGO_COLOURS, LOGO_PLACES, LOGO_SHAPES, NEW_LOGO_SHAPES, NEW_STYLES, STYLES, Logo
from .photos import write_photos

PARTS = {  # steps, batch, minutes on two CPU cores
    "vae": (8000, 16, 70),
    "encoders": (4000, 128, 30),
    "judge": (4000, 120, 20),
    "unet": (50000, 64, 150),
    "adapter": (6000, 64, 25),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.pocket", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=(*PARTS, "export", "measure", "sheet", "restore", "photos"))
    parser.add_argument("--folder", type=Path, default=Path("pocket-runs"), help="pictures, checkpoints and logs")
    parser.add_argument("--steps", type=int, help="optimiser steps in all")
    parser.add_argument("--batch", type=int, help="pictures a step")
    parser.add_argument("--pictures", type=int, default=100_000, help="pictures to draw and train on")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="minutes between checkpoints")
    parser.add_argument("--output", type=Path, help="where export, sheet and photos write")
    parser.add_argument("--identity", type=int, default=0, help="photos: the number of the subject")
    parser.add_argument("--count", type=int, default=10, help="photos: how many")
    parser.add_argument("--style", choices=(*STYLES, *NEW_STYLES), help="photos: many subjects in one style")
    parser.add_argument("--logo", help="photos: many subjects with one mark, as shape:colour:place, moon:red:shirt")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow down what else the machine does
    folder, part = options.folder.expanduser(), options.part
    if part == "photos":
        logo = None if options.logo is None else _logo(parser, options.logo)
        output = options.output or Path("photos")
        paths = write_photos(output, options.identity, options.count, options.style, logo)
        print(f"{len(paths)} pictures with captions in {output}")
        return
    needed = {"measure": "torch_fidelity", "sheet": "torch_fidelity"}.get(part, "timm")
    if importlib.util.find_spec(needed) is None:
        parser.error(f"{part} needs {needed.replace('_', '-')}: pip install {needed.replace('_', '-')}.")
    if part in PARTS:
        from .loop import Run

        steps, batch, minutes = PARTS[part]
        steps, batch = options.steps or steps, options.batch or batch
        if options.pictures < 8 * batch:
            parser.error(f"--pictures {options.pictures} is too few for a batch of {batch}: draw at least {8 * batch}.")
        print(f"{part}: {steps} steps of {batch}; {PARTS[part][0]} steps take about {minutes} min on two CPU cores.")
        _trainer(part)(Run(folder, steps, batch, options.pictures, options.save_minutes))
    elif part == "export":
        from ..shared import POCKET
        from .export import export

        export(folder, options.output or POCKET)
    elif part == "restore":
        from .restore import restore

        restore(folder)
    elif part == "measure":
        from .measure import measure

        measure(folder)
    else:
        from .sheet import prompt_sheet

        prompt_sheet(options.output or folder / "sheet.png")


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
