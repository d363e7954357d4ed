"""The demo's pictures without ComfyUI: through diffusers, with the pack's own equations."""

import gc
import re
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from ..base_model import BaseModel, load_base
from ..generate import Job, ReferencePrompts, Sampling, draw_pictures, noise_seed
from ..image_encoder import load_image_encoder
from ..personalization import put_on
from ..pocket.files import CHECKPOINT, IMAGE_ENCODER
from ..pocket.shipped import GUIDANCE, SIZE, STEPS
from ..shared import (
    BEFORE_PROJECTION,
    POCKET,
    SELF_ATTENTION,
    TRIGGER,
    IPAdapter,
    cut_out,
    list_pictures,
    read_ip_adapter,
    read_picture,
    subject_region,
)
from ..subject_drawing import Placed, SubjectArtist, SubjectJob
from .methods import ADAPTER, BOX, PROMPTS, Made, prompt_of

SAMPLING = Sampling(SIZE, STEPS, GUIDANCE)


def in_diffusers(rows: Sequence[Made], photos: Path, count: int, folder: Path) -> list[list[list[Image.Image]]]:
    """Of each row and prompt so many pictures, from the same noise for all rows.

    Args:
        folder: for the pictures; those that are there are taken.
    """
    found: list[list[list[Image.Image]]] = []
    for row in rows:
        base = load_base(str(row.files[0] if row.method == "dreambooth" else POCKET / CHECKPOINT))
        base.pipeline.unet.requires_grad_(False)
        draw = _by_subject_diffusion if row.method == "subject_diffusion" else _by_others
        found.append([[Image.open(path) for path in some] for some in draw(base, row, photos, count, folder)])
        del base
        gc.collect()
    return found


def _paths(row: Made, count: int, folder: Path) -> list[list[tuple[Path, int]]]:
    """By prompt where each picture goes, and its seed."""
    return [
        [(folder / row.title / f"p{i}-s{seed}.png", noise_seed(seed, i)) for seed in range(count)]
        for i in range(len(PROMPTS))
    ]


def _by_others(base: BaseModel, row: Made, photos: Path, count: int, folder: Path) -> list[list[Path]]:
    references: tuple[Path, ...] = ()
    showing, subject = None, row.subject
    if row.method == "ip_adapter":
        adapter = IPAdapter.from_state(read_ip_adapter(ADAPTER))
        encoder = load_image_encoder(POCKET / IMAGE_ENCODER)
        showing = ReferencePrompts(base, adapter, encoder, SELF_ATTENTION, BEFORE_PROJECTION, 1.0)
        references = tuple(list_pictures(photos))
    elif row.method and row.method != "dreambooth":
        put_on(base, row.method, row.files[0], TRIGGER)
        subject = re.sub(r"embedding:\S+", TRIGGER, row.subject)
    paths = _paths(row, count, folder)
    jobs = [
        Job(path, prompt_of(wishes, subject), seed, references)
        for wishes, some in zip(PROMPTS, paths, strict=True)
        for path, seed in some
    ]
    draw_pictures(Accelerator(), base, jobs, SAMPLING, row.title, showing)
    return [[path for path, _ in some] for some in paths]


def _by_subject_diffusion(base: BaseModel, row: Made, photos: Path, count: int, folder: Path) -> list[list[Path]]:
    photo = read_picture(list_pictures(photos)[0])
    inside = subject_region(photo.pixels, photo.mask)
    crop = folder / row.title / "subject.png"
    crop.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((cut_out(photo.pixels, inside) * 255).round().byte().numpy()).save(crop)
    paths = _paths(row, count, folder)
    jobs = [
        SubjectJob(path, prompt_of(wishes, row.subject), seed, (Placed(crop, row.subject, BOX),))
        for wishes, some in zip(PROMPTS, paths, strict=True)
        for path, seed in some
    ]
    artist = SubjectArtist(base, row.files[0], load_image_encoder(POCKET / IMAGE_ENCODER))
    artist.draw(Accelerator(), jobs, SAMPLING, row.title)
    return [[path for path, _ in some] for some in paths]
