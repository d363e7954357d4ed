"""Decoupled cross-attention (IP-Adapter, Ye et al. 2023, arXiv:2308.06721, equation 5).

Q = Z W_q, K = c_t W_k, V = c_t W_v, K' = c_i W'_k, V' = c_i W'_v
Z_new = Attention(Q, K, V) + lambda Attention(Q, K', V')
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def image_attention(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Attention(Q, K', V') for G groups of pictures that each share one set of image tokens.

    Args:
        query: [B, N, C], the UNet's queries. B is G times the pictures a group, group by group, as a
            guided batch is laid out ([negative pictures, positive pictures] has G = 2).
        key, value: [G, T, C].
        heads: attention heads; C is heads times the head's width.
        bias: [G, T], added to the logits: log w for a token of weight w, -inf for padding.

    Returns:
        [B, N, C], before the output projection.
    """
    groups = key.shape[0]
    if query.shape[0] % groups:
        raise ValueError(f"a batch of {query.shape[0]} does not divide into {groups} groups")
    # The pictures of a group see the same tokens, so they can stand in one long row of queries: nothing is repeated.
    q = rearrange(query, "(g b) n (h d) -> g h (b n) d", g=groups, h=heads)
    k = rearrange(key, "g t (h d) -> g h t d", h=heads)
    v = rearrange(value, "g t (h d) -> g h t d", h=heads)
    mask = None if bias is None else bias[:, None, None, :].to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(out, "g h (b n) d -> (g b) n (h d)", n=query.shape[1])


def decoupled_attention(
    text: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    weight: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Z_new = Attention(Q, K, V) + lambda Attention(Q, K', V').

    Args:
        text: [B, N, C], Attention(Q, K, V), the text branch.
        query, key, value, heads, bias: see `image_attention`.
        weight: lambda, the decoupled cross-attention weight.
        mask: [B, N, 1] or broadcastable, 0..1: where in the picture the image branch acts.
    """
    image = image_attention(query, key, value, heads, bias)
    if mask is not None:
        image = image * mask.to(image.dtype)
    return torch.add(text, image, alpha=weight)
