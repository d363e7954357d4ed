"""Composable Diffusion in the host: the formula at every step, and what the host's own guider does."""

import pytest
import torch
from inprocess import HostError, node
from sampling import controlled, encode

STEPS = 4


@pytest.fixture
def conds(host, loaded):
    """CONDITIONING of a cat, of a dog, and of nothing."""
    return [encode(host, loaded[1], text) for text in ("a cat, on the beach", "a sad dog", "")]


def run(guider, noise, sampler="euler", after=None):
    """Latents; `after` sees each step."""
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "normal", STEPS)
    with torch.inference_mode():
        sample = comfy.samplers.sampler_object(sampler)
        return guider.sample(noise, torch.zeros_like(noise), sample, sigmas, seed=3, disable_pbar=True, callback=after)


def watched(model):
    """A clone, and what it predicts at each step."""
    seen, model = [], model.clone()

    def look(arguments):
        seen.append(arguments["denoised"])
        return arguments["denoised"]

    model.set_model_sampler_post_cfg_function(look)
    return model, seen


def cfg(model, positive, negative, scale):
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(scale)
    return guider


def composed(host, model, concepts, negative, scale=4.0, weights=""):
    return node(host, "ComposeConcepts")(
        model, negative, {f"concept{i}": concept for i, concept in enumerate(concepts)}, weights, scale
    )[0]


def test_the_formula_holds_at_every_step(host, loaded, conds, noise):
    """Of the predictions that one model call gave for all concepts."""
    cat, dog, empty = conds
    model, denoised = watched(loaded[0])
    predicted = []

    def look(arguments):
        predicted.append(arguments["conds_out"])
        return arguments["conds_out"]

    model.set_model_sampler_pre_cfg_function(look)
    run(composed(host, model, [cat, dog], empty, 4.0, "1, -0.5"), noise)
    assert len(predicted) == STEPS
    for (a, u, b), out in zip(predicted, denoised, strict=True):
        torch.testing.assert_close(out, u + 4 * (a - u) - 2 * (b - u), rtol=1e-5, atol=1e-5)
        assert (a - b).abs().max() > 1e-3


def test_one_concept_is_guidance_bit_for_bit(host, loaded, conds, noise):
    cat, _, empty = conds
    for scale in (4.0, 1.0):
        expected = run(cfg(loaded[0], cat, empty, scale), noise)
        assert torch.equal(run(composed(host, loaded[0], [cat], empty, scale), noise), expected)
    assert torch.equal(
        run(composed(host, loaded[0], [cat], empty, 2.0, "2"), noise), run(cfg(loaded[0], cat, empty, 4.0), noise)
    )


@pytest.mark.parametrize("patch", ["RescaleCFG", "Mahiro"])
def test_the_hosts_functions_of_guidance_work_on_one_concept_as_they_do(host, loaded, conds, noise, patch):
    cat, dog, empty = conds
    made = host.nodes.NODE_CLASS_MAPPINGS[patch]
    model = made.execute(loaded[0]).result[0] if hasattr(made, "execute") else made().patch(loaded[0], 0.7)[0]
    assert torch.equal(run(composed(host, model, [cat], empty), noise), run(cfg(model, cat, empty, 4.0), noise))
    assert run(composed(host, model, [cat, dog], empty), noise).isfinite().all()


def test_the_average_of_conditionings_at_n_times_the_scale_is_the_same(host, loaded, conds, noise):
    cat, dog, empty = conds
    expected = run(cfg(loaded[0], cat + dog, empty, 2 * 3.0), noise)
    assert (run(composed(host, loaded[0], [cat, dog], empty, 3.0), noise) - expected).abs().max() < 1e-3


def test_a_concept_that_is_subtracted_from_itself_is_nothing(host, loaded, conds, noise):
    """Where the host's average divides by nearly zero."""
    cat, _, empty = conds
    out = run(composed(host, loaded[0], [cat, cat], empty, 4.0, "1, -1"), noise)
    assert out.isfinite().all()
    assert (out - run(cfg(loaded[0], empty, empty, 1.0), noise)).abs().max() < 1e-3


def test_a_concept_counts_only_where_its_area_or_mask_is(host, loaded, conds, noise):
    cat, dog, empty = conds
    mask = torch.zeros(1, 64, 96)
    mask[:, :, 48:] = 1
    nodes = host.nodes.NODE_CLASS_MAPPINGS
    masked = nodes["ConditioningSetMask"]().append(dog, mask, "default", 1.0)[0]
    area = nodes["ConditioningSetArea"]().append(dog, 48, 64, 48, 0, 1.0)[0]
    model, seen = watched(loaded[0])
    run(composed(host, model, [cat], empty), noise)
    alone = seen[0]
    run(composed(host, model, [cat, dog], empty), noise)
    both = seen[STEPS]
    for part in (masked, area):
        seen.clear()
        run(composed(host, model, [cat, part], empty), noise)
        torch.testing.assert_close(seen[0][..., :6], alone[..., :6], rtol=1e-4, atol=1e-4)
        assert (seen[0][..., 8:] - alone[..., 8:]).abs().max() > 0.01
    seen.clear()
    run(composed(host, model, [cat, masked], empty), noise)
    torch.testing.assert_close(seen[0][..., 6:], both[..., 6:], rtol=1e-4, atol=1e-4)


def test_a_concept_counts_only_in_its_steps(host, loaded, conds, noise):
    cat, dog, empty = conds
    late = host.nodes.NODE_CLASS_MAPPINGS["ConditioningSetTimestepRange"]().set_range(dog, 0.5, 1.0)[0]
    model, seen = watched(loaded[0])
    for concepts in ([cat], [cat, late]):
        run(composed(host, model, concepts, empty), noise)
    differences = [(seen[i] - seen[i + STEPS]).abs().max().item() for i in range(STEPS)]
    assert max(differences[:2]) < 1e-4
    assert differences[3] > 1e-2


def test_a_concept_may_have_a_control_net_of_its_own(host, loaded, conds, noise):
    cat, dog, empty = conds
    model, seen = watched(loaded[0])
    run(cfg(model, dog, empty, 1.0), noise)
    run(cfg(model, controlled(host, loaded, dog), empty, 1.0), noise)
    run(composed(host, model, [cat], empty), noise)
    run(composed(host, model, [cat, dog], empty), noise)
    run(composed(host, model, [cat, controlled(host, loaded, dog)], empty), noise)
    plain, steered, one, both, own = (seen[i * STEPS] for i in range(5))
    assert (steered - plain).abs().max() > 0.01
    torch.testing.assert_close(own - both, 4 * (steered - plain), rtol=1e-3, atol=1e-3)
    assert (both - one).abs().max() > 0.01
    alone = controlled(host, loaded, cat)
    assert torch.equal(
        run(composed(host, loaded[0], [alone], empty), noise), run(cfg(loaded[0], alone, empty, 4.0), noise)
    )


@pytest.mark.parametrize(
    "sampler", ["euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "ddim", "uni_pc", "lcm", "euler_cfg_pp"]
)
def test_with_every_sampler(host, loaded, conds, noise, sampler):
    cat, dog, empty = conds
    guider = composed(host, loaded[0], [cat, dog], empty, 3.0)
    out = run(guider, noise, sampler)
    assert out.isfinite().all()
    assert torch.equal(out, run(guider, noise, sampler)), "queued again it is the same picture"


def graph(text, cfg=4.0):
    return {
        "base": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "pocket_portraits.safetensors"}},
        "empty": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["base", 1], "text": ""}},
        "guider": {
            "class_type": "PersonalizeComposePrompt",
            "inputs": {"model": ["base", 0], "clip": ["base", 1], "text": text, "negative": ["empty", 0], "cfg": cfg},
        },
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}},
        "sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "sigmas": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["base", 0], "scheduler": "normal", "steps": 4, "denoise": 1.0},
        },
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 96, "height": 64, "batch_size": 1}},
        "drawn": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["noise", 0],
                "guider": ["guider", 0],
                "sampler": ["sampler", 0],
                "sigmas": ["sigmas", 0],
                "latent_image": ["latent", 0],
            },
        },
        "decoded": {"class_type": "VAEDecode", "inputs": {"samples": ["drawn", 0], "vae": ["base", 2]}},
        "kept": {"class_type": "PreviewImage", "inputs": {"images": ["decoded", 0]}},
    }


def test_a_text_through_the_executor(host):
    outputs = host.run(graph("a cat AND a dog :0.5 AND NOT a robot"))
    assert list(outputs["guider"]["text"]) == ["1: a cat\n0.5: a dog\n-1: a robot"]
    with pytest.raises(HostError, match=r'Concept 2 of "a cat AND" has no text'):
        host.run(graph("a cat AND"))


def test_what_is_wrong_is_said(host, loaded, conds):
    with pytest.raises(Exception, match="no concepts"):
        composed(host, loaded[0], [], conds[2])
    with pytest.raises(Exception, match="2 weights for 1 concept:"):
        composed(host, loaded[0], [conds[0]], conds[2], 4.0, "1 2")
