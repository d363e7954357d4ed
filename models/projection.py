"""Image projections of the published IP-Adapters: from the image encoder's features to cross-attention tokens.

Parameter names are those of the official files (tencent-ailab/IP-Adapter), so that a file's tensors load as they
are. Every class builds itself from the shapes in a state dict; build under `torch.device("meta")` and load with
`assign=True`, and nothing is initialised at random only to be overwritten.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

HEAD_WIDTH = 64
"""Of each head of a perceiver's attention, in all published files."""


class LinearProjection(nn.Module):
    """Linear and LayerNorm: one pooled vector becomes a few tokens (base, light, ViT-G)."""

    def __init__(self, width: int, cross_width: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(width, tokens * cross_width)
        self.norm = nn.LayerNorm(cross_width)

    @classmethod
    def from_shapes(cls, state: Mapping[str, Tensor]) -> "LinearProjection":
        out, width = state["proj.weight"].shape
        cross = state["norm.weight"].shape[0]
        return cls(width, cross, out // cross)

    def forward(self, features: Tensor) -> Tensor:
        """[n, 1, width] -> [n, tokens, cross_width]."""
        tokens = rearrange(self.proj(features), "n 1 (t c) -> n t c", t=self.tokens)
        return self.norm(tokens)


class FullFaceProjection(nn.Module):
    """An MLP on every patch token (Full-Face): T tokens in, T tokens out."""

    def __init__(self, width: int, cross_width: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, cross_width), nn.LayerNorm(cross_width)
        )

    @classmethod
    def from_shapes(cls, state: Mapping[str, Tensor]) -> "FullFaceProjection":
        return cls(state["proj.0.weight"].shape[1], state["proj.2.weight"].shape[0])

    def forward(self, features: Tensor) -> Tensor:
        """[n, T, width] -> [n, T, cross_width]."""
        return self.proj(features)


class PerceiverAttention(nn.Module):
    """Latents attend to the features and to themselves (Flamingo, Alayrac et al. 2022)."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.heads = inner // HEAD_WIDTH
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """[n, T, dim], [n, L, dim] -> [n, L, dim]."""
        features, latents = self.norm1(features), self.norm2(latents)
        key, value = self.to_kv(torch.cat((features, latents), dim=1)).chunk(2, dim=-1)
        q, k, v = (rearrange(x, "n t (h d) -> n h t d", h=self.heads) for x in (self.to_q(latents), key, value))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(out, "n h t d -> n t (h d)"))


class Resampler(nn.Module):
    """A perceiver that turns any number of patch tokens into a fixed number of tokens (Plus, Plus-Face)."""

    def __init__(self, width: int, dim: int, cross_width: int, tokens: int, depth: int, inner: int, ff_inner: int):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, tokens, dim))
        self.proj_in = nn.Linear(width, dim)
        self.proj_out = nn.Linear(dim, cross_width)
        self.norm_out = nn.LayerNorm(cross_width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim, inner),
                    nn.Sequential(
                        nn.LayerNorm(dim),
                        nn.Linear(dim, ff_inner, bias=False),
                        nn.GELU(),
                        nn.Linear(ff_inner, dim, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )

    @classmethod
    def from_shapes(cls, state: Mapping[str, Tensor]) -> "Resampler":
        dim, width = state["proj_in.weight"].shape
        return cls(
            width=width,
            dim=dim,
            cross_width=state["proj_out.weight"].shape[0],
            tokens=state["latents"].shape[1],
            depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers.")),
            inner=state["layers.0.0.to_q.weight"].shape[0],
            ff_inner=state["layers.0.1.1.weight"].shape[0],
        )

    def forward(self, features: Tensor) -> Tensor:
        """[n, T, width] -> [n, tokens, cross_width]."""
        features = self.proj_in(features)
        latents = self.latents.to(features.dtype).expand(features.shape[0], -1, -1)
        for layer in self.layers:
            attention, feed_forward = layer.children()
            latents = attention(features, latents) + latents
            latents = feed_forward(latents) + latents
        return self.norm_out(self.proj_out(latents))
