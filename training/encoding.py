"""Pictures to latents and captions to text states, once, and kept on disk by everything that they depend on."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from .base_model import BaseModel
from .dataset import Example, load_pixels, mask_file, reframe
from .shared import PersonalizeError, read_safetensors, write_safetensors

VERSION = 2  # of how things are encoded: a change here makes old caches useless


class Cache:
    """Tensors on disk by what they depend on: another key, another file; a damaged file is made anew."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: Mapping) -> Path:
        text = json.dumps({**key, "version": VERSION}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def get(self, key: Mapping) -> dict[str, Tensor] | None:
        """What was put there, or None.

        In memory: a system maps no more than some ten thousand files at a time.
        """
        try:
            stored = read_safetensors(self.path(key))[0] if self.path(key).exists() else None
        except PersonalizeError:
            return None
        return None if stored is None else {name: value.clone() for name, value in stored.items()}

    def put(self, key: Mapping, tensors: Mapping[str, Tensor]) -> None:
        """Atomic."""
        write_safetensors(self.path(key), tensors, {})


def digest_of(module: nn.Module) -> str:
    """Of a network's weights."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Latent:
    """A picture as the VAE sees it: a normal distribution over latents, and the mask in their size."""

    mean: Tensor
    """[C, h, w], scaled as the UNet wants it."""
    deviation: Tensor | None
    """[C, h, w]; None for a VAE without (TAESD)."""
    mask: Tensor | None
    """[1, h, w], 0..1."""
    inside: Tensor | None = None
    """[1, h, w], 0 or 1: where the picture is in its frame, if not everywhere."""


def latent_key(example: Example, vae: str) -> dict:
    """Everything that a picture's latent depends on: its bytes and its mask's, size, mirroring, the VAE."""
    mask = mask_file(example.path)
    key: dict = {
        "picture": digest_of_path(example.path),
        "mask": digest_of_path(mask) if mask.is_file() else "",
        "size": example.size,
        "mirrored": example.mirrored,
        "vae": vae,
    }
    if example.framing is not None:
        key["framing"] = asdict(example.framing)
    if example.beside is not None:
        key["beside"] = latent_key(example.beside, vae)
    return key


def digest_of_path(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL | AutoencoderTiny, examples: Iterable[Example], cache: Cache, digest: str
) -> dict[Example, Latent]:
    """The latents of all examples, from the cache or by the VAE, which must be on its device; results on the CPU."""
    device, latents = next(vae.parameters()).device, dict[Example, Latent]()
    for example in examples:
        if example in latents:
            continue
        key = latent_key(example, digest)
        stored = cache.get(key)
        if stored is None:
            stored = _encode(vae, example, device)
            cache.put(key, stored)
        latents[example] = Latent(stored["mean"], stored.get("deviation"), stored.get("mask"), stored.get("inside"))
    return latents


def _encode(vae: AutoencoderKL | AutoencoderTiny, example: Example, device: torch.device) -> dict[str, Tensor]:
    pixels, mask = load_pixels(example)
    inside = None
    if example.framing is not None:
        mask = None if mask is None else reframe(mask, example.framing)[0]
        pixels, inside = reframe(pixels, example.framing)
        inside = inside if example.framing.side < 1 else None
    x = pixels[None].to(device, torch.float32)
    if isinstance(vae, AutoencoderTiny):
        stored = {"mean": vae.encoder(x)[0] * vae.config.scaling_factor}
    else:
        posterior, shift = vae.encode(x).latent_dist, vae.config.get("shift_factor") or 0.0
        scale = vae.config.scaling_factor
        stored = {"mean": (posterior.mean[0] - shift) * scale, "deviation": posterior.std[0] * scale}
    if not all(bool(value.isfinite().all()) for value in stored.values()):
        raise PersonalizeError(f"The VAE gives no finite numbers for {example.path.name}: use another --vae_path.")
    if mask is not None:
        size = stored["mean"].shape[-2:]
        stored["mask"] = nn.functional.interpolate(mask[None], size, mode="area")[0]
    if inside is not None:
        stored["inside"] = _within(inside, stored["mean"].shape[-2:])
    if example.beside is not None:
        cells = torch.ones_like(stored["mean"][:1])
        seam = round(cells.shape[2] * (1 - example.beside.size[1] / example.size[1]))
        cells[:, :, seam - 1 : seam + 1] = 0
        stored["inside"] = cells
    return {name: value.float().cpu().contiguous() for name, value in stored.items()}


def _within(inside: Tensor, size: Sequence[int]) -> Tensor:
    """The cells of a latent that lie in a picture [1, H, W] and see nothing of its border, unless those are none."""
    cells = (nn.functional.interpolate(inside[None], tuple(size), mode="area") > 0.999).float()
    inner = -nn.functional.max_pool2d(nn.functional.pad(-cells, (1, 1, 1, 1)), 3, stride=1)
    return (inner if bool(inner.any()) else cells if bool(cells.any()) else torch.ones_like(cells))[0]


@dataclass(frozen=True)
class TextStates:
    """Captions as the UNet reads them."""

    states: Tensor
    """[n, 77, width]."""
    pooled: Tensor | None
    """[n, width] for SDXL, else None."""

    def to(self, device: torch.device, dtype: torch.dtype) -> "TextStates":
        """On a device, in a precision."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return TextStates(self.states.to(device, dtype), pooled)


def stack_texts(rows: Sequence[TextStates]) -> TextStates:
    """Rows below each other."""
    pooled = [row.pooled for row in rows if row.pooled is not None]
    return TextStates(torch.cat([row.states for row in rows]), torch.cat(pooled) if pooled else None)


def guiding(positive: TextStates, negative: TextStates) -> dict[str, Tensor]:
    """Both sides of a guided batch as a diffusers pipeline is given them."""
    given = {"prompt_embeds": positive.states, "negative_prompt_embeds": negative.states}
    if positive.pooled is not None and negative.pooled is not None:
        given |= {"pooled_prompt_embeds": positive.pooled, "negative_pooled_prompt_embeds": negative.pooled}
    return given


def read_text(base: BaseModel, texts: Sequence[str], clip_skip: int = 1) -> TextStates:
    """Captions through the text encoders, with gradients where those train.

    Args:
        base: whose text encoders are on their device.
        texts: n captions; of more than 77 tokens the end is cut off.
        clip_skip: 1 is the last layer, for SDXL the last but one.
    """
    device = next(base.text_encoders[0].parameters()).device
    if base.layout != "sdxl" and clip_skip > 1:
        return TextStates(_earlier_layer(base, texts, clip_skip, device), None)
    arguments = (list(texts),) if base.layout != "sdxl" else (list(texts), None)
    result = base.pipeline.encode_prompt(
        *arguments,
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=None if clip_skip == 1 else clip_skip - 1,
    )
    return TextStates(result[0], result[2] if base.layout == "sdxl" else None)


def _earlier_layer(base: BaseModel, texts: Sequence[str], clip_skip: int, device: torch.device) -> Tensor:
    """The states before the last layers, normalised like the last ones.

    diffusers' pipeline looks for the norm where transformers has it no more (from 5.6 on).
    """
    encoder = base.text_encoders[0]
    ids = base.pipeline.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = encoder(ids.to(device), output_hidden_states=True).hidden_states[-clip_skip]
    return getattr(encoder, "text_model", encoder).final_layer_norm(states)


@torch.no_grad()
def encode_captions(
    base: BaseModel, texts: Iterable[str], cache: Cache, digest: str, clip_skip: int
) -> dict[str, TextStates]:
    """Text states of all captions, one row each, from the cache or by the text encoders; results on the CPU."""
    states: dict[str, TextStates] = {}
    for text in texts:
        if text in states:
            continue
        key = {"text": text, "encoders": digest, "clip_skip": clip_skip}
        stored = cache.get(key)
        if stored is None:
            read = read_text(base, [text], clip_skip)
            stored = {"states": read.states} | ({} if read.pooled is None else {"pooled": read.pooled})
            stored = {name: value.cpu() for name, value in stored.items()}
            cache.put(key, stored)
        states[text] = TextStates(stored["states"], stored.get("pooled"))
    return states
