"""Attend-and-Excite in the host: which samplers it moves, what it leaves, and what else works with it."""

import pytest
import torch
from diffusers import DDIMScheduler
from inprocess import HostError, node
from narrow import SD15, comfy_model, conditionings, diffusers_unet
from pack.training.attend_and_excite import AttendAndExcite
from pack.training.shared import Excitement
from sampling import controlled, encode

STEPS = 6
PROMPT = "a cat and a dog, on the beach"
FEW = {"steps": 4, "thresholds": "0:0.05, 2:0.6", "refinements": 3}
MOVED = ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "ddim", "lcm", "heun", "dpmpp_sde", "euler_cfg_pp")
REFUSED = ("uni_pc", "dpm_adaptive", "dpm_fast")


def run(model, positive, negative, noise, sampler="euler", latent=None, mask=None, steps=STEPS, cfg=4.0):
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    with torch.inference_mode():
        return guider.sample(
            noise,
            torch.zeros_like(noise) if latent is None else latent,
            comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler,
            sigmas,
            denoise_mask=mask,
            seed=3,
            disable_pbar=True,
        )


@pytest.fixture
def empty(host, loaded):
    return encode(host, loaded[1], "")


def excited(host, loaded, words="cat, dog", prompt=PROMPT, model=None, **values):
    return node(host, "AttendAndExcite")(model or loaded[0], loaded[1], prompt, words, **{**FEW, **values})


@pytest.mark.parametrize("sampler", MOVED)
def test_samplers_that_are_moved(host, loaded, empty, noise, sampler):
    model, positive = excited(host, loaded)
    told = encode(host, loaded[1], PROMPT)
    plain = run(loaded[0], told, empty, noise, sampler)
    moved = run(model, positive, empty, noise, sampler)
    assert moved.isfinite().all()
    assert (moved - plain).abs().max() > 0.01
    assert torch.equal(moved, run(model, positive, empty, noise, sampler)), "queued again it is the same picture"
    assert torch.equal(plain, run(loaded[0], told, empty, noise, sampler)), "nothing is left on the model"


@pytest.mark.parametrize("sampler", REFUSED)
def test_samplers_that_cannot_be_moved_are_named(host, loaded, empty, noise, sampler):
    model, positive = excited(host, loaded)
    with pytest.raises(Exception, match=f"does not work with the sampler {sampler}, which"):
        run(model, positive, empty, noise, sampler)
    told = encode(host, loaded[1], PROMPT)
    assert run(loaded[0], told, empty, noise, sampler).isfinite().all()


@pytest.mark.parametrize("values", [{"words": ""}, {"steps": 0, "thresholds": ""}])
def test_off_it_is_plain_sampling_bit_for_bit(host, loaded, empty, noise, values):
    model, positive = excited(host, loaded, **values)
    expected = run(loaded[0], encode(host, loaded[1], PROMPT), empty, noise)
    assert torch.equal(run(model, positive, empty, noise), expected)


def test_the_words_are_looked_at_more(host, loaded, empty, noise):
    """By the maps of the model's own steps."""
    reached = []
    for values in ({"words": ""}, {"steps": STEPS, "thresholds": "0:0.6, 1:0.7", "refinements": 10}):
        model, positive = excited(host, loaded, **values)
        model, record = node(host, "RecordAttentionMaps")(model)
        run(model, positive, empty, noise)
        attention = record.of(1)[2]
        places = [[2], [5]]
        excitement = host.module("models.attend_and_excite").excitement
        reached.append(torch.stack([excitement(one[None], places, 0.5, 0.2)[0].min() for one in attention]))
    assert (reached[1] > reached[0]).all()


def test_the_low_memory_switch_changes_no_picture(host, loaded, empty, noise):
    model, positive = excited(host, loaded)
    careful, same = excited(host, loaded, low_memory=True)
    torch.testing.assert_close(
        run(careful, same, empty, noise), run(model, positive, empty, noise), rtol=1e-4, atol=1e-4
    )
    unet = loaded[0].model.diffusion_model
    assert not any("forward" in vars(module) for module in unet.modules())


def test_a_batch_is_its_pictures(host, loaded, empty, noise):
    model, positive = excited(host, loaded)
    both = run(model, positive, empty, noise)
    for i in range(2):
        torch.testing.assert_close(run(model, positive, empty, noise[i : i + 1]), both[i : i + 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(4, 8, 8), (1, 8, 20), (1, 13, 9)])
def test_any_size_and_batch(host, loaded, empty, size):
    count, height, width = size
    noise = torch.randn(count, 32, height, width, generator=torch.Generator().manual_seed(0))
    for resolution in ("auto", "1/1", "1/2"):
        model, positive = excited(host, loaded, resolution=resolution)
        assert run(model, positive, empty, noise, steps=2).isfinite().all()


def test_weighted_and_long_prompts(host, loaded, empty, noise):
    long = "a (cat:1.3) " + "and flowers, " * 50 + "and a (dog:0.7)"
    model, positive = excited(host, loaded, prompt=long)
    assert positive[0][0].shape[1] > 77 * 1
    plain = run(loaded[0], encode(host, loaded[1], long), empty, noise)
    assert (run(model, positive, empty, noise) - plain).abs().max() > 0.01


def test_areas_masks_and_timestep_ranges_of_its_conditioning(host, loaded, empty, noise):
    model, positive = excited(host, loaded)
    nodes = host.nodes.NODE_CLASS_MAPPINGS
    plain = encode(host, loaded[1], PROMPT)
    rest = encode(host, loaded[1], "a robot")
    mask = torch.zeros(1, 64, 96)
    mask[:, :, 48:] = 1
    for change in (
        lambda cond: nodes["ConditioningSetMask"]().append(cond, mask, "default", 1.0)[0],
        lambda cond: nodes["ConditioningSetArea"]().append(cond, 48, 64, 48, 0, 1.0)[0],
        lambda cond: nodes["ConditioningSetTimestepRange"]().set_range(cond, 0.0, 0.5)[0],
    ):
        moved = run(model, change(positive) + rest, empty, noise)
        assert moved.isfinite().all()
        assert (moved - run(loaded[0], change(plain) + rest, empty, noise)).abs().max() > 1e-3
    late = nodes["ConditioningSetTimestepRange"]().set_range(positive, 0.9, 1.0)[0]
    same = nodes["ConditioningSetTimestepRange"]().set_range(plain, 0.9, 1.0)[0]
    few, own = excited(host, loaded, steps=2, thresholds="")
    late = nodes["ConditioningSetTimestepRange"]().set_range(own, 0.9, 1.0)[0]
    assert torch.equal(run(few, late + rest, empty, noise), run(loaded[0], same + rest, empty, noise))


def test_what_an_inpainting_mask_keeps_is_kept(host, loaded, empty, noise):
    model, positive = excited(host, loaded)
    latent = torch.randn(2, 32, 8, 12, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 48:] = 1
    moved = run(model, positive, empty, noise, latent=latent, mask=mask)
    plain = run(loaded[0], encode(host, loaded[1], PROMPT), empty, noise, latent=latent, mask=mask)
    assert (moved - plain)[..., 6:].abs().max() > 1e-3
    torch.testing.assert_close(moved[..., :6], plain[..., :6], rtol=1e-4, atol=1e-4)


def test_with_ip_adapter_in_either_order(host, loaded, empty, noise, models, clip_vision):
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    adapter = node(host, "LoadIPAdapter")("base.safetensors")[0]
    references = node(host, "EncodeReferences")(clip_vision, {"image0": image})[0]

    def adapted(model):
        return node(host, "ApplyIPAdapter")(model, adapter, references, 1.0)[0]

    first, positive = excited(host, loaded, model=adapted(loaded[0]))
    second, other = excited(host, loaded)
    one, two = run(first, positive, empty, noise), run(adapted(second), other, empty, noise)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert (one - run(second, other, empty, noise)).abs().max() > 0.01


def test_with_a_control_net(host, loaded, empty, noise):
    model, positive = excited(host, loaded)
    with_control = controlled(host, loaded, positive)
    moved = run(model, with_control, empty, noise)
    assert torch.equal(moved, run(model, with_control, empty, noise)), "queued again it is the same picture"
    assert (moved - run(model, positive, empty, noise)).abs().max() > 0.01
    told = encode(host, loaded[1], PROMPT)
    assert (moved - run(loaded[0], controlled(host, loaded, told), empty, noise)).abs().max() > 0.01
    without = run(model, controlled(host, loaded, positive, 1e-9), empty, noise)
    torch.testing.assert_close(without, run(model, positive, empty, noise), rtol=1e-3, atol=1e-3)
    assert not any(weight.grad is not None for weight in with_control[0][1]["control"].control_model.parameters())


def test_inside_and_headless_agree(host):
    """ComfyUI's euler is DDIM without noise: the same weights in diffusers, the same latents."""
    import comfy.samplers

    unet = diffusers_unet(SD15)
    model = comfy_model(SD15, unet)
    positive, negative = conditionings(SD15)
    text = positive[0][0]
    settings = Excitement(steps=4, thresholds={0: 0.02, 2: 0.03}, refinements=4, scale=2000.0)
    places = [[2], [5, 6]]
    excitation, capture = host.module("nodes.excitation"), host.module("nodes.attention_capture")
    own = host.module("models.attend_and_excite").Excitement(4, {0: 0.02, 2: 0.03}, 2000.0, 4)
    layers = tuple(layer for layer, level in capture.layer_levels(model, "").items() if level == 2)
    patched = excitation.Excitation("here", places, own, layers, False).apply_to(model)
    marked = [[text, {**positive[0][1], excitation.KEY: "here"}]]

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(5)
    alphas = scheduler.alphas_cumprod
    sigmas = torch.tensor([float((1 - alphas[t]) ** 0.5 / alphas[t] ** 0.5) for t in scheduler.timesteps])
    last = (1 - scheduler.final_alpha_cumprod) ** 0.5 / scheduler.final_alpha_cumprod**0.5
    sigmas = torch.cat([sigmas, last[None]])
    z = torch.randn(1, 4, 24, 32, generator=torch.Generator().manual_seed(5))

    def inside(model, cond):
        scale = (sigmas[0] ** 2 + 1) ** 0.5
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(cond, negative)
        guider.set_cfg(5.0)
        seen = []

        def euler(model, x, sigmas, extra_args, callback, disable):
            x = x * (scale / sigmas[0])  # the host gives sigma z
            for i in range(len(sigmas) - 1):
                denoised = model(x, sigmas[i] * x.new_ones([1]), **extra_args)
                x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
            seen.append(x / (sigmas[-1] ** 2 + 1) ** 0.5)
            return x

        with torch.inference_mode():
            guider.sample(z, torch.zeros_like(z), comfy.samplers.KSAMPLER(euler), sigmas, seed=0)
        return seen[-1]

    def headless(move):
        unwanted, latents = negative[0][0], z.clone()
        ours = AttendAndExcite(unet, scheduler, text, [places], settings, level=2)
        if move:
            latents = ours.before_first(latents)
        for i, t in enumerate(scheduler.timesteps):
            with torch.no_grad():
                u, c = unet(torch.cat([latents] * 2), t, torch.cat([unwanted, text])).sample.chunk(2)
                latents = scheduler.step(u + 5 * (c - u), t, latents).prev_sample
            if move:
                latents = ours.callback(None, i, t, {"latents": latents})["latents"]
        return latents

    torch.testing.assert_close(inside(model, positive), headless(False), rtol=1e-4, atol=1e-4)
    moved = headless(True)
    assert (moved - headless(False)).abs().max() > 0.01
    torch.testing.assert_close(inside(patched, marked), moved, rtol=1e-3, atol=1e-3)


def graph(words="cat, dog", sampler="euler", positive=("excited", 1), show=""):
    return {
        "base": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "pocket_portraits.safetensors"}},
        "empty": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["base", 1], "text": ""}},
        "excited": {
            "class_type": "PersonalizeAttendAndExcite",
            "inputs": {
                "model": ["base", 0], "clip": ["base", 1], "prompt": PROMPT, "words": words, "scale": 20.0,
                "resolution": "auto", "low_memory": False, **FEW,
            },
        },
        "recorded": {
            "class_type": "PersonalizeRecordAttentionMaps",
            "inputs": {"model": ["excited", 0], "resolution": "auto"},
        },
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 96, "height": 64, "batch_size": 2}},
        "drawn": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["recorded", 0], "positive": list(positive), "negative": ["empty", 0],
                "latent_image": ["latent", 0], "seed": 1, "steps": 4, "cfg": 4.0, "sampler_name": sampler,
                "scheduler": "normal", "denoise": 1.0,
            },
        },
        "decoded": {"class_type": "VAEDecode", "inputs": {"samples": ["drawn", 0], "vae": ["base", 2]}},
        "shown": {
            "class_type": "PersonalizeShowAttentionMaps",
            "inputs": {
                "maps": ["recorded", 1], "image": ["decoded", 0], "clip": ["base", 1], "prompt": PROMPT, "words": show,
                "show": "each step", "conditioning": 1,
            },
        },
        "kept": {"class_type": "PreviewImage", "inputs": {"images": ["shown", 0]}},
    }  # fmt: skip


def test_through_the_executor(host):
    outputs = host.run(graph())
    assert len(outputs["kept"]["images"]) == 2
    for values, sentence in (
        ({"words": "cat, bird"}, r'"bird" is not in the prompt, whose words are: a, cat, and, dog, on, the, beach'),
        ({"words": '"cat'}, "A quote has no end"),
        ({"positive": ("empty", 0)}, "does not get the conditioning of Attend-and-Excite"),
        ({"sampler": "uni_pc"}, "does not work with the sampler uni_pc"),
        ({"show": "bird"}, '"bird" is not in the prompt'),
    ):
        with pytest.raises(HostError, match=sentence):
            host.run(graph(**values))
    assert len(host.run(graph())["kept"]["images"]) == 2


def test_what_is_wrong_is_said(host, loaded):
    model, _ = excited(host, loaded)
    with pytest.raises(Exception, match="write all words into one node"):
        excited(host, loaded, model=model)
    for thresholds in ("0", "a:1", "-1:0.5", "3:1.5"):
        with pytest.raises(Exception, match="is not a step and a value from 0 to 1"):
            excited(host, loaded, thresholds=thresholds)
    with pytest.raises(Exception, match=r"no attention maps of 1/8 of the latent, but of 1/1, 1/2"):
        excited(host, loaded, resolution="1/8")
    maps = node(host, "RecordAttentionMaps")(loaded[0])[1]
    with pytest.raises(Exception, match="No attention maps were recorded"):
        node(host, "ShowAttentionMaps")(maps, torch.zeros(1, 64, 64, 3), loaded[1], PROMPT)


def test_recording_changes_no_picture_and_maps_are_shown_over_it(host, loaded, empty, noise):
    positive = encode(host, loaded[1], PROMPT)
    model, record = node(host, "RecordAttentionMaps")(loaded[0])
    expected = run(loaded[0], positive, empty, noise)
    assert torch.equal(run(model, positive, empty, noise), expected)
    maps = record.of(1)
    assert maps.shape == (STEPS, 2, 8, 12, 77)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    show = node(host, "ShowAttentionMaps")
    pixels = torch.rand(2, 64, 96, 3)
    sheets, masks = show(record, pixels, loaded[1], PROMPT, 'cat, "on the beach"')
    assert masks.shape == (2 * 2, 64, 96)
    assert masks.amax((1, 2)).min() > 0.9
    assert sheets.shape[0] == 2
    each, masks = show(record, pixels, loaded[1], PROMPT, "", "each step")
    assert masks.shape == (2 * STEPS * 7, 64, 96)
    assert each.shape[1] > 4 * sheets.shape[1]
    assert each.shape[2] > 3 * sheets.shape[2]
    with pytest.raises(Exception, match="2 pictures of 12:8, but the image is 1 of 64x64"):
        show(record, torch.zeros(1, 64, 64, 3), loaded[1], PROMPT)
    with pytest.raises(Exception, match="attention maps of 1 conditioning, not of 2"):
        show(record, pixels, loaded[1], PROMPT, "", "average", 2)


def test_it_can_be_cancelled(host, loaded, empty, noise, monkeypatch):
    import comfy.model_management

    model, positive = excited(host, loaded)
    asked = []

    def interrupted():
        asked.append(1)
        if len(asked) == 5:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model, positive, empty, noise)
    monkeypatch.undo()
    assert run(model, positive, empty, noise).isfinite().all()
    unet = loaded[0].model.diffusion_model
    assert not any("forward" in vars(module) for module in unet.modules())
