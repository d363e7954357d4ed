"""One step of fine-tuning: noise on latents, the network's prediction, the loss.

Everything random about a picture in a step comes from a generator of its own, seeded by the run's seed, the batch's
number and the picture's place in the batch over all processes. So a run can stop and go on bit for bit, and two
processes draw together what one with twice the batch draws.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor

from .encoding import Latent, TextStates
from .settings import Settings
from .shared import denoising_losses, min_snr_weights, offset_noise, prior_preservation_loss


@dataclass(frozen=True)
class Draw:
    """What is random in a step, for each picture of a batch."""

    latents: Tensor
    """[n, C, h, w], drawn from the VAE's distributions."""
    noise: Tensor
    """[n, C, h, w]."""
    timesteps: Tensor
    """[n], whole numbers."""
    captions: list[float]
    """Which of a picture's captions, 0..1; below zero, none."""


@dataclass(frozen=True)
class Weighting:
    """How noise is drawn, and how errors count."""

    snr_gamma: float | None = None
    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    prior_loss_weight: float = 1.0
    timesteps: Tensor | None = None
    """How often each is drawn, of all together; None: all as often."""

    @classmethod
    def of(cls, settings: Settings, timesteps: int) -> "Weighting":
        """As the settings say, of a schedule with so many timesteps."""
        training, data = settings.training, settings.data
        often = timestep_weights(
            timesteps,
            training.timestep_bias_strategy or "none",
            training.timestep_bias_portion,
            training.timestep_bias_multiplier,
        )
        gamma = training.snr_gamma or None
        return cls(gamma, training.noise_offset, data.caption_dropout, data.prior_loss_weight, often)


def timestep_weights(count: int, strategy: str, portion: float, multiplier: float) -> Tensor | None:
    """How often each timestep is drawn, [count], as diffusers' SDXL script has it; None: all as often.

    Args:
        count: of the schedule.
        strategy: none, earlier (the first, with little noise) or later (the last, with much).
        portion: of the schedule, that is drawn more or less often.
        multiplier: how many times as often.
    """
    if strategy == "none":
        return None
    weights, some = torch.ones(count), int(portion * count)
    weights[slice(some) if strategy == "earlier" else slice(count - some, None)] *= multiplier
    return weights / weights.sum()


def generator_of(seed: int, *numbers: int) -> torch.Generator:
    """A generator for one thing, independent of those for all other numbers."""
    digest = hashlib.sha256(repr((seed, *numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def draw(
    latents: Sequence[Latent], places: Sequence[int], seed: int, number: int, timesteps: int, weighting: Weighting
) -> Draw:
    """Draw a batch's noise, on the CPU.

    Args:
        latents: of n pictures of one size.
        places: of each in the batch over all processes.
        seed: of the run.
        number: of the batch.
        timesteps: how many the schedule has.
        weighting: says how noise and timesteps are drawn, and how many captions are left out.
    """
    z, noises, times, captions = [], [], [], []
    for latent, place in zip(latents, places, strict=True):
        generator = generator_of(seed, number, place)
        if weighting.timesteps is None:
            times.append(torch.randint(timesteps, (), generator=generator))
        else:
            times.append(torch.multinomial(weighting.timesteps, 1, generator=generator)[0])
        noise = torch.randn(latent.mean.shape, generator=generator)
        if weighting.noise_offset:
            shift = torch.randn(latent.mean.shape[0], 1, 1, generator=generator)
            noise = offset_noise(noise, shift, weighting.noise_offset)
        noises.append(noise)
        deviation = torch.randn(latent.mean.shape, generator=generator)
        z.append(latent.mean if latent.deviation is None else latent.mean + latent.deviation * deviation)
        dropped, which = torch.rand(2, generator=generator).tolist()
        captions.append(-1.0 if dropped < weighting.caption_dropout else which)
    return Draw(torch.stack(z), torch.stack(noises), torch.stack(times), captions)


def picture_sizes(latents: Tensor, vae_scale: int) -> Tensor:
    """SDXL's time ids [n, 6]: original size, crop, and target size, all of an uncut picture of this size."""
    height, width = (side * vae_scale for side in latents.shape[-2:])
    row = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=latents.device)
    return row.expand(len(latents), 6)


def training_losses(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    drawn: Draw,
    text: TextStates,
    mask: Tensor | None,
    vae_scale: int,
    weighting: Weighting,
) -> Tensor:
    """The loss of each picture, [n].

    Args:
        unet: the network, on its device, which everything is brought to.
        scheduler: a DDPMScheduler of the base's schedule and prediction type.
        drawn: noise and latents.
        text: [n, 77, width] states.
        mask: [n, 1, h, w] or None.
        vae_scale: pixels a latent, along each side.
        weighting: min-SNR.
    """
    device = next(unet.parameters()).device
    z, noise = drawn.latents.to(device), drawn.noise.to(device)
    timesteps = drawn.timesteps.to(device)
    noisy = scheduler.add_noise(z, noise, timesteps)
    v_prediction = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(z, noise, timesteps) if v_prediction else noise
    added = {}
    if text.pooled is not None:
        added = {"added_cond_kwargs": {"text_embeds": text.pooled, "time_ids": picture_sizes(z, vae_scale)}}
    dtype = unet.dtype
    prediction = unet(noisy.to(dtype), timesteps, text.states.to(dtype), **added).sample
    losses = denoising_losses(prediction, target, None if mask is None else mask.to(device))
    if weighting.snr_gamma is not None:
        losses = losses * min_snr_weights(compute_snr(scheduler, timesteps), weighting.snr_gamma, v_prediction)
    return losses


def total_loss(losses: Tensor, is_prior: Sequence[bool], weighting: Weighting) -> Tensor:
    """The mean of the losses, or with pictures of the class, DreamBooth's."""
    if not any(is_prior):
        return losses.mean()
    return prior_preservation_loss(losses, torch.tensor(is_prior, device=losses.device), weighting.prior_loss_weight)


def stack_masks(latents: Sequence[Latent], masked: bool) -> Tensor | None:
    """Where each picture counts, [n, 1, h, w]: in its frame, and if `masked` where its mask says; None: everywhere."""
    parts = [[x.inside, x.mask if masked else None] for x in latents]
    if not masked and all(inside is None for inside, _ in parts):
        return None
    ones = [torch.ones_like(x.mean[:1]) for x in latents]
    return torch.stack(
        [math.prod((p for p in part if p is not None), start=one) for part, one in zip(parts, ones, strict=True)]
    )
