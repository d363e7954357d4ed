"""Single files headless: the pocket model and full shapes of Stable Diffusion by the same code, offline."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from narrow_models import narrow_folder, narrow_vae
from pack.models.errors import PersonalizeError
from pack.models.vae_keys import PREFIX, vae_tensors
from pack.models.weight_files import read_safetensors, write_safetensors
from pack.training import base_model
from pack.training.base_model import load_base, load_pipeline
from pack.training.export import checkpoint_tensors
from pack.training.image_encoder import load_image_encoder

CHECKPOINT = "pocket_portraits.safetensors"


@pytest.fixture(scope="module")
def file(root):
    return root / "models" / "pocket" / "checkpoints" / CHECKPOINT


def test_the_pocket_model_comes_back_bit_for_bit(file):
    pipeline = load_pipeline(file, torch.float16)
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    state, metadata = read_safetensors(file)
    again = checkpoint_tensors(pipeline.unet, [pipeline.text_encoder], pipeline.vae, "sd", v_prediction=True)
    assert set(state) - set(again) == {"cond_stage_model.transformer.text_projection.weight"}
    assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in again.items())
    assert metadata["modelspec.license"] == "Apache-2.0"


def test_it_makes_a_picture_and_follows_the_seed(file):
    pipeline = load_pipeline(file)
    pipeline.set_progress_bar_config(disable=True)

    def picture(seed, prompt="a cat"):
        generator = torch.Generator().manual_seed(seed)
        return pipeline(prompt, width=64, height=64, num_inference_steps=4, generator=generator).images[0]

    assert picture(1).size == (64, 64)
    assert picture(1).tobytes() == picture(1).tobytes()
    assert picture(1).tobytes() != picture(2).tobytes()
    assert picture(1).tobytes() != picture(1, "a dog").tobytes()


def test_the_prediction_type_is_told_from_the_file(file, tmp_path):
    state, _ = read_safetensors(file)
    del state["v_pred"]
    write_safetensors(tmp_path / "epsilon.safetensors", state, {})
    scheduler = load_pipeline(tmp_path / "epsilon.safetensors").scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize(("family", "scale"), [("sd15", 0.18215), ("sdxl", 0.13025)])
@pytest.mark.parametrize("layout", ["single file", "diffusers"])
def test_another_vae_has_the_scale_of_the_family(tmp_path, monkeypatch, family, scale, layout):
    for name in ("sd15", "sdxl"):  # the shipped configurations, with narrow networks
        config = json.loads((base_model.CONFIGS / name / "vae" / "config.json").read_text())
        (tmp_path / "configs" / name / "vae").mkdir(parents=True)
        narrow = {"block_out_channels": [8] * 4, "norm_num_groups": 4}
        (tmp_path / "configs" / name / "vae" / "config.json").write_text(json.dumps(config | narrow))
    where = narrow_folder(family, tmp_path / "base")
    monkeypatch.setattr(base_model, "CONFIGS", tmp_path / "configs")
    state = narrow_vae(4).state_dict()
    tensors = state if layout == "diffusers" else {k.removeprefix(PREFIX): v for k, v in vae_tensors(state).items()}
    write_safetensors(tmp_path / "vae.safetensors", tensors, {})
    vae = load_base(str(where), vae=str(tmp_path / "vae.safetensors")).pipeline.vae
    assert vae.config.scaling_factor == scale
    assert all(torch.equal(value, state[name]) for name, value in vae.state_dict().items())


def test_what_is_no_base_model(file, tmp_path, root):
    with pytest.raises(PersonalizeError, match=r"^gone\.safetensors is not in "):
        load_pipeline(tmp_path / "gone.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(PersonalizeError, match=r"^broken\.safetensors in .* is damaged or cut short"):
        load_pipeline(broken)
    encoder = root / "models" / "pocket" / "clip_vision" / "pocket_portraits_vision.safetensors"
    with pytest.raises(PersonalizeError, match=r"^pocket_portraits_vision\.safetensors is not a checkpoint"):
        load_pipeline(encoder)
    lora = root / "models" / "pocket" / "loras" / "pocket_woman_lora.safetensors"
    with pytest.raises(
        PersonalizeError, match=r"^pocket_woman_lora\.safetensors is a LoRA, not a checkpoint: move it to"
    ):
        load_pipeline(lora)
    with pytest.raises(PersonalizeError, match=r"is no image encoder that is supported"):
        load_image_encoder(file)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("first_stage_model.taesd_decoder.3.", "first_stage_model.taesd_decoder.3.conv.0.weight and 5 other tensors"),
        ("first_stage_model.taesd_decoder.1.bias", "first_stage_model.taesd_decoder.1.bias"),
        ("first_stage_model.taesd_decoder.1.", "first_stage_model.taesd_decoder.1.weight and 1 other tensor"),
        ("model.diffusion_model.time_embed.0.weight", "model.diffusion_model.time_embed.0.weight"),
        (
            "model.diffusion_model.input_blocks.1.0.in_layers.",
            "model.diffusion_model.input_blocks.1.0.in_layers.0.weight and 3 other tensors",
        ),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.",
            "the text encoder's encoder.layers.1.mlp.fc1.weight and 1 other tensor",
        ),
    ],
)
def test_an_incomplete_checkpoint_is_one_sentence(gone, said, file, tmp_path):
    state = {name: value for name, value in read_safetensors(file)[0].items() if not name.startswith(gone)}
    write_safetensors(tmp_path / "part.safetensors", state, {})
    with pytest.raises(PersonalizeError) as error:
        load_pipeline(tmp_path / "part.safetensors")
    assert str(error.value).replace("the text encoder's text_model.", "the text encoder's ") == (
        f"part.safetensors in {tmp_path} is incomplete ({said} not in it): take a whole checkpoint."
    )


def test_a_tensor_of_another_shape_is_one_sentence(file, tmp_path):
    state = read_safetensors(file)[0] | {"first_stage_model.taesd_decoder.3.conv.0.bias": torch.zeros(3)}
    write_safetensors(tmp_path / "other.safetensors", state, {})
    with pytest.raises(
        PersonalizeError, match=r"^other\.safetensors in [^\n]* cannot be loaded \([^\n]*\): take another"
    ):
        load_pipeline(tmp_path / "other.safetensors")


def test_a_checkpoint_without_vae_takes_another(file, tmp_path):
    state = {name: value for name, value in read_safetensors(file)[0].items() if not name.startswith(PREFIX)}
    write_safetensors(tmp_path / "bare.safetensors", state, {})
    with pytest.raises(
        PersonalizeError, match=r"^bare\.safetensors has no VAE: give one with --vae_path, or take a whole"
    ):
        load_base(str(tmp_path / "bare.safetensors"))
    own = narrow_vae(4)
    own.save_pretrained(tmp_path / "vae")
    vae = load_base(str(tmp_path / "bare.safetensors"), vae=str(tmp_path / "vae")).pipeline.vae
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in vae.state_dict().items())


def test_a_family_that_is_not_supported(file, tmp_path):
    state = {name: value for name, value in read_safetensors(file)[0].items() if name.startswith("model.")}
    key = "model.diffusion_model.input_blocks.0.0.weight"
    state[key] = state[key].repeat(2, 1, 1, 1)
    write_safetensors(tmp_path / "wide.safetensors", state, {})
    with pytest.raises(PersonalizeError, match=r"UNet width 192, text features of width 64\): SD1\.5, SD2\.x and SDXL"):
        load_pipeline(tmp_path / "wide.safetensors")
