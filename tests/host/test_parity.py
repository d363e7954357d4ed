"""The same random weights through ours in ComfyUI and through diffusers' IP-Adapter."""

import narrow
import pytest
import torch

CASES = [(narrow.SD15, kind) for kind in ("base", "plus", "full-face")] + [
    (narrow.SDXL, kind) for kind in ("base", "plus", "full-face")
]


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def unets(host):
    """Each layout's plain diffusers UNet and the MODEL with its weights, made once."""
    made = {}

    def get(layout):
        if layout["family"] not in made:
            unet = narrow.diffusers_unet(layout)
            made[layout["family"]] = unet.state_dict(), narrow.comfy_model(layout, unet)
        return made[layout["family"]]

    return get


@pytest.mark.parametrize(
    ("layout", "kind"), CASES, ids=lambda value: value if isinstance(value, str) else value["family"]
)
def test_equals_diffusers(host, unets, layout, kind, monkeypatch):
    weights, model = unets(layout)
    state = narrow.adapter(layout, kind)
    unet = narrow.diffusers_unet(layout)
    unet.load_state_dict(weights)
    unet._load_ip_adapter_weights([state])
    positive, negative = narrow.conditionings(layout)
    x = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(5)) * 10
    apply = host.node("PersonalizeApplyIPAdapter").execute
    patch = host.module("nodes.attention_patch")
    fired = []
    equation = patch.decoupled_attention
    monkeypatch.setattr(patch, "decoupled_attention", lambda *a, **k: fired.append(1) or equation(*a, **k))
    for n in (1, 4):
        references = narrow.references(host.module("models.references"), n)
        features = references.pooled if kind == "base" else references.patches
        zero = torch.zeros(1, n, 1024) if kind == "base" else references.zero_patches.expand(1, n, -1, -1)
        for weight in (0.0, 0.6, 1.0, -0.5):
            for processor in unet.attn_processors.values():
                if hasattr(processor, "scale"):
                    processor.scale = [weight]
            patched = apply(model, state, references, weight, "concatenate")[0]
            fired.clear()
            ours = narrow.evaluate(patched, positive, negative, x, 500)
            assert len(fired) == (layout["layers"] if weight else 0)
            sides = zip(ours, (positive, negative), (features[None], zero), strict=True)
            for side, conditioning, embeds in sides:
                theirs = narrow.evaluate_diffusers(layout, unet, model, conditioning, x, 500, embeds)
                assert relative(side, theirs) <= 1e-4, (n, weight)
            if weight:
                plain = narrow.evaluate(model, positive, negative, x, 500)
                assert relative(ours[0], plain[0]) > 1e-3, "the references have no effect"
