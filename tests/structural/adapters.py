"""IP-Adapter files in every published layout, with random weights: real names and shapes, made on the fly."""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file

SD15_WIDTHS = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
SDXL_WIDTHS = [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10
"""Width of each cross-attention layer in file order (down, up, middle)."""

# name: (kind, width of the image features, width of the text features, widths of the layers)
PUBLISHED = {
    "ip-adapter_sd15": ("base", 1024, 768, SD15_WIDTHS),
    "ip-adapter_sd15_light": ("base", 1024, 768, SD15_WIDTHS),
    "ip-adapter_sd15_vit-G": ("base", 1280, 768, SD15_WIDTHS),
    "ip-adapter-plus_sd15": ("plus", 1280, 768, SD15_WIDTHS),
    "ip-adapter-plus-face_sd15": ("plus", 1280, 768, SD15_WIDTHS),
    "ip-adapter-full-face_sd15": ("full-face", 1280, 768, SD15_WIDTHS),
    "ip-adapter_sdxl": ("base", 1280, 2048, SDXL_WIDTHS),
    "ip-adapter_sdxl_vit-h": ("base", 1024, 2048, SDXL_WIDTHS),
    "ip-adapter-plus_sdxl_vit-h": ("plus", 1280, 2048, SDXL_WIDTHS),
    "ip-adapter-plus-face_sdxl_vit-h": ("plus", 1280, 2048, SDXL_WIDTHS),
}
FACEID = ("ip-adapter-faceid_sd15", "ip-adapter-faceid-plusv2_sd15", "ip-adapter-faceid-portrait_sd15")

Shapes = dict[str, tuple[int, ...]]


def projection_shapes(kind: str, width: int, cross: int) -> Shapes:
    """The `image_proj` part."""
    if kind == "base":
        return {
            "proj.weight": (4 * cross, width),
            "proj.bias": (4 * cross,),
            "norm.weight": (cross,),
            "norm.bias": (cross,),
        }
    if kind == "full-face":
        shapes = {"proj.0": (width, width), "proj.2": (cross, width), "proj.3": (cross,)}
        return {
            f"{key}.{part}": s if part == "weight" else s[:1]
            for key, s in shapes.items()
            for part in ("weight", "bias")
        }
    dim = 1280 if cross == 2048 else min(cross, 768)
    inner = max(dim // 64, 1) * 64
    shapes = {
        "latents": (1, 16, dim),
        "proj_in.weight": (dim, width),
        "proj_in.bias": (dim,),
        "proj_out.weight": (cross, dim),
        "proj_out.bias": (cross,),
        "norm_out.weight": (cross,),
        "norm_out.bias": (cross,),
    }
    for i in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{i}.{norm}.weight": (dim,), f"layers.{i}.{norm}.bias": (dim,)}
        shapes |= {
            f"layers.{i}.0.to_q.weight": (inner, dim),
            f"layers.{i}.0.to_kv.weight": (2 * inner, dim),
            f"layers.{i}.0.to_out.weight": (dim, inner),
            f"layers.{i}.1.1.weight": (4 * dim, dim),
            f"layers.{i}.1.3.weight": (dim, 4 * dim),
        }
    return shapes


def adapter_shapes(kind: str, width: int, cross: int, layers: list[int]) -> dict[str, Shapes]:
    """{"image_proj": {...}, "ip_adapter": {...}} of shapes."""
    keys = {f"{2 * i + 1}.to_{part}_ip.weight": (inner, cross) for i, inner in enumerate(layers) for part in ("k", "v")}
    return {"image_proj": projection_shapes(kind, width, cross), "ip_adapter": keys}


def faceid_shapes(name: str) -> dict[str, Shapes]:
    """The parts of the FaceID layouts that tell them from the others."""
    tokens = 16 if "portrait" in name else 4
    shapes = adapter_shapes("base", 1024, 768, SD15_WIDTHS)
    shapes["image_proj"] = {
        "proj.0.weight": (1024, 512),
        "proj.0.bias": (1024,),
        "proj.2.weight": (tokens * 768, 1024),
        "proj.2.bias": (tokens * 768,),
        "norm.weight": (768,),
        "norm.bias": (768,),
    }
    if "plus" in name:
        shapes["image_proj"]["perceiver_resampler.proj_in.weight"] = (768, 1280)
    if "portrait" not in name:
        shapes["ip_adapter"]["0.to_q_lora.down.weight"] = (128, 320)
    return shapes


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights of a size that keeps activations near 1; norms near the identity."""
    if len(shape) == 1:
        return torch.randn(shape, generator=generator) * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
    return torch.randn(shape, generator=generator) / math.sqrt(fan_in)


def random_adapter(
    kind: str, width: int, cross: int, layers: list[int], seed: int = 0
) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        part: {key: random_tensor(key, shape, generator) for key, shape in shapes.items()}
        for part, shapes in adapter_shapes(kind, width, cross, layers).items()
    }


def view_tensors(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Tensors of any size as overlapping views of small buffers, which is all that torch.save stores of them."""
    buffers: dict[int, torch.Tensor] = {}  # one for each power of two that the weights are scaled by
    tensors = {}
    for name, shape in shapes.items():
        power = round(math.log2(math.prod(shape[1:])) / 2) if len(shape) > 1 else 3
        if power not in buffers:
            generator = torch.Generator().manual_seed(power)
            buffers[power] = torch.randn(1 << 17, generator=generator) / 2**power
        room, strides = buffers[power].numel() - 1, []
        for size in shape:
            strides.append(max(1, room // (2 * size)))
            room -= strides[-1] * (size - 1)
        tensors[name] = buffers[power].as_strided(shape, strides)
    return tensors


def save_adapter(state: dict[str, dict[str, torch.Tensor]], path: Path) -> Path:
    """Flat in a .safetensors, nested in a .bin, as published."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        flat = {f"{part}.{key}": value.contiguous() for part, inner in state.items() for key, value in inner.items()}
        save_file(flat, path)
    else:
        torch.save(state, path)
    return path
