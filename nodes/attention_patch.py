"""Decoupled cross-attention inside ComfyUI's UNet.

A DIFFUSION_MODEL wrapper composes `patches_replace["attn2"]` at each model call, over whatever other patches are
there by then, so that the order of nodes does not matter and nothing shared is changed. What belongs to one
sampling (which conditioning is negative, what was moved to the device) lives in a `Sampling` that a SAMPLER_SAMPLE
wrapper puts into that sampling's own options; the patch itself never changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..models.attention import decoupled_attention
from ..models.blocks import Layer, UNetLayout
from ..models.errors import PersonalizeError, plural
from ..models.ip_adapter import ImagePrompt, stack_prompts
from ..models.pictures import same_aspect
from .attention_capture import attend, below_of, unet_of, unet_parts, wrapped

KEY = "personalize_ip_adapter"
SIGMA = "personalize_sigma"


def unet_layout(model: ModelPatcher, what: str) -> tuple[UNetLayout, list[tuple[int, int]]]:
    """The cross-attention layers of a MODEL: their layout, and (C, context width) of each in file order.

    Args:
        model: a MODEL.
        what: is asked of it, for the message.

    Raises:
        PersonalizeError: the model is not a Stable Diffusion UNet.
    """
    sections: dict[str, list[tuple[int, Any]]] = {"input": [], "output": [], "middle": []}
    for name, number, module in unet_parts(unet_of(model, what)):
        if hasattr(module, "transformer_blocks"):
            sections[name].append((number, module.transformer_blocks))
    layout = UNetLayout(
        input=tuple((number, len(blocks)) for number, blocks in sections["input"]),
        output=tuple((number, len(blocks)) for number, blocks in sections["output"]),
        middle=sum(len(blocks) for _, blocks in sections["middle"]),
    )
    layers = [block.attn2.to_k for section in sections.values() for _, blocks in section for block in blocks]
    return layout, [(layer.out_features, layer.in_features) for layer in layers]


@dataclass
class Sampling:
    """What is known during one run of a sampler, and what may be kept until it ends."""

    negative: Mapping[UUID, bool] = field(default_factory=dict)
    """Whether a conditioning belongs to the negative prompt; those that stand on both sides are left out."""
    areas: Mapping[UUID, tuple[int, ...]] = field(default_factory=dict)
    """Conditionings of a part of the picture: (height, width, top, left) in latent cells."""
    latent: tuple[int, int] | None = None
    """Height and width of the whole latent."""
    cache: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, guider: Any, noise: Tensor) -> "Sampling":
        sides: dict[UUID, set[bool]] = {}
        areas = {}
        for name, conds in guider.conds.items():
            for cond in conds or ():
                if "uuid" in cond:
                    sides.setdefault(cond["uuid"], set()).add("negative" in name)
                    if isinstance(cond.get("area"), tuple) and len(cond["area"]) == 4:
                        areas[cond["uuid"]] = cond["area"]
        negative = {uuid: side.pop() for uuid, side in sides.items() if len(side) == 1}
        height, width = noise.shape[-2:]
        return cls(negative, areas, (height, width))


@dataclass(frozen=True)
class DecoupledAttentionPatch:
    """One adapter applied to one set of references."""

    positive: ImagePrompt
    negative: ImagePrompt
    layout: UNetLayout
    weights: Mapping[Layer, float]
    """lambda of every layer that takes part."""
    sigma_start: float
    sigma_end: float
    mask: Tensor | None
    """[M, H, W]: where in the picture the references act; one for all pictures, or one for each."""

    def apply_to(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of the model with this patch."""
        return wrapped(model, KEY, self.around_sampler, self.around_unet)

    def around_sampler(self, executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
        """Begin a sampling: look at its conditionings and check the mask against its size."""
        options = extra_args["model_options"].setdefault("transformer_options", {})
        if KEY not in options:
            options[KEY] = Sampling.of(guider, noise)
        self._check_mask(noise)
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)

    def _check_mask(self, noise: Tensor) -> None:
        if self.mask is None:
            return
        count, height, width = self.mask.shape
        pictures, (rows, columns) = noise.shape[0], noise.shape[-2:]
        if count not in (1, pictures):
            raise PersonalizeError(
                f"Apply IP-Adapter has {count} masks for a batch of {plural(pictures, 'picture')}: give one mask, or "
                f"one for each."
            )
        if not same_aspect(rows, columns, height, width):
            raise PersonalizeError(
                f"The mask of Apply IP-Adapter is {width}x{height} but the picture is {columns * 8}x{rows * 8}: make the "
                "mask with the picture's aspect."
            )

    def around_unet(
        self, executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs
    ):
        """One model call: compose our image branch over the attention patches that are there."""
        options = dict(transformer_options or {})
        if self._active(options):
            options["patches_replace"] = self._compose(options, x)
        return executor(x, timesteps, context, y, control, options, **kwargs)

    def _active(self, options: dict[str, Any]) -> bool:
        sigmas = options.get("sigmas")
        if sigmas is None or (self.sigma_start == float("inf") and self.sigma_end == 0.0):
            return True
        if SIGMA not in options:  # the one device synchronisation of a model call, shared by stacked adapters
            options[SIGMA] = float(sigmas[0])
        return self.sigma_end < options[SIGMA] <= self.sigma_start

    def _compose(self, options: Mapping[str, Any], x: Tensor) -> dict[str, Any]:
        sampling: Sampling = options.get(KEY) or Sampling()
        uuids = tuple(options.get("uuids", ()))
        sides = self._sides(sampling, uuids, options.get("cond_or_uncond", [0]))
        tensors = self._on_device(sampling, sides, x)
        masks = None if self.mask is None else _Masks(self.mask, sampling, uuids, x, len(sides))
        replace = dict(options.get("patches_replace", {}))
        attn2 = dict(replace.get("attn2", {}))
        for layer, weight in self.weights.items():
            attn2[tuple(layer)] = _LayerPatch(below_of(attn2, layer), *tensors[layer], weight, masks)
        replace["attn2"] = attn2
        return replace

    @staticmethod
    def _sides(sampling: Sampling, uuids: tuple[UUID, ...], indices: list[int]) -> tuple[bool, ...]:
        """For each conditioning in the batch, whether it is negative."""
        if len(uuids) != len(indices):
            return tuple(index == 1 for index in indices)
        return tuple(sampling.negative.get(uuid, index == 1) for uuid, index in zip(uuids, indices, strict=True))

    def _on_device(
        self, sampling: Sampling, sides: tuple[bool, ...], x: Tensor
    ) -> dict[Layer, tuple[Tensor, Tensor, Tensor | None]]:
        """K', V' and bias of every layer for this arrangement of conditionings; moved once a sampling."""
        key = (id(self), sides, x.device, x.dtype)
        if key not in sampling.cache:
            prompts = [self.negative if negative else self.positive for negative in sides]
            moved = {}
            # Kept for the whole sampling, so not inference tensors: a later call may need gradients.
            with torch.inference_mode(False), torch.no_grad():
                for index, layer in enumerate(self.layout.file_order()):
                    if layer in self.weights:
                        k, v, bias = stack_prompts(prompts, index)
                        bias = None if bias is None else bias.to(x.device, x.dtype)
                        moved[layer] = (k.to(x.device, x.dtype), v.to(x.device, x.dtype), bias)
            sampling.cache[key] = moved
        return sampling.cache[key]


@dataclass(frozen=True)
class _LayerPatch:
    """The attn2 replacement of one layer: what was there before, plus the image branch."""

    below: Any
    key: Tensor
    value: Tensor
    bias: Tensor | None
    weight: float
    masks: "_Masks | None"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        heads = extra_options["n_heads"]
        text = attend(self.below, q, k, v, extra_options)
        mask = None if self.masks is None else self.masks.at(*extra_options["activations_shape"][-2:])
        return decoupled_attention(
            text,
            q,
            self.key.to(q.dtype),
            self.value.to(q.dtype),
            heads=heads,
            weight=self.weight,
            bias=self.bias,
            mask=mask,
        )


class _Masks:
    """A mask at the resolutions of the UNet's layers, made once for each."""

    def __init__(self, mask: Tensor, sampling: Sampling, uuids: tuple[UUID, ...], x: Tensor, chunks: int):
        self.pictures, self.shape = x.shape[0] // chunks, tuple(x.shape[-2:])
        self.sampling, self.dtype = sampling, x.dtype
        self.areas = tuple(sampling.areas.get(uuid) for uuid in uuids) or (None,) * chunks
        if mask.shape[0] not in (1, self.pictures):
            raise PersonalizeError(
                f"Apply IP-Adapter has {mask.shape[0]} masks, but the sampler makes "
                f"{plural(self.pictures, 'picture')} at a time "
                "(context windows do that): give one mask for all."
            )
        key = (id(mask), x.device)
        if key not in sampling.cache:
            with torch.inference_mode(False):
                sampling.cache[key] = mask.clone().to(x.device)
        self.mask = sampling.cache[key]

    def at(self, rows: int, columns: int) -> Tensor:
        """[chunks * pictures, rows * columns, 1]."""
        key = (id(self.mask), self.areas, self.pictures, self.shape, rows, columns, self.dtype)
        if key not in self.sampling.cache:
            with torch.inference_mode(False), torch.no_grad():
                parts = [self._resized(area, rows, columns) for area in self.areas]
                self.sampling.cache[key] = torch.cat(parts).flatten(1)[..., None].to(self.dtype)
        return self.sampling.cache[key]

    def _resized(self, area: tuple[int, ...] | None, rows: int, columns: int) -> Tensor:
        mask = self.mask[:, None].float()
        whole = self.sampling.latent
        if area is not None and whole is not None and self.shape != whole:
            height, width, top, left = area
            mask = F.interpolate(mask, whole, mode="bilinear", antialias=True)
            mask = mask[..., top : top + height, left : left + width]
        mask = F.interpolate(mask, (rows, columns), mode="bilinear", antialias=True)
        return mask[:, 0].expand(self.pictures, -1, -1)
