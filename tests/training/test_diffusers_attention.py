"""Headless decoupled attention against diffusers' own IP-Adapter."""

import narrow
import pytest
import torch
from pack.models.ip_adapter import IPAdapter
from pack.models.references import References
from pack.training.diffusers_attention import apply_image_prompts

CASES = [(narrow.SD15, "base"), (narrow.SD15, "plus"), (narrow.SD15, "full-face"), (narrow.SDXL, "plus")]


def run(unet, layout, x, text, image_embeds=None):
    added = {} if image_embeds is None else {"image_embeds": [image_embeds]}
    if layout is narrow.SDXL:
        added |= {"text_embeds": torch.ones(2, 1280), "time_ids": torch.full((2, 6), 1024.0)}
    with torch.no_grad():
        return unet(x, 500, text, added_cond_kwargs=added).sample


@pytest.mark.parametrize(("layout", "kind"), CASES, ids=lambda v: v if isinstance(v, str) else v["family"])
def test_equals_diffusers(layout, kind):
    unet = narrow.diffusers_unet(layout)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 16, 24, generator=generator).expand(2, -1, -1, -1)
    text = torch.randn(2, 77, layout["cross"], generator=generator)
    state = narrow.adapter(layout, kind)
    references = narrow.references(type("module", (), {"References": References}), 3)
    adapter = IPAdapter.from_state(state)
    plain = run(unet, layout, x, text)
    before = apply_image_prompts(unet, [adapter.empty_prompt(references), adapter.image_prompt(references)], 0.6)
    ours = run(unet, layout, x, text)
    unet.set_attn_processor(before)
    assert torch.equal(run(unet, layout, x, text), plain)
    unet._load_ip_adapter_weights([state])
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.6]
    features = adapter.features(references)
    zero = torch.zeros_like(features) if kind == "base" else references.zero_patches.expand_as(features)
    embeds = torch.stack((zero, features))
    theirs = run(unet, layout, x, text, embeds[:, :, 0] if kind == "base" else embeds)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    assert float((ours - plain).norm() / plain.norm()) > 1e-3


def test_another_layout_is_an_error():
    adapter = IPAdapter.from_state(narrow.adapter(narrow.SDXL, "base"))
    references = narrow.references(type("module", (), {"References": References}), 1)
    with pytest.raises(ValueError, match="16 cross-attention layers, the adapter 70"):
        apply_image_prompts(narrow.diffusers_unet(narrow.SD15), [adapter.image_prompt(references)], 1.0)
