"""Checkpoints of full SD1.5 and SDXL shapes through the unpatched stock loader, with adapters as published."""

import gc

import pytest
import torch
from PIL import Image
from structural import checkpoints
from structural.adapters import PUBLISHED, adapter_shapes, save_adapter, view_tensors


@pytest.fixture
def references_file(host):
    """References as a ViT-H gives them (257 patch tokens), saved."""
    module = host.module("models.references")
    generator = torch.Generator().manual_seed(0)
    references = module.References(
        torch.randn(2, 1024, generator=generator),
        torch.randn(2, 257, 1280, generator=generator),
        torch.randn(257, 1280, generator=generator),
        torch.ones(2),
        ("a", "b"),
    )
    path = host.base / "output" / "references" / "vit_h.safetensors"
    references.save(path)
    return path.name


@pytest.mark.parametrize(
    ("family", "adapter"), [("sd15", "ip-adapter-plus_sd15"), ("sdxl", "ip-adapter-plus_sdxl_vit-h")]
)
def test_a_picture_from_full_shapes(host, references_file, family, adapter):
    import comfy.model_management

    models = host.base / "models"
    for folder in ("checkpoints", "ipadapter"):
        (models / folder).mkdir(exist_ok=True)
    checkpoint = checkpoints.full_checkpoint(family, models / "checkpoints" / f"{family}.ckpt")
    assert checkpoint.stat().st_size < 20e6
    kind, width, cross, layers = PUBLISHED[adapter]
    if family == "sdxl":
        layers = [320] * len(layers)  # as wide as the checkpoint's
    state = {part: view_tensors(shapes) for part, shapes in adapter_shapes(kind, width, cross, layers).items()}
    save_adapter(state, models / "ipadapter" / f"{adapter}.bin")
    applied = {"weight": 0.8, "aggregation": "concatenate", "pooling": "before projection", "start_percent": 0.0}
    applied |= {"end_percent": 1.0, "layers": "all", "layer_list": ""}
    sampler = {"seed": 1, "steps": 1, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint.name}},
        "2": {"class_type": "PersonalizeLoadIPAdapter", "inputs": {"file": f"{adapter}.bin"}},
        "3": {"class_type": "PersonalizeLoadReferences", "inputs": {"file": references_file, "weights": ""}},
        "4": {
            "class_type": "PersonalizeApplyIPAdapter",
            "inputs": {"model": ["1", 0], "ip_adapter": ["2", 0], "references": ["3", 0]} | applied,
        },
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a toy"}},
        "6": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "7": {
            "class_type": "KSampler",
            "inputs": sampler
            | {"model": ["4", 0], "positive": ["5", 0], "negative": ["5", 0], "latent_image": ["6", 0]},
        },
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["1", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": family}},
    }
    pictures = {}
    for weight in (0.8, 0.0):
        prompt["4"]["inputs"]["weight"] = weight
        outputs = host.run(prompt)
        pictures[weight] = Image.open(host.base / "output" / outputs["9"]["images"][0]["filename"])
    assert pictures[0.8].size == (64, 64)
    assert pictures[0.8].tobytes() != pictures[0.0].tobytes()
    host.executor.reset()
    comfy.model_management.unload_all_models()
    gc.collect()
