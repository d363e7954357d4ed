"""Every method on the same few photographs: trained, drawn, measured, and laid side by side on one sheet.

Trains Textual Inversion, LoRA, Custom Diffusion and DreamBooth of the pocket model on them, takes its IP-Adapter and its
Subject-Diffusion (of the first photograph) as they are, and draws the same prompts with each in the ComfyUI of this
machine, or through diffusers where there is none.
"""

import argparse
import sys
import time
from pathlib import Path

from PIL import Image

from ..about import told
from ..pocket.photos import write_photos
from ..shared import PersonalizeError, contact_sheet, list_pictures, plural, read_picture
from .find import ROOT, comfyui_version, find_comfyui
from .measures import score
from .methods import PROMPTS, make, place_of, prompt_of

SUBJECT, CLASS, PHOTOS = 10, "woman", 5
"""A pocket identity that the model has never seen, where nobody brings photographs."""
EACH = 4
"""Pictures of each method and prompt."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photos", type=Path, help="a folder of pictures of one subject; pocket pictures by default")
    parser.add_argument("--class_name", help="what it is, as one noun: dog, woman, logo; person by default")
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", help="where everything goes")
    options = parser.parse_args()
    started, output = time.monotonic(), options.output.expanduser()
    try:
        output.mkdir(parents=True, exist_ok=True)
        if options.photos is None:
            photos = output / "photographs"
            write_photos(photos, SUBJECT, PHOTOS)
        else:
            photos = options.photos.expanduser().resolve()
        class_name = options.class_name or (CLASS if options.photos is None else "person")
        references = list_pictures(photos)
        print(f"{plural(len(references), 'photograph')} of a {class_name} in {photos}")
        place = place_of(references, class_name, output)
        rows = make(photos, class_name, place)
        comfyui = find_comfyui()
        if comfyui is not None:
            from .comfyui import in_comfyui

            where, pictures = f"ComfyUI {comfyui_version(comfyui)}", in_comfyui(comfyui, rows, photos, EACH)
        else:
            from .headless import in_diffusers

            where, pictures = "diffusers", in_diffusers(rows, photos, EACH, place / "pictures")
        scores, among = score(pictures, references)
        table = table_of(rows, scores, among)
        labels = [
            (row.title, f"likeness {own.likeness:.2f}", f"prompt {own.following:.0%}")
            for row, own in zip(rows, scores, strict=True)
        ]
        shown = [[some[0] for some in row] for row in pictures]
        prompts = [prompt_of(wishes, class_name) for wishes in PROMPTS]
        photographs = [Image.fromarray((read_picture(path).pixels * 255).round().byte().numpy()) for path in references]
        note = f"Pocket portraits, drawn by {where}"
        sheet = contact_sheet(shown, labels, prompts, photographs, note)
        sheet.save(output / "contact_sheet.png")
        (output / "table.md").write_text(table, encoding="utf-8")
    except (PersonalizeError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"\n{table}\nIn {(time.monotonic() - started) / 60:.1f} minutes. Contact sheet: {output / 'contact_sheet.png'}"
    )
    for row in rows:
        if row.minutes:
            for file in row.files:
                print(f"{row.title}: {told(file)}")
    return 0


def table_of(rows, scores, among: float) -> str:
    """In Markdown."""
    lines = ["| method | likeness | prompt followed | minutes | MB |", "|---|---|---|---|---|"]
    for row, own in zip(rows, scores, strict=True):
        cost = f"{row.minutes:.1f} | {row.megabytes:.2g}" if row.minutes else "|"
        lines.append(f"| {row.title} | {own.likeness:.2f} | {own.following:.0%} | {cost} |")
    lines.append(f"| the photographs to each other | {among:.2f} | | | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
