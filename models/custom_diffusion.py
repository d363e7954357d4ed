"""Custom Diffusion (Kumari et al. 2023, arXiv:2212.04488): keys and values of the cross-attention, and a word a concept.

The file: the difference W - W0 of each trained matrix, under the names of models.lora, so that ComfyUI's stock LoraLoader
takes it: `lora_unet_<layer>.diff` (`.diff_b` of a bias), or where it is cut to its leading singular values
`.lora_up.weight`, `.lora_down.weight`, `.alpha`. The words are files of Textual Inversion.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import PersonalizeError
from .lora import UNET, file_name
from .weight_files import check_finite

KEYS_AND_VALUES, ALL = ("to_k", "to_v"), ("to_q", "to_k", "to_v", "to_out.0")
"""What trains of each cross-attention: the paper's choice, or all of it."""
RARE = ("ktn", "pll", "ucd")
"""Entries of CLIP's vocabulary that hardly any text has: what the words of concepts start as, in turn."""
CALL = "embedding:"
"""Before a learned word in ComfyUI's prompts."""
PARTS = ("diff", "diff_b", "lora_up.weight", "lora_down.weight", "alpha")


def hold_first(states: Tensor) -> Tensor:
    """Keys or values [B, T, C] of a text, as they are, without a gradient through the token that begins it.

    All texts begin so: what it learned from one would be in every picture.
    """
    return torch.cat([states[:, :1].detach(), states[:, 1:]], dim=1)


def is_trained(module: str, parts: tuple[str, ...]) -> bool:
    """Whether a diffusers module of the UNet is one of `parts` of a cross-attention."""
    attention, _, part = module.rpartition(".attn2.")
    return bool(attention) and part in parts


def leading_rank(values: Tensor, share: float) -> int:
    """How many singular values, sorted and at least one, make up no more than a share of their sum."""
    sums = values.double().cumsum(0)
    return max(1, int((sums <= share * (1 + 1e-9) * sums[-1]).sum()))


def concept_tensors(changes: Mapping[str, Tensor], share: float | None = None) -> dict[str, Tensor]:
    """The file's tensors.

    Args:
        changes: W - W0 by diffusers' parameter name, `...attn2.to_k.weight`.
        share: each matrix is cut to the singular values that make up this share of their sum (the paper: 0.6).
    """
    tensors: dict[str, Tensor] = {}
    for parameter, change in changes.items():
        module, _, kind = parameter.rpartition(".")
        name = file_name(UNET, module)
        if kind == "bias":
            tensors[f"{name}.diff_b"] = change
        elif share is None:
            tensors[f"{name}.diff"] = change
        else:
            u, values, v = torch.linalg.svd(change.float(), full_matrices=False)
            rank = leading_rank(values, share)
            root = values[:rank].sqrt()
            tensors[f"{name}.lora_up.weight"] = (u[:, :rank] * root).contiguous()
            tensors[f"{name}.lora_down.weight"] = (v[:rank] * root[:, None]).contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    return tensors


@dataclass(frozen=True)
class Call:
    """How a prompt calls a concept."""

    text: str
    """As "embedding:dog_ohwx dog"."""
    word: str
    """Of the learned word the name, "dog_ohwx"; empty where there is none."""


def calls_of(trigger: str) -> list[Call]:
    """The concepts of a file, of the trigger that it names: "embedding:a_ohwx dog, embedding:b_zxcv mug"."""
    texts = [part.strip() for part in trigger.split(",") if part.strip()]
    firsts = [text.split()[0] for text in texts]
    words = [first.removeprefix(CALL) if first.startswith(CALL) else "" for first in firsts]
    return [Call(text, word) for text, word in zip(texts, words, strict=True)]


def concept_changes(
    tensors: Mapping[str, Tensor], layers: Mapping[str, tuple[int, ...]], name: str
) -> dict[str, Tensor]:
    """W - W0 of each layer, in fp32, and of a bias, by the file's layer names with `.weight` or `.bias`.

    Args:
        tensors: of the file.
        layers: `models.lora.host_layers` of the base.
        name: the file's.

    Raises:
        PersonalizeError: a tensor that has no place in the base or in such a file, another shape, or numbers that are not
            finite.
    """
    check_finite(tensors, name)
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        layer, _, part = key.partition(".")
        if layer not in layers or part not in PARTS:
            raise PersonalizeError(f"{key} in {name} has no place in the base model: it is no Custom Diffusion for it.")
        found.setdefault(layer, {})[part] = value.float()
    changes = {}
    for layer, parts in found.items():
        if "diff" in parts:
            change = parts["diff"]
        elif parts.keys() >= {"lora_up.weight", "lora_down.weight"}:
            up, down = parts["lora_up.weight"], parts["lora_down.weight"]
            change = up @ down * (float(parts.get("alpha", torch.tensor(len(down)))) / len(down))
        elif parts.keys() == {"diff_b"}:
            change = None
        else:
            raise PersonalizeError(f"{layer} in {name} is not whole: it has {', '.join(parts)} only.")
        if change is not None:
            if tuple(change.shape) != layers[layer]:
                raise PersonalizeError(
                    f"{layer} in {name} is {tuple(change.shape)}, but the base model's layer is {layers[layer]}: it was made "
                    "for another base model."
                )
            changes[f"{layer}.weight"] = change
        if "diff_b" in parts:
            if tuple(parts["diff_b"].shape) != layers[layer][:1]:
                raise PersonalizeError(
                    f"The bias of {layer} in {name} is {tuple(parts['diff_b'].shape)}, but the base model's layer has "
                    f"{layers[layer][0]} outputs: it was made for another base model."
                )
            changes[f"{layer}.bias"] = parts["diff_b"]
    return changes
