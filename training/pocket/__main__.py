"""Train and measure the pocket model, part by part, from nothing.

    python -m training.pocket vae        1. VAE
    python -m training.pocket encoders   2. text and image encoder
    python -m training.pocket judge      3. judge
    python -m training.pocket unet       4. UNet (after 1 and 2)
    python -m training.pocket adapter    5. IP-Adapter (after 4)
    python -m training.pocket export     6. write models/pocket
    python -m training.pocket measure    7. count what it can do
    python -m training.pocket sheet      8. sixty-four prompts as a picture

Each training resumes from the checkpoint in --folder, to which it also writes a log in JSON lines.
"""

import argparse
import os
from pathlib import Path

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
    parser.add_argument("part", choices=(*PARTS, "export", "measure", "sheet"))
    parser.add_argument("--folder", type=Path, default=Path("pocket-runs"), help="pictures, checkpoints and logs")
    parser.add_argument("--steps", type=int, help="optimiser steps in all")
    parser.add_argument("--batch", type=int, help="pictures a step")
    parser.add_argument("--pictures", type=int, default=100_000, help="pictures to draw and train on")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="minutes between checkpoints")
    parser.add_argument("--output", type=Path, help="where export writes, and sheet its picture")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow down what else the machine does
    folder, part = options.folder.expanduser(), options.part
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
    elif part == "measure":
        from .measure import measure

        measure(folder)
    else:
        from .sheet import prompt_sheet

        prompt_sheet(options.output or folder / "sheet.png")


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
