"""Cross-attention of ComfyUI's UNet: its layers, what computes them already, and their maps while it runs."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor, nn

from ..models.blocks import Layer
from ..models.errors import PersonalizeError
from .schema import ADVANCED

LEVELS = {"auto": None, "1/1": 0, "1/2": 1, "1/4": 2, "1/8": 3}
"""How often the latent is halved where maps are taken, as users choose it."""
LOOK = "personalize_look"
"""In transformer options: this call of the UNet is for its maps alone, and no step of the sampler."""

Keep = Callable[[Layer, Tensor, Tensor, Mapping[str, Any]], None]
"""What is done with a layer's query [B, N, C] and key [B, T, C], and with the options that the layer was called with."""


def resolution_input() -> Any:
    """At which of LEVELS maps are taken."""
    return io.Combo.Input(
        "resolution",
        options=list(LEVELS),
        default="auto",
        tooltip="Of the attention maps, as a share of the latent's sides. Auto: 1/4, as in the paper; the finest where the "
        "model has none of that size.",
        extra_dict=ADVANCED,
    )


def unet_of(model: ModelPatcher, what: str) -> Any:
    """A MODEL's UNet. Raises PersonalizeError where it is not Stable Diffusion's; `what` is asked of it, for the message."""
    unet = model.get_model_object("diffusion_model")
    if not hasattr(unet, "input_blocks"):
        raise PersonalizeError(
            f"{what} needs an SD1.5, SD2 or SDXL model, but this MODEL is {type(model.model).__name__}."
        )
    return unet


def unet_parts(unet: Any) -> Iterator[tuple[str, int, nn.Module]]:
    """The modules of a Stable Diffusion UNet's blocks in the order they run, each with its block's name and number."""
    middle = [] if unet.middle_block is None else [unet.middle_block]
    for name, blocks in (("input", unet.input_blocks), ("middle", middle), ("output", unet.output_blocks)):
        for number, block in enumerate(blocks):
            for module in block:
                yield name, number, module


def layer_levels(model: ModelPatcher, what: str) -> dict[Layer, int]:
    """How often the latent was halved before each cross-attention layer, in the order they run.

    Args:
        model: a MODEL.
        what: is asked of it, for the message.

    Raises:
        PersonalizeError: it is not a Stable Diffusion UNet.
    """
    levels, level = dict[Layer, int](), 0
    for name, number, module in unet_parts(unet_of(model, what)):
        for depth in range(len(getattr(module, "transformer_blocks", ()))):
            levels[Layer(name, number, depth)] = level
        level += isinstance(module, Downsample) - isinstance(module, Upsample)
    return levels


def wrapped(model: ModelPatcher, key: str, around_sampler: Callable, around_unet: Callable) -> ModelPatcher:
    """A clone of the model, each run of a sampler and each call of the UNet of which goes through these."""
    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, key, around_sampler)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, around_unet)
    return patched


def below_of(attn2: Mapping[Any, Any], layer: Layer) -> Any:
    """The replacement that a layer's attention has already, or None."""
    return attn2.get(tuple(layer), attn2.get((layer.block, layer.id)))


def attend(below: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """What a layer computes with the replacement that it has already, or with the host's attention where it has none."""
    if below is not None:
        return below(q, k, v, options)
    precision = options.get("attn_precision")
    return optimized_attention(q, k, v, options["n_heads"], attn_precision=precision, transformer_options=options)


@dataclass(frozen=True)
class _Looking:
    """An attn2 replacement that computes what was computed before, and shows its query and key."""

    layer: Layer
    below: Any
    keep: Keep

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        self.keep(self.layer, q, k, extra_options)
        return attend(self.below, q, k, v, extra_options)


def looking(options: Mapping[str, Any], layers: Collection[Layer], keep: Keep) -> dict[str, Any]:
    """`patches_replace` of transformer options, with a look at some layers over whatever patches are there."""
    replace = dict(options.get("patches_replace", {}))
    attn2 = dict(replace.get("attn2", {}))
    for layer in layers:
        attn2[tuple(layer)] = _Looking(layer, below_of(attn2, layer), keep)
    replace["attn2"] = attn2
    return replace
