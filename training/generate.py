"""Pictures for a measurement: fixed prompts and seeds, in batches, shared by all processes, and resumable.

A picture's noise comes from its own seed, so that methods which are compared start from the same noise, and it makes no
difference in which batch or process a picture is drawn, or whether the run was stopped in between.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPVisionModelWithProjection

from .base_model import BaseModel
from .diffusers_attention import apply_image_prompts
from .encoding import TextStates, read_text
from .image_encoder import encode_references
from .shared import ImagePrompt, IPAdapter
from .watch import decode, resting

SOLVERS = {"euler": EulerDiscreteScheduler, "dpm++": DPMSolverMultistepScheduler}
"""Of the sampling's differential equation; the second needs half the steps."""


@dataclass(frozen=True)
class Job:
    """One picture to draw."""

    path: Path
    """Where to; beside it go NAME.txt, the prompt, and NAME.json, the wishes, if any."""
    prompt: str
    seed: int
    """Of its noise."""
    references: tuple[Path, ...] = ()
    """Pictures of whom it shall show, for an adapter."""
    wishes: Mapping[str, str] = field(default_factory=dict)
    """What the prompt asks for, in the words of training.truth."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn."""

    resolution: int
    """Pixels, of a square."""
    steps: int = 20
    guidance: float = 4.0
    batch: int = 8
    solver: str = "euler"
    """Of SOLVERS."""


Showing = Callable[[Sequence[Job]], AbstractContextManager]
"""Tells the UNet about the references of a batch, guided as [without, with], until the end of the block."""


def draw_pictures(
    accelerator: Accelerator,
    base: BaseModel,
    jobs: Sequence[Job],
    sampling: Sampling,
    title: str,
    showing: Showing | None = None,
) -> int:
    """Draw what is missing of the jobs; returns how many this process drew.

    Args:
        accelerator: the processes.
        base: on its device.
        jobs: all of them; those whose file is there are done.
        sampling: how.
        title: for the progress bar.
        showing: for an adapter.
    """
    missing = [job for job in jobs if not job.path.exists()]
    accelerator.wait_for_everyone()  # before the first is saved, or the processes would count differently
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    texts: dict[str, TextStates] = {}
    bar = tqdm(total=len(mine), desc=title, unit=" pictures", disable=not accelerator.is_main_process, leave=False)
    with resting(base), bar:
        for start in range(0, len(mine), sampling.batch):
            some = mine[start : start + sampling.batch]
            for prompt in ("", *(job.prompt for job in some)):
                if prompt not in texts:
                    texts[prompt] = read_text(base, [prompt])
            with showing(some) if showing is not None else nullcontext():
                pictures = _draw(
                    base, [texts[job.prompt] for job in some], texts[""], [job.seed for job in some], sampling
                )
            for job, picture in zip(some, pictures, strict=True):
                _save(job, picture)
            bar.update(len(some))
    accelerator.wait_for_everyone()
    return len(mine)


def _draw(
    base: BaseModel, rows: Sequence[TextStates], empty: TextStates, seeds: Sequence[int], sampling: Sampling
) -> list[Image.Image]:
    pipeline = base.pipeline
    device, dtype = pipeline.unet.device, pipeline.unet.dtype
    scheduler, progress = pipeline.scheduler, dict(getattr(pipeline, "_progress_bar_config", {}))
    side, n = sampling.resolution // pipeline.vae_scale_factor, len(rows)
    shape = (pipeline.unet.config.in_channels, side, side)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    pooled: dict[str, Tensor] = {}
    if empty.pooled is not None:
        pooled["pooled_prompt_embeds"] = torch.cat([r.pooled for r in rows if r.pooled is not None]).to(device, dtype)
        pooled["negative_pooled_prompt_embeds"] = empty.pooled.expand(n, -1).to(device, dtype)
    pipeline.scheduler = SOLVERS[sampling.solver].from_config(scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    try:
        latents = pipeline(
            prompt_embeds=torch.cat([row.states for row in rows]).to(device, dtype),
            negative_prompt_embeds=empty.states.expand(n, -1, -1).to(device, dtype),
            latents=noise.to(device, dtype),
            height=sampling.resolution,
            width=sampling.resolution,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            output_type="latent",
            **pooled,
        ).images
    finally:
        pipeline.scheduler = scheduler
        pipeline.set_progress_bar_config(**progress)
    return [picture for row in latents.split(1) for picture in decode(pipeline.vae, row)]


def _save(job: Job, picture: Image.Image) -> None:
    """The picture last: where it is, all is."""
    job.path.parent.mkdir(parents=True, exist_ok=True)
    job.path.with_suffix(".txt").write_text(job.prompt + "\n", encoding="utf-8")
    if job.wishes:
        job.path.with_suffix(".json").write_text(json.dumps(dict(job.wishes)))
    part = job.path.with_name(f".{job.path.name}.part")
    picture.save(part, format="png")
    part.replace(job.path)


class ReferencePrompts:
    """Shows a UNet the references of each picture of a batch, by an adapter from a file."""

    def __init__(
        self,
        base: BaseModel,
        adapter: IPAdapter,
        encoder: CLIPVisionModelWithProjection,
        aggregation: str,
        pooling: str,
        weight: float,
    ):
        """Args:
        base: whose UNet it is.
        adapter: made for it.
        encoder: the adapter's image encoder.
        aggregation, pooling: as in IPAdapter.image_prompt.
        weight: λ.
        """
        self.base, self.adapter, self.encoder = base, adapter, encoder
        self.aggregation, self.pooling, self.weight = aggregation, pooling, weight
        self.known: dict[tuple[Path, ...], tuple[ImagePrompt, ImagePrompt]] = {}

    def prompts(self, references: tuple[Path, ...]) -> tuple[ImagePrompt, ImagePrompt]:
        """Without and with these references."""
        if references not in self.known:
            given, device = encode_references(self.encoder, references), self.base.pipeline.unet.device
            shown = self.adapter.image_prompt(given, self.aggregation, self.pooling, device)
            self.known[references] = self.adapter.empty_prompt(given, device), shown
        return self.known[references]

    @contextmanager
    def __call__(self, jobs: Sequence[Job]):
        """Of a batch."""
        pairs = [self.prompts(job.references) for job in jobs]
        sides = [side[0] for side in pairs] + [side[1] for side in pairs]
        unet = self.base.pipeline.unet
        before = apply_image_prompts(unet, sides, self.weight)
        try:
            yield
        finally:
            unet.set_attn_processor(dict(before))
