"""Structural models for a real ComfyUI, with random weights, made on the fly.

- full shapes ("sd15", "sdxl") for the unpatched stock loader: every tensor a view of small buffers, 3 MB a file;
- a miniature of SD1.5 ("miniature"), registered as one more family, and a small image encoder, so that the shipped
  workflows run in seconds at their real resolution.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from .adapters import random_adapter, random_tensor, save_adapter, view_tensors

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
# Heads of one width instead of eight a layer: ComfyUI's attention on the CPU takes time by the head.
MINIATURE_HEADS = {"num_heads": -1, "num_head_channels": 32}
MINIATURE_UNET = UNET | SD15_LAYOUT | MINIATURE_HEADS | {"model_channels": 32, "context_dim": 64}
MINIATURE_WIDTHS = [32, 32, 64, 64, 128, 128] + [128] * 3 + [64] * 3 + [32] * 3 + [128]
MINIATURE_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "vocab_size": 49408,
    "eos_token_id": 49407,
    "layer_norm_eps": 1e-5,
    "projection_dim": 64,
    "num_positions": 77,
}
SMALL_VISION = {
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 64,
    "image_size": 224,
    "intermediate_size": 128,
    "layer_norm_eps": 1e-5,
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": 32,
    "projection_dim": 48,
    "torch_dtype": "float32",
}


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


def miniature_checkpoint(path: Path) -> Path:
    """SD1.5 in miniature, for the family that this pack registers."""
    shapes = _unet_shapes(MINIATURE_UNET) | _vae_shapes()
    shapes |= _text_shapes(MINIATURE_TEXT, "cond_stage_model.transformer.")
    save_file(_random(shapes, seed=2), path)
    return path


def small_image_encoder(path: Path) -> Path:
    """A CLIP vision encoder of three layers."""
    import comfy.clip_model
    import comfy.ops

    model = comfy.clip_model.CLIPVisionModelProjection(SMALL_VISION, torch.float32, "meta", comfy.ops.manual_cast)
    save_file(_random({key: tuple(value.shape) for key, value in model.state_dict().items()}, seed=3), path)
    return path


def miniature_adapter(kind: str, path: Path, seed: int = 0) -> Path:
    """An adapter for the miniature and the small image encoder."""
    width = SMALL_VISION["projection_dim"] if kind == "base" else SMALL_VISION["hidden_size"]
    return save_adapter(random_adapter(kind, width, MINIATURE_UNET["context_dim"], MINIATURE_WIDTHS, seed), path)


def register() -> None:
    """Let the stock loaders take the miniature and the small image encoder."""
    import comfy.clip_vision
    import comfy.sd1_clip
    import comfy.supported_models
    import comfy.supported_models_base

    if any(model.__name__ == "StructuralMiniature" for model in comfy.supported_models.models):
        return

    class TextEncoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(
                device=device,
                dtype=dtype,
                textmodel_json_config=dict(MINIATURE_TEXT),
                return_projected_pooled=False,
                model_options=model_options or {},
            )

    class Text(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=TextEncoder)

    class Words(comfy.sd1_clip.SDTokenizer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs, embedding_size=MINIATURE_TEXT["hidden_size"])

    class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=Words)

    class StructuralMiniature(comfy.supported_models.SD15):
        unet_config = comfy.supported_models.SD15.unet_config | {"context_dim": 64, "model_channels": 32}
        unet_extra_config = MINIATURE_HEADS

        def clip_target(self, state_dict=None):
            return comfy.supported_models_base.ClipTarget(Tokenizer, Text)

    comfy.supported_models.models.append(StructuralMiniature)
    stock_loader = comfy.clip_vision.load_clipvision_from_sd

    def load_clipvision_from_sd(sd, prefix="", convert_keys=False):
        embedding = sd.get("vision_model.embeddings.class_embedding")
        if embedding is None or embedding.shape[0] != SMALL_VISION["hidden_size"]:
            return stock_loader(sd, prefix, convert_keys)
        return small_clip_vision(sd)

    comfy.clip_vision.load_clipvision_from_sd = load_clipvision_from_sd


def small_clip_vision(state):
    """The small image encoder as the host's CLIP_VISION."""
    import tempfile

    import comfy.clip_vision

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"  # 0.8.0 takes a path only
        config.write_text(json.dumps(SMALL_VISION))
        encoder = comfy.clip_vision.ClipVisionModel(str(config))
    encoder.load_sd(state)
    return encoder
