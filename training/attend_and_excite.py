"""Attend-and-Excite in a diffusers pipeline: `before_first` moves the noise, `callback` the latents before each other step.

A look at the maps runs the UNet for the prompt alone, and only as far as the last layer whose maps are needed.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from .shared import (
    Excitement,
    cross_attention_maps,
    excite,
    map_size,
    mean_map,
    pick_level,
    step_size,
)


class _Enough(Exception):  # noqa: N818 - nothing is wrong
    """All maps are there."""


class _Capturing:
    """An attention processor that keeps its maps, and does what the one before did."""

    def __init__(self, before: Callable, maps: list[Tensor], last: bool):
        self.before, self.maps, self.last = before, maps, last

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is None:
            raise ValueError("the maps are those of cross-attention, which needs text features")
        self.maps.append(cross_attention_maps(attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.heads))
        if self.last:
            raise _Enough
        return self.before(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def levels_of(unet: UNet2DConditionModel) -> dict[str, int]:
    """How often the latent was halved before each cross-attention layer, by its processor, in the order they run."""
    deepest = len(unet.config.down_block_types) - 1
    order: dict[str, list[str]] = {"down_blocks": [], "mid_block": [], "up_blocks": []}
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            order[name.split(".")[0]].append(name)

    def level(name: str) -> int:
        section, number = name.split(".")[:2]
        if section == "mid_block":
            return deepest
        return int(number) if section == "down_blocks" else deepest - int(number)

    return {name: level(name) for names in order.values() for name in names}


@contextmanager
def _captured(unet: UNet2DConditionModel, layers: Sequence[str], maps: list[Tensor]):
    """A block in which the UNet runs as far as the last of some layers, and leaves their maps."""
    before = dict(unet.attn_processors)
    ours = {name: _Capturing(before[name], maps, name == layers[-1]) for name in layers}
    unet.set_attn_processor(before | ours)
    try:
        yield
    except _Enough:
        pass
    finally:
        unet.set_attn_processor(before)


class AttendAndExcite:
    """Moves the latents of one batch."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: Any,
        texts: Tensor,
        words: Sequence[Sequence[Sequence[int]]],
        settings: Excitement,
        *,
        added: dict[str, Tensor] | None = None,
        level: int | None = None,
        showing: Callable[[Sequence[int]], AbstractContextManager] = lambda _: nullcontext(),
    ):
        """Args:
        unet: any Stable Diffusion's.
        scheduler: the pipeline's, which has its timesteps.
        texts: the text features of each picture, [B, T, C].
        words: of each picture, the places of the tokens of each word or phrase.
        settings: how.
        added: what SDXL is told beside, a row for each picture.
        level: the maps of which halving of the latent; by default a quarter of it, or the finest that the UNet has.
        showing: a block in which the UNet sees the references of some pictures of the batch.
        """
        self.unet, self.scheduler, self.texts, self.words, self.settings = unet, scheduler, texts, words, settings
        self.added, self.showing = added or {}, showing
        levels = levels_of(unet)
        self.level = pick_level(set(levels.values()), level)
        self.layers = [name for name, own in levels.items() if own == self.level]
        self.refined: list[tuple[int, ...]] = []
        """How often each picture was refined, by step."""

    def before_first(self, latents: Tensor) -> Tensor:
        """The latents for the first step, as the scheduler has them."""
        return self._moved(latents, 0)

    def callback(self, _pipeline: Any, step: int, _timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """For `callback_on_step_end`: moves what the next step starts from."""
        following = step + 1
        if following >= len(self.scheduler.timesteps):
            return values
        return {**values, "latents": self._moved(values["latents"], following)}

    def _moved(self, latents: Tensor, step: int) -> Tensor:
        if not any(self.words) or not self.settings.acts_at(step):
            return latents
        timestep = self.scheduler.timesteps[step]
        z = self.scheduler.scale_model_input(latents, timestep)  # in the variance-preserving process's coordinates
        alpha = step_size(step, len(self.scheduler.timesteps), self.settings.scale)

        def maps_of(some: Tensor, pictures: Sequence[int]) -> Tensor:
            return self._maps(some, timestep, list(pictures))

        done = excite(z, step, alpha, maps_of, self.words, self.settings)
        self.refined.append(done.refined)
        if torch.equal(z, latents):
            return done.latent
        factor = (latents * z).sum() / z.square().sum()  # the scheduler divides by a number
        return latents + (done.latent - z) * factor

    def _maps(self, z: Tensor, timestep: Tensor, pictures: list[int]) -> Tensor:
        maps: list[Tensor] = []
        with self.showing(pictures), _captured(self.unet, self.layers, maps):
            added = {name: value[pictures] for name, value in self.added.items()}
            self.unet(z, timestep, encoder_hidden_states=self.texts[pictures], added_cond_kwargs=added)
        height, width = map_size(z.shape[-2], z.shape[-1], self.level)
        return mean_map(maps, height, width)
