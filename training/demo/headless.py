"""The demo's pictures without ComfyUI: through diffusers, with the pack's own equations."""

import gc
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from ..base_model import load_base
from ..generate import Job, ReferencePrompts, Sampling, draw_pictures
from ..image_encoder import load_image_encoder
from ..personalization import put_on
from ..pocket.files import CHECKPOINT, IMAGE_ENCODER
from ..shared import POCKET, SELF_ATTENTION, IPAdapter, list_pictures, read_ip_adapter
from .methods import ADAPTER, PROMPTS, TRIGGER, Made, prompt_of

SAMPLING = Sampling(64, 20, 4.0)


def in_diffusers(rows: Sequence[Made], photos: Path, count: int, folder: Path) -> list[list[list[Image.Image]]]:
    """Of each row and prompt so many pictures, from the same noise for all rows.

    Args:
        folder: for the pictures; those that are there are taken.
    """
    found: list[list[list[Image.Image]]] = []
    for row in rows:
        base = load_base(str(row.files[0] if row.method == "dreambooth" else POCKET / CHECKPOINT))
        base.pipeline.unet.requires_grad_(False)
        references: tuple[Path, ...] = ()
        showing, subject = None, row.subject
        if row.method == "ip_adapter":
            adapter = IPAdapter.from_state(read_ip_adapter(ADAPTER))
            encoder = load_image_encoder(POCKET / IMAGE_ENCODER)
            showing = ReferencePrompts(base, adapter, encoder, SELF_ATTENTION, "before projection", 1.0)
            references = tuple(list_pictures(photos))
        elif row.method and row.method != "dreambooth":
            put_on(base, row.method, row.files[0], TRIGGER)
            subject = f"{TRIGGER} {row.subject.rpartition(' ')[2]}"
        jobs = [
            [
                Job(
                    folder / row.title / f"p{i}-s{seed}.png",
                    prompt_of(wishes, subject),
                    seed * 1_000_003 + i,
                    references,
                )
                for seed in range(count)
            ]
            for i, wishes in enumerate(PROMPTS)
        ]
        draw_pictures(Accelerator(), base, [job for some in jobs for job in some], SAMPLING, row.title, showing)
        found.append([[Image.open(job.path) for job in some] for some in jobs])
        del base, showing
        gc.collect()
    return found
