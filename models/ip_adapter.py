"""IP-Adapter files: recognising them from their tensors, and the K' and V' they give for a set of references.

Layout of a file: `image_proj.*`, the image projection, and `ip_adapter.N.to_k_ip.weight` / `to_v_ip.weight`, W'_k
and W'_v of every cross-attention layer (N: see `blocks`); where a self-attention over the references was trained,
`aggregator.features.*` (it stands before the projection) or `aggregator.tokens.*` (after it), which other loaders pass
over. A .safetensors file is flat, a .bin is nested.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from .aggregation import (
    AGGREGATIONS,
    SELF_ATTENTION,
    Aggregation,
    SelfAttentionAggregator,
    log_weights,
    select_references,
)
from .base_models import FAMILIES, title_of
from .errors import PersonalizeError
from .file_kinds import taken_for
from .projection import FullFaceProjection, LinearProjection, Resampler
from .references import ENCODER_NAMES, References
from .weight_files import check_finite, read_weights

BASE_MODELS = {context: title_of(family) for (_, context), family in FAMILIES.items()}
"""Base model by the width of its text features."""

BEFORE_PROJECTION, AFTER_PROJECTION = POOLING_STAGES = ("before projection", "after projection")
AGGREGATOR_STAGES = {"features": BEFORE_PROJECTION, "tokens": AFTER_PROJECTION}
"""Where a trained aggregator stands, by its name in files."""


@dataclass(frozen=True)
class Variant:
    """What a file's tensors say about it."""

    kind: str
    """ "base" (and light, ViT-G), "plus" (and Plus-Face) or "full-face"."""
    encoder_width: int
    """Width of the image features it takes."""
    cross_width: int
    """Width of its tokens, equal to the base model's text features."""
    layers: int
    """Cross-attention layers it has K' and V' for."""

    @property
    def pooled(self) -> bool:
        """Whether it takes the pooled image embedding rather than the patch tokens."""
        return self.kind == "base"

    @property
    def base_model(self) -> str:
        return BASE_MODELS.get(self.cross_width, f"a model with text features of width {self.cross_width}")

    @property
    def encoder(self) -> str:
        """The image encoder it was trained with."""
        names = ENCODER_NAMES["pooled" if self.pooled else "patches"]
        return names.get(self.encoder_width, f"an encoder with features of width {self.encoder_width}")

    def __str__(self) -> str:
        return f"IP-Adapter {self.kind} for {self.base_model}"


class AdapterTensors(dict[str, dict[str, Tensor]]):
    """{"image_proj": {...}, "ip_adapter": {...}, "aggregator": {...} if any}, with the name of the file for messages."""

    name = "the IP-Adapter"


def read_ip_adapter(path: Path) -> AdapterTensors:
    """Read and recognise a file.

    Raises:
        PersonalizeError: not readable, or not an IP-Adapter that is supported; the message names the file.
    """
    state = AdapterTensors(nest(read_weights(path)))
    state.name = f"{path.name} in {path.parent}"
    IPAdapter.from_state(state)
    check_finite({f"{part}.{key}": value for part, own in state.items() for key, value in own.items()}, path.name)
    state.name = path.name
    return state


def nest(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Group flat names by their first part; `adapter_modules` is an alias of `ip_adapter`."""
    nested: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            nested.setdefault(str(key), {}).update({str(inner): tensor for inner, tensor in value.items()})
        else:
            part, _, rest = str(key).partition(".")
            nested.setdefault(part, {})[rest] = value
    if "adapter_modules" in nested:
        nested.setdefault("ip_adapter", nested.pop("adapter_modules"))
    return nested


def recognise(state: Mapping[str, Mapping[str, Tensor]], name: str) -> Variant:
    """Tell the variant from the tensors, never from the file's name.

    Raises:
        PersonalizeError: not an IP-Adapter, or one that is not supported.
    """
    image_proj, ip_adapter = state.get("image_proj"), state.get("ip_adapter")
    if bool(image_proj) != bool(ip_adapter):
        raise PersonalizeError(
            f"{name} is not a whole IP-Adapter: it has no {'ip_adapter' if image_proj else 'image_proj'} tensors."
        )
    if not image_proj or not ip_adapter:
        names = [f"{part}.{rest}" if rest else part for part, inner in state.items() for rest in inner]
        raise taken_for("an IP-Adapter", name, names or list(state), None)
    if not all(isinstance(value, Tensor) for part in (image_proj, ip_adapter) for value in part.values()):
        raise PersonalizeError(
            f"{name} holds other things than tensors where its weights should be: download it again."
        )
    if any(".to_q_lora." in key for key in ip_adapter) or any("perceiver_resampler" in key for key in image_proj):
        raise PersonalizeError(
            f"{name} is a FaceID adapter, which is not supported yet: use Plus-Face or Full-Face, which need no "
            "face recognition model."
        )
    layers = _layers(ip_adapter)
    if not layers or any(pair is None or pair[0].ndim != 2 or pair[0].shape != pair[1].shape for pair in layers):
        raise PersonalizeError(
            f"{name} lacks to_k_ip or to_v_ip of some layers, or they have wrong shapes: download it again."
        )
    shape = {key: tuple(value.shape) for key, value in image_proj.items()}
    if any(len(size) < 2 for key, size in shape.items() if key in ("proj.weight", "proj.0.weight", "proj_in.weight")):
        raise PersonalizeError(f"{name} has an image projection of a wrong shape: download it again.")
    if "latents" in shape and "proj_in.weight" in shape:
        kind, width = "plus", shape["proj_in.weight"][1]
    elif "proj.3.weight" in shape:
        kind, width = "full-face", shape["proj.0.weight"][1]
    elif "proj.weight" in shape and "norm.weight" in shape:
        kind, width = "base", shape["proj.weight"][1]
    elif "proj.2.weight" in shape:
        raise PersonalizeError(
            f"{name} is a FaceID portrait adapter (it takes face embeddings of width {shape['proj.0.weight'][1]}), "
            "which is not supported yet: use Plus-Face or Full-Face, which need no face recognition model."
        )
    else:
        raise PersonalizeError(
            f"{name} has an image projection of an unknown kind ({', '.join(sorted(shape)[:3])}, ...): base, light, "
            "ViT-G, Plus, Plus-Face and Full-Face adapters of SD1.5 and SDXL are supported."
        )
    return Variant(kind, width, ip_adapter["1.to_k_ip.weight"].shape[1], len(layers))


def _layers(ip_adapter: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor] | None]:
    numbers = sorted({int(key.split(".")[0]) for key in ip_adapter if key.split(".")[0].isdigit()})
    if numbers != list(range(1, 2 * len(numbers), 2)):
        return []
    pairs = ((ip_adapter.get(f"{n}.to_k_ip.weight"), ip_adapter.get(f"{n}.to_v_ip.weight")) for n in numbers)
    return [None if k is None or v is None else (k, v) for k, v in pairs]


@dataclass(frozen=True)
class ImagePrompt:
    """K' and V' of one set of references for every layer, in the order of the file.

    The references do not change while a picture is made, so they are projected once, and the weights W'_k, W'_v
    need not stay in the accelerator's memory.
    """

    keys: tuple[Tensor, ...]
    """[T, C] for each layer."""
    values: tuple[Tensor, ...]
    """[T, C] for each layer."""
    bias: Tensor | None
    """[T], log of the reference weights; None where they are equal."""


class IPAdapter:
    """An adapter ready to turn references into image prompts."""

    def __init__(
        self,
        variant: Variant,
        image_proj: nn.Module,
        layers: Sequence[tuple[Tensor, Tensor]],
        name: str,
        trained: tuple[str, SelfAttentionAggregator] | None = None,
    ):
        """Args:
        trained: the stage, of POOLING_STAGES, and the self-attention that was trained for it, if one was.
        """
        self.variant = variant
        self.image_proj = image_proj
        self.layers = tuple(layers)
        self.name = name
        self.trained = trained

    @classmethod
    def from_state(cls, state: Mapping[str, Mapping[str, Tensor]]) -> "IPAdapter":
        """Build from {"image_proj", "ip_adapter"} tensors, without copying or initialising anything.

        Raises:
            PersonalizeError: see `recognise`; or a tensor of the projection is missing or of a wrong shape.
        """
        name = getattr(state, "name", AdapterTensors.name)
        variant = recognise(state, name)
        kinds = {"base": LinearProjection, "plus": Resampler, "full-face": FullFaceProjection}
        try:
            with torch.device("meta"):
                image_proj = kinds[variant.kind].from_shapes(state["image_proj"])  # type: ignore[attr-defined]
            image_proj.load_state_dict(dict(state["image_proj"]), assign=True)
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            detail = " ".join(str(error).split())[:200]
            raise PersonalizeError(
                f"{name} has an incomplete image projection ({detail}): download it again."
            ) from None
        layers = [pair for pair in _layers(state["ip_adapter"]) if pair is not None]
        last = {"base": "norm.weight", "plus": "norm_out.weight", "full-face": "proj.3.weight"}[variant.kind]
        width = state["image_proj"][last].shape[0]
        if any(key.shape[1] != width for key, _ in layers):
            raise PersonalizeError(
                f"{name} does not fit together (tokens of width {width}, to_k_ip of width {variant.cross_width}): "
                "download it again."
            )
        trained = read_aggregator(state.get("aggregator", {}), variant, name)
        return cls(variant, image_proj.requires_grad_(False), layers, name, trained)

    def features(self, references: References) -> Tensor:
        """The features this adapter takes: [n, 1, D] pooled or [n, T, D] patch tokens.

        Raises:
            PersonalizeError: the references were encoded with another image encoder than the adapter needs.
        """
        features = references.pooled[:, None] if self.variant.pooled else references.patches
        self._check_encoder(features.shape[-1], references)
        return features

    def _check_encoder(self, width: int, references: References) -> None:
        if width != self.variant.encoder_width:
            raise PersonalizeError(
                f"{self.name} ({self.variant}) takes image features of width {self.variant.encoder_width}, but the "
                f"references were encoded with {references.encoder} and have width {width}: encode them with "
                f"{self.variant.encoder}."
            )

    @torch.no_grad()
    def tokens(self, features: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Image projection in float32: [n, T, D] -> [n, tokens, cross_width], on `device`."""
        weights = {key: value.to(device).float() for key, value in self.image_proj.state_dict().items()}
        return torch.func.functional_call(self.image_proj, weights, (features.to(device).float(),))

    def image_prompt(
        self,
        references: References,
        aggregation: str | Aggregation = "concatenate",
        pooling: str = BEFORE_PROJECTION,
        device: torch.device | str = "cpu",
    ) -> ImagePrompt:
        """c_i = G(references), then K' = c_i W'_k and V' = c_i W'_v of every layer.

        Args:
            references: n references of this adapter's encoder.
            aggregation: G, by its name in AGGREGATIONS, or "self-attention", or itself.
            pooling: whether to aggregate the encoder's features or the projected tokens; self-attention stands where it
                was trained, whatever this says.
            device: where to compute; the result is on the CPU, in float32.

        Raises:
            PersonalizeError: wrong encoder, no references, bad weights, or no self-attention in this adapter's file.
        """
        if aggregation == SELF_ATTENTION:
            pooling, aggregator = self.self_attention()
            aggregator.to(device)
            aggregate: Aggregation = aggregator.aggregate
        else:
            aggregate = AGGREGATIONS[aggregation] if isinstance(aggregation, str) else aggregation
        features, weights = select_references(self.features(references), references.weights)
        if pooling == BEFORE_PROJECTION:
            features, weights = aggregate(features.to(device).float(), weights.to(device))
            tokens = self.tokens(features, device)
        else:
            tokens, weights = aggregate(self.tokens(features, device), weights.to(device))
        return self._project(tokens.flatten(0, 1), log_weights(weights, tokens.shape[1]))

    def self_attention(self) -> tuple[str, SelfAttentionAggregator]:
        """The stage, of POOLING_STAGES, and the trained aggregator.

        Raises:
            PersonalizeError: the file has none.
        """
        if self.trained is None:
            raise PersonalizeError(
                f"{self.name} has no self-attention over the references: choose concatenate, average or max, or train one "
                "for it with python -m training.ip_adapter."
            )
        return self.trained

    @torch.no_grad()
    def attended(self, references: References) -> Tensor:
        """How much each head of the self-attention looks at each reference, [heads, n]; 0 for those of weight 0.

        Raises:
            PersonalizeError: as `image_prompt`.
        """
        pooling, aggregator = self.self_attention()
        features, weights = select_references(self.features(references), references.weights)
        elements = features.float() if pooling == BEFORE_PROJECTION else self.tokens(features)
        shares = torch.zeros(aggregator.head_count, len(references))
        shares[:, references.weights > 0] = aggregator.cpu().attended(elements, weights).float()
        return shares

    def empty_prompt(self, references: References, device: torch.device | str = "cpu") -> ImagePrompt:
        """The image prompt of "no picture", for the negative side of guidance, as the adapters were trained:
        a zero embedding, or for patch tokens the encoder's features of an all-zero input."""
        if self.variant.pooled:
            features = references.pooled.new_zeros(1, 1, self.variant.encoder_width)
        else:
            features = references.zero_patches[None]
            self._check_encoder(features.shape[-1], references)
        return self._project(self.tokens(features, device)[0], None)

    @torch.no_grad()
    def _project(self, tokens: Tensor, bias: Tensor | None) -> ImagePrompt:
        def project(weight: Tensor) -> Tensor:
            return (tokens @ weight.to(tokens.device).float().T).cpu()

        keys, values = zip(*((project(k), project(v)) for k, v in self.layers), strict=True)
        return ImagePrompt(keys, values, None if bias is None else bias.float().cpu())


def read_aggregator(
    state: Mapping[str, Tensor], variant: Variant, name: str
) -> tuple[str, SelfAttentionAggregator] | None:
    """The stage, of POOLING_STAGES, and the self-attention of a file's `aggregator.*` tensors; None if there are none.

    Raises:
        PersonalizeError: they are of an unknown kind, not whole, or do not fit the adapter.
    """
    if not state:
        return None
    stage = next(iter(state)).split(".")[0]
    if stage not in AGGREGATOR_STAGES:
        raise PersonalizeError(f"{name} has an aggregator of an unknown kind ({stage}): update Personalize.")
    try:
        own = {
            key.removeprefix(f"{stage}."): value.float() if value.is_floating_point() else value
            for key, value in state.items()
        }
        made = SelfAttentionAggregator.from_tensors(own)
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        detail = " ".join(str(error).split())[:200]
        raise PersonalizeError(f"{name} has an incomplete aggregator ({detail}): get the file again.") from None
    width = variant.encoder_width if stage == "features" else variant.cross_width
    if made.gate.shape[0] != width:
        raise PersonalizeError(
            f"{name} does not fit together (an aggregator of width {made.gate.shape[0]}, {stage} of width {width}): get "
            "the file again."
        )
    return AGGREGATOR_STAGES[stage], made


def stack_prompts(prompts: Sequence[ImagePrompt], layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """K', V' and logit bias of several prompts as one batch: [G, T, C], [G, T, C], [G, T] or None.

    A shorter prompt without bias whose length divides the longest is repeated, which softmax cannot tell from
    the prompt itself and which needs no mask; any other shorter prompt is padded and the padding masked.
    """
    length = max(prompt.keys[layer].shape[0] for prompt in prompts)
    masked = any(prompt.bias is not None or length % prompt.keys[layer].shape[0] for prompt in prompts)
    keys, values, biases = [], [], []
    for prompt in prompts:
        key, value, size = prompt.keys[layer], prompt.values[layer], prompt.keys[layer].shape[0]
        if not masked:
            keys.append(repeat(key, "t c -> (n t) c", n=length // size))
            values.append(repeat(value, "t c -> (n t) c", n=length // size))
            continue
        bias = key.new_full((length,), float("-inf"))
        bias[:size] = 0 if prompt.bias is None else prompt.bias
        biases.append(bias)
        keys.append(torch.cat((key, key.new_zeros(length - size, key.shape[1]))))
        values.append(torch.cat((value, value.new_zeros(length - size, value.shape[1]))))
    return torch.stack(keys), torch.stack(values), torch.stack(biases) if masked else None
