"""While it trains: sample pictures of fixed prompts and seeds, and the loss on pictures that are kept out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .base_model import BaseModel
from .conditioning import Conditioning
from .dataset import Example
from .denoising import Weighting, draw, training_losses
from .encoding import Latent, TextStates, guiding, read_text
from .methods import Method
from .shared import PersonalizeError, cover_picture, read_picture

STEPS, GUIDANCE = 20, 5.0
LEVELS = 4  # timesteps at which the validation loss is measured
LABEL = 16  # pixels of a line of text over the samples


@contextmanager
def resting(base: BaseModel):
    """Without gradients and dropout."""
    modules = [base.pipeline.unet, *(encoder for encoder in base.text_encoders if encoder is not None)]
    before = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.train(mode)


def read_rows(
    base: BaseModel, method: Method, texts: dict[str, TextStates], captions: Sequence[str], clip_skip: int
) -> list[TextStates]:
    """One row for each caption: read now if the text encoders train, else what was encoded before."""
    if method.trains_text:
        return [read_text(base, [method.spoken(caption)], clip_skip) for caption in captions]
    return [texts[caption] for caption in captions]


def draw_samples(
    accelerator: Accelerator,
    base: BaseModel,
    rows: Sequence[TextStates],
    empty: TextStates,
    count: int,
    size: tuple[int, int],
    seed: int,
    after_step: Callable[..., dict[str, Any]],
) -> list[list[Image.Image]]:
    """`count` pictures of each prompt, by DPM-Solver++ in 20 steps at guidance 5.

    Args:
        rows: text states of the prompts, one row each.
        empty: of no text.
        size: height and width, pixels.
        seed: of the first picture of each prompt; the others count on.
        after_step: as diffusers calls it after each of a picture's steps; to raise in it ends it all.
    """
    pipeline, device = base.pipeline, accelerator.device
    vae_device = next(pipeline.vae.parameters()).device
    pipeline.vae.to(device)
    try:
        with solving(pipeline, DPMSolverMultistepScheduler):
            return [
                [_one(accelerator, pipeline, row, empty, size, seed + i, after_step) for i in range(count)]
                for row in rows
            ]
    finally:
        pipeline.vae.to(vae_device)


@contextmanager
def solving(pipeline: Any, solver: Any) -> Iterator[Any]:
    """A block in which a pipeline has another scheduler, which it yields, and no progress bar of its own.

    Args:
        pipeline: of diffusers.
        solver: the class of the scheduler.
    """
    before, progress = pipeline.scheduler, dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.scheduler = solver.from_config(before.config)
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield pipeline.scheduler
    finally:
        pipeline.scheduler = before
        pipeline.set_progress_bar_config(**progress)


def _one(accelerator, pipeline, row: TextStates, empty: TextStates, size, seed: int, after_step) -> Image.Image:
    device, dtype = accelerator.device, pipeline.unet.dtype
    text, nothing = row.to(device, dtype), empty.to(device, dtype)
    with accelerator.autocast():
        latents = pipeline(
            **guiding(text, nothing),
            height=size[0],
            width=size[1],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=after_step,
        ).images
    return decode(pipeline.vae, latents)[0]


def decode(vae: Any, latents: Tensor) -> list[Image.Image]:
    """Latents [n, C, h, w], as the UNet has them, to pictures.

    Raises:
        PersonalizeError: they are not finite.
    """
    scaled = latents.to(torch.float32) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    with torch.autocast(latents.device.type, enabled=False):  # SDXL's VAE overflows in half precision
        decoded = vae.decode(scaled).sample.clamp(-1, 1)
    if not decoded.isfinite().all():
        raise PersonalizeError(
            "The model draws no picture but NaN: use --mixed_precision bf16 or no, or a lower --learning_rate."
        )
    pixels = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


@dataclass(frozen=True)
class Shown:
    """What samples are drawn with."""

    label: str
    pictures: list[Image.Image]
    """References, beside the samples."""
    size: tuple[int, int]
    """Height and width of the samples, pixels."""
    around: AbstractContextManager
    """A block in which to draw."""
    said: Callable[[str], str]
    """A prompt as it is to be read."""


def views(conditioning: Conditioning | None, held: Mapping[Path, Sequence[Path]], resolution: int) -> Iterator[Shown]:
    """What samples are drawn with: once, or once for each held-out identity, from its references.

    Args:
        conditioning: takes references, if the method does.
        held: references of each held-out identity, by its folder.
        resolution: pixels of a square sample.
    """
    if conditioning is None:
        yield Shown("", [], (resolution, resolution), nullcontext(), lambda prompt: prompt)
        return
    for folder, paths in held.items():
        pictures, size = [], conditioning.frame(paths, resolution)
        for path in paths:
            pixels = cover_picture(read_picture(path).pixels, *size)
            pictures.append(Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy()))
        label = f"{folder.name}, {len(paths)} references: " if len(paths) > 1 else f"{folder.name}: "
        yield Shown(label, pictures, size, conditioning.showing(paths), partial(conditioning.said, paths))


def grid(pictures: Sequence[Sequence[Image.Image]], labels: Sequence[str]) -> Image.Image:
    """A row of pictures for each label, with the label over it; as wide as the widest of all."""
    font = ImageFont.load_default()
    width = max(sum(picture.width + 4 for picture in row) for row in pictures)
    width = max(width, 240, *(math.ceil(font.getlength(label)) + 6 for label in labels))
    heights = [row[0].height + LABEL for row in pictures]
    sheet = Image.new("RGB", (width, sum(heights)), "white")
    pen, y = ImageDraw.Draw(sheet), 0
    for row, label, height in zip(pictures, labels, heights, strict=True):
        pen.text((3, y + 2), label, fill="black", font=font)
        for i, picture in enumerate(row):
            sheet.paste(picture, (i * (picture.width + 4), y + LABEL))
        y += height
    return sheet


def write_samples(
    path: Path, pictures: Sequence[Sequence[Image.Image]], prompts: Sequence[str], step: int
) -> np.ndarray:
    """The pictures of all prompts as one PNG that says the step and the prompts; returns it, [h, w, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = grid(pictures, [f"step {step}: {prompt}" for prompt in prompts])
    sheet.save(path)
    return np.asarray(sheet)


def validation_loss(
    base: BaseModel,
    scheduler: DDPMScheduler,
    examples: Sequence[Example],
    latents: dict[Example, Latent],
    read: Callable[[str], TextStates],
    device: torch.device,
    conditioning: Conditioning | None = None,
) -> float:
    """The mean loss on pictures that are kept out, always with the same noise, at four timesteps each.

    Where there is a `conditioning`, each is predicted from references, always the same. `read` gives a caption's states.
    """
    total, times = 0.0, scheduler.config.num_train_timesteps
    for i, example in enumerate(examples):
        for level in range(LEVELS):
            drawn = draw([latents[example]], [i], 0, -1 - level, times, Weighting())
            drawn.timesteps.fill_((2 * level + 1) * times // (2 * LEVELS))
            if conditioning is not None:
                conditioning.tell([example], -1 - level, [i])
            row = read(example.captions[0])
            text = row.to(device, row.states.dtype)
            losses = training_losses(
                base.pipeline.unet, scheduler, drawn, text, None, base.pipeline.vae_scale_factor, Weighting()
            )
            total += losses.item()
    return total / (len(examples) * LEVELS)
