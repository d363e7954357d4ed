"""Decoupled cross-attention in a diffusers UNet2DConditionModel, with the equations of models/."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor

from .shared import ImagePrompt, decoupled_attention, stack_prompts


class DecoupledAttentionProcessor:
    """Attention(Q, K, V) + lambda Attention(Q, K', V') for one cross-attention layer.

    Args:
        key, value: [G, T, C], one row for each side of a guided batch ([negative, positive] has G = 2).
        bias: [G, T] or None.
        weight: lambda.
    """

    def __init__(self, key: Tensor, value: Tensor, bias: Tensor | None, weight: float):
        self.key, self.value, self.bias, self.weight = key, value, bias, weight

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """[B, N, C] -> [B, N, C]; the UNet calls it with the layer it replaces the attention of."""
        if encoder_hidden_states is None:
            raise ValueError("decoupled attention stands in cross-attention layers, which need text features")
        query = attn.to_q(hidden_states)
        q, k, v = (
            rearrange(x, "b n (h d) -> b h n d", h=attn.heads)
            for x in (query, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(
                attention_mask, encoder_hidden_states.shape[1], hidden_states.shape[0], out_dim=4
            )
        text = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        out = decoupled_attention(
            rearrange(text, "b h n d -> b n (h d)"),
            query,
            self.key.to(query),
            self.value.to(query),
            heads=attn.heads,
            weight=self.weight,
            bias=None if self.bias is None else self.bias.to(query),
        )
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def apply_image_prompts(unet: UNet2DConditionModel, prompts: Sequence[ImagePrompt], weight: float) -> Mapping:
    """Give every cross-attention layer its K' and V'.

    Args:
        unet: its batches must be as many equal parts as there are prompts.
        prompts: one for each part, [negative, positive] for a guided pipeline.
        weight: lambda.

    Returns:
        The processors that were there, for `unet.set_attn_processor` to put back.
    """
    before = dict(unet.attn_processors)
    # diffusers lists the processors in the order of the IP-Adapter files, self- and cross-attention in turn.
    cross = [name for name in before if name.endswith("attn2.processor")]
    if len(cross) != len(prompts[0].keys):
        raise ValueError(f"the UNet has {len(cross)} cross-attention layers, the adapter {len(prompts[0].keys)}")
    with torch.no_grad():
        ours = {
            name: DecoupledAttentionProcessor(*stack_prompts(prompts, index), weight)
            for index, name in enumerate(cross)
        }
    unet.set_attn_processor(before | ours)
    return before
