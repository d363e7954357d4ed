"""Attend-and-Excite (Chefer et al. 2023, arXiv:2301.13826): every chosen word gets some place in the picture.

Before a step, the latent is moved so that the most neglected word is attended to more:

    A = mean over heads and layers of softmax(Q K^T / sqrt d)     the maps of one resolution, [h, w, T]
    P = softmax(100 A) over the tokens, without those that begin and end the text, and without sinks
    m_k = max over the places of smooth(P_k),  L = max over the words k of max(0, 1 - m_k)
    z <- z - alpha_i grad_z L,                 alpha_i = 20 sqrt(linspace(1, .5, steps)_i)

At some steps this is repeated until L is small enough. z is in the coordinates of the variance-preserving process.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .errors import PersonalizeError

WINDOW = 77
"""Tokens of one text window: longer prompts are several windows, each with a token that begins it and one that ends it."""
SHARPNESS = 100.0
"""Of the softmax over the words, as in the paper's code."""

QUARTER = 2
"""So many halvings make a quarter."""

Words = Sequence[Sequence[int]]
"""For each excited word or phrase the places of its tokens in the text, those that begin and end the text counted."""


@dataclass(frozen=True)
class Excitement:
    """The paper's settings."""

    steps: int = 25
    """The first so many steps move the latent."""
    thresholds: Mapping[int, float] = field(default_factory=lambda: {0: 0.05, 10: 0.5, 20: 0.8})
    """At these steps every word's m_k must reach the value, if `refinements` moves are enough for it."""
    scale: float = 20.0
    """alpha of the first step."""
    refinements: int = 20
    sigma: float = 0.5
    """Of the smoothing, in cells; 0 does not smooth."""
    sink: float = 0.2
    """A token that gets more than this share of the attention in the mean over the whole picture holds what no word
    wants, as the token that begins the text does: no word could stand out beside it. Stable Diffusion has none, and the
    paper leaves none out; the pocket model's is the first article. 1 leaves none out."""

    def acts_at(self, step: int) -> bool:
        """Whether the latent may be moved before a step."""
        return step < self.steps or step in self.thresholds


def parse_thresholds(text: str) -> dict[int, float]:
    """`0:0.05, 10:0.5` -> {0: 0.05, 10: 0.5}: m_k that every word must reach at a step. Empty: none.

    Raises:
        PersonalizeError: something else is there.
    """
    found = {}
    for item in text.replace(";", ",").split(","):
        if not item.strip():
            continue
        step, _, value = item.partition(":")
        try:
            number, reached = int(step), float(value)
        except ValueError:
            number, reached = -1, 0.0
        if number < 0 or not 0 <= reached <= 1:
            raise PersonalizeError(
                f'"{item.strip()}" in the thresholds is not a step and a value from 0 to 1: write for example '
                '"0:0.05, 10:0.5, 20:0.8".'
            )
        found[number] = reached
    return found


def cross_attention_maps(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt d) in fp32: [B, N, C], [B, T, C] -> [B, heads, N, T]."""
    q = rearrange(query.float(), "b n (h d) -> b h n d", h=heads)
    k = rearrange(key.float(), "b t (h d) -> b h t d", h=heads)
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def map_size(height: int, width: int, level: int) -> tuple[int, int]:
    """Rows and columns of the maps after so many halvings of a latent, which round up."""
    return -(-height // 2**level), -(-width // 2**level)


def pick_level(there: Collection[int], wanted: int | None = None) -> int:
    """How often the latent is halved where the maps are taken: as wanted, or so that they are a quarter of its sides, as
    16 x 16 maps are at 512 pixels; where a small UNet has no such maps, its finest.

    Args:
        there: of all cross-attention layers.
        wanted: None for what suits.

    Raises:
        PersonalizeError: the UNet has no such layer.
    """
    if wanted is None:
        return QUARTER if QUARTER in there else min(there)
    if wanted not in there:
        sizes = ", ".join(f"1/{2**level}" for level in sorted(there))
        raise PersonalizeError(f"This model has no attention maps of 1/{2**wanted} of the latent, but of {sizes}.")
    return wanted


def mean_map(maps: Sequence[Tensor], height: int, width: int) -> Tensor:
    """A: the mean of the maps [B, heads, height width, T] of all heads and layers, [B, height, width, T]."""
    return rearrange(torch.cat(list(maps), dim=1).mean(1), "b (h w) t -> b h w t", h=height, w=width)


def smoothing_kernel(sigma: float) -> Tensor:
    """[3, 3]: exp(-(x / 2 sigma)^2) in each direction, as in the paper's code (a Gaussian has 2 sigma^2), sum 1."""
    row = torch.exp(-((torch.arange(3) - 1.0) / (2 * sigma)).square())
    kernel = row[:, None] * row[None]
    return kernel / kernel.sum()


def smooth(pictures: Tensor, sigma: float) -> Tensor:
    """[..., h, w], mirrored at the border."""
    if sigma == 0:
        return pictures
    flat = pictures.reshape(-1, 1, *pictures.shape[-2:])
    # a single row or column has nothing to mirror
    padded = F.pad(flat, (1, 1, 1, 1), mode="reflect" if min(pictures.shape[-2:]) > 1 else "replicate")
    return F.conv2d(padded, smoothing_kernel(sigma).to(flat)[None, None]).reshape(pictures.shape)


def text_tokens(count: int) -> list[int]:
    """Which of so many tokens are neither the first nor the last of their window."""
    return [i for i in range(count) if i % WINDOW not in (0, min(WINDOW, count - i // WINDOW * WINDOW) - 1)]


def excitement(attention: Tensor, words: Words, sigma: float, sink: float = 1.0) -> Tensor:
    """m_k of each word: [1, h, w, T] -> [1, K], from 0 to 1; several pictures share their sinks.

    Where a word or phrase has several tokens, P_k is their mean.
    """
    chosen = {token for word in words for token in word}
    shares = attention.detach().mean((0, 1, 2)).tolist()
    inner = [i for i in text_tokens(len(shares)) if shares[i] <= sink or i in chosen]
    places = {token: i for i, token in enumerate(inner)}
    chances = (SHARPNESS * attention[..., inner]).softmax(-1)
    rows = [chances[..., [places[token] for token in word]].mean(-1) for word in words]
    return smooth(torch.stack(rows, dim=1), sigma).flatten(2).amax(2)


def loss_of(excited: Tensor) -> Tensor:
    """L of each picture: [B, K] -> [B]."""
    return (1 - excited).clamp(min=0).amax(1)


def step_size(step: int, steps: int, scale: float) -> float:
    """alpha_i of step i of so many."""
    share = 1.0 if steps == 1 else 1 - 0.5 * step / (steps - 1)
    return scale * math.sqrt(share)


@dataclass(frozen=True)
class Excited:
    """What happened before one step."""

    latent: Tensor
    refined: tuple[int, ...]
    """How often each picture was refined."""


def excite(
    latent: Tensor,
    step: int,
    alpha: float,
    maps_of: Callable[[Tensor, Sequence[int]], Tensor],
    words: Sequence[Words],
    settings: Excitement,
) -> Excited:
    """Move a batch of latents before a step, each picture by its own loss.

    Args:
        latent: z, [B, C, H, W]; needs no gradient.
        step: i.
        alpha: alpha_i.
        maps_of: A [n, h, w, T] of latents that need gradients, and of which pictures of the batch they are.
        words: what to excite in each picture; nothing leaves it alone.
        settings: how.

    Returns:
        The moved latents; the others are as they were, bit for bit.
    """
    todo = [i for i, own in enumerate(words) if own]
    moved, refined = latent.clone(), [0] * len(words)
    if not todo or not settings.acts_at(step):
        return Excited(moved, tuple(refined))

    def look(pictures: Sequence[int]) -> tuple[Tensor, Tensor]:
        """L of some pictures, and z - alpha grad L."""
        with torch.enable_grad():
            z = moved[list(pictures)].detach().requires_grad_(True)
            seen = zip(maps_of(z, pictures).split(1), pictures, strict=True)
            loss = torch.cat([loss_of(excitement(maps, words[i], settings.sigma, settings.sink)) for maps, i in seen])
            (gradient,) = torch.autograd.grad(loss.sum(), z)
        return loss.detach(), z.detach() - alpha * gradient

    loss, further = look(todo)
    losses, next_one = dict(zip(todo, loss.tolist(), strict=True)), dict(zip(todo, further, strict=True))
    threshold = settings.thresholds.get(step)
    if threshold is not None:
        # Whether to go on is asked of the loss from before the move, as in the paper's code: a picture is moved once more
        # after its loss has become small enough.
        target = max(0.0, 1 - threshold)
        rest = [i for i in todo if losses[i] > target]
        while rest:
            before = dict(losses)
            for i in rest:
                moved[i] = next_one[i]
                refined[i] += 1
            loss, further = look(rest)
            for i, value, z in zip(rest, loss.tolist(), further, strict=True):
                losses[i], next_one[i] = value, z
            rest = [i for i in rest if before[i] > target and refined[i] < settings.refinements]
    if step < settings.steps:
        for i in todo:
            if losses[i] != 0:
                moved[i] = next_one[i]
    return Excited(moved, tuple(refined))
