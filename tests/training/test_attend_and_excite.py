"""Attend-and-Excite against diffusers' own pipeline, on the same narrow model of random weights."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionAttendAndExcitePipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
    pipeline_stable_diffusion_attend_and_excite as reference,
)
from narrow_models import narrow_folder
from pack.models.attend_and_excite import (
    Excitement,
    excitement,
    loss_of,
    map_size,
    pick_level,
    smooth,
    smoothing_kernel,
)
from pack.models.errors import PersonalizeError
from pack.training.attend_and_excite import AttendAndExcite, levels_of

STEPS = 6
SETTINGS = Excitement(steps=4, thresholds={0: 0.0009, 2: 0.00157, 5: 0.9}, scale=4)
PROMPT = "a blue cat and a yellow bowl"
WORDS = [[3], [7]]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """With a UNet whose attention is sharp enough that words compete."""
    folder = narrow_folder("sd15", tmp_path_factory.mktemp("narrow"))
    pipeline = StableDiffusionAttendAndExcitePipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    for name, parameter in pipeline.unet.named_parameters():
        parameter.requires_grad_(False)
        if "attn2.to_k" in name or "attn2.to_q" in name:
            parameter.mul_(6)
    return pipeline


def noise(batch=1, size=16):
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(3))


def ours(pipeline, scheduler, latents, settings=SETTINGS, words=WORDS, **options):
    """The latents of a plain diffusers pipeline with our callback; and what was done."""
    plain = StableDiffusionPipeline(**{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    text = plain.encode_prompt(PROMPT, "cpu", 1, False)[0].expand(len(latents), -1, -1)
    scheduler.set_timesteps(STEPS)
    exciting = AttendAndExcite(plain.unet, scheduler, text, [words] * len(latents), settings, **options)
    first = exciting.before_first(latents * scheduler.init_noise_sigma) / scheduler.init_noise_sigma
    out = plain(
        PROMPT,
        num_images_per_prompt=len(latents),
        latents=first,
        height=latents.shape[-2] * 4,
        width=latents.shape[-1] * 4,
        num_inference_steps=STEPS,
        callback_on_step_end=exciting.callback,
        output_type="latent",
    ).images
    return out, exciting


def test_smoothing_is_the_papers():
    theirs = reference.GaussianSmoothing()
    torch.testing.assert_close(smoothing_kernel(0.5), theirs.weight[0, 0], rtol=1e-6, atol=1e-7)
    assert abs(smoothing_kernel(0.5)[1, 1].item() - 0.3319) < 1e-4
    picture = torch.rand(1, 1, 16, 12)
    padded = torch.nn.functional.pad(picture, (1, 1, 1, 1), mode="reflect")
    torch.testing.assert_close(smooth(picture, 0.5), theirs(padded), rtol=1e-6, atol=1e-7)


def test_loss_and_gradient_are_the_papers():
    cls = StableDiffusionAttendAndExcitePipeline
    maps = torch.rand(16, 16, 77, generator=torch.Generator().manual_seed(0)).mul(4).softmax(-1).double()
    mine, theirs = (maps.clone().requires_grad_(True) for _ in range(2))
    loss = loss_of(excitement(mine[None], [[2], [5], [9]], 0.5))[0]
    expected = cls._compute_loss(cls._compute_max_attention_per_index(theirs * 1, [2, 5, 9]))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (one,), (other,) = torch.autograd.grad(loss, mine), torch.autograd.grad(expected, theirs)
    assert other.abs().max() > 0
    assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("batch", [1, 2])
def test_six_steps_of_ddim_with_refinement(pipeline, monkeypatch, batch):
    config, told = pipeline.scheduler.config, []
    monkeypatch.setattr(reference.logger, "info", told.append)
    pipeline.scheduler = DDIMScheduler.from_config(config)
    expected = pipeline(
        [PROMPT] * batch,
        [[word for (word,) in WORDS]] * batch,
        64,
        64,
        num_inference_steps=STEPS,
        latents=noise(batch),
        max_iter_to_alter=SETTINGS.steps,
        thresholds=dict(SETTINGS.thresholds),
        scale_factor=SETTINGS.scale,
        attn_res=(4, 4),
        output_type="latent",
    ).images
    out, exciting = ours(pipeline, DDIMScheduler.from_config(config), noise(batch))
    assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()
    refined = sum(map(sum, exciting.refined))
    assert refined == sum("Try" in line for line in told)
    assert 20 * batch < refined < 60 * batch, "some thresholds are met, one is not"


@pytest.mark.parametrize(("words", "settings"), [([], SETTINGS), (WORDS, Excitement(steps=0, thresholds={}))])
def test_off_is_plain_sampling_bit_for_bit(pipeline, words, settings):
    plain = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    plain.scheduler = scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    arguments = {"height": 64, "width": 64, "num_inference_steps": STEPS, "output_type": "latent"}
    expected = plain(PROMPT, latents=noise(), **arguments).images
    out, exciting = ours(pipeline, scheduler, noise(), settings, words)
    assert torch.equal(out, expected)
    assert not exciting.refined


def test_every_scheduler_moves_alike_in_variance_preserving_coordinates(pipeline):
    config = dict(pipeline.scheduler.config) | {"timestep_spacing": "linspace"}
    ddim, euler = DDIMScheduler.from_config(config), EulerDiscreteScheduler.from_config(config)
    text, moved = pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0], []
    for scheduler in (ddim, euler):
        scheduler.set_timesteps(4)  # 999, 666, 333, 0
        factor = 1.0 if scheduler is ddim else (scheduler.sigmas[1] ** 2 + 1).sqrt()
        if scheduler is euler:  # as after a step
            scheduler.scale_model_input(noise(), scheduler.timesteps[0])
            scheduler.step(noise(), scheduler.timesteps[0], noise())
        exciting = AttendAndExcite(pipeline.unet, scheduler, text, [WORDS], Excitement(thresholds={}))
        given = {"latents": noise() * factor}
        moved.append(exciting.callback(None, 0, None, given)["latents"] / factor)
    assert ddim.timesteps.float().equal(euler.timesteps.float())
    change = moved[0] - noise()
    assert change.abs().max() > 1e-3
    assert (moved[1] - moved[0]).norm() < 1e-3 * change.norm()


def test_a_picture_without_words_stays_as_it_is(pipeline):
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    text = pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0].expand(2, -1, -1)
    exciting = AttendAndExcite(pipeline.unet, scheduler, text, [WORDS, []], Excitement(thresholds={}))
    moved = exciting.before_first(noise(2))
    assert not torch.equal(moved[0], noise(2)[0])
    assert torch.equal(moved[1], noise(2)[1])


def test_which_layers_have_which_maps(pipeline):
    levels = levels_of(pipeline.unet)
    assert [levels[name] for name in levels] == [0, 0, 1, 1, 2, 2, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]
    assert pick_level(set(levels.values())) == 2
    assert (pick_level({0, 1}), pick_level({1, 2}), pick_level({0, 1}, 1)) == (0, 2, 1)
    with pytest.raises(PersonalizeError, match=r"no attention maps of 1/16 .* but of 1/1, 1/2, 1/4, 1/8"):
        pick_level(set(levels.values()), 4)
    assert map_size(65, 96, 2) == (17, 24)
