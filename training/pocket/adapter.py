"""A base IP-Adapter for the pocket model: one reference, four tokens, W'_k and W'_v of every cross-attention layer.

Target and reference are two pictures of one identity, so that the adapter learns who it is and leaves pose, expression
and background to the prompt. The prompt is dropped often, the reference sometimes, for guidance.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm

from ..adapter_module import TrainableAdapter, build, fresh_adapter
from ..shared import IPAdapter, read_ip_adapter
from .data import Pictures, cache_folder, make_once
from .device import tensor_of
from .encoders import VISION, Encoders, prepare
from .loop import Run, autocast, average, require, train
from .unet import SCHEDULE, Conditions, Latents, build_unet, version_of, weighted_loss

NO_TEXT, NO_REFERENCE, NEITHER = 0.4, 0.05, 0.05


def adapter_of(unet: UNet2DConditionModel, path: Path | None = None) -> TrainableAdapter:
    """An untrained adapter for the UNet, or a file's, ready to train."""
    state = fresh_adapter(unet, "base", VISION.projection_dim) if path is None else read_ip_adapter(path)
    return build(IPAdapter.from_state(state), "average", "features", None, 1, 0).requires_grad_(True)


@torch.no_grad()
def embed(encoders: Encoders, pictures: np.ndarray) -> Tensor:
    """[n, 96] image embeddings, 128 pictures at a time."""
    parts = [
        encoders.image(prepare(pictures[i : i + 128])).image_embeds
        for i in tqdm(range(0, len(pictures), 128), desc="Embedding", unit=" x 128", leave=False)
    ]
    return torch.cat(parts)


def cached_embeddings(folder: Path, pictures: Pictures) -> Tensor:
    """[n, 96] of the single pictures, by the trained image encoder."""
    encoders = Encoders()
    average(encoders, folder, "encoders")
    name = f"embeddings-{pictures.seed}-{pictures.count}-{version_of(encoders.image)}.npy"
    path = cache_folder(folder) / name
    make_once(path, lambda file: np.save(file, embed(encoders, pictures.single).cpu().numpy()))
    return tensor_of(np.load(path))


def train_adapter(run: Run) -> TrainableAdapter:
    """Train, or go on training, on the finished UNet."""
    require(run.folder, "vae", "encoders", "unet")
    torch.manual_seed(0)
    unet, latents, conditions = build_unet(), Latents(run.folder, run.pictures), Conditions(run.folder, run.pictures)
    average(unet, run.folder, "unet")
    unet.requires_grad_(False)
    adapter, scheduler = adapter_of(unet), DDPMScheduler(**SCHEDULE)
    embeddings = cached_embeddings(run.folder, latents.pictures)

    def step(_number: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        target, reference = latents.pictures.twins(run.batch, rng)
        x = tensor_of(latents.single[target].astype(np.float32))
        fate = tensor_of(rng.random(run.batch))
        no_text = fate < NO_TEXT + NEITHER
        no_reference = (fate >= NO_TEXT) & (fate < NO_TEXT + NEITHER + NO_REFERENCE)
        states = conditions.some(latents.pictures.single_index[target], rng, no_text)
        timesteps, noise = torch.randint(0, 1000, (run.batch,)), torch.randn_like(x)
        noisy = scheduler.add_noise(x, noise, timesteps)
        with autocast():
            seen = embeddings[reference] * ~no_reference[:, None]
            adapter.attach(unet, adapter.tokens(seen[:, None]), None)
            prediction = unet(noisy, timesteps, states).sample
        v = scheduler.get_velocity(x, noise, timesteps)
        return weighted_loss(prediction.float(), v, timesteps, scheduler, latents.weights(target)), {}

    train(adapter, step, run, "adapter", learning_rate=1e-3)
    return adapter
