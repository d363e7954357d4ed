"""Checkpoints of full shapes for the unpatched stock loader, with random weights, made on the fly.

Every tensor is a view of small buffers: 3 MB a file.
"""

import json
from pathlib import Path

import torch

from .adapters import random_tensor, view_tensors

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "use_checkpoint": False,
    "legacy": False,
    "use_temporal_attention": False,
    "adm_in_channels": None,
}
SD15_LAYOUT = {
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "channel_mult": [1, 2, 4, 4],
    "use_linear_in_transformer": False,
    "num_heads": 8,
}
SDXL_LAYOUT = {
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "channel_mult": [1, 2, 4],
    "use_linear_in_transformer": True,
    "num_head_channels": 64,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
SD15_UNET = UNET | SD15_LAYOUT | {"model_channels": 320, "context_dim": 768}
# Real in everything that the stock loader looks at (depths, text widths); one width for all levels keeps it at 1.1 B.
SDXL_UNET = UNET | SDXL_LAYOUT | {"model_channels": 320, "context_dim": 2048, "channel_mult": [1, 1, 1]}


def _unet_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    with torch.device("meta"):
        unet = UNetModel(**config, dtype=torch.float32, device="meta")
    return {f"model.diffusion_model.{key}": tuple(value.shape) for key, value in unet.state_dict().items()}


def _text_shapes(config: dict, prefix: str) -> dict[str, tuple[int, ...]]:
    import comfy.ops
    from comfy.clip_model import CLIPTextModel

    model = CLIPTextModel(config, torch.float32, "meta", comfy.ops.manual_cast)
    return {
        f"{prefix}{key}": tuple(value.shape)
        for key, value in model.state_dict().items()
        if not key.startswith("text_projection")
    }


def _open_clip_shapes(config: dict, prefix: str) -> dict[str, tuple[int, ...]]:
    """The second text encoder of SDXL, as its checkpoints name it."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, width),
    }
    for i in range(config["num_hidden_layers"]):
        block = f"transformer.resblocks.{i}."
        for name, shape in {
            "attn.in_proj": (3 * width, width),
            "attn.out_proj": (width, width),
            "mlp.c_fc": (inner, width),
            "mlp.c_proj": (width, inner),
        }.items():
            joint = "_" if name.endswith("in_proj") else "."
            shapes |= {f"{block}{name}{joint}weight": shape, f"{block}{name}{joint}bias": shape[:1]}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
    return {f"{prefix}{key}": shape for key, shape in shapes.items()}


def _vae_shapes() -> dict[str, tuple[int, ...]]:
    from comfy.taesd.taesd import TAESD

    return {f"first_stage_model.{key}": tuple(value.shape) for key, value in TAESD().state_dict().items()}


def _host_config(name: str) -> dict:
    import comfy.sd1_clip

    return json.loads((Path(comfy.sd1_clip.__file__).parent / name).read_text())


def full_checkpoint(family: str, path: Path) -> Path:
    """A .ckpt of full SD1.5 or SDXL shapes that the unpatched stock loader takes; 3 MB on disk."""
    text_l = _host_config("sd1_clip_config.json")
    if family == "sd15":
        shapes = _unet_shapes(SD15_UNET) | _text_shapes(text_l, "cond_stage_model.transformer.")
    else:
        shapes = _unet_shapes(SDXL_UNET) | _text_shapes(text_l, "conditioner.embedders.0.transformer.")
        shapes |= _open_clip_shapes(_host_config("clip_config_bigg.json"), "conditioner.embedders.1.model.")
    tensors = view_tensors(shapes) | _random(_vae_shapes(), seed=1)
    torch.save({"state_dict": tensors}, path)
    return path


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: random_tensor(key, shape, generator) for key, shape in shapes.items()}
    constants = {"vae_scale": 1.0, "vae_shift": 0.0}
    for key in tensors:
        if key.rpartition(".")[2] in constants:
            tensors[key] = torch.tensor(constants[key.rpartition(".")[2]])
    return tensors
