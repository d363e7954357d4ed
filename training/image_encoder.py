"""CLIP image encoders, and the features of pictures: encoded once, and kept on disk by everything they depend on."""

import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from .base_model import is_hub_id
from .dataset import mask_file
from .encoding import Cache, digest_of, digest_of_path
from .shared import (
    CLIP_MEAN,
    CLIP_STD,
    ENCODER_ADVICE,
    VISION_CONFIG,
    PersonalizeError,
    References,
    crop_square,
    frame_picture,
    read_header,
    read_picture,
    read_safetensors,
)

HEADS = 16
"""Of CLIP's ViT-L, ViT-H and ViT-bigG, all of which have as many, whatever their width."""
BATCH = 16
KEPT = 4_000_000_000
"""Bytes of features in memory; what is more is read from the cache in each step."""
_PATCH = "vision_model.embeddings.patch_embedding.weight"


def load_image_encoder(where: str | Path) -> CLIPVisionModelWithProjection:
    """A CLIP vision encoder: a .safetensors file as ComfyUI's models/clip_vision has them, a folder, or a hub id.

    Raises:
        PersonalizeError: there is none, or it is damaged or of another kind.
    """
    path = Path(where).expanduser()
    if path.is_file():
        state, metadata = read_safetensors(path)
        config = config_of_file({name: tuple(value.shape) for name, value in state.items()}, metadata, path.name)
        with torch.device("meta"):
            encoder = CLIPVisionModelWithProjection(config)
        state = {k: v for k, v in state.items() if k.startswith(("vision_model.", "visual_projection."))}
        positions = encoder.vision_model.embeddings.position_ids.shape[-1]
        encoder.load_state_dict(
            {name: v.float() for name, v in state.items() if "position_ids" not in name}, assign=True
        )
        encoder.vision_model.embeddings.position_ids = torch.arange(positions)[None]  # no weight, so in no file
        return encoder.eval()
    if not path.is_dir() and not is_hub_id(str(where)):
        raise PersonalizeError(f"The image encoder {where} does not exist: it is no file, no folder, and no hub id.")
    try:
        local = path.is_dir()
        found = CLIPVisionModelWithProjection.from_pretrained(
            str(path) if local else str(where), local_files_only=local, torch_dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PersonalizeError(f"{where} cannot be loaded as an image encoder: {reason}") from None
    return found.eval()


def config_of_file(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str], name: str) -> CLIPVisionConfig:
    """What the file says, or for the published encoders what their shapes tell.

    Raises:
        PersonalizeError: neither does.
    """
    if VISION_CONFIG in metadata:
        return CLIPVisionConfig(**json.loads(metadata[VISION_CONFIG]))
    if _PATCH not in shapes or "visual_projection.weight" not in shapes:
        raise PersonalizeError(
            f"{name} is no image encoder that is supported: it has no vision_model and visual_projection; "
            f"{ENCODER_ADVICE}."
        )
    layers = [int(m[1]) for key in shapes if (m := re.match(r"vision_model\.encoder\.layers\.(\d+)\.", key))]
    width, _, patch, _ = shapes[_PATCH]
    positions = shapes["vision_model.embeddings.position_embedding.weight"][0]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=HEADS,
        image_size=patch * round((positions - 1) ** 0.5),
        patch_size=patch,
        projection_dim=shapes["visual_projection.weight"][0],
        hidden_act="quick_gelu" if width <= 1024 else "gelu",  # OpenAI's, and OpenCLIP's
    )


def widths_of_encoder(where: str | None) -> tuple[int, int] | None:
    """Width of the pooled embedding and of the patch tokens, from headers only; None for a hub id.

    Args:
        where: as --image_encoder gives it.

    Raises:
        PersonalizeError: nothing is given, or there is none.
    """
    if not where:
        raise PersonalizeError(
            "--image_encoder is missing: the CLIP image encoder, as in ComfyUI's models/clip_vision."
        )
    path = Path(where).expanduser()
    if path.is_file():
        header, metadata, _ = read_header(path)
        config = config_of_file({key: entry["shape"] for key, entry in header.items()}, metadata, path.name)
        return config.projection_dim, config.hidden_size
    if path.is_dir():
        try:
            config = CLIPVisionConfig.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError):
            raise PersonalizeError(f"The folder {path} is no image encoder: it has no config.json of one.") from None
        return config.projection_dim, config.hidden_size
    if not is_hub_id(where):
        raise PersonalizeError(f"The image encoder {where} does not exist: it is no file, no folder, and no hub id.")
    return None


@dataclass(frozen=True)
class View:
    """A picture, or a random square of it."""

    path: Path
    crop: int = 0
    """Which of its squares; 0 for the picture."""


def as_seen(path: Path, size: int, square: Sequence[float] | None = None) -> Tensor:
    """A picture as the encoder takes it, framed as *Encode References* frames it: [3, size, size].

    Args:
        path: of the picture.
        size: pixels.
        square: side, place across and place down, all from 0 to 1, of the part that is seen; None for the whole.
    """
    picture = read_picture(path)
    framed = frame_picture(picture if square is None else crop_square(picture, *square), "crop", size)
    return ((framed - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(2, 0, 1)


def square_of(digest: str, crop: int, sides: tuple[float, float]) -> list[float]:
    """The same for the same picture: the side is uniform, the place uniform within the picture.

    Args:
        digest: of the picture, hexadecimal.
        crop: which square, from 1.
        sides: least and greatest side, as shares of the picture's shorter one.
    """
    rng = np.random.default_rng([int(digest, 16), crop])
    return [float(rng.uniform(*sides)), float(rng.random()), float(rng.random())]


@torch.no_grad()
def encode(encoder: CLIPVisionModelWithProjection, inputs: Tensor, layer: int = -2) -> tuple[Tensor, Tensor]:
    """Pooled embeddings [n, D] and a layer's hidden states [n, T, H] of [n, 3, size, size], on the CPU.

    Args:
        encoder: on its device.
        inputs: normalised pictures.
        layer: of the hidden states; the penultimate is what IP-Adapters take.
    """
    output = encoder(inputs.to(encoder.device, encoder.dtype), output_hidden_states=True)
    return output.image_embeds.float().cpu(), output.hidden_states[layer].float().cpu()


def encode_zero(encoder: CLIPVisionModelWithProjection) -> Tensor:
    """Penultimate hidden states of an all-zero input, [T, H]: "no picture" for Plus adapters."""
    size = encoder.config.image_size
    return encode(encoder, torch.zeros(1, 3, size, size))[1][0]


def encode_references(encoder: CLIPVisionModelWithProjection, paths: Sequence[Path]) -> References:
    """Pictures as the nodes have them, each of weight 1."""
    inputs = torch.stack([as_seen(path, encoder.config.image_size) for path in paths])
    parts = [encode(encoder, some) for some in inputs.split(BATCH)]
    pooled, patches = (torch.cat(part) for part in zip(*parts, strict=True))
    return References(pooled, patches, encode_zero(encoder), torch.ones(len(paths)), tuple(p.name for p in paths))


Key = TypeVar("Key", bound=Hashable)


class CachedFeatures(Generic[Key]):
    """Named tensors by key, on the CPU: from memory, or from disk where that would be too much."""

    def __init__(self, cache: Cache, encoder: CLIPVisionModelWithProjection):
        """Args:
        cache: on disk.
        encoder: on its device; it is not kept.
        """
        self.cache, self.digest = cache, digest_of(encoder)
        self.keys: dict[Key, dict] = {}
        """What each depends on, as the cache wants it."""
        self.memory: dict[Key, dict[str, Tensor]] = {}

    def find(self, key: Key) -> bool:
        """Whether the cache has it; then it is kept."""
        stored = self.cache.get(self.keys[key])
        if stored is not None:
            self._keep(key, stored)
        return stored is not None

    def store(self, key: Key, tensors: dict[str, Tensor]) -> None:
        """Into the cache."""
        self.cache.put(self.keys[key], tensors)
        self._keep(key, tensors)

    def _keep(self, key: Key, tensors: dict[str, Tensor]) -> None:
        if (len(self.memory) + 1) * sum(value.nbytes for value in tensors.values()) <= KEPT:
            self.memory[key] = tensors

    def tensors(self, key: Key) -> dict[str, Tensor]:
        """What was found or stored.

        Raises:
            PersonalizeError: it is no longer in the cache.
        """
        if key in self.memory:
            return self.memory[key]
        stored = self.cache.get(self.keys[key])
        if stored is None:
            raise PersonalizeError(f"The cache {self.cache.folder} was changed while it was in use: run it again.")
        return stored


class Features(CachedFeatures[View]):
    """What an adapter takes of each view, [T, D]."""

    def __init__(
        self,
        cache: Cache,
        encoder: CLIPVisionModelWithProjection,
        pooled: bool,
        crops: int = 0,
        sides: tuple[float, float] = (1, 1),
    ):
        """Args:
        cache: on disk.
        encoder: on its device; it is not kept.
        pooled: whether the adapter takes the pooled embedding, else the patch tokens.
        crops: random squares of every picture, beside the picture.
        sides: least and greatest side of these, as shares of the picture's shorter one.
        """
        super().__init__(cache, encoder)
        self.pooled, self.crops, self.sides = pooled, crops, sides
        width = encoder.config.projection_dim
        self.empty = torch.zeros(1, width) if pooled else encode_zero(encoder)
        """Of no picture, [T, D]."""

    def add(self, encoder: CLIPVisionModelWithProjection, paths: Iterable[Path]) -> None:
        """Encode what is not in the cache."""
        waiting = list[View]()
        for path in paths:
            mask, digest = mask_file(path), digest_of_path(path)
            whole = {
                "features of": digest,
                "mask": digest_of_path(mask) if mask.is_file() else "",
                "encoder": self.digest,
                "pooled": self.pooled,
            }
            for crop in range(self.crops + 1):
                view = View(path, crop)
                square = {"square": square_of(digest, crop, self.sides)} if crop else {}
                self.keys[view] = whole | square
                if not self.find(view):
                    waiting.append(view)
                if len(waiting) == BATCH:
                    self._encode(encoder, waiting)
                    waiting = []
        if waiting:
            self._encode(encoder, waiting)

    def _encode(self, encoder: CLIPVisionModelWithProjection, views: Sequence[View]) -> None:
        size = encoder.config.image_size
        seen = [as_seen(view.path, size, self.keys[view].get("square")) for view in views]
        pooled, patches = encode(encoder, torch.stack(seen))
        for i, view in enumerate(views):
            self.store(view, {"features": (pooled[i : i + 1] if self.pooled else patches[i]).clone()})

    def __getitem__(self, seen: Path | View) -> Tensor:
        return self.tensors(View(seen) if isinstance(seen, Path) else seen)["features"]
