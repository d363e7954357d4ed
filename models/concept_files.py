"""Custom Diffusion's files of other programs: read into differences from the base, and written from them.

- diffusers: `pytorch_custom_diffusion_weights`, whose `<layer>.attn2.processor.to_k_custom_diffusion.weight` are whole
  matrices, and a file for each word, `{"<new1>": [width]}`;
- Adobe, with diffusers: `{"unet": {"<layer>.attn2.to_k.weight": whole matrix}, "modifier_token": {"<new1>": [width]}}`, or
  compressed `{"u": [out, r], "v": [r, in]}` of the difference;
- Adobe, the original: `{"state_dict": {"model.diffusion_model. ...attn2.to_k.weight": whole matrix, "embed": [n, width]}}`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .custom_diffusion import ALL, is_trained
from .errors import PersonalizeError

_PROCESSOR, _SUFFIX = ".processor.", "_custom_diffusion"


@dataclass(frozen=True)
class Concepts:
    """What a file holds."""

    changes: dict[str, Tensor]
    """W - W0 by diffusers' parameter name, in fp32."""
    words: dict[str, Tensor]
    """Vectors [n, width] of the first text encoder's words, by how the file calls them."""


def format_of(weights: Mapping[str, Any]) -> str | None:
    """ "diffusers", "adobe" or "adobe original"; None for another file."""
    if any(f"{_SUFFIX}." in key for key in weights):
        return "diffusers"
    if isinstance(weights.get("unet"), Mapping):
        return "adobe"
    inner = weights.get("state_dict")
    if isinstance(inner, Mapping) and inner and all(key == "embed" or "attn2" in key for key in inner):
        return "adobe original"
    return None


def read_concepts(
    weights: Mapping[str, Any], base: Mapping[str, Tensor], single: Mapping[str, str], name: str
) -> Concepts:
    """Args:
        weights: of the file, as nested as it was saved.
        base: the UNet's parameters by diffusers' names.
        single: `models.unet_keys`: the single-file name of each.
        name: the file's.

    Raises:
        PersonalizeError: it is in none of these formats, or damaged, or a matrix has no place in the base, or another shape.
    """
    kind, words = format_of(weights), dict[str, Tensor]()
    if kind == "diffusers":
        entries: dict[str, Any] = {_layer_name(k): value for k, value in weights.items() if isinstance(value, Tensor)}
    elif kind == "adobe":
        entries, words = dict(weights["unet"]), _words_of(weights.get("modifier_token"), name)
    elif kind == "adobe original":
        ours = {theirs: mine for mine, theirs in single.items()}
        inner = dict(weights["state_dict"])
        rows = inner.pop("embed", torch.zeros(0, 1))
        words = {f"<new{i + 1}>": row for i, row in enumerate(rows)}
        entries = {ours.get(str(key), str(key)): value for key, value in inner.items()}
    else:
        raise PersonalizeError(f"{name} is no Custom Diffusion of diffusers or Adobe.")
    changes = {}
    for key, value in entries.items():
        if key not in base or not is_trained(key.rpartition(".")[0], ALL):
            raise PersonalizeError(f"{key} in {name} has no place in the base model: it was made for another one.")
        whole = base[key].float()
        cut = isinstance(value, Mapping)
        parts = [value.get("u"), value.get("v")] if cut else [value]
        if any(not isinstance(part, Tensor) or not part.isfinite().all() for part in parts):
            raise PersonalizeError(f"{key} in {name} is no matrix of finite numbers: the file is damaged.")
        change = (value["u"].float() @ value["v"].float()) if cut else value.float()
        if change.shape != whole.shape:
            raise PersonalizeError(
                f"{key} in {name} is {tuple(change.shape)}, but the base model's is {tuple(whole.shape)}: it was made for "
                "another base model."
            )
        changes[key] = change if cut else change - whole
    if not changes:
        raise PersonalizeError(f"{name} has no matrix of a layer: there is nothing to convert.")
    return Concepts(changes, {word: torch.atleast_2d(vectors) for word, vectors in words.items()})


def _words_of(given: Any, name: str) -> dict[str, Tensor]:
    """Raises PersonalizeError where these are no vectors by their names."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or any(not isinstance(vector, Tensor) for vector in given.values()):
        raise PersonalizeError(f"modifier_token in {name} does not name vectors: the file is damaged.")
    return {str(word): vector for word, vector in given.items()}


def _layer_name(key: str) -> str:
    """`x.attn2.processor.to_k_custom_diffusion.weight` -> `x.attn2.to_k.weight`."""
    return key.replace(_PROCESSOR, ".").replace(_SUFFIX, "")


def diffusers_weights(changes: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Any]:
    """What diffusers' `load_attn_procs` takes; it counts processors, so that those of self-attention are there, empty.

    Keys and values that did not train are the base's: its format has both of every layer.
    """
    layers = {key.rpartition(".attn")[0] for key in base if key.endswith(".attn2.to_k.weight")}
    out: dict[str, Any] = {}
    for layer in sorted(layers):
        out[f"{layer}.attn1.processor"] = {}
        for part in ("to_k", "to_v"):
            out[f"{layer}.attn2.processor.{part}{_SUFFIX}.weight"] = _whole(
                f"{layer}.attn2.{part}.weight", changes, base
            )
        if f"{layer}.attn2.to_q.weight" in changes:
            out[f"{layer}.attn2.processor.to_q{_SUFFIX}.weight"] = _whole(f"{layer}.attn2.to_q.weight", changes, base)
            for kind in ("weight", "bias"):
                key = f"{layer}.attn2.to_out.0.{kind}"
                out[f"{layer}.attn2.processor.to_out{_SUFFIX}.0.{kind}"] = _whole(key, changes, base)
    return out


def adobe_weights(
    changes: Mapping[str, Tensor], base: Mapping[str, Tensor], words: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Adobe's `delta.bin`: whole matrices, and a vector a word.

    Raises:
        PersonalizeError: a word has several vectors.
    """
    if several := [word for word, vectors in words.items() if len(vectors) != 1]:
        raise PersonalizeError(
            f"{several[0]} has {len(words[several[0]])} vectors, but Adobe's format holds one a word."
        )
    return {
        "unet": {key: _whole(key, changes, base) for key in changes},
        "modifier_token": {word: vectors[0] for word, vectors in words.items()},
    }


def _whole(key: str, changes: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Tensor:
    whole = base[key].float()
    return whole + changes[key].float() if key in changes else whole.clone()
