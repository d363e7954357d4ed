"""An IP-Adapter that trains: the projection, W'_k and W'_v, and the self-attention over the references."""

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn

from .diffusers_attention import DecoupledAttentionProcessor
from .shared import (
    AGGREGATIONS,
    AGGREGATOR_STAGES,
    SELF_ATTENTION,
    AdapterTensors,
    IPAdapter,
    LinearProjection,
    PersonalizeError,
    Resampler,
    SelfAttentionAggregator,
)

BASE_TOKENS, PLUS_TOKENS = 4, 16
RESAMPLER_DEPTH, AGGREGATOR_HEADS, AGGREGATOR_DEPTH = 4, 8, 2
"""Of what is new where nobody says."""
PLUS_WIDTHS = {2048: 1280}
"""Of a fresh Plus adapter's resampler by the width of the text features; elsewhere 768, or theirs if that is less."""


def cross_layers(unet: UNet2DConditionModel) -> list[str]:
    """The processors of cross-attention, in the order of adapter files."""
    return [name for name in unet.attn_processors if name.endswith("attn2.processor")]


def fresh_adapter(
    unet: UNet2DConditionModel, kind: str, encoder_width: int, depth: int = RESAMPLER_DEPTH
) -> AdapterTensors:
    """An untrained adapter of the official layout; W'_k and W'_v start as the UNet's W_k and W_v, as the official ones did.

    Args:
        unet: of the base.
        kind: "base" or "plus".
        encoder_width: of the image features.
        depth: layers of a Plus adapter's resampler.
    """
    layers = [unet.get_submodule(name.removesuffix(".processor")) for name in cross_layers(unet)]
    cross = layers[0].to_k.in_features
    if kind == "base":
        projection: nn.Module = LinearProjection(encoder_width, cross, BASE_TOKENS)
    else:
        dim = PLUS_WIDTHS.get(cross, min(cross, 768))
        projection = Resampler(encoder_width, dim, cross, PLUS_TOKENS, depth, max(dim // 64, 1) * 64, 4 * dim)
        nn.init.normal_(projection.latents, std=dim**-0.5)
    state = AdapterTensors({"image_proj": projection.state_dict(), "ip_adapter": {}})
    for i, layer in enumerate(layers):
        state["ip_adapter"][f"{2 * i + 1}.to_k_ip.weight"] = layer.to_k.weight.detach().float().clone()
        state["ip_adapter"][f"{2 * i + 1}.to_v_ip.weight"] = layer.to_v.weight.detach().float().clone()
    return state


class TrainableAdapter(nn.Module):
    """c_i = G(references) of a batch of pictures, and K', V' of every layer, with gradients; in fp32."""

    def __init__(self, adapter: IPAdapter, aggregation: str, stage: str, aggregator: SelfAttentionAggregator | None):
        """Args:
        adapter: what it starts from.
        aggregation: G, of AGGREGATIONS or "self-attention".
        stage: "features" or "tokens", where G stands.
        aggregator: for self-attention.
        """
        super().__init__()
        self.variant, self.aggregation, self.stage = adapter.variant, aggregation, stage
        self.image_proj = adapter.image_proj.float()
        self.to_k_ip = nn.ModuleList(_linear(key) for key, _ in adapter.layers)
        self.to_v_ip = nn.ModuleList(_linear(value) for _, value in adapter.layers)
        self.aggregator = aggregator

    def check_fits(self, unet: UNet2DConditionModel, name: str, base: str) -> None:
        """Raises PersonalizeError where the UNet, of a base by its name, has other layers than the adapter."""
        layers = [unet.get_submodule(layer.removesuffix(".processor")) for layer in cross_layers(unet)]
        wanted = [tuple(layer.to_k.weight.shape) for layer in layers]
        found = [tuple(layer.get_parameter("weight").shape) for layer in self.to_k_ip]
        if wanted != found:
            raise PersonalizeError(
                f"{name} is made for {self.variant.base_model} ({len(found)} cross-attention layers, the first "
                f"{found[0][0]} wide), but {base} has {len(wanted)}, the first {wanted[0][0]} wide: use an adapter made for "
                "this base."
            )

    def tokens(self, features: Tensor) -> Tensor:
        """The image projection: [n, T, D] -> [n, t, cross_width]."""
        return self.image_proj(features)

    def aggregated(self, sets: Sequence[Tensor]) -> Tensor:
        """G of B sets of features [n_b, T, D], or of tokens [n_b, t, C], where it stands: [B, T, D] or [B, t, C]."""
        if self.aggregator is not None:
            most = max(len(one) for one in sets)
            weights = torch.zeros(len(sets), most, device=sets[0].device)
            padded = sets[0].new_zeros(len(sets), most, *sets[0].shape[1:])
            for i, one in enumerate(sets):
                padded[i, : len(one)] = one
                weights[i, : len(one)] = 1
            return self.aggregator(padded, weights)
        aggregate = AGGREGATIONS[self.aggregation]
        return torch.cat([aggregate(one, one.new_ones(len(one)))[0] for one in sets])

    def condition(self, sets: Sequence[Tensor | None], empty: Tensor) -> tuple[Tensor, Tensor | None]:
        """Image tokens [B, L, C] of B sets of references, and a bias [B, L] on their logits where they are padded.

        Args:
            sets: features [n_b, T, D] of each set, or None for no picture.
            empty: the features of no picture, [T, D].
        """
        if self.aggregation == "concatenate":
            return self._side_by_side([empty[None] if one is None else one for one in sets])
        given = [one for one in sets if one is not None]
        if self.stage == "features":
            rows = iter(self.aggregated(given)) if given else iter(())
            return self.tokens(torch.stack([empty if one is None else next(rows) for one in sets])), None
        sizes = [len(one) for one in given]
        tokens = self.tokens(torch.cat([empty[None], *given]))
        rows = iter(self.aggregated(tokens[1:].split(sizes))) if given else iter(())
        return torch.stack([tokens[0] if one is None else next(rows) for one in sets]), None

    def _side_by_side(self, sets: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        sizes = [len(one) for one in sets]
        parts = [rearrange(part, "n t c -> (n t) c") for part in self.tokens(torch.cat(list(sets))).split(sizes)]
        longest = max(len(part) for part in parts)
        tokens = torch.stack([nn.functional.pad(part, (0, 0, 0, longest - len(part))) for part in parts])
        if len(set(sizes)) == 1:
            return tokens, None
        bias = tokens.new_full(tokens.shape[:2], float("-inf"))
        for row, part in zip(bias, parts, strict=True):
            row[: len(part)] = 0
        return tokens, bias

    def attach(self, unet: UNet2DConditionModel, tokens: Tensor, bias: Tensor | None, weight: float = 1.0) -> None:
        """Let every cross-attention layer attend to image tokens [B, L, C], a row for each picture of the batch."""
        pairs = zip(cross_layers(unet), self.to_k_ip, self.to_v_ip, strict=True)
        ours = {
            name: DecoupledAttentionProcessor(key(tokens), value(tokens), bias, weight) for name, key, value in pairs
        }
        unet.set_attn_processor(dict(unet.attn_processors) | ours)

    def tensors(self) -> dict[str, Tensor]:
        """In the official layout, with `aggregator.*` where one trains."""
        state = {f"image_proj.{name}": value for name, value in self.image_proj.state_dict().items()}
        for i, (key, value) in enumerate(zip(self.to_k_ip, self.to_v_ip, strict=True)):
            state[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"] = key.get_parameter("weight")
            state[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"] = value.get_parameter("weight")
        if self.aggregator is not None:
            own = self.aggregator.state_dict()
            state |= {f"aggregator.{self.stage}.{name}": value for name, value in own.items()}
        return {name: value.detach() for name, value in state.items()}


def stage_of(adapter: IPAdapter) -> str | None:
    """Where the self-attention in its file stands, "features" or "tokens"; None where it has none."""
    where = None if adapter.trained is None else adapter.trained[0]
    return {pooling: stage for stage, pooling in AGGREGATOR_STAGES.items()}.get(where or "")


def build(
    adapter: IPAdapter,
    aggregation: str,
    stage: str | None = None,
    width: int | None = None,
    heads: int | None = None,
    depth: int | None = None,
) -> TrainableAdapter:
    """An adapter that trains, starting from a file's or a fresh one.

    Args:
        adapter: as it was read.
        aggregation: of AGGREGATIONS or "self-attention", which is the file's, where it stands there, if it has one.
        stage: "features", which is the default, or "tokens".
        width: of a new self-attention; by default the features', 512 at most, rounded to a multiple of the heads.
        heads, depth: of a new self-attention.

    Raises:
        PersonalizeError: the self-attention has more heads than it is wide.
    """
    if aggregation != SELF_ATTENTION:
        return TrainableAdapter(adapter, aggregation, stage or "features", None)
    if adapter.trained is not None:
        return TrainableAdapter(adapter, aggregation, stage_of(adapter) or "features", adapter.trained[1])
    stage, heads = stage or "features", heads or AGGREGATOR_HEADS
    outer = adapter.variant.encoder_width if stage == "features" else adapter.variant.cross_width
    inner = min(outer, 512) // heads * heads if width is None else width
    if inner < heads:
        raise PersonalizeError(
            f"--aggregator_heads {heads} are more than the self-attention is wide ({width or min(outer, 512)}): use fewer."
        )
    made = SelfAttentionAggregator(outer, inner, heads, AGGREGATOR_DEPTH if depth is None else depth)
    return TrainableAdapter(adapter, aggregation, stage, made)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.load_state_dict({"weight": weight.detach().float().clone()}, assign=True)
    return layer
