"""LoRA files in kohya's naming, which ComfyUI's stock loader, diffusers and the other trainers' tools read.

W' = W + (alpha / rank) B A, where A is `lora_down` [rank, in] and B is `lora_up` [out, rank] (Hu et al. 2022,
arXiv:2106.09685, eq. 3); DoRA scales the rows of W' to learned lengths (Liu et al. 2024, arXiv:2402.09353, eq. 5).

A layer's name is that of diffusers' or transformers' module with dots as underscores, after `lora_unet_`, and
`lora_te_`, or with two text encoders `lora_te1_` and `lora_te2_`.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .errors import PersonalizeError

UNET = "lora_unet"
PARTS = ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")
_PEFT_DOWN, _PEFT_UP, _PEFT_LENGTHS = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_TEXT_LAYERS = frozenset(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")) | {"mlp.fc1", "mlp.fc2"}


def text_prefixes(encoders: int) -> tuple[str, ...]:
    """Of the names of one or two text encoders' layers."""
    return ("lora_te",) if encoders == 1 else tuple(f"lora_te{i + 1}" for i in range(encoders))


def file_name(prefix: str, module: str) -> str:
    """The name of a module's layer in a file.

    transformers from 5.6 on has no `text_model.` in the names of a plain text encoder; files always have.
    """
    if prefix != UNET and not module.startswith("text_model."):
        module = f"text_model.{module}"
    return f"{prefix}_{module.replace('.', '_')}"


def lora_tensors(
    prefix: str, state: Mapping[str, Tensor], alphas: Mapping[str, float], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The file's tensors of one network.

    Args:
        prefix: UNET or one of `text_prefixes`.
        state: as peft's `get_peft_model_state_dict` gives it: `<module>.lora_A.weight`, `.lora_B.weight`, and for DoRA
            `.lora_magnitude_vector`.
        alphas: of each module. Always written: a file without means alpha = rank.
        weights: `<module>.weight` of the base. Needed for DoRA only, where ComfyUI divides a row by its length in the
            base, not in the sum as peft does, so that what is written is scaled to give the same W'.
    """
    tensors: dict[str, Tensor] = {}
    for module in sorted(key.removesuffix(_PEFT_DOWN) for key in state if key.endswith(_PEFT_DOWN)):
        down, up, name = state[module + _PEFT_DOWN], state[module + _PEFT_UP], file_name(prefix, module)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
        tensors[f"{name}.alpha"] = torch.tensor(float(alphas[module]))
        lengths = state.get(module + _PEFT_LENGTHS, state.get(f"{module}{_PEFT_LENGTHS}.weight"))
        if lengths is not None:
            base = weights[f"{module}.weight"].float()
            change = (up.float().flatten(1) @ down.float().flatten(1)).reshape(base.shape)
            new = base + alphas[module] / down.shape[0] * change
            rows = lengths.float().reshape(-1) * _row_lengths(base) / _row_lengths(new)
            tensors[f"{name}.dora_scale"] = rows.reshape(-1, *[1] * (base.ndim - 1))
    return tensors


def _row_lengths(weight: Tensor) -> Tensor:
    return weight.flatten(1).norm(dim=1)


def host_layers(
    unet: Mapping[str, tuple[int, ...]], texts: Iterable[Mapping[str, tuple[int, ...]]]
) -> dict[str, tuple[int, ...]]:
    """Every layer that ComfyUI's loader knows by a name of ours, with the shape of its weight.

    Args:
        unet: shapes of diffusers' UNet by parameter name.
        texts: shapes of each of transformers' text encoders by parameter name.
    """
    layers = {
        file_name(UNET, name.removesuffix(".weight")): shape for name, shape in unet.items() if _matrix(name, shape)
    }
    encoders = list(texts)
    for prefix, shapes in zip(text_prefixes(len(encoders)), encoders, strict=True):
        for name, shape in shapes.items():
            inner = name.removeprefix("text_model.").removesuffix(".weight").split(".", 3)
            if _matrix(name, shape) and inner[:2] == ["encoder", "layers"] and inner[3] in _TEXT_LAYERS:
                layers[file_name(prefix, name.removesuffix(".weight"))] = shape
    return layers


def _matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) in (2, 4)


def check_lora(tensors: Mapping[str, Tensor], layers: Mapping[str, tuple[int, ...]], name: str) -> int:
    """Check that every tensor is one that ComfyUI takes, and fits.

    Args:
        tensors: of the file.
        layers: `host_layers` of the base.
        name: the file's.

    Returns:
        The number of layers.

    Raises:
        PersonalizeError: a tensor that would not be loaded, or of another shape.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        layer, _, part = key.partition(".")
        if layer not in layers or part not in PARTS:
            raise PersonalizeError(f"{key} in {name} has no place in the base model: ComfyUI would not load it.")
        found.setdefault(layer, {})[part] = value
    for layer, parts in found.items():
        missing = [part for part in PARTS[:3] if part not in parts]
        if missing:
            raise PersonalizeError(f"{layer} in {name} has no {missing[0]}: ComfyUI would not load it rightly.")
        down, up, shape = parts["lora_down.weight"], parts["lora_up.weight"], layers[layer]
        # A convolution's `down` has its kernel, and its `up` one of 1 x 1.
        if (up.shape[0], *down.shape[1:]) != shape or up.shape[1] != down.shape[0]:
            raise PersonalizeError(
                f"{layer} in {name} is {tuple(up.shape)} x {tuple(down.shape)}, but the base model's layer is {shape}."
            )
    return len(found)
