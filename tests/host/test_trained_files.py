"""Files of the trainers in ComfyUI: through the stock nodes and through ours."""

import logging
import os
import shutil

import narrow
import pytest
import torch
from diffusers import StableDiffusionPipeline
from finetuning import CHECKPOINT, photos, train
from inprocess import BASE, HostError, node, patched
from pack.training import run
from pack.training.base_model import load_base, load_pipeline
from safetensors.torch import load_file, save_file

FOLDERS = {"lora": "loras", "dora": "loras", "word": "embeddings", "full": "checkpoints", "delta": "loras"}


class Files:
    """One file of each method, and the weights that the trainer had when it wrote it."""

    def __init__(self, host, root, folder):
        pictures = photos(folder / "photos")
        self.weights: dict[str, dict[str, torch.Tensor]] = {}
        common = {"learning_rate": 5e-3, "save_precision": "fp32"}
        lora = common | {"train_text_encoder": True, "text_encoder_lr": 5e-3, "lora_layers": "all", "rank": 4}
        full = {"learning_rate": 2e-3, "train_text_encoder": True, "text_encoder_lr": 2e-3, "save_as": "both"}
        for name, method, options in (
            ("lora", "lora", lora | {"lora_alpha": 2.0}),
            ("dora", "lora", lora | {"use_dora": True}),
            ("word", "textual_inversion", common | {"num_vectors": 2, "learning_rate": 0.1}),
            ("full", "dreambooth", full),
        ):
            with pytest.MonkeyPatch.context() as patch:
                self._keep(patch, method, name)
                paths = train(method, root, pictures, folder / name, output_name=f"my_{name}", **options)
            for path in paths:
                kind = "delta" if ".delta." in path.name else name
                target = host.base / "models" / FOLDERS[kind]
                target.mkdir(exist_ok=True)
                shutil.copy(path, target / path.name)

    def _keep(self, patch, method, name):
        made = run.METHODS[method][1]
        write = made.write

        def keeping(this, *arguments):
            pipeline = this.base.pipeline
            for module in (pipeline.unet, pipeline.text_encoder):
                for layer in module.modules():
                    if hasattr(layer, "merge"):
                        layer.merge()
            weights = {f"unet.{key}": value.clone() for key, value in pipeline.unet.state_dict().items()}
            weights |= {f"text.{key}": value.clone() for key, value in pipeline.text_encoder.state_dict().items()}
            self.weights[name] = {key.replace(".base_layer", ""): value for key, value in weights.items()}
            for module in (pipeline.unet, pipeline.text_encoder):
                for layer in module.modules():
                    if hasattr(layer, "unmerge"):
                        layer.unmerge()
            return write(this, *arguments)

        patch.setattr(made, "write", keeping)


@pytest.fixture(scope="module")
def files(host, root, tmp_path_factory):
    return Files(host, root, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def other(host, root):
    """Another pocket model."""
    tensors = load_file(root / CHECKPOINT)
    tensors["model.diffusion_model.time_embed.0.bias"] += 0.01
    folder = host.base / "models" / "checkpoints"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "other.safetensors")
    return host.nodes.CheckpointLoaderSimple().load_checkpoint("other.safetensors")


def host_names(root):
    """The networks' parameters by our names, and those names in the host."""
    base = load_base(str(root / CHECKPOINT), torch.float32)
    names = {f"unet.{key}": value.removeprefix("model.") for key, value in base.unet_names().items()}
    for key in base.pipeline.text_encoder.state_dict():
        names[f"text.{key}"] = f"clip_l.transformer.text_model.{key.removeprefix('text_model.')}"
    before = {f"unet.{key}": value for key, value in base.pipeline.unet.state_dict().items()}
    before |= {f"text.{key}": value for key, value in base.pipeline.text_encoder.state_dict().items()}
    return names, before


def close_to_trained(files, name, root, model, clip, strength=1.0, of_change=1e-3, of_weight=1e-6):
    """Whether every weight of MODEL and CLIP is the trainer's; returns how many differ from the base's."""
    names, before = host_names(root)
    changed = 0
    for key, target in names.items():
        trained, base = files.weights[name][key].float(), before[key].float()
        ours = patched(model if key.startswith("unet.") else clip.patcher, target)
        change = strength * (trained - base)
        bound = of_change * change.abs().max() + of_weight * trained.abs().max()
        assert (ours - base - change).abs().max() <= bound, key
        changed += bool(change.any())
    return changed


def loaded_without_complaint(caplog):
    return not [record for record in caplog.records if "not loaded" in record.getMessage() or record.levelno >= 40]


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_lora_by_the_stock_loader_and_ours(host, root, files, loaded, name, caplog):
    file = f"my_{name}.safetensors"
    with caplog.at_level(logging.INFO):
        stock = host.nodes.LoraLoader().load_lora(loaded[0], loaded[1], file, 1.0, 1.0)
        model, clip, trigger = node(host, "LoadLoRA")(loaded[0], file, 1.0, 1.0, loaded[1])
    assert loaded_without_complaint(caplog)
    assert trigger == "ohwx woman"
    layers = {key.split(".")[0] for key in load_file(host.base / "models" / "loras" / file)}
    for made, one in ((stock[0], stock[1]), (model, clip)):
        assert len(made.patches) + len(one.patcher.patches) == len(layers)
        assert close_to_trained(files, name, root, made, one) == len(layers)
    half, _, _ = node(host, "LoadLoRA")(loaded[0], file, 0.5, 0.0)
    assert {key: value[0][0] for key, value in half.patches.items()} == dict.fromkeys(half.patches, 0.5)


def test_a_lora_in_diffusers(host, root, files):
    pipeline = load_pipeline(root / CHECKPOINT)
    pipeline.load_lora_weights(str(host.base / "models" / "loras" / "my_lora.safetensors"))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    _, before = host_names(root)
    for part, module in (("unet", pipeline.unet), ("text", pipeline.text_encoder)):
        for key, value in module.state_dict().items():
            trained = files.weights["lora"][f"{part}.{key}"]
            bound = 1e-3 * (trained - before[f"{part}.{key}"]).abs().max() + 1e-6 * trained.abs().max()
            assert (value - trained).abs().max() <= bound, key


def encode(host, clip, text):
    with torch.inference_mode():
        return host.nodes.CLIPTextEncode().encode(clip, text)[0][0][0]


def test_a_word_in_a_prompt(host, root, files, loaded):
    model, clip, trigger = node(host, "LoadTextualInversion")(loaded[0], "my_word.safetensors", 1.0, loaded[1])
    assert (model, clip) == loaded[:2]
    assert trigger == "embedding:my_word"
    ours = encode(host, loaded[1], f"a photo of {trigger} smiling")
    assert not torch.equal(ours, encode(host, loaded[1], "a photo of my_word smiling"))
    pipeline: StableDiffusionPipeline = load_pipeline(root / CHECKPOINT)
    pipeline.load_textual_inversion(str(host.base / "models" / "embeddings" / "my_word.safetensors"), token="<word>")
    prompt = pipeline.maybe_convert_prompt("a photo of <word> smiling", pipeline.tokenizer)
    ids = pipeline.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(ours.float(), pipeline.text_encoder(ids)[0], atol=5e-3, rtol=1e-2)
    assert node(host, "LoadTextualInversion")(loaded[0], "my_word.safetensors", 0.8)[2] == "(embedding:my_word:0.8)"


def test_words_of_others(host, files, loaded):
    folder = host.base / "models" / "embeddings"
    (folder / "people").mkdir()
    shutil.copy(folder / "my_word.safetensors", folder / "people" / "anna.safetensors")
    (vectors,) = load_file(folder / "my_word.safetensors").values()
    torch.save({"string_to_param": {"*": vectors}, "name": "anna", "step": 9}, folder / "a1111.pt")
    torch.save({"string_to_param": {"*": torch.zeros(2, 768)}}, folder / "wide.pt")
    load = node(host, "LoadTextualInversion")
    ours = encode(host, loaded[1], "a photo of embedding:my_word smiling")
    for file, word in (("people/anna.safetensors", "embedding:people/anna"), ("a1111.pt", "embedding:a1111")):
        trigger = load(loaded[0], file, 1.0)[2]
        assert trigger == word
        assert torch.equal(encode(host, loaded[1], f"a photo of {trigger} smiling"), ours)
    with pytest.raises(ValueError, match=r"^wide\.pt has vectors of width 768, but the pocket model needs 64"):
        load(loaded[0], "wide.pt", 1.0)
    for name in ("my word", "my(word)"):
        shutil.copy(folder / "my_word.safetensors", folder / f"{name}.safetensors")
        with pytest.raises(
            ValueError, match=r"^A prompt cannot call .* rename it, to \"my_word_?\.safetensors\" say\.$"
        ):
            load(loaded[0], f"{name}.safetensors", 1.0)


def test_a_checkpoint_by_the_stock_loader_and_ours(host, root, files, caplog):
    with caplog.at_level(logging.INFO):
        stock = host.nodes.CheckpointLoaderSimple().load_checkpoint("my_full.safetensors")
        model, clip, vae, trigger = node(host, "LoadDreamBooth")("my_full.safetensors", 1.0)
    assert loaded_without_complaint(caplog)
    assert trigger == "ohwx woman"
    for made in (stock, (model, clip, vae)):
        changed = close_to_trained(files, "full", root, made[0], made[1], of_weight=1e-3)
        assert changed > 250
        assert made[2] is not None


def test_a_difference_by_the_stock_loader_and_ours(host, root, files, loaded, caplog):
    file = "my_full.delta.safetensors"
    with caplog.at_level(logging.INFO):
        stock = host.nodes.LoraLoader().load_lora(loaded[0], loaded[1], file, 1.0, 1.0)
        model, clip, vae, trigger = node(host, "LoadDreamBooth")(file, 1.0, *loaded[:3])
        half = node(host, "LoadDreamBooth")(file, 0.5, *loaded[:3])
    assert loaded_without_complaint(caplog)
    assert trigger == "ohwx woman"
    assert vae is loaded[2]
    for made, one, strength in ((stock[0], stock[1], 1.0), (model, clip, 1.0), (half[0], half[1], 0.5)):
        assert close_to_trained(files, "full", root, made, one, strength) > 250


def test_a_difference_by_any_name(host, root, files, loaded):
    models = host.base / "models"
    difference = models / "loras" / "my_full.delta.safetensors"
    shutil.copy(difference, models / "loras" / "renamed.safetensors")
    shutil.copy(difference, models / "loras" / "my_full.safetensors")
    shutil.copy(models / "checkpoints" / "my_full.safetensors", models / "checkpoints" / "odd.delta.safetensors")
    inputs = host.node("PersonalizeLoadDreamBooth").INPUT_TYPES()
    options = inputs["required"]["file"][1]["options"]
    wanted = ["my_full.delta.safetensors", "loras/my_full.safetensors", "renamed.safetensors"]
    example = "pocket_woman.delta.safetensors"
    assert [name for name in options if name != example] == wanted + host.folder_paths.get_filename_list("checkpoints")
    assert example in options
    for load, file in [("DreamBooth", file) for file in wanted[1:]] + [("Personalization", wanted[1])]:
        model, clip, vae, trigger = node(host, f"Load{load}")(file, 1.0, *loaded[:3])
        assert (vae, trigger) == (loaded[2], "ohwx woman")
        assert close_to_trained(files, "full", root, model, clip) > 250
    for load, file in (
        ("DreamBooth", "my_full.safetensors"),
        ("DreamBooth", "odd.delta.safetensors"),
        ("Personalization", "checkpoints/my_full.safetensors"),
    ):
        model, _, vae, trigger = node(host, f"Load{load}")(file, 1.0, *loaded[:3])
        assert trigger == "ohwx woman"
        assert vae is not loaded[2]
        assert not model.patches


def test_thousands_of_loras_are_listed_fast(host, files, monkeypatch):
    """A file is opened once, unless it changes."""
    trained_files = host.module("nodes.trained_files")
    opened = []

    def counting(path, mode):
        opened.append(path.name)
        return open(path, mode)

    monkeypatch.setattr(trained_files, "open", counting, raising=False)
    trained_files._is_dreambooth.cache_clear()
    host.node("PersonalizeLoadDreamBooth").INPUT_TYPES()
    assert "my_lora.safetensors" in opened
    opened.clear()
    path = host.base / "models" / "loras" / "my_lora.safetensors"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    host.node("PersonalizeLoadDreamBooth").INPUT_TYPES()
    assert opened == ["my_lora.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_base_is_known_in_any_precision(host, files, other, dtype):
    import comfy.sd

    def load(name):
        path = host.folder_paths.get_full_path("checkpoints", name)
        return comfy.sd.load_checkpoint_guess_config(path, output_vae=False, model_options={"dtype": dtype})[:2]

    model, clip = load(BASE)
    assert model.model.diffusion_model.time_embed[0].bias.dtype == dtype
    node(host, "LoadDreamBooth")("my_full.delta.safetensors", 1.0, model, clip)
    for name in ("my_full.safetensors", "other.safetensors"):
        with pytest.raises(ValueError, match="the model is another of its family"):
            node(host, "LoadDreamBooth")("my_full.delta.safetensors", 1.0, *load(name))


def graph(file, strength, **links):
    sampler = {"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    wires = {"model": ["2", 0], "positive": ["3", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": BASE}},
        "2": {
            "class_type": "PersonalizeLoadPersonalization",
            "inputs": {"file": file, "strength": strength, "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
            | links,
        },
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 1], "text": ["2", 3]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {"class_type": "KSampler", "inputs": sampler | wires},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["2", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "trained"}},
    }


def test_one_loader_for_all(host, files):
    from PIL import Image

    def picture(file, strength):
        outputs = host.run(graph(file, strength))
        return Image.open(host.base / "output" / outputs["7"]["images"][0]["filename"]).tobytes()

    names = ["loras/my_lora", "loras/my_dora", "embeddings/my_word", "checkpoints/my_full", "loras/my_full.delta"]
    seen = {name: picture(f"{name}.safetensors", 1.0) for name in names}
    assert len(set(seen.values())) == len(names)
    assert seen["loras/my_full.delta"] != picture("loras/my_full.delta.safetensors", 0.5)
    # in use, the base's weights are patched in place: it is still known as the base
    assert seen["loras/my_full.delta"] == picture("loras/my_full.delta.safetensors", 1.0)


def test_another_base(host, files, loaded, other, caplog):
    narrow_model = narrow.comfy_model(narrow.SD15, narrow.diffusers_unet(narrow.SD15))
    lora, word = node(host, "LoadLoRA"), node(host, "LoadTextualInversion")
    for call in (
        lambda: lora(narrow_model, "my_lora.safetensors", 1.0, 1.0),
        lambda: word(narrow_model, "my_word.safetensors", 1.0),
        lambda: node(host, "LoadDreamBooth")("my_full.delta.safetensors", 1.0, narrow_model),
    ):
        with pytest.raises(ValueError, match=r"^my_.* was trained on the pocket model \(pocket_portraits\.safetens"):
            call()
    with pytest.raises(ValueError, match=r"is the difference of a trained model from pocket_portraits.*another of its"):
        node(host, "LoadDreamBooth")("my_full.delta.safetensors", 1.0, *other[:3])
    with caplog.at_level(logging.INFO):
        lora(other[0], "my_lora.safetensors", 1.0, 1.0, other[1])
    with pytest.raises(ValueError, match=r"is the difference of a trained model from pocket_portraits.*another of its"):
        lora(other[0], "my_full.delta.safetensors", 1.0, 1.0, other[1])
    assert "was trained on pocket_portraits.safetensors; on another checkpoint it may act differently" in caplog.text


def test_files_of_others_and_wrong_ones(host, files, loaded):
    loras = host.base / "models" / "loras"
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(
        {f"{layer}.lora_down.weight": torch.zeros(4, 768), f"{layer}.lora_up.weight": torch.zeros(1280, 4)},
        loras / "sd15.safetensors",
    )
    with pytest.raises(
        ValueError, match=r"is \(96, 64\) in this model, but \(1280, 768\) in sd15\.safetensors: it was"
    ):
        node(host, "LoadLoRA")(loaded[0], "sd15.safetensors", 1.0, 1.0)
    save_file({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, loras / "flux.safetensors")
    with pytest.raises(
        ValueError, match=r"^None of the 1 tensors in flux\.safetensors is for this model: it was made for"
    ):
        node(host, "LoadLoRA")(loaded[0], "flux.safetensors", 1.0, 1.0)
    with pytest.raises(HostError, match=r"^sd15\.safetensors does not say how it was trained: use the loader of its"):
        host.run(graph("loras/sd15.safetensors", 1.0))
    with pytest.raises(
        ValueError, match=r"^my_full\.delta\.safetensors is a difference from pocket_portraits\.safetensors: c"
    ):
        node(host, "LoadDreamBooth")("my_full.delta.safetensors", 1.0)
    with pytest.raises(ValueError, match=r"changes the text encoders, too: connect the checkpoint's CLIP\.$"):
        node(host, "LoadDreamBooth")("my_full.delta.safetensors", 1.0, loaded[0])
    with pytest.raises(ValueError, match=r"^my_word\.safetensors is a learned word for pocket_portraits.*connect"):
        node(host, "LoadPersonalization")("embeddings/my_word.safetensors", 1.0)
    save_file({"emb_params": torch.zeros(1, 768)}, host.base / "models" / "embeddings" / "wide.safetensors")
    with pytest.raises(ValueError, match=r"^wide\.safetensors has vectors of width 768, but the pocket model needs 64"):
        node(host, "LoadTextualInversion")(loaded[0], "wide.safetensors", 1.0)
    with pytest.raises(ValueError, match=r"^my_lora\.safetensors changes the text encoders, too: connect the checkp"):
        node(host, "LoadLoRA")(loaded[0], "my_lora.safetensors", 1.0, 1.0)
    node(host, "LoadLoRA")(loaded[0], "my_lora.safetensors", 1.0, 0.0)  # who wants the rest of it says so
    whole = load_file(loras / "my_lora.safetensors")
    lost = next(key for key in whole if key.startswith("lora_unet") and key.endswith("lora_down.weight"))
    save_file({key: value for key, value in whole.items() if key != lost}, loras / "half.safetensors")
    with pytest.raises(ValueError, match=r"^half\.safetensors is not whole: it lacks lora_unet_.*lora_down\.weight\.$"):
        node(host, "LoadLoRA")(*loaded[:1], "half.safetensors", 1.0, 1.0, loaded[1])
    shutil.copy(host.base / "models" / "embeddings" / "my_word.safetensors", loras / "a_word.safetensors")
    with pytest.raises(
        ValueError,
        match=r"^a_word\.safetensors is a learned word, which is looked for in models/embeddings only: move it there\.$",
    ):
        node(host, "LoadPersonalization")("loras/a_word.safetensors", 1.0, *loaded[:2])
    shutil.copy(loras / "my_lora.safetensors", host.base / "models" / "embeddings" / "a_lora.safetensors")
    with pytest.raises(
        ValueError,
        match=r"^a_lora\.safetensors is a LoRA, not a learned word: its place is models/loras, for its own loader\.$",
    ):
        node(host, "LoadTextualInversion")(loaded[0], "a_lora.safetensors", 1.0)
    with pytest.raises(
        ValueError,
        match=r"is a checkpoint, not a personalisation: its place is models/checkpoints, for its own loader\.$",
    ):
        node(host, "LoadPersonalization")(f"checkpoints/{BASE}", 1.0)
    (loras / "cut.safetensors").write_bytes((loras / "my_lora.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"^cut\.safetensors in .*"):
        node(host, "LoadLoRA")(loaded[0], "cut.safetensors", 1.0, 1.0)
    with pytest.raises(ValueError, match=r"^gone\.safetensors is not in .*: put it there and refresh\.$"):
        node(host, "LoadLoRA")(loaded[0], "gone.safetensors", 1.0, 1.0)
