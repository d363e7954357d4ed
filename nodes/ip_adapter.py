"""IP-Adapter: load an adapter file, apply it to a model with references."""

from collections.abc import Mapping
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.aggregation import AGGREGATIONS, SELF_ATTENTION
from ..models.blocks import LAYER_CHOICES, layer_weights
from ..models.errors import PersonalizeError
from ..models.ip_adapter import BASE_MODELS, POOLING_STAGES, AdapterTensors, IPAdapter, nest, read_ip_adapter
from ..models.references import References
from .attention_patch import DecoupledAttentionPatch, unet_layout
from .folders import find_model, listed
from .schema import ADVANCED, SHARE, EmbedsType, IPAdapterType, Node, ReferencesType, schema


class LoadIPAdapter(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeLoadIPAdapter",
            display_name="Load IP-Adapter",
            description="Loads an IP-Adapter file. Which variant it is, is told from its tensors; the file's name "
            "does not matter.",
            search_aliases=["ipadapter model loader", "ip-adapter loader", "ip adapter plus"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=listed("ipadapter", "pocket_portraits_ip_adapter.safetensors"),
                    tooltip="A .safetensors or .bin file in models/ipadapter, or one of the pocket model's, which come "
                    "with the pack.",
                )
            ],
            outputs=[IPAdapterType.Output(display_name="ip_adapter", tooltip="To Apply IP-Adapter.")],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(read_ip_adapter(find_model("ipadapter", file)))


class ApplyIPAdapter(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeApplyIPAdapter",
            display_name="Apply IP-Adapter",
            description="Makes a model follow reference pictures: in every cross-attention layer they get keys and "
            "values of their own beside the text's (decoupled cross-attention, Ye et al. 2023).",
            search_aliases=["ipadapter advanced", "ip-adapter", "image prompt", "style transfer", "face", "reference"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="SD1.5 or SDXL. Several of these nodes in a row add up, in any order, also with other packs' "
                    "attention patches.",
                ),
                IPAdapterType.Input("ip_adapter", tooltip="From Load IP-Adapter, made for the same base model."),
                io.MultiType.Input(
                    "references",
                    types=[ReferencesType, EmbedsType],
                    tooltip="Pictures of the subject, from Encode References or Load References.",
                ),
                io.Float.Input(
                    "weight",
                    display_name="weight (λ)",
                    default=0.8,
                    min=-1.0,
                    max=3.0,
                    step=0.05,
                    tooltip="λ: 0.6 to 0.8 leaves room for the prompt, 1 follows the references, 0 ignores them, below 0 "
                    "moves away from them.",
                ),
                io.Combo.Input(
                    "aggregation",
                    options=[*AGGREGATIONS, SELF_ATTENTION],
                    default="concatenate",
                    tooltip="How several references become one. concatenate: all side by side, attention chooses "
                    "(weights count as copies). average: their mean. max: the largest value of each feature. "
                    "self-attention: what a file of python -m training.ip_adapter has learned to make of them all; "
                    "other files are refused.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    **SHARE,
                    tooltip="Where in the sampling the references begin to act: 0 is the first step.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    **SHARE,
                    tooltip="Where they stop: 1 is the last step. Ending at 0.6 leaves details to the prompt.",
                ),
                io.Combo.Input(
                    "pooling",
                    options=list(POOLING_STAGES),
                    default=POOLING_STAGES[0],
                    tooltip="Average and max: over the image encoder's features, or over the tokens after the adapter's "
                    "projection. Self-attention stands where it was trained.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYER_CHOICES),
                    default="all",
                    tooltip="Which layers follow the references: all, those of style or of composition (InstantStyle), "
                    "both, or those in layer_list.",
                    extra_dict=ADVANCED,
                ),
                io.String.Input(
                    "layer_list",
                    default="",
                    tooltip="For list: transformer indices with a factor on λ, such as 3:2.5, 6. SD1.5 has 0 to 15, SDXL "
                    "0 to 10.",
                    extra_dict=ADVANCED,
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the new picture the references act (white). Any size of the picture's aspect; a "
                    "batch gives each picture its own.",
                ),
                io.MultiType.Input(
                    "negative",
                    types=[ReferencesType, EmbedsType],
                    display_name="negative references",
                    optional=True,
                    tooltip="Pictures to move away from: they stand on the negative prompt's side.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="To a sampler, or to another Apply IP-Adapter.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        ip_adapter,
        references: References | Tensor,
        weight: float,
        aggregation: str = "concatenate",
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        pooling: str = POOLING_STAGES[0],
        layers: str = "all",
        layer_list: str = "",
        mask=None,
        negative: References | Tensor | None = None,
    ) -> io.NodeOutput:
        adapter = IPAdapter.from_state(tensors_of(ip_adapter))
        layout, widths = unet_layout(model, "IP-Adapter")
        _check_base_model(adapter, widths)
        factors = layer_weights(layout, layers, layer_list)
        device = comfy.model_management.get_torch_device()
        # Made outside inference mode, so that methods that need gradients through the UNet work on top of it.
        with torch.inference_mode(False):
            prompt = adapter.image_prompt(references_of(references, adapter), aggregation, pooling, device)
            if negative is not None:
                negative_prompt = adapter.image_prompt(references_of(negative, adapter), aggregation, pooling, device)
            elif isinstance(references, Tensor) and not adapter.variant.pooled:
                raise PersonalizeError(
                    "EMBEDS from another pack do not say what an empty picture looks like to the encoder, which "
                    f"{adapter.name} needs: connect its neg_embed to negative references, or use Encode References."
                )
            else:
                negative_prompt = adapter.empty_prompt(references_of(references, adapter), device)
        if weight == 0 or start_percent >= end_percent:
            return io.NodeOutput(model)
        sampling = model.get_model_object("model_sampling")
        patch = DecoupledAttentionPatch(
            positive=prompt,
            negative=negative_prompt,
            layout=layout,
            weights={layer: weight * factor for layer, factor in factors.items() if factor != 0},
            sigma_start=float("inf") if start_percent <= 0 else float(sampling.percent_to_sigma(start_percent)),
            sigma_end=0.0 if end_percent >= 1 else float(sampling.percent_to_sigma(end_percent)),
            mask=_checked_mask(mask),
        )
        return io.NodeOutput(patch.apply_to(model))


def tensors_of(ip_adapter: Mapping[str, Any]) -> AdapterTensors:
    """The tensors on the wire: ours, or those of ComfyUI_IPAdapter_plus (raw, or its unified loader's pipeline)."""
    if isinstance(ip_adapter, AdapterTensors):
        return ip_adapter
    if "ipadapter" in ip_adapter:
        ip_adapter = (ip_adapter["ipadapter"] or {}).get("model") or {}
    return AdapterTensors(nest(ip_adapter))


def _checked_mask(mask: Tensor | None) -> Tensor | None:
    """[M, H, W], 0..1, on the CPU. Raises PersonalizeError where it is not finite."""
    if mask is None:
        return None
    if not bool(torch.isfinite(mask).all()):
        raise PersonalizeError("The mask has values that are not numbers (NaN or infinite): check the node before.")
    return mask.reshape(-1, *mask.shape[-2:]).float().clamp(0, 1).cpu()


def references_of(wire: References | Tensor, adapter: IPAdapter) -> References:
    """Ours, or EMBEDS of ComfyUI_IPAdapter_plus, each of weight 1.

    Raises:
        PersonalizeError: EMBEDS of a shape that the adapter does not take.
    """
    if isinstance(wire, References):
        return wire
    if wire.ndim != (2 if adapter.variant.pooled else 3):
        wanted = "pooled, [n, width]" if adapter.variant.pooled else "of patches, [n, tokens, width]"
        raise PersonalizeError(
            f"These EMBEDS have the shape {tuple(wire.shape)}, but {adapter.name} takes features {wanted}: encode them "
            f"for an {adapter.variant}."
        )
    if not len(wire) or not bool(torch.isfinite(wire).all()):
        raise PersonalizeError(
            f"These EMBEDS {'have values that are not numbers (NaN or infinite)' if len(wire) else 'are of no picture'}: "
            "check the node before."
        )
    n, nothing = wire.shape[0], wire.new_zeros(wire.shape[0], 0)
    pooled, patches = (wire, nothing[:, None]) if wire.ndim == 2 else (nothing, wire)
    return References(pooled, patches, patches[0], torch.ones(n), tuple(f"embed {i}" for i in range(n)))


def _check_base_model(adapter: IPAdapter, widths: list[tuple[int, int]]) -> None:
    wanted = [tuple(key.shape) for key, _ in adapter.layers]
    if wanted == widths:
        return
    wide, context = widths[0] if widths else (0, 0)
    base = BASE_MODELS.get(context, f"text features of width {context}")
    raise PersonalizeError(
        f"This adapter is made for {adapter.variant.base_model} ({len(wanted)} cross-attention layers, the first "
        f"{wanted[0][0]} wide, text width {wanted[0][1]}), but the model is {base} ({len(widths)} layers, the first {wide} "
        f"wide, text width {context}): use an adapter made for this model, or a checkpoint of {adapter.variant.base_model}."
    )
