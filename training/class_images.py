"""Pictures of others of the class, drawn by the frozen base model, for prior preservation; kept and used again."""

import hashlib
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from .base_model import BaseModel
from .encoding import read_text
from .shared import picture_paths, whole
from .stopping import Stop, step_of
from .watch import draw_samples, resting


def draw_class_images(
    accelerator: Accelerator,
    base: BaseModel,
    folder: Path,
    prompt: str,
    count: int,
    resolution: int,
    seed: int,
    stop: Stop,
) -> int:
    """Draw what is missing of `count` pictures into the folder; returns how many were drawn.

    Whatever pictures are in the folder count, whoever made them. Each has a seed of its own, so that a run that was
    stopped goes on; processes share the work.

    Raises:
        StoppedError: somebody asked to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in picture_paths(folder)}
    accelerator.wait_for_everyone()  # before the first is saved, or the processes would count differently
    mark = hashlib.sha256(f"{base.fingerprint()} {prompt} {resolution} {seed}".encode()).hexdigest()[:8]
    wanted = [(i, f"class-{mark}-{i:04}.png") for i in range(count)]
    missing = [(i, name) for i, name in wanted if name not in there][: max(0, count - len(there))]
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    with resting(base), accelerator.autocast():
        row, empty = (read_text(base, [text]) for text in (prompt, ""))
        bar = tqdm(mine, desc=f"Drawing '{prompt}'", unit=" pictures", disable=not accelerator.is_main_process)
        for i, name in stop.between(bar):
            size, own = (resolution, resolution), seed * 100_003 + i
            ((picture,),) = draw_samples(accelerator, base, [row], empty, 1, size, own, partial(step_of, stop, None))
            with whole(folder / name) as part:
                picture.save(part, format="png")
    accelerator.wait_for_everyone()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return len(missing)
