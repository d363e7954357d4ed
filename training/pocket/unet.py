"""The UNet: SD1.5's architecture in small, v-prediction on the schedule of Stable Diffusion, trained on cached latents.

Loss: that of v up to an SNR of 5 and min-SNR above it (Hang et al. 2023), heavier where eyes and mouths are, since
expressions are decided by few latents; captions dropped for one picture in ten for guidance.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from tqdm import tqdm

from .data import TRAIN, Pictures, cache_folder, make_once
from .device import tensor_of
from .encoders import TEXT, Encoders
from .loop import Run, autocast, average, require, train
from .vae import CHANNELS, build, to_tensor
from .words import Captions, add_unknown_words, tokenize

WIDTHS = (96, 96)
DEPTHS = (2, 1)  # transformer blocks
HEADS = 3
UNCONDITIONAL = 0.1
PAIR_STEPS = 0.45  # of all: two subjects are harder than one
MIN_SNR_GAMMA = 5.0
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


def build_unet() -> UNet2DConditionModel:
    """An untrained UNet: cross-attention at both levels, 8x8 and 4x4 for 64 px."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        transformer_layers_per_block=DEPTHS,
        down_block_types=("CrossAttnDownBlock2D",) * len(WIDTHS),
        up_block_types=("CrossAttnUpBlock2D",) * len(WIDTHS),
        cross_attention_dim=TEXT.hidden_size,
        attention_head_dim=HEADS,  # diffusers' name for the number of heads
    )
    unet.set_attn_processor(AttnProcessor())  # on CPUs the fused attention has a slow backward
    return unet


class Latents:
    """Pictures of the training seed as latents, encoded once: `single` [n, 32, 8, 8], `pair` [m, 32, 8, 12], fp16."""

    def __init__(self, folder: Path, count: int):
        self.pictures = Pictures(folder, TRAIN, count)
        self.single = _encoded(folder, "single", self.pictures.single)
        self.pair = _encoded(folder, "pair", self.pictures.pair)
        self._weights = [
            _weights(pictures, faces)
            for pictures, faces in zip((self.pictures.single, self.pictures.pair), self.pictures.faces(), strict=True)
        ]

    def some(self, batch: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, np.ndarray]:
        """Latents of one shape, the weights of their losses, and the numbers of their scenes: single pictures, or pairs."""
        pairs = rng.random() < PAIR_STEPS
        latents = self.pair if pairs else self.single
        index = self.pictures.pair_index if pairs else self.pictures.single_index
        rows = rng.integers(len(latents), size=batch * 2 // 3 if pairs else batch)
        return tensor_of(latents[rows].astype(np.float32)), self.weights(rows, pairs), index[rows]

    def weights(self, rows: np.ndarray, pairs: bool = False) -> Tensor:
        """[n, h, w] of mean 1 for each picture: how much the loss counts at each place of these latents.

        Half goes by how much there is to see there in the mean of all pictures, half to what shows the expression.
        """
        return tensor_of(self._weights[pairs][rows].astype(np.float32))


def _weights(pictures: np.ndarray, faces: np.ndarray) -> np.ndarray:
    x = pictures[:2000].astype(np.float32)
    across, down = (np.abs(np.diff(x, axis=a, append=x.take([-1], a))).sum(3).mean(0) for a in (2, 1))
    squared = nn.functional.avg_pool2d(torch.from_numpy(across + down)[None], 8)[0].square().numpy()
    share = faces / faces.sum((1, 2), keepdims=True).clip(1) * faces[0].size
    weights = 0.3 + 0.7 * squared / squared.mean() + share.clip(max=8) * 0.7
    return (weights / weights.mean((1, 2), keepdims=True)).astype(np.float16)


@torch.no_grad()
def _encoded(folder: Path, name: str, pictures: np.ndarray) -> np.ndarray:
    vae = build()
    average(vae, folder, "vae")

    def make(file: Path) -> None:
        shape = (len(pictures), CHANNELS, pictures.shape[1] // 8, pictures.shape[2] // 8)
        store = open_memmap(file, "w+", np.float16, shape)
        for start in tqdm(range(0, len(pictures), 64), desc=f"Encoding {name}", unit=" x 64", mininterval=5):
            x = to_tensor(pictures[start : start + 64]).contiguous(memory_format=torch.channels_last)
            with autocast():
                store[start : start + 64] = vae.encoder(x).float().cpu().numpy()
        store.flush()

    path = cache_folder(folder) / f"latents-{name}-{len(pictures)}-{version_of(vae)}.npy"
    make_once(path, make)
    return np.load(path, mmap_mode="r")


def version_of(module: nn.Module) -> str:
    """Eight digits for the weights that a cache depends on."""
    return hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in module.parameters())).hexdigest()[:8]


class Conditions(nn.Module):
    """Text states of captions, by the frozen text encoder."""

    def __init__(self, folder: Path, count: int):
        super().__init__()
        encoders = Encoders()
        average(encoders, folder, "encoders")
        self.text = encoders.text.requires_grad_(False)
        self.captions = Captions(folder, TRAIN, count)
        self.empty = tokenize([""])

    @torch.no_grad()
    def some(self, scenes: np.ndarray, rng: np.random.Generator, empty: Tensor | None = None) -> Tensor:
        """[n, 77, 64] of one caption of each scene; those of `empty` [n], else a tenth at random, say nothing."""
        ids = add_unknown_words(self.captions.some(scenes, rng)[0], rng)
        ids[tensor_of(rng.random(len(ids)) < UNCONDITIONAL) if empty is None else empty] = self.empty
        return self.text(ids).last_hidden_state


def weighted_loss(
    prediction: Tensor, target: Tensor, timesteps: Tensor, scheduler: DDPMScheduler, places: Tensor
) -> Tensor:
    """Squared error of v, weighted by min(SNR + 1, 6) / (SNR + 1), and by `places` [n, h, w]."""
    rescaled = compute_snr(scheduler, timesteps) + 1
    weight = rescaled.clamp(max=MIN_SNR_GAMMA + 1) / rescaled
    return (weight * ((prediction - target).square().mean(1) * places).mean((1, 2))).mean()


def train_unet(run: Run) -> UNet2DConditionModel:
    """Train, or go on training."""
    require(run.folder, "vae", "encoders")
    torch.manual_seed(0)
    unet, latents, conditions = build_unet(), Latents(run.folder, run.pictures), Conditions(run.folder, run.pictures)
    scheduler = DDPMScheduler(**SCHEDULE)

    def step(_number: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        x, places, scenes = latents.some(run.batch, rng)
        states = conditions.some(scenes, rng)
        timesteps, noise = torch.randint(0, 1000, (len(x),)), torch.randn_like(x)
        noisy = scheduler.add_noise(x, noise, timesteps)
        with autocast():
            prediction = unet(noisy, timesteps, states).sample
        target = scheduler.get_velocity(x, noise, timesteps)
        return weighted_loss(prediction.float(), target, timesteps, scheduler, places), {}

    train(unet, step, run, "unet", ema_decay=0.9995)
    return unet
