"""Pictures for a measurement: fixed prompts and seeds, in batches, shared by all processes, and resumable.

A picture's noise comes from its own seed, so that methods which are compared start from the same noise, and it makes no
difference in which batch or process a picture is drawn, or whether the run was stopped in between.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPVisionModelWithProjection

from .attend_and_excite import AttendAndExcite
from .base_model import BaseModel, Pipeline
from .denoising import picture_sizes
from .diffusers_attention import apply_image_prompts
from .encoding import TextStates, guiding, read_text, stack_texts
from .following import ATTEND_AND_EXCITE, COMPOSABLE_DIFFUSION, PLAIN, composed, excited_places
from .image_encoder import encode_references
from .shared import Concept, Excitement, ImagePrompt, IPAdapter, parse_concepts, whole
from .watch import decode, resting, solving

SOLVERS = {"euler": EulerDiscreteScheduler, "dpm++": DPMSolverMultistepScheduler}
"""Of the sampling's differential equation; the second needs half the steps."""


def noise_seed(seed: int, number: int) -> int:
    """Of the noise of a picture: the run's seed, and the number of its prompt. The same for all methods."""
    return seed * 1_000_003 + number


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
    wishes: Mapping[str, Any] = field(default_factory=dict)
    """What the prompt asks for, in the words of training.truth."""
    excite: str = ""
    """For Attend-and-Excite: cat, "yellow bowl"."""


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
    prompts: str = PLAIN
    """Of training.following.PROMPT_METHODS: as they are, with each job's words excited, or composed of concepts."""
    width: int | None = None
    """Pixels, where it is no square."""
    excitement: Excitement = field(default_factory=Excitement)


Showing = Callable[[Sequence[Job], Sequence[bool]], AbstractContextManager]
"""Tells the UNet about the references of a batch until the end of the block. It is run for as many copies of the batch as
there are truths, one after the other, and those that are true see the references."""


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
            for prompt in ("", *(text for job in some for text in _texts_of(job, sampling))):
                if prompt not in texts:
                    texts[prompt] = read_text(base, [prompt])
            pictures = _draw(base, some, texts, sampling, showing or _unseen)
            for job, picture in zip(some, pictures, strict=True):
                save_drawn(job, picture)
            bar.update(len(some))
    accelerator.wait_for_everyone()
    return len(mine)


def _unseen(_jobs: Sequence[Job], _sees: Sequence[bool]) -> AbstractContextManager:
    """No references."""
    return nullcontext()


def _texts_of(job: Job, sampling: Sampling) -> list[str]:
    return (
        [concept.text for concept in parse_concepts(job.prompt)]
        if sampling.prompts == COMPOSABLE_DIFFUSION
        else [job.prompt]
    )


def _draw(
    base: BaseModel, jobs: Sequence[Job], texts: Mapping[str, TextStates], sampling: Sampling, showing: Showing
) -> list[Image.Image]:
    pipeline, n = base.pipeline, len(jobs)
    device, dtype = pipeline.unet.device, pipeline.unet.dtype
    latents, arguments = noise_of(pipeline, [job.seed for job in jobs], sampling), dict[str, Any]()
    negative = stack_texts([texts[""]] * n).to(device, dtype)
    sides: tuple[bool, ...] = (False, True) if sampling.guidance > 1 else (True,)  # as the pipeline has it
    with ExitStack() as stack:
        scheduler = stack.enter_context(solving(pipeline, SOLVERS[sampling.solver]))
        if sampling.prompts == COMPOSABLE_DIFFUSION:
            rows, weights = _composition(jobs, texts)
            concepts = [row.to(device, dtype) for row in rows]
            positive, sides = concepts[0], (False, *(True for _ in concepts))
            stack.enter_context(composed(pipeline.unet, negative, concepts, weights))
        else:
            positive = stack_texts([texts[job.prompt] for job in jobs]).to(device, dtype)
        stack.enter_context(showing(jobs, sides))
        if sampling.prompts == ATTEND_AND_EXCITE:
            scheduler.set_timesteps(sampling.steps, device=device)
            exciting = AttendAndExcite(
                pipeline.unet,
                scheduler,
                positive.states,
                [excited_places(base, job.prompt, job.excite) for job in jobs],
                sampling.excitement,
                added=_added(base, positive, latents),
                showing=lambda pictures: showing([jobs[i] for i in pictures], (True,)),
            )
            first = scheduler.init_noise_sigma
            latents = exciting.before_first(latents * first) / first
            arguments["callback_on_step_end"] = exciting.callback
        drawn = denoised(pipeline, latents, positive, negative, sampling, **arguments)
    return [picture for row in drawn.split(1) for picture in decode(pipeline.vae, row)]


def noise_of(pipeline: Pipeline, seeds: Sequence[int], sampling: Sampling) -> Tensor:
    """What the picture of each seed starts from, whatever is drawn beside it: [n, C, h, w]."""
    step = pipeline.vae_scale_factor
    height, width = sampling.resolution, sampling.width or sampling.resolution
    shape = (pipeline.unet.config.in_channels, height // step, width // step)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return noise.to(pipeline.unet.device, pipeline.unet.dtype)


def denoised(
    pipeline: Pipeline, noise: Tensor, positive: TextStates, negative: TextStates, sampling: Sampling, **arguments: Any
) -> Tensor:
    """The latents [n, C, h, w] that the pipeline makes of noise by its scheduler; more arguments of its own may be given."""
    return pipeline(
        **guiding(positive, negative),
        latents=noise,
        height=sampling.resolution,
        width=sampling.width or sampling.resolution,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        output_type="latent",
        **arguments,
    ).images


def _composition(jobs: Sequence[Job], texts: Mapping[str, TextStates]) -> tuple[list[TextStates], list[list[float]]]:
    """The first concepts of all pictures, the second ones...; who has fewer gets empty ones of weight 0."""
    own = [parse_concepts(job.prompt) for job in jobs]
    padded = list(itertools.zip_longest(*own, fillvalue=Concept("", 0.0)))
    return [stack_texts([texts[concept.text] for concept in row]) for row in padded], [
        [concept.weight for concept in row] for row in padded
    ]


def _added(base: BaseModel, text: TextStates, latents: Tensor) -> dict[str, Tensor] | None:
    """What SDXL is told beside the text."""
    if text.pooled is None:
        return None
    return {"text_embeds": text.pooled, "time_ids": picture_sizes(latents, base.pipeline.vae_scale_factor)}


def save_drawn(job: Job, picture: Image.Image) -> None:
    """The picture last: where it is, all is."""
    job.path.parent.mkdir(parents=True, exist_ok=True)
    job.path.with_suffix(".txt").write_text(job.prompt + "\n", encoding="utf-8")
    if job.wishes:
        job.path.with_suffix(".json").write_text(json.dumps(dict(job.wishes)))
    with whole(job.path) as part:
        picture.save(part, format="png")


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
    def __call__(self, jobs: Sequence[Job], sees: Sequence[bool] = (False, True)):
        """Of a batch; see Showing."""
        pairs = [self.prompts(job.references) for job in jobs]
        rows = [pair[int(shown)] for shown in sees for pair in pairs]
        unet = self.base.pipeline.unet
        before = apply_image_prompts(unet, rows, self.weight)
        try:
            yield
        finally:
            unet.set_attn_processor(dict(before))
