"""Layer names and image projections against diffusers."""

import narrow
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
)
from pack.models.blocks import SD15, SDXL
from pack.models.ip_adapter import IPAdapter
from structural.adapters import PUBLISHED, random_adapter


def diffusers_names(layout, layers_per_block=2):
    """The module name of every layer in diffusers' UNet2DConditionModel."""
    span = layers_per_block + 1
    names = {}
    for layer in layout.file_order():
        if layer.block == "middle":
            place = "mid_block.attentions.0"
        elif layer.block == "input":
            place = f"down_blocks.{(layer.id - 1) // span}.attentions.{(layer.id - 1) % span}"
        else:
            place = f"up_blocks.{layer.id // span}.attentions.{layer.id % span}"
        names[layer] = f"{place}.transformer_blocks.{layer.depth}.attn2"
    return names


@pytest.mark.parametrize(("layout", "unet"), [(SD15, narrow.SD15), (SDXL, narrow.SDXL)], ids=["SD15", "SDXL"])
def test_file_order_is_that_of_diffusers_attention_processors(layout, unet):
    with torch.device("meta"):
        model = UNet2DConditionModel(**unet["diffusers"])
    processors = [name.removesuffix(".processor") for name in model.attn_processors]
    names = diffusers_names(layout)
    assert [names[layer] for layer in layout.file_order()] == processors[1::2]


def diffusers_projection(state):
    """diffusers' own conversion of an official image projection."""
    model = UNet2DConditionModel(**narrow.SD15["diffusers"])
    return model._convert_ip_adapter_image_proj_to_diffusers(state["image_proj"], low_cpu_mem_usage=False)


@pytest.mark.parametrize(
    "name", [n for n in PUBLISHED if "light" not in n and "face_" not in n.replace("full-face", "")]
)
def test_projection_equals_diffusers(name):
    kind, width, cross, layers = PUBLISHED[name]
    state = random_adapter(kind, width, cross, [8] * len(layers))
    adapter = IPAdapter.from_state(state)
    reference = diffusers_projection(state).eval()
    assert type(reference) in (ImageProjection, IPAdapterPlusImageProjection, IPAdapterFullImageProjection)
    features = torch.randn(2, 1 if kind == "base" else 257, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = reference(features[:, 0] if kind == "base" else features)
    ours = adapter.tokens(features)
    assert ours.shape == theirs.shape
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
