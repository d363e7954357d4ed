"""c_i = G(features of n references): how several reference pictures become one image condition.

Every aggregation takes features [n, T, C] with a weight per reference and gives features [m, T, C] with a weight per
remaining row, so the same function serves before and after the image projection. Three need no training; the fourth,
self-attention over the references, is trained by leave-one-out (`training.ip_adapter`).

A weight w means "as if this reference were given w times": in the average it counts w times; concatenated, its
tokens' logits get + log w; the maximum of a set does not change when an element is repeated, so there a weight
only decides whether the reference takes part (0 leaves it out, everywhere).
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .errors import PersonalizeError

Aggregation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def concatenate(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """All references side by side: attention chooses among n T tokens."""
    return features, weights


def mean_of(features: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i f_i / sum_i w_i of B sets, summed in float64 so that the order of the references does not show.

    Args:
        features: [B, n, T, C].
        weights: [B, n].

    Returns:
        [B, T, C].
    """
    where = "cpu" if features.device.type == "mps" else features.device  # which has no float64
    f, w = features.to(where, torch.float64), weights.to(where, torch.float64)
    mean = torch.einsum("bn,bntc->btc", w, f) / w.sum(1)[:, None, None]
    return mean.to(features.device, features.dtype)


def average(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i w_i f_i / sum_i w_i."""
    return mean_of(features[None], weights[None]), weights.new_ones(1)


def maximum(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """max_i f_i, element by element."""
    return features.amax(dim=0, keepdim=True), weights.new_ones(1)


SELF_ATTENTION = "self-attention"
AGGREGATIONS: dict[str, Aggregation] = {"concatenate": concatenate, "average": average, "max": maximum}


def select_references(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the references of weight 0 and check the rest.

    Args:
        features: [n, T, C].
        weights: [n], 0 or more.

    Raises:
        PersonalizeError: no references, a negative or non-finite weight, or all weights 0.
    """
    if features.shape[0] == 0:
        raise PersonalizeError("There are no references: give at least one picture.")
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        shown = ", ".join(f"{w:g}" for w in weights.tolist())
        raise PersonalizeError(f"Reference weights must be 0 or more, but they are {shown}.")
    keep = weights > 0
    if not bool(keep.any()):
        which = "The reference weight is" if len(weights) == 1 else f"All {len(weights)} reference weights are"
        raise PersonalizeError(f"{which} 0: give at least one a weight above 0.")
    return features[keep], weights[keep]


def log_weights(weights: Tensor, tokens: int) -> Tensor | None:
    """Attention bias of m concatenated rows of `tokens` tokens: log w, [m * tokens]; None where all w are equal."""
    if bool((weights == weights[0]).all()):
        return None
    return weights.log().repeat_interleave(tokens)


class AttentionBlock(nn.Module):
    """MAB(X, Y) of the Set Transformer (Lee et al. 2019, arXiv:1810.00825, eq. 6), normalised first."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_query, self.norm_key = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.norm_ff = nn.LayerNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return rearrange(x, "b t (h d) -> b h t d", h=heads)

    def forward(self, x: Tensor, y: Tensor, heads: int, bias: Tensor) -> Tensor:
        """x [B, Q, width], y [B, K, width], bias [B, K] on the logits -> [B, Q, width]."""
        seen = self.norm_key(y)
        q = self._heads(self.to_q(self.norm_query(x)), heads)
        k, v = self._heads(self.to_k(seen), heads), self._heads(self.to_v(seen), heads)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None].to(q.dtype))
        x = x + self.to_out(rearrange(out, "b h t d -> b t (h d)"))
        return x + self.ff(self.norm_ff(x))

    def attention(self, x: Tensor, y: Tensor, heads: int, bias: Tensor) -> Tensor:
        """The weights of `forward`'s attention, [B, heads, Q, K]."""
        q = self._heads(self.to_q(self.norm_query(x)), heads)
        k = self._heads(self.to_k(self.norm_key(y)), heads)
        return (q @ k.mT / q.shape[-1] ** 0.5 + bias[:, None, None]).softmax(-1)


class SelfAttentionAggregator(nn.Module):
    """G(f_1, ..., f_n) = mean + gate * PMA(SAB(... SAB(f))): what the references agree on, and what each alone shows.

    All tokens of all references attend to each other (SAB), then the mean's tokens attend to them (PMA with the mean as
    its seed; Lee et al. 2019, arXiv:1810.00825). No positions, so the order of the references means nothing. The gate, one
    number a channel, starts at zero: until it is trained, this is average pooling, with any published adapter. A weight w
    adds log w to a reference's logits, so that w = 2 equals giving it twice, and w = 0 is padding.
    """

    def __init__(self, width: int, inner: int, heads: int, depth: int):
        """Args:
        width: C, of the features.
        inner: of the attention; a multiple of `heads`.
        heads: attention heads.
        depth: self-attention blocks before the pooling.

        Raises:
            ValueError: `inner` is no multiple of `heads`.
        """
        super().__init__()
        if inner % heads:
            raise ValueError(f"a width of {inner} does not divide into {heads} heads")
        self.norm, self.proj_in = nn.LayerNorm(width), nn.Linear(width, inner)
        self.blocks = nn.ModuleList(AttentionBlock(inner) for _ in range(depth))
        self.pool = AttentionBlock(inner)
        self.norm_out, self.proj_out = nn.LayerNorm(inner), nn.Linear(inner, width)
        self.gate = nn.Parameter(torch.zeros(width))
        self.register_buffer("heads", torch.tensor(heads))
        self.head_count = heads

    @classmethod
    def from_tensors(cls, state: Mapping[str, Tensor]) -> "SelfAttentionAggregator":
        """From the tensors of a file, without copying them.

        Raises:
            LookupError, RuntimeError, ValueError: they are not whole or do not fit together.
        """
        heads, (inner, width) = int(state["heads"]), state["proj_in.weight"].shape
        if heads < 1 or not all(bool(value.isfinite().all()) for value in state.values()):
            raise ValueError(f"{heads} heads, or weights that are no numbers")
        depth = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=-1)
        with torch.device("meta"):
            made = cls(width, inner, heads, depth)
        made.load_state_dict(dict(state), assign=True)
        return made.requires_grad_(False)

    def forward(self, features: Tensor, weights: Tensor) -> Tensor:
        """B sets at once: [B, n, T, C], [B, n] (0 is padding, whatever stands there) -> [B, T, C]."""
        features = torch.where((weights > 0)[:, :, None, None], features, 0)
        mean = mean_of(features, weights)
        seeds, elements, bias = self._prepared(features, weights, mean)
        pooled = self.pool(seeds, elements, self.head_count, bias)
        return mean + self.gate * self.proj_out(self.norm_out(pooled))

    def aggregate(self, features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """As an Aggregation: one set, [n, T, C] and [n] -> [1, T, C] and [1]; in the precision of the features."""
        return self(features[None], weights[None]), weights.new_ones(1)

    @torch.no_grad()
    def attended(self, features: Tensor, weights: Tensor) -> Tensor:
        """How much each head of the pooling looks at each reference, mean over the tokens: [n, T, C], [n] -> [heads, n].

        A head's row sums to 1.
        """
        n = features.shape[0]
        features, weights = features[None], weights[None]
        seeds, elements, bias = self._prepared(features, weights, mean_of(features, weights))
        shares = self.pool.attention(seeds, elements, self.head_count, bias)[0]
        return rearrange(shares, "h q (n t) -> h q n t", n=n).sum(3).mean(1)

    def _prepared(self, features: Tensor, weights: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Seeds [B, T, inner], elements [B, n T, inner], bias [B, n T]."""
        bias = weights.to(features.dtype).log().repeat_interleave(features.shape[2], dim=1)
        elements = self.proj_in(self.norm(rearrange(features, "b n t c -> b (n t) c")))
        for block in self.blocks:
            elements = block(elements, elements, self.head_count, bias)
        return self.proj_in(self.norm(mean)), elements, bias
