"""The pocket model in ComfyUI: every stock node that a user reaches for takes it."""

import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from pack.models.weight_files import read_safetensors, write_safetensors
from pack.training.base_model import load_base, load_pipeline
from pack.training.encoding import read_text
from pack.training.image_encoder import load_image_encoder
from pack.training.pocket.data import pixels as draw_pixels
from pack.training.pocket.data import scene
from safetensors.torch import save_file
from sampling import PROMPT, encode, pixels, sample

CHECKPOINT, ENCODER = "pocket_portraits.safetensors", "pocket_portraits_vision.safetensors"


@pytest.fixture(scope="module")
def pipeline(root):
    pipeline = load_pipeline(root / "models" / "pocket" / "checkpoints" / CHECKPOINT)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_stock_loaders_list_it(host, root):
    assert CHECKPOINT in host.folder_paths.get_filename_list("checkpoints")
    assert "pocket_portraits_ip_adapter.safetensors" in host.folder_paths.get_filename_list("ipadapter")
    assert host.folder_paths.get_full_path("checkpoints", CHECKPOINT).startswith(str(root / "models" / "pocket"))


def test_all_tensors_are_taken(host, caplog):
    """But the mark of v-prediction, which was read."""
    with caplog.at_level("DEBUG"):
        host.nodes.CheckpointLoaderSimple().load_checkpoint(CHECKPOINT)
    told = [record.getMessage() for record in caplog.records]
    told = [text for text in told if re.search("missing|unexpected|left ?over", text, re.IGNORECASE)]
    names = set(re.findall(r"'([\w.]+)'", " ".join(told)))
    assert "v_pred" in names
    assert all(re.search(r"^v_pred$|logit_scale", name) for name in names), told


def test_a_checkpoint_saved_in_the_host_keeps_the_projection_of_texts(loaded, root):
    model, clip, _ = loaded
    name = "cond_stage_model.transformer.text_projection.weight"
    saved = model.model.model_config.process_clip_state_dict_for_saving(dict(clip.get_sd()))
    file = read_safetensors(root / "models" / "pocket" / "checkpoints" / CHECKPOINT)[0]
    torch.testing.assert_close(saved[name].float(), file[name].float())
    assert not [key for key in saved if key.startswith("clip_l.")]


def test_text_encoding_equals_transformers(host, loaded, pipeline):
    for text in (PROMPT, "", "a dog and " * 20):
        states = encode(host, loaded[1], text)[0][0]
        ids = pipeline.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            theirs = pipeline.text_encoder(ids)[0]
        torch.testing.assert_close(states.float()[:, :77], theirs, atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize("clip_skip", [2, 3])
def test_text_of_an_earlier_layer_equals_what_the_trainer_reads(host, root, loaded, clip_skip):
    base = load_base(str(root / "models" / "pocket" / "checkpoints" / CHECKPOINT))
    with torch.no_grad():
        theirs = read_text(base, [PROMPT], clip_skip).states
    clip = host.nodes.CLIPSetLastLayer().set_last_layer(loaded[1], -clip_skip)[0]
    states = encode(host, clip, PROMPT)[0][0]
    torch.testing.assert_close(states.float(), theirs, atol=5e-3, rtol=1e-2)
    assert (states - encode(host, loaded[1], PROMPT)[0][0]).abs().max() > 0.1


@pytest.mark.parametrize(("sampler", "scheduler"), [("ddim", DDIMScheduler), ("euler", EulerDiscreteScheduler)])
@pytest.mark.parametrize("width", [64, 96])
def test_a_picture_equals_diffusers(host, loaded, pipeline, sampler, scheduler, width):
    noise = torch.randn(2, 32, 8, width // 8, generator=torch.Generator().manual_seed(3))
    options = {"set_alpha_to_one": True} if scheduler is DDIMScheduler else {}
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    # The same noisy latent: ComfyUI starts at sigma times the noise, diffusers at a multiple of its own.
    pipeline.scheduler.set_timesteps(20)
    sigma = loaded[0].get_model_object("model_sampling").sigma(torch.tensor(951.0))
    start = noise * sigma if scheduler is EulerDiscreteScheduler else noise * sigma / (sigma**2 + 1) ** 0.5
    ours = pixels(loaded, sample(host, loaded, noise.clone(), sampler=sampler)).numpy()
    theirs = pipeline(
        [PROMPT] * 2,
        latents=start / pipeline.scheduler.init_noise_sigma,
        num_inference_steps=20,
        guidance_scale=4.0,
        width=width,
        height=64,
        output_type="np",
    ).images
    assert ours.shape == theirs.shape == (2, 64, width, 3)
    assert np.abs(ours - theirs).max() * 255 <= 2
    assert theirs.std() > 0.1


def test_previews_are_close_to_the_picture(loaded):
    """The factors are the best linear guess of this VAE's pictures, to a twentieth of what they leave unexplained."""
    image = torch.from_numpy(np.stack([draw_pixels(9, i) for i in range(200) if len(scene(9, i).subjects) == 1]))
    with torch.inference_mode():
        latent = loaded[2].encode(image.float() / 255)
    small = torch.nn.functional.avg_pool2d(image.permute(0, 3, 1, 2).float() / 127.5 - 1, 8)
    x, y = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (latent, small))
    kind = loaded[0].model.latent_format
    ours = x @ torch.tensor(kind.latent_rgb_factors) + torch.tensor(kind.latent_rgb_factors_bias)
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    best = x @ torch.linalg.lstsq(x, y).solution
    assert (ours - y).square().mean() < 1.05 * (best - y).square().mean()
    assert (best - y).var() < 0.1 * y.var()


def test_encoding_and_decoding_a_picture(host, loaded, root):
    from PIL import Image

    picture = Image.open(root / "workflows" / "example_photos" / "01.jpg").convert("RGB").resize((64, 64))
    image = torch.from_numpy(np.asarray(picture).copy())[None].float() / 255
    with torch.inference_mode():
        latent = loaded[2].encode(image)
    assert latent.shape == (1, 32, 8, 8)
    error = (pixels(loaded, latent) - image).square().mean()
    assert -10 * torch.log10(error) > 20


def test_the_stock_lora_loader_changes_the_picture(host, loaded, tmp_path):
    folder = host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    down = torch.randn(4, 64, generator=generator)
    tensors = {"lora_down.weight": down, "lora_up.weight": torch.randn(96, 4, generator=generator)}
    tensors["alpha"] = torch.tensor(4.0)
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    both = {f"{layer}.{key}": value for key, value in tensors.items()}
    both |= {f"{text}.lora_down.weight": down / 10, f"{text}.alpha": torch.tensor(4.0)}
    both |= {f"{text}.lora_up.weight": torch.randn(64, 4, generator=generator)}
    save_file(both, folder / "tiny.safetensors")
    model, clip = host.nodes.LoraLoader().load_lora(loaded[0], loaded[1], "tiny.safetensors", 1.0, 1.0)
    noise = torch.randn(1, 32, 8, 8, generator=generator)
    before = sample(host, loaded, noise.clone(), steps=3)
    assert not torch.equal(sample(host, loaded, noise.clone(), steps=3, model=model), before)
    assert not torch.equal(encode(host, clip, PROMPT)[0][0], encode(host, loaded[1], PROMPT)[0][0])
    assert torch.equal(sample(host, loaded, noise.clone(), steps=3), before)


def test_a_stock_embedding_changes_the_words(host, loaded):
    folder = host.base / "models" / "embeddings"
    folder.mkdir(exist_ok=True)
    save_file({"emb_params": torch.randn(2, 64)}, folder / "mine.safetensors")
    save_file({"emb_params": torch.randn(2, 64)}, folder / "other.safetensors")
    words = ("embedding:mine", "embedding:other", "embedding:gone")
    mine, other, gone = (encode(host, loaded[1], f"a photo of {word}")[0][0] for word in words)
    assert (mine - other).abs().max() > 0.1
    assert (mine - gone).abs().max() > 0.1


def test_the_image_encoder_equals_transformers(host, clip_vision, root):
    reference = load_image_encoder(root / "models" / "pocket" / "clip_vision" / ENCODER)
    image = torch.rand(3, 64, 64, 3)
    with torch.inference_mode():
        ours = clip_vision.encode_image(image)
    from pack.training.pocket.encoders import prepare

    with torch.no_grad():
        theirs = reference(prepare((image * 255).round().byte().numpy()), output_hidden_states=True)
    cosine = torch.nn.functional.cosine_similarity(ours["image_embeds"].float(), theirs.image_embeds)
    assert cosine.min() > 0.999
    assert ours["penultimate_hidden_states"].shape == (3, 65, 128)


def test_a_file_that_is_no_image_encoder(host):
    folder = host.base / "models" / "clip_vision"
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.zeros(1)}, folder / "odd.safetensors")
    with pytest.raises(
        ValueError, match=r"^odd\.safetensors in .* is not an image encoder that ComfyUI knows: use CLIP"
    ):
        host.node("PersonalizeLoadImageEncoder").execute("odd.safetensors")
    with pytest.raises(ValueError, match=r"^gone\.safetensors is not in .*: put it there and refresh\.$"):
        host.node("PersonalizeLoadImageEncoder").execute("gone.safetensors")


def test_an_image_encoder_that_lacks_a_tensor(host, root):
    tensors, about = read_safetensors(root / "models" / "pocket" / "clip_vision" / ENCODER)
    path = host.base / "models" / "clip_vision" / ENCODER
    path.parent.mkdir(exist_ok=True)
    tensors.pop("visual_projection.weight")
    write_safetensors(path, tensors, about)
    try:  # the user's own file of this name comes first
        with pytest.raises(ValueError, match=rf"^{ENCODER} does not hold the .*: 1 tensor is missing and 0 are of"):
            host.node("PersonalizeLoadImageEncoder").execute(ENCODER)
    finally:
        path.unlink()
    assert host.node("PersonalizeLoadImageEncoder").execute(ENCODER)[0] is not None
