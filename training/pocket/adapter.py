"""A base IP-Adapter for the pocket model: one reference, four tokens, W'_k and W'_v of every cross-attention layer.

Target and reference are two pictures of one identity, so that the adapter learns who it is and leaves pose, expression
and background to the prompt. The prompt is dropped often, the reference sometimes, for guidance.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm

from ..diffusers_attention import DecoupledAttentionProcessor
from ..shared import LinearProjection
from .data import Pictures, cache_folder, make_once
from .device import tensor_of
from .encoders import VISION, Encoders, prepare
from .loop import Run, autocast, average, require, train
from .unet import SCHEDULE, Conditions, Latents, build_unet, version_of, weighted_loss

TOKENS = 4
NO_TEXT, NO_REFERENCE, NEITHER = 0.4, 0.05, 0.05


class Adapter(nn.Module):
    """The image projection, and K' and V' of a UNet's cross-attention layers, which start as its K and V."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
        layers = [unet.get_submodule(name.removesuffix(".processor")) for name in self.names]
        cross = layers[0].to_k.in_features
        self.image_proj = LinearProjection(VISION.projection_dim, cross, TOKENS)
        self.to_k_ip = nn.ModuleList(nn.Linear(cross, layer.to_k.out_features, bias=False) for layer in layers)
        self.to_v_ip = nn.ModuleList(nn.Linear(cross, layer.to_v.out_features, bias=False) for layer in layers)
        for layer, key, value in zip(layers, self.to_k_ip, self.to_v_ip, strict=True):
            key.load_state_dict({"weight": layer.to_k.weight})
            value.load_state_dict({"weight": layer.to_v.weight})

    def apply(self, unet: UNet2DConditionModel, embeddings: Tensor) -> None:  # type: ignore[override]
        """Let the UNet attend to the references with embeddings [n, 96], a row for each picture, at weight 1."""
        tokens = self.image_proj(embeddings[:, None])
        pairs = zip(self.names, self.to_k_ip, self.to_v_ip, strict=True)
        ours = {name: DecoupledAttentionProcessor(key(tokens), value(tokens), None, 1.0) for name, key, value in pairs}
        unet.set_attn_processor(dict(unet.attn_processors) | ours)

    def tensors(self) -> dict[str, Tensor]:
        """In the official layout."""
        state = {f"image_proj.{name}": value for name, value in self.image_proj.state_dict().items()}
        for i, (key, value) in enumerate(zip(self.to_k_ip, self.to_v_ip, strict=True)):
            state[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"] = key.weight
            state[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"] = value.weight
        return state

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The reverse of `tensors`."""
        state = {name: value for name, value in tensors.items() if name.startswith("image_proj.")}
        for i in range(len(self.names)):
            for which in ("to_k_ip", "to_v_ip"):
                state[f"{which}.{i}.weight"] = tensors[f"ip_adapter.{2 * i + 1}.{which}.weight"]
        self.load_state_dict(state)


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


def train_adapter(run: Run) -> Adapter:
    """Train, or go on training, on the finished UNet."""
    require(run.folder, "vae", "encoders", "unet")
    torch.manual_seed(0)
    unet, latents, conditions = build_unet(), Latents(run.folder, run.pictures), Conditions(run.folder, run.pictures)
    average(unet, run.folder, "unet")
    unet.requires_grad_(False)
    adapter, scheduler = Adapter(unet), DDPMScheduler(**SCHEDULE)
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
            adapter.apply(unet, embeddings[reference] * ~no_reference[:, None])
            prediction = unet(noisy, timesteps, states).sample
        v = scheduler.get_velocity(x, noise, timesteps)
        return weighted_loss(prediction.float(), v, timesteps, scheduler, latents.weights(target)), {}

    train(adapter, step, run, "adapter", learning_rate=1e-3)
    return adapter
