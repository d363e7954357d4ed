"""The VAE: TAESD's architecture with 32 latent channels, 64 px to 8x8."""

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from .data import TRAIN, VALIDATION, Pictures
from .device import tensor_of
from .loop import Run, autocast, train

CHANNELS = 32
NOISE = 0.05  # on the latents while training: the decoder shall bear the UNet's small errors


def build() -> AutoencoderTiny:
    """An untrained VAE; `encoder` takes [n, 3, h, w] in -1..1 and gives latents of about unit variance."""
    return AutoencoderTiny(latent_channels=CHANNELS, scaling_factor=1.0).to(memory_format=torch.channels_last)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """[n, h, w, 3] uint8 -> [n, 3, h, w] in -1..1."""
    return tensor_of(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, across and down."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Absolute and squared error of pixels, and absolute error of edges, so that thin lines count."""
    difference = output - target
    across, down = edges(difference)
    return difference.abs().mean() + 2 * difference.square().mean() + across.abs().mean() + down.abs().mean()


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in -1..1, over all pixels together."""
    return -10 * torch.log10(((output.clamp(-1, 1) - target) / 2).square().mean()).item()


def train_vae(run: Run) -> AutoencoderTiny:
    """Train, or go on training; prints the PSNR on pictures never seen."""
    torch.manual_seed(0)
    vae, pictures = build(), Pictures(run.folder, TRAIN, run.pictures)
    pairs = run.batch * len(pictures.pair) // run.pictures

    def step(_number: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        left = int(rng.integers(5)) * 8
        wide = pictures.pair[np.sort(rng.integers(len(pictures.pair), size=pairs)), :, left : left + 64]
        plain = pictures.single[np.sort(rng.integers(len(pictures.single), size=run.batch - pairs))]
        x = to_tensor(np.concatenate([plain, wide])).contiguous(memory_format=torch.channels_last)
        with autocast():
            z = vae.encoder(x)
            output = vae.decoder(z + NOISE * torch.randn_like(z))
        z, output = z.float(), output.float()
        mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3))
        unit = mean.square().mean() + (variance.clamp(min=1e-6).log()).square().mean()
        return reconstruction_loss(output, x) + 0.01 * unit, {"psnr": psnr(output.detach(), x)}

    train(vae, step, run, "vae")
    fresh = Pictures(run.folder, VALIDATION, min(500, run.pictures))
    print(f"VAE: {mean_psnr(vae, fresh):.2f} dB on {fresh.count} fresh pictures")
    return vae


@torch.no_grad()
def mean_psnr(vae: AutoencoderTiny, fresh: Pictures) -> float:
    """Mean over pictures of the PSNR of encoding and decoding, in fp32."""
    values = []
    for array in (fresh.single, fresh.pair):
        for i in range(0, len(array), 50):
            x = to_tensor(array[i : i + 50])
            output = vae.decoder(vae.encoder(x))
            values += [psnr(a, b) for a, b in zip(output, x, strict=True)]
    return float(np.mean(values))
