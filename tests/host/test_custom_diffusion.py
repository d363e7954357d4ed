"""Custom Diffusion's files in ComfyUI: through the stock loader and ours, and merged."""

import logging
import re
import shutil

import narrow
import pytest
import torch
from finetuning import CHECKPOINT, photos, train
from inprocess import HostError, node, patched
from pack.models.custom_diffusion import concept_tensors, is_trained
from pack.models.merging import prompts_of
from pack.models.weight_files import read_safetensors, write_safetensors
from pack.training.merge_concepts import MergeConcepts, merge
from safetensors.torch import load_file, save_file
from sampling import encode


@pytest.fixture(scope="module")
def files(host, root, tmp_path_factory):
    """The folder of two concepts that were trained apart, all files of which are in the host's folders."""
    folder = tmp_path_factory.mktemp("concepts")
    common = {"learning_rate": 2e-2, "text_encoder_lr": 5e-2, "save_precision": "fp32", "size_variants": 0}
    for seed, (name, trigger) in enumerate((("rex", "ohwx"), ("anna", "zxcv"))):  # and so another concept each
        pictures = photos(folder / f"photos_{name}")
        for path in train(
            "custom_diffusion", root, pictures, folder, output_name=name, trigger=trigger,
            resume_from_checkpoint="none", seed=seed, **common,
        ):  # fmt: skip
            target = host.base / "models" / ("loras" if path.stem == name else "embeddings")
            target.mkdir(exist_ok=True)
            shutil.copy(path, target / path.name)
    return folder


def matrices(tensors, model):
    """Of each difference in a file the host's key, and the difference."""
    import comfy.lora

    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    return {keys[name.removesuffix(".diff")]: change for name, change in tensors.items()}


def test_the_stock_loader_and_ours(host, files, loaded, caplog):
    changes = matrices(load_file(files / "rex.safetensors"), loaded[0])
    assert len(changes) == 20
    with caplog.at_level(logging.INFO):
        stock, _ = host.nodes.LoraLoader().load_lora(*loaded[:2], "rex.safetensors", 1.0, 1.0)
        ours, trigger = node(host, "LoadCustomDiffusion")(loaded[0], "rex.safetensors", 1.0)
        any_, _, _, same = node(host, "LoadPersonalization")("loras/rex.safetensors", 1.0, loaded[0], loaded[1])
    assert not [record for record in caplog.records if "not loaded" in record.getMessage() or record.levelno >= 40]
    assert trigger == same == "embedding:rex_ohwx woman"
    for model in (stock, ours, any_):
        assert model.patches.keys() == changes.keys()
        for key, change in changes.items():
            torch.testing.assert_close(patched(model, key), patched(loaded[0], key) + change)
    half, _ = node(host, "LoadCustomDiffusion")(loaded[0], "rex.safetensors", 0.5)
    key = next(iter(changes))
    torch.testing.assert_close(patched(half, key), patched(loaded[0], key) + 0.5 * changes[key])
    calls = [encode(host, loaded[1], f"a photo of {word}")[0][0] for word in (trigger, "rex_ohwx woman")]
    assert not torch.equal(*calls)


@pytest.mark.parametrize("layout", [narrow.SD15, narrow.SDXL], ids=["sd15", "sdxl"])
@pytest.mark.parametrize("share", [None, 0.6])
def test_the_stock_loader_takes_every_layer_of_the_full_layouts(host, loaded, layout, share, caplog):
    unet = narrow.diffusers_unet(layout)
    model, weights = narrow.comfy_model(layout, unet), unet.state_dict()
    trained = [name for name in weights if is_trained(name.removesuffix(".weight"), ("to_k", "to_v"))]
    assert len(trained) == 2 * layout["layers"]
    changes = {
        name: torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate(trained)
    }
    folder = host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    save_file(concept_tensors(changes, share), folder / "whole.safetensors")
    with caplog.at_level(logging.INFO):
        stock, _ = host.nodes.LoraLoader().load_lora(model, loaded[1], "whole.safetensors", 1.0, 1.0)
    assert not [record for record in caplog.records if "not loaded" in record.getMessage()]
    assert len(stock.patches) == len(trained)
    if share is None:
        for name in trained[:3]:
            key = next(k for k in stock.patches if torch.equal(patched(model, k), weights[name]))
            torch.testing.assert_close(patched(stock, key), weights[name] + changes[name])


def test_merged_in_the_node_and_headless(host, root, files, loaded, tmp_path):
    model, trigger, report = node(host, "MergeCustomDiffusion")(*loaded[:2], "rex.safetensors", "anna.safetensors", 1.0)
    assert trigger == "embedding:rex_ohwx woman, embedding:anna_zxcv woman"
    assert report.startswith("20 layers merged")
    missed, disturbed = (float(value) for value in re.findall(r"by (\S+) at most", report))
    assert missed < 1e-5
    assert 0 < disturbed < 10, "at these rates each file by itself changes as much"
    own = [matrices(load_file(files / f"{name}.safetensors"), loaded[0]) for name in ("rex", "anna")]
    assert model.patches.keys() == own[0].keys()
    for key in model.patches:
        base, merged = patched(loaded[0], key), patched(model, key)
        for call, changes in zip(trigger.split(", "), own, strict=True):
            states = encode(host, loaded[1], prompts_of(call)[1])[0][0][0].float()
            word = states[4]  # behind "a photo of"
            wanted = (base + changes[key]) @ word
            assert (merged @ word - wanted).norm() < 1e-3 * (base @ word - wanted).norm()
    half, _, _ = node(host, "MergeCustomDiffusion")(*loaded[:2], "rex.safetensors", "anna.safetensors", 0.5)
    key = next(iter(model.patches))
    base = patched(loaded[0], key)
    torch.testing.assert_close(patched(half, key), base + 0.5 * (patched(model, key) - base))
    options = MergeConcepts(
        pretrained_model_name_or_path=str(root / CHECKPOINT),
        file=[str(files / "rex.safetensors"), str(files / "anna.safetensors")],
        output_dir=str(tmp_path),
        save_precision="fp32",
    )
    headless = matrices(load_file(merge(options)), loaded[0])
    assert headless.keys() == model.patches.keys()
    for key, change in headless.items():
        ours = patched(model, key) - patched(loaded[0], key)
        assert (ours - change).norm() < 0.02 * change.norm(), "the host's text encoder is in half precision"
    twice, _, _ = node(host, "MergeCustomDiffusion")(
        *loaded[:2], "rex.safetensors", "anna.safetensors", 1.0, "a cat\n\na dog on a beach"
    )
    assert any(not torch.equal(patched(twice, key), patched(model, key)) for key in model.patches)


def test_what_is_wrong_is_said(host, files, loaded):
    merging, loras = node(host, "MergeCustomDiffusion"), host.base / "models" / "loras"
    tensors = {"lora_unet_other.diff": torch.ones(2, 2)}
    save_file(tensors, loras / "foreign.safetensors")
    with pytest.raises(
        ValueError,
        match=r"^foreign\.safetensors is a LoRA, not a file of Custom Diffusion: its place is models/loras, for its own",
    ):
        merging(*loaded[:2], "rex.safetensors", "foreign.safetensors", 1.0)
    with pytest.raises(ValueError, match=r"are both called by 'embedding:rex_ohwx woman': train one with another"):
        merging(*loaded[:2], "rex.safetensors", "rex.safetensors", 1.0)
    tensors, metadata = read_safetensors(loras / "rex.safetensors")
    next(iter(tensors.values())).fill_(float("nan"))
    write_safetensors(loras / "diverged.safetensors", tensors, metadata)
    with pytest.raises(
        ValueError,
        match=r"in diverged\.safetensors has numbers that are not finite: its training diverged, train it again\.",
    ):
        node(host, "LoadCustomDiffusion")(loaded[0], "diverged.safetensors", 1.0)
    word = host.base / "models" / "embeddings" / "anna_zxcv.safetensors"
    away = word.with_suffix(".away")
    word.rename(away)
    try:
        with pytest.raises(
            ValueError, match=r"^The word anna_zxcv\.safetensors of anna\.safetensors is not in models/emb"
        ):
            node(host, "LoadCustomDiffusion")(loaded[0], "anna.safetensors", 1.0)
    finally:
        away.rename(word)


def test_through_the_executor_and_cancelled(host, files, monkeypatch):
    import comfy.model_management

    prompt = {
        "base": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "pocket_portraits.safetensors"}},
        "merged": {
            "class_type": "PersonalizeMergeCustomDiffusion",
            "inputs": {
                "model": ["base", 0], "clip": ["base", 1], "file1": "rex.safetensors", "file2": "anna.safetensors",
                "file3": "none", "file4": "none", "file5": "none", "file6": "none", "strength": 1.0, "captions": "a cat",
            },
        },
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["base", 1], "text": ["merged", 1]}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "drawn": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["merged", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["latent", 0],
                "seed": 1, "steps": 1, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            },
        },
        "decoded": {"class_type": "VAEDecode", "inputs": {"samples": ["drawn", 0], "vae": ["base", 2]}},
        "kept": {"class_type": "PreviewImage", "inputs": {"images": ["decoded", 0]}},
    }  # fmt: skip
    outputs = host.run(prompt)
    assert outputs["merged"]["text"][0].startswith("20 layers merged: on the concepts' words they miss")
    assert len(outputs["kept"]["images"]) == 1
    prompt["merged"]["inputs"]["captions"] = "a dog"
    asked = []

    def interrupted():
        asked.append(None)
        if len(asked) > before:
            raise HostError("cancelled")

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupted)
    module, before = host.module("nodes.custom_diffusion"), 10**6
    monkeypatch.setattr(module, "features", lambda *a, own=module.features: (asked.clear(), own(*a))[1])
    before = 0
    with pytest.raises(HostError, match="cancelled"):
        host.run(prompt)
    assert len(asked) == 1, "it stopped at the first text"


def test_the_words_give_what_they_shall_and_captions_change_the_least(host, files, loaded):
    """On one layer, with the host's own features: the minimum that the closed form is."""
    module = host.module("nodes.custom_diffusion")

    class Bar:
        def update(self, _):
            pass

    clip, captions = loaded[1], ["a cat", "a dog on a beach"]
    calls = ["embedding:rex_ohwx woman", "embedding:anna_zxcv woman"]
    words = [module.features(clip, prompts_of(call), Bar(), (1, 4)) for call in calls]  # behind "a photo of"
    assert [len(one) for one in words] == [6, 6], "the word, the class and the end, with and without a frame"
    everyday = module.features(clip, captions, Bar())
    model, _, _ = node(host, "MergeCustomDiffusion")(
        *loaded[:2], "rex.safetensors", "anna.safetensors", 1.0, "\n".join(captions)
    )
    own = [matrices(load_file(files / f"{name}.safetensors"), loaded[0]) for name in ("rex", "anna")]
    key = next(iter(model.patches))
    base = patched(loaded[0], key).detach()
    rows, trained = torch.cat(words).double(), [base.double() + changes[key] for changes in own]
    wanted = torch.cat([own_rows.double() @ one.T for own_rows, one in zip(words, trained, strict=True)])
    merged = patched(model, key).double()
    assert ((rows @ merged.T - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 1e-4
    free = torch.eye(rows.shape[1], dtype=torch.double) - torch.linalg.pinv(rows) @ rows
    change = ((merged - base) @ everyday.double().T).norm()
    for seed in range(5):
        other = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double) @ free
        assert ((merged + 0.01 * other - base) @ everyday.double().T).norm() > change, "any other changes captions more"
