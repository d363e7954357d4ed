"""Names of CLIP text encoders' parameters: transformers' to those of single-file checkpoints.

CLIP-L (SD1.5, SDXL's first, the pocket model) keeps transformers' names after a prefix. OpenCLIP (SD2.x's H, SDXL's
second, bigG) has its own, with q, k and v in one matrix and the projection transposed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

PREFIXES = {
    "sd": (("cond_stage_model.transformer.", False),),
    "sd2": (("cond_stage_model.model.", True),),
    "sdxl": (("conditioner.embedders.0.transformer.", False), ("conditioner.embedders.1.model.", True)),
}
"""Of each layout's text encoders: the prefix, and whether it is an OpenCLIP."""
_OUTER = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_INNER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_LAYER = "text_model.encoder.layers."


def with_text_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the `text_model.` in front that transformers from 5.6 on leaves out of a plain text encoder's names."""
    flat = not any(name.startswith("text_model.") for name in state)
    return {f"text_model.{name}" if flat and name != "text_projection.weight" else name: v for name, v in state.items()}


def text_tensors(state: Mapping[str, Tensor], prefix: str, open_clip: bool) -> dict[str, Tensor]:
    """A text encoder's tensors under their single-file names."""
    state = with_text_model(state)
    if not open_clip:
        return {prefix + name: value for name, value in state.items()}
    tensors = {prefix + theirs: state[ours] for ours, theirs in _OUTER.items() if ours in state}
    if "text_projection.weight" in state:
        tensors[f"{prefix}text_projection"] = state["text_projection.weight"].T.contiguous()
    for name, value in state.items():
        if not name.startswith(_LAYER):
            continue
        number, inner = name.removeprefix(_LAYER).split(".", 1)
        block, (module, kind) = f"{prefix}transformer.resblocks.{number}.", inner.rsplit(".", 1)
        if module in _INNER:
            tensors[f"{block}{_INNER[module]}.{kind}"] = value
        elif module == "self_attn.q_proj":
            three = [state[f"{_LAYER}{number}.self_attn.{x}_proj.{kind}"] for x in ("q", "k", "v")]
            tensors[f"{block}attn.in_proj_{kind}"] = torch.cat(three)
    return tensors
