"""Subject-Diffusion inside ComfyUI's UNet, as the host knows GLIGEN: a conditioning brings its subjects with it.

The host hands `set_position` of what a conditioning has under "gligen" the latent's shape, and calls what it returns
between self- and cross-attention of every block, for this conditioning alone. The location channel is added after the
first convolution, which is linear: conv([z, M]) = conv(z) + conv(M).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..models.blocks import Layer
from ..models.errors import PersonalizeError
from ..models.subject_diffusion import WORDS, SubjectParts, SubjectTensors, inside_boxes, location_mask
from ..models.text_keys import with_text_model
from .trained_files import as_loaded


@dataclass(frozen=True)
class Told:
    """What one conditioning says about its subjects."""

    objects: Tensor
    """Their tokens, [1, K, width]; zeros: no subjects."""
    boxes: Tensor | None
    """[n, 4], shares of the picture; None: no location."""


class SubjectModule(nn.Module):
    """The parts, and which of them stands in which block."""

    def __init__(self, parts: SubjectParts, layers: Sequence[Layer]):
        super().__init__()
        self.parts = parts
        self.places = {(layer.block, layer.id, layer.depth): i for i, layer in enumerate(layers)}

    def set_position(self, shape: Sequence[int], told: Told, device: torch.device) -> "SubjectPatch":
        """As the host asks for it: of a latent's shape [B, C, h, w]."""
        location = None
        if told.boxes is not None:
            height, width = shape[-2:]
            inside = inside_boxes(told.boxes, height * 8, width * 8)
            location = location_mask(inside, height, width)[None].to(device)
        return SubjectPatch(self, told.objects.to(device), location)

    def set_empty(self, shape: Sequence[int], device: torch.device) -> "SubjectPatch":
        """As the host asks for it, of an area without."""
        zeros = torch.zeros(1, 1, self.parts.objects.mlp.fc2.out_features, device=device)
        return SubjectPatch(self, zeros, None)


class SubjectPatch:
    """Called by the host between the attentions; the wrapper asks it for the location."""

    def __init__(self, module: SubjectModule, objects: Tensor, location: Tensor | None):
        self.module, self.objects, self.location = module, objects, location

    def __call__(self, x: Tensor, options: Mapping[str, Any]) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        block, number = options["block"]
        place = self.module.places[block, number, options["block_index"]]
        return self.module.parts.adapt(place, x, self.objects, options["n_heads"])


def located(h: Tensor, options: Mapping[str, Any]) -> Tensor:
    """After an input block: the first one's is told where the subjects are, if the conditioning that runs says so."""
    if options["block"] != ("input", 0):
        return h
    for patch in options.get("patches", {}).get("middle_patch", ()):
        if isinstance(patch, SubjectPatch) and patch.location is not None:
            h = h + patch.module.parts.located(patch.location).to(h)
    return h


def has_subjects(model: Any) -> bool:
    """Whether a MODEL comes from *Apply Subject-Diffusion*."""
    patches = model.model_options.get("transformer_options", {}).get("patches", {})
    return located in patches.get("input_block_patch", ())


def patcher_of(parts: SubjectParts, layers: Sequence[Layer]) -> ModelPatcher:
    """The parts as the host loads them beside the UNet."""
    module = SubjectModule(parts, layers)
    device = comfy.model_management.get_torch_device()
    return ModelPatcher(module, load_device=device, offload_device=comfy.model_management.unet_offload_device())


def with_weights(model: Any, clip: Any, tensors: SubjectTensors, name: str) -> tuple[Any, Any]:
    """MODEL and CLIP with a file's own weights in place of theirs.

    Raises:
        PersonalizeError: they have others.
    """
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    unet = {f"diffusion_model.{names[key]}": value for key, value in tensors.unet.items() if key in names}
    first = tensors.parts["conv_in.weight"]
    unet["diffusion_model.input_blocks.0.0.weight"] = first[:, :-1].contiguous()
    unet["diffusion_model.input_blocks.0.0.bias"] = tensors.parts["conv_in.bias"]
    state = clip.patcher.model.state_dict()
    ending = "text_model.final_layer_norm.weight"
    prefix = next((key.removesuffix(ending) for key in state if key.endswith(ending)), "")
    text = {prefix + key: value for key, value in with_text_model(tensors.text).items()}
    table = next((key for key in state if key.startswith(prefix) and key.endswith(WORDS)), "")
    if table:
        words, rows = as_loaded(clip.patcher, table).detach().cpu(), tensors.words
        fits = rows.weight.shape[1] == words.shape[1] and bool((rows.index < len(words)).all())
        text[table] = rows.in_table(words) if fits else rows.weight
    done = []
    for thing, patcher, weights in ((model, model, unet), (clip, clip.patcher, text)):
        shapes = {key: tuple(value.shape) for key, value in patcher.model.state_dict().items()}
        wrong = [key for key, value in weights.items() if key in shapes and shapes[key] != tuple(value.shape)]
        fitting = {key: ("set", (value,)) for key, value in weights.items() if key in shapes}
        if wrong or not fitting:
            raise PersonalizeError(
                f"{name} does not fit this {'model' if thing is model else 'CLIP'}"
                f"{f' ({wrong[0]})' if wrong else ''}: it was trained on another base."
            )
        clone = thing.clone()
        clone.add_patches(fitting, 1.0)
        done.append(clone)
    return done[0], done[1]
