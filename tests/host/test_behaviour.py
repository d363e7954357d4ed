"""What a user can rely on: Apply IP-Adapter inside ComfyUI's own sampler."""

import narrow
import pytest
import torch

LAYOUT = narrow.SD15


@pytest.fixture(scope="module")
def model(host):
    return narrow.comfy_model(LAYOUT, narrow.diffusers_unet(LAYOUT))


@pytest.fixture(scope="module")
def state():
    return narrow.adapter(LAYOUT, "plus")


@pytest.fixture
def refs(host):
    return narrow.references(host.module("models.references"), 5)


@pytest.fixture
def apply(host):
    execute = host.node("PersonalizeApplyIPAdapter").execute
    return lambda *args, **kwargs: execute(*args, **kwargs)[0]


def evaluate(model, batch=1, timestep=500, size=(16, 24), conds=None):
    positive, negative = conds or narrow.conditionings(LAYOUT)
    x = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(5)) * 10
    return torch.stack(narrow.evaluate(model, positive, negative, x, timestep))


def sample(model, steps=3, cfg=5.0, size=(16, 16), batch=1):
    import comfy.sample

    positive, negative = narrow.conditionings(LAYOUT)
    latent = torch.zeros(batch, 4, *size)
    noise = comfy.sample.prepare_noise(latent, seed=1)
    return comfy.sample.sample(model, noise, steps, cfg, "euler", "normal", positive, negative, latent, seed=1)


def test_weight_zero_is_bit_equal_to_no_adapter(model, state, refs, apply):
    assert torch.equal(sample(apply(model, state, refs, 0.0)), sample(model))


@pytest.mark.parametrize("pooling", ["before projection", "after projection"])
@pytest.mark.parametrize("aggregation", ["average", "max"])
def test_identical_references_equal_one(host, model, state, apply, aggregation, pooling):
    module = host.module("models.references")
    one = narrow.references(module, 1)
    many = module.References(
        one.pooled.expand(5, -1),
        one.patches.expand(5, -1, -1),
        one.zero_patches,
        torch.ones(5),
        tuple("abcde"),
    )
    a = evaluate(apply(model, state, one, 1.0, aggregation, pooling=pooling))
    b = evaluate(apply(model, state, many, 1.0, aggregation, pooling=pooling))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["before projection", "after projection"])
@pytest.mark.parametrize("aggregation", ["average", "max"])
def test_any_order_gives_the_same(host, model, state, refs, apply, aggregation, pooling):
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = host.module("models.references").References(
        refs.pooled[order], refs.patches[order], refs.zero_patches, refs.weights, refs.names
    )
    a = evaluate(apply(model, state, refs, 1.0, aggregation, pooling=pooling))
    b = evaluate(apply(model, state, shuffled, 1.0, aggregation, pooling=pooling))
    assert torch.equal(a, b)


def test_pooling_before_and_after_the_projection_differ(model, state, refs, apply):
    before = evaluate(apply(model, state, refs, 1.0, "average", pooling="before projection"))
    after = evaluate(apply(model, state, refs, 1.0, "average", pooling="after projection"))
    assert float((before - after).norm() / before.norm()) > 1e-3


def test_weight_two_equals_the_reference_twice(host, model, state, apply):
    module = host.module("models.references")
    weighted = narrow.references(module, 3, weights=[2.0, 1.0, 1.0])
    index = torch.tensor([0, 0, 1, 2])
    doubled = module.References(
        weighted.pooled[index], weighted.patches[index], weighted.zero_patches, torch.ones(4), tuple("aabc")
    )
    for aggregation in ("concatenate", "average"):
        a = evaluate(apply(model, state, weighted, 1.0, aggregation))
        b = evaluate(apply(model, state, doubled, 1.0, aggregation))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def attention_output(patched):
    """What the first cross-attention layer gives, before its output projection."""
    seen = []
    block = patched.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2.to_out
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    try:
        evaluate(patched)
    finally:
        handle.remove()
    return seen[0]


def test_stacked_adapters_add_up(host, model, state, refs, apply):
    other_state, other = (
        narrow.adapter(LAYOUT, "base", seed=7),
        narrow.references(host.module("models.references"), 2, 9),
    )
    plain, first, second, both, reverse = (
        attention_output(patched)
        for patched in (
            model,
            apply(model, state, refs, 0.7),
            apply(model, other_state, other, 0.4),
            apply(apply(model, state, refs, 0.7), other_state, other, 0.4),
            apply(apply(model, other_state, other, 0.4), state, refs, 0.7),
        )
    )
    assert float((first - plain).norm()) > 1e-2
    assert float((second - plain).norm()) > 1e-2
    torch.testing.assert_close(both - plain, (first - plain) + (second - plain), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both, reverse, rtol=1e-4, atol=1e-5)


def test_other_packs_patches_stay(model, state, refs, apply):
    calls = []

    def halve(q, k, v, extra_options):
        from comfy.ldm.modules.attention import optimized_attention

        calls.append(extra_options["block"])
        return optimized_attention(q, k, v, extra_options["n_heads"]) * 0.5

    def patch(m):
        m = m.clone()
        m.set_model_attn2_replace(halve, "input", 1)  # a whole block
        m.set_model_attn2_replace(halve, "middle", 0, 0)  # one layer
        return m

    theirs_first = evaluate(apply(patch(model), state, refs, 1.0))
    assert {("input", 1), ("middle", 0)} == set(calls)
    ours_first = evaluate(patch(apply(model, state, refs, 1.0)))
    assert torch.equal(theirs_first, ours_first)
    assert not torch.equal(theirs_first, evaluate(apply(model, state, refs, 1.0)))


def test_start_and_end_percent(model, state, refs, apply):
    sampling = model.get_model_object("model_sampling")
    plain = {t: evaluate(model, timestep=t) for t in (900, 500, 100)}
    late = apply(model, state, refs, 1.0, start_percent=0.4)
    early = apply(model, state, refs, 1.0, end_percent=0.4)
    edge = float(sampling.timestep(torch.tensor(sampling.percent_to_sigma(0.4))))
    assert 500 < edge < 900
    for t, (late_acts, early_acts) in {900: (False, True), 500: (True, False), 100: (True, False)}.items():
        assert torch.equal(evaluate(late, timestep=t), plain[t]) is not late_acts
        assert torch.equal(evaluate(early, timestep=t), plain[t]) is not early_acts
    nothing = apply(model, state, refs, 1.0, start_percent=0.7, end_percent=0.3)
    assert torch.equal(evaluate(nothing), plain[500])


def test_layers(model, state, refs, apply, host, monkeypatch):
    patch = host.module("nodes.attention_patch")
    fired = []
    equation = patch.decoupled_attention
    monkeypatch.setattr(patch, "decoupled_attention", lambda *a, **k: fired.append(k["weight"]) or equation(*a, **k))
    for choice, listed, expected in [
        ("all", "", [0.5] * 16),
        ("style", "", [0.5] * 11),
        ("composition", "", [0.125, 0.5]),
        ("style and composition", "", [0.125] + [0.5] * 12),
        ("list", "6:2, 15", [0.5, 1.0]),
        ("list", "6:0", []),
    ]:
        fired.clear()
        evaluate(apply(model, state, refs, 0.5, layers=choice, layer_list=listed))
        assert sorted(fired) == expected, choice


def test_a_mask_limits_the_references_to_its_place(model, state, refs, apply):
    everywhere = apply(model, state, refs, 1.0)
    white, black = torch.ones(1, 128, 192), torch.zeros(1, 128, 192)
    torch.testing.assert_close(evaluate(apply(model, state, refs, 1.0, mask=white)), evaluate(everywhere))
    assert torch.equal(evaluate(apply(model, state, refs, 1.0, mask=black)), evaluate(model))
    left = torch.zeros(1, 128, 192)
    left[..., :96] = 1
    masked, plain = attention_output(apply(model, state, refs, 1.0, mask=left)), attention_output(model)
    change = (masked - plain).abs().mean(dim=(0, 2)).reshape(16, 24)
    assert float(change[:, :11].min()) > 1e-3
    assert float(change[:, 13:].max()) == 0


def test_each_picture_of_a_batch_can_have_its_mask(model, state, refs, apply):
    masks = torch.stack((torch.ones(128, 192), torch.zeros(128, 192)))
    both = evaluate(apply(model, state, refs, 1.0, mask=masks), batch=2)
    torch.testing.assert_close(both[:, 0], evaluate(apply(model, state, refs, 1.0), batch=2)[:, 0])
    torch.testing.assert_close(both[:, 1], evaluate(model, batch=2)[:, 1])


def test_a_mask_is_cropped_to_a_conditioning_area(model, state, refs, apply):
    positive, negative = narrow.conditionings(LAYOUT)
    right = [[positive[0][0], positive[0][1] | {"area": (16, 8, 0, 16), "strength": 1.0}]]
    left_mask = torch.zeros(1, 128, 192)
    left_mask[..., :112] = 1  # nothing of the area, nor of the cells whose average touches it
    conds = (right, negative)
    masked = evaluate(apply(model, state, refs, 1.0, mask=left_mask), conds=conds)
    assert torch.allclose(masked[0], evaluate(model, conds=conds)[0], atol=1e-5)
    unmasked = evaluate(apply(model, state, refs, 1.0, mask=torch.ones(1, 128, 192)), conds=conds)
    assert not torch.allclose(unmasked[0], masked[0], atol=1e-3)


def test_negative_references_stand_on_the_negative_side(host, model, state, refs, apply):
    other = narrow.references(host.module("models.references"), 3, seed=11)
    ordinary, negated = (evaluate(apply(model, state, refs, 1.0, negative=n)) for n in (None, other))
    assert torch.equal(ordinary[0], negated[0])
    assert not torch.allclose(ordinary[1], negated[1], atol=1e-3)
    positive_of_other = evaluate(apply(model, state, other, 1.0), conds=narrow.conditionings(LAYOUT)[::-1])[0]
    torch.testing.assert_close(negated[1], positive_of_other, rtol=1e-4, atol=1e-4)


def test_several_positives_and_guiders_that_reverse(host, model, state, refs, apply):
    """The sides are told by the conditioning, not by its place in the batch."""
    import comfy.samplers

    positive, negative = narrow.conditionings(LAYOUT)
    patched = apply(model, state, refs, 1.0)
    x = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(5)) * 10
    expected = evaluate(patched)
    seen = {}

    def record(wrapped, noise, sigmas, extra_args, **_):
        guider = wrapped.inner_model
        sigma = guider.inner_model.model_sampling.sigma(torch.tensor([500.0]))
        conds = [guider.conds[name] for name in ("negative", "positive")]  # as DualCFG and others order them
        out = comfy.samplers.calc_cond_batch(guider.inner_model, conds, x, sigma, extra_args["model_options"])
        seen["eps"] = [(x - one) / sigma for one in out]
        return noise

    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds(positive, negative)
    with torch.inference_mode():
        sigma = model.model.model_sampling.sigma(torch.tensor([500.0]))[0]
        sigmas = torch.stack([sigma, torch.tensor(0.0)])
        guider.sample(torch.zeros_like(x), torch.zeros_like(x), comfy.samplers.KSAMPLER(record), sigmas, seed=0)
    torch.testing.assert_close(torch.stack(seen["eps"]), expected.flip(0), rtol=1e-4, atol=1e-4)
    two = narrow.evaluate(patched, positive + positive, negative, x, 500)[0]
    torch.testing.assert_close(two, expected[0], rtol=1e-4, atol=1e-4)


def test_nothing_accumulates(model, state, refs, apply):
    before = {key: (dict(value) if isinstance(value, dict) else value) for key, value in model.model_options.items()}
    pictures = [sample(apply(model, state, refs, 1.0)) for _ in range(3)]
    patched = apply(model, state, refs, 1.0)
    pictures += [sample(patched), sample(patched), sample(patched.clone())]
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)
    assert model.model_options == before
    assert not model.wrappers
    assert not model.patches


def test_the_patch_works_where_only_the_unet_is_called(model, state, refs, apply):
    """Packs that call apply_model themselves, without a sampler."""
    patched = apply(model, state, refs, 1.0)
    positive, _ = narrow.conditionings(LAYOUT)
    options = {"wrappers": patched.wrappers, "cond_or_uncond": [0]}
    sigma = model.model.model_sampling.sigma(torch.tensor([500.0]))
    x = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(5)) * 10
    with torch.inference_mode():
        denoised = model.model.apply_model(x, sigma, c_crossattn=positive[0][0], transformer_options=options)
    torch.testing.assert_close((x - denoised) / sigma, evaluate(patched)[0], rtol=1e-4, atol=1e-4)


def test_accepts_the_wires_of_comfyui_ipadapter_plus(model, state, refs, apply):
    expected = evaluate(apply(model, state, refs, 1.0))
    assert torch.equal(evaluate(apply(model, {"ipadapter": {"model": state}, "clipvision": {}}, refs, 1.0)), expected)


def test_accepts_the_embeds_of_comfyui_ipadapter_plus(host, model, state, refs, apply):
    zero = refs.zero_patches[None]
    expected = evaluate(apply(model, state, refs, 1.0))
    torch.testing.assert_close(evaluate(apply(model, state, refs.patches, 1.0, negative=zero)), expected)
    with pytest.raises(ValueError, match=r"EMBEDS have the shape \(5, 1024\), but .* takes features of patches"):
        apply(model, state, refs.pooled, 1.0)
    with pytest.raises(ValueError, match="connect its neg_embed to negative references"):
        apply(model, state, refs.patches, 1.0)
    base = narrow.adapter(LAYOUT, "base")
    expected = evaluate(apply(model, base, refs, 1.0))
    torch.testing.assert_close(evaluate(apply(model, base, refs.pooled, 1.0)), expected)


def test_gradients_flow_through_the_unet_after_an_ordinary_call(model, state, refs, apply):
    """Methods that look at the gradient of the UNet in the middle of a sampling work on top of it."""
    import comfy.samplers

    with torch.inference_mode():
        patched = apply(model, state, refs, 1.0, mask=torch.rand(1, 128, 192))
    positive, negative = narrow.conditionings(LAYOUT)
    norms = []

    def record(wrapped, noise, sigmas, extra_args, **_):
        guider = wrapped.inner_model
        sigma, conds = sigmas[:1], [guider.conds["positive"]]
        for _ in range(2):
            comfy.samplers.calc_cond_batch(guider.inner_model, conds, noise, sigma, extra_args["model_options"])
            with torch.inference_mode(False), torch.enable_grad():
                x = torch.ones(1, 4, 16, 24).requires_grad_()
                plain = [[{**cond, "model_conds": dict(cond["model_conds"])} for cond in side] for side in conds]
                for cond in plain[0]:
                    for name, value in cond["model_conds"].items():
                        cond["model_conds"][name] = type(value)(value.cond.clone())
                args = (guider.inner_model, plain, x, sigma.clone(), extra_args["model_options"])
                out = comfy.samplers.calc_cond_batch(*args)[0]
                norms.append(float(torch.autograd.grad(out.square().sum(), x)[0].norm()))
        return noise

    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds(positive, negative)
    with torch.inference_mode():
        latent = torch.zeros(1, 4, 16, 24)
        guider.sample(latent, latent, comfy.samplers.KSAMPLER(record), torch.tensor([7.0, 0.0]), seed=0)
    assert len(norms) == 2
    assert norms[0] == norms[1] > 0


def test_what_is_constant_is_made_once_a_sampling(model, state, refs, apply, host, monkeypatch):
    """K' and V' are projected by the node, moved once a sampling, and the mask is scaled once for each resolution."""
    patch = host.module("nodes.attention_patch")
    stacked, scaled = [], []
    stack, resized = patch.stack_prompts, patch._Masks._resized
    monkeypatch.setattr(patch, "stack_prompts", lambda *a: stacked.append(1) or stack(*a))
    monkeypatch.setattr(patch._Masks, "_resized", lambda *a: scaled.append(a[2:]) or resized(*a))
    sample(apply(model, state, refs, 1.0, mask=torch.ones(1, 128, 128)), steps=4)
    assert len(stacked) == 16
    assert sorted(scaled) == sorted([(s, s) for s in (16, 8, 4, 2)] * 2)


def test_masks_that_are_no_numbers_or_fit_no_window(model, state, refs, apply):
    with pytest.raises(ValueError, match="mask has values that are not numbers"):
        apply(model, state, refs, 1.0, mask=torch.full((1, 128, 128), float("nan")))
    patched = apply(model, state, refs, 1.0, mask=torch.rand(4, 128, 128))
    options = {"wrappers": patched.wrappers, "cond_or_uncond": [0]}
    text = narrow.conditionings(LAYOUT)[0][0][0]
    with pytest.raises(ValueError, match="4 masks, but the sampler makes 2 pictures at a time"), torch.inference_mode():
        model.model.apply_model(
            torch.zeros(2, 4, 16, 16), torch.ones(2), c_crossattn=text.expand(2, -1, -1), transformer_options=options
        )
