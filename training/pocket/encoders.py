"""The text and the image encoder: CLIP's architectures, small, trained together by contrast.

The loss is CLIP's, between pictures and captions, and the same between two pictures of one identity. Two helpers that
are thrown away afterwards make every token and the image embedding tell the attributes: the UNet reads each token, and
an IP-Adapter the embedding.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ..base_model import CONFIGS
from ..shared import CLIP_MEAN, CLIP_STD
from .data import TRAIN, Pictures
from .device import tensor_of
from .labels import SCENE_SIZES, SUBJECT_SIZES, cached_labels
from .loop import Run, autocast, train
from .words import Captions, add_unknown_words

TEXT = CLIPTextConfig.from_json_file(CONFIGS / "pocket" / "text_encoder" / "config.json")
VISION = CLIPVisionConfig(
    hidden_size=128,
    intermediate_size=384,
    projection_dim=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=64,
    patch_size=8,
    hidden_act="quick_gelu",
)


class Readers(nn.Module):
    """Linear readings of every attribute, from the image embedding and, by one query each, from the text's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (*SUBJECT_SIZES, *SUBJECT_SIZES, *SCENE_SIZES)
        width = TEXT.hidden_size
        self.query = nn.Parameter(torch.randn(len(self.sizes), width) * 0.1)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.of_text = nn.ModuleList(nn.Linear(width, size) for size in self.sizes)
        self.of_image = nn.ModuleList(nn.Linear(VISION.projection_dim, size) for size in (*SUBJECT_SIZES, *SCENE_SIZES))

    def text_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """From tokens' final states [n, 77, 64], the labels [n, 47] of two subjects and the scene."""
        weights = (self.query @ self.key(states).transpose(1, 2) / states.shape[-1] ** 0.5).softmax(-1)
        told = (weights @ self.value(states)).unbind(1)
        return reading_loss([head(x) for head, x in zip(self.of_text, told, strict=True)], labels)

    def image_loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """From embeddings [n, 96] of pictures of one subject, the labels [n, 26]."""
        return reading_loss([head(embeddings) for head in self.of_image], labels)


def reading_loss(logits: Iterable[Tensor], labels: Tensor) -> Tensor:
    """Mean cross-entropy of what is known of labels [n, attributes], from [n, values] of each attribute."""
    losses = [
        cross_entropy(one.float(), label, ignore_index=-1, reduction="sum")
        for one, label in zip(logits, labels.T, strict=True)
    ]
    return torch.stack(losses).sum() / (labels >= 0).sum()


class Encoders(nn.Module):
    """Both encoders, their temperature, and the helpers."""

    def __init__(self) -> None:
        super().__init__()
        # "eager": on CPUs the fused attention has a slow backward
        self.text = CLIPTextModelWithProjection._from_config(TEXT, attn_implementation="eager")
        self.image = CLIPVisionModelWithProjection._from_config(VISION, attn_implementation="eager")
        self.readers = Readers()
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))


def prepare(pictures: np.ndarray) -> Tensor:
    """[n, h, w, 3] uint8, squeezed to squares of 64 px -> [n, 3, 64, 64], normalised as CLIP has it."""
    x = tensor_of(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255
    if x.shape[-1] != x.shape[-2]:
        x = nn.functional.interpolate(x, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    return (x - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def contrast(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss of rows that belong together."""
    logits = scale * normalize(a, dim=-1) @ normalize(b, dim=-1).T
    own = torch.arange(len(a))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def train_encoders(run: Run) -> Encoders:
    """Train, or go on training, both encoders."""
    torch.manual_seed(0)
    encoders, pictures = Encoders(), Pictures(run.folder, TRAIN, run.pictures)
    subjects, scenes = cached_labels(run.folder, TRAIN, pictures.single_index, f"single-{TRAIN}-{run.pictures}")
    labels = tensor_of(np.concatenate([subjects[:, 0], scenes], axis=1)).long()
    captions = Captions(run.folder, TRAIN, run.pictures)
    wide = run.batch // 4

    def step(_number: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        a, b = pictures.twins(run.batch - wide, rng)
        c = rng.choice(len(pictures.pair), size=wide, replace=False)
        ids, named = captions.some(np.concatenate([pictures.single_index[a], pictures.pair_index[c]]), rng)
        pixels = torch.cat([prepare(pictures.single[a]), prepare(pictures.single[b]), prepare(pictures.pair[c])])
        pixels = pixels + 0.05 * torch.randn_like(pixels)
        with autocast():
            text = encoders.text(add_unknown_words(ids, rng))
            image = encoders.image(pixels).image_embeds
        image, words = image.float(), text.text_embeds.float()
        image_a, image_b, image_c = image.split([len(a), len(b), len(c)])
        scale = encoders.log_scale.exp().clamp(max=100)
        match = contrast(torch.cat([image_a, image_c]), words, scale)
        same = contrast(image_a, image_b, scale)
        reading = encoders.readers.text_loss(text.last_hidden_state.float(), named)
        seeing = encoders.readers.image_loss(torch.cat([image_a, image_b]), torch.cat([labels[a], labels[b]]))
        loss = match + 0.5 * same + reading + seeing
        return loss, {"match": match.item(), "same": same.item(), "reading": reading.item(), "seeing": seeing.item()}

    train(encoders, step, run, "encoders")
    return encoders
