"""Every format of every file, there and back."""

import re
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from finetuning import ADAPTER, CHECKPOINT, photos, train
from narrow_models import narrow_folder
from pack.models.custom_diffusion import leading_rank
from pack.models.errors import PersonalizeError
from pack.models.ip_adapter import read_ip_adapter
from pack.models.lora import file_name
from pack.models.metadata import read_about
from pack.models.weight_files import read_safetensors, write_safetensors
from pack.training.base_model import load_base, load_pipeline
from pack.training.convert import Convert, convert, kind_of
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """A narrow base of SD1.5's layout, as a folder."""
    return narrow_folder("sd15", tmp_path_factory.mktemp("sd15"))


def converted(file, to, output, base=None, **values):
    base = None if base is None else str(base)
    return convert(
        Convert(
            file=str(file), to=to, pretrained_model_name_or_path=base, output_dir=str(output),
            **({"save_precision": "fp32"} | values),
        )
    )  # fmt: skip


def same(one, other, tolerance=0.0):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert (value - other[key]).norm() <= tolerance * value.norm(), key


@pytest.fixture(scope="module", params=["kv", "all"])
def concept(request, root, pictures, sd15, tmp_path_factory):
    """Custom Diffusion's two files, of a narrow SD1.5."""
    folder = tmp_path_factory.mktemp("concept")
    options = {"train_layers": request.param, "learning_rate": 1e-2, "text_encoder_lr": 1e-2, "size_variants": 0}
    options |= {"pretrained_model_name_or_path": str(sd15), "resolution": 64, "output_name": "mine"}
    return train("custom_diffusion", root, pictures, folder, **options)


@pytest.mark.parametrize("to", ["diffusers", "adobe"])
def test_two_words_stay_who_they_are(root, pictures, tmp_path, to):
    """Words are in the order of their files there and back, whatever order they were trained in."""
    other = photos(tmp_path / "other", 2)
    base, concepts = root / CHECKPOINT, [f"{pictures}:zxcv:woman", f"{other}:ohwx:dog"]
    whole, *words = train("custom_diffusion", root, None, tmp_path / "two", concept=concepts, instance_data_dir=None)
    theirs = converted(whole, to, tmp_path / to, base)
    in_order = "dog, woman" if to == "diffusers" else "woman, dog"
    for given in (in_order, f"{words[1].stem}:dog, {words[0].stem}:woman"):
        out = tmp_path / str(":" in given)
        back = converted(theirs[0], "personalize", out, base, output_name=whole.stem, class_name=given)
        assert {path.name for path in back[1:]} == {path.name for path in words}
        for path in back[1:]:
            assert torch.equal(load_file(path)["emb_params"], load_file(tmp_path / "two" / path.name)["emb_params"])
        trigger = read_about(read_safetensors(back[0])[1], "").trigger
        assert set(trigger.split(", ")) == {f"embedding:{words[0].stem} woman", f"embedding:{words[1].stem} dog"}
    with pytest.raises(PersonalizeError, match=r"^--class_name is 'a:woman, b:dog', but the words are "):
        converted(theirs[0], "personalize", tmp_path / "no", base, class_name="a:woman, b:dog")


def test_a_damaged_or_hostile_file_is_one_sentence(root, tmp_path):
    base, key = root / CHECKPOINT, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    good, word = torch.zeros(96, 64), torch.zeros(64)
    for i, (content, said) in enumerate(
        [
            (
                {"unet": {key: good}, "modifier_token": {"</../../evil>": word}},
                "is called '/../../evil', which no file",
            ),
            ({"unet": {key: good}, "modifier_token": {"<a b>": word}}, "is called 'a b', which no file"),
            ({"unet": {key: good}, "modifier_token": word}, "modifier_token in own.bin does not name vectors"),
            ({"unet": {key: 3.0}}, "is no matrix of finite numbers"),
            ({"unet": {key: good * float("nan")}}, "is no matrix of finite numbers"),
            ({"unet": {}}, "own.bin has no matrix of a layer"),
            ({"unet": {key: good}, "modifier_token": {"<a>": word, "<own_a>": word}}, "Two words would both be own_a"),
        ]
    ):
        place = tmp_path / str(i)
        place.mkdir()
        torch.save(content, place / "own.bin")
        with pytest.raises(PersonalizeError, match=re.escape(said)):
            converted(place / "own.bin", "personalize", place / "out" / "deep", base)
        assert [path.name for path in place.rglob("*") if path.is_file()] == ["own.bin"]
    (place / "stray.safetensors").write_bytes(b"")
    save_file({"<stray>": word}, place / "stray.safetensors")
    torch.save({"unet": {key: good}, "modifier_token": {"<a>": word}}, place / "own.bin")
    paths = converted(place / "own.bin", "personalize", place / "out", base)
    assert [path.name for path in paths] == ["own.safetensors", "own_a.safetensors"], (
        "a file that has its words needs none"
    )


@pytest.mark.parametrize("to", ["diffusers", "adobe"])
def test_custom_diffusion_there_and_back(concept, sd15, tmp_path, to):
    """W0 + (W - W0) rounds once: the differences agree to a hundredth of a thousandth of themselves."""
    whole, word = concept
    assert kind_of(whole) == "custom_diffusion"
    theirs = converted(whole, to, tmp_path / to, sd15)
    assert kind_of(theirs[0]) == "custom_diffusion"
    back = converted(theirs[0], "personalize", tmp_path / "back", sd15, output_name="mine")
    before, after = load_file(whole), load_file(back[0])
    assert before.keys() <= after.keys()
    for key, value in after.items():
        expected = before.get(key, torch.zeros_like(value))
        assert (value - expected).norm() <= 1e-5 * max(expected.norm(), 1)
    assert torch.equal(load_file(word)["emb_params"], load_file(back[1])["emb_params"])
    again = converted(back[0], to, tmp_path / "again", sd15)
    one, two = (torch.load(paths[0], weights_only=True) for paths in (theirs, again))
    for key, value in (one["unet"] if to == "adobe" else one).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close((two["unet"] if to == "adobe" else two)[key], value, rtol=1e-6, atol=1e-7)
    about = read_about(read_safetensors(back[0])[1], "back")
    assert about.method == "custom_diffusion"
    assert about.trigger == f"embedding:{back[1].stem}"


def test_diffusers_loads_what_is_written_for_it(concept, sd15, tmp_path):
    whole, word = concept
    paths = converted(whole, "diffusers", tmp_path, sd15)
    assert [path.name for path in paths] == ["pytorch_custom_diffusion_weights.bin", f"{word.stem}.safetensors"]
    pipeline = load_base(str(sd15)).pipeline
    assert isinstance(pipeline, StableDiffusionPipeline)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    pipeline.unet.load_attn_procs(str(tmp_path), weight_name=paths[0].name, use_safetensors=False, _pipeline=pipeline)
    pipeline.load_textual_inversion(str(paths[1]))
    processors = pipeline.unet.attn_processors
    custom = {name: one for name, one in processors.items() if isinstance(one, CustomDiffusionAttnProcessor)}
    changes = load_file(whole)
    for name, one in custom.items():
        layer = name.removesuffix(".processor")
        if "attn2" in name:
            for part in ("to_k", "to_v"):
                expected = (
                    before[f"{layer}.{part}.weight"] + changes[f"{file_name('lora_unet', f'{layer}.{part}')}.diff"]
                )
                assert torch.equal(one.get_parameter(f"{part}_custom_diffusion.weight"), expected)
    assert sum("attn2" in name for name in custom) == 16
    token = pipeline.tokenizer.convert_tokens_to_ids(f"<{word.stem}>")
    learned = pipeline.text_encoder.get_input_embeddings().weight[token]
    assert torch.equal(learned, load_file(word)["emb_params"][0])


def test_adobe_s_other_formats(concept, sd15, tmp_path):
    whole, word = concept
    base = load_base(str(sd15))
    state, single = base.pipeline.unet.state_dict(), base.unet_names()
    changes, vector = load_file(whole), load_file(word)["emb_params"][0]
    names = {
        key: file_name("lora_unet", key.removesuffix(".weight")) for key in state if key.endswith("attn2.to_k.weight")
    }
    original = {single[key]: state[key] + changes[f"{name}.diff"] for key, name in names.items()}
    torch.save({"state_dict": original | {"embed": vector[None]}}, tmp_path / "delta.ckpt")
    (path, mine) = converted(tmp_path / "delta.ckpt", "personalize", tmp_path / "original", sd15)
    assert mine.name == "delta_new1.safetensors"
    assert torch.equal(load_file(mine)["emb_params"][0], vector)
    found = load_file(path)
    assert found.keys() == {f"{name}.diff" for name in names.values()}
    for key, value in found.items():
        assert (value - changes[key]).norm() <= 1e-5 * max(changes[key].norm(), 1)
    compressed = {}
    for key, name in names.items():
        u, values, v = torch.linalg.svd(changes[f"{name}.diff"], full_matrices=False)
        rank = leading_rank(values, 0.6)
        compressed[key] = {"u": u[:, :rank] * values[:rank], "v": v[:rank]}
    torch.save({"unet": compressed, "modifier_token": {"<new1>": vector}}, tmp_path / "small.bin")
    (path, _) = converted(tmp_path / "small.bin", "personalize", tmp_path / "small", sd15)
    (cut, *_) = converted(whole, "personalize", tmp_path / "cut", sd15, compression=0.6, output_name="cut")
    theirs, ours = load_file(path), load_file(cut)
    for name in names.values():
        change = ours[f"{name}.lora_up.weight"] @ ours[f"{name}.lora_down.weight"]
        torch.testing.assert_close(theirs[f"{name}.diff"], change, rtol=1e-4, atol=1e-5)


def test_custom_diffusion_of_sdxl(root, pictures, tmp_path):
    base = narrow_folder("sdxl", tmp_path / "sdxl")
    options = {"pretrained_model_name_or_path": str(base), "resolution": 64, "size_variants": 0, "max_train_steps": 1}
    whole, word = train("custom_diffusion", root, pictures, tmp_path / "trained", output_name="mine", **options)
    paths = converted(whole, "personalize", tmp_path / "cut", base, compression=0.6, output_name="cut")
    assert paths[1].name == word.name
    same(paths[1], word)
    with pytest.raises(PersonalizeError, match=rf"^{paths[1]} is there already"):
        converted(whole, "personalize", tmp_path / "cut", base, output_name="other")
    assert not (tmp_path / "cut" / "other.safetensors").exists()
    with pytest.raises(PersonalizeError, match=r"--to adobe is for SD1\.5 and SD2"):
        converted(whole, "adobe", tmp_path / "adobe", base)


def test_half_precision_keeps_small_changes(concept, sd15, tmp_path):
    """Whole matrices are written in fp32 unless asked otherwise: in fp16 they would round away what was learned."""
    whole, _ = concept
    theirs = converted(whole, "adobe", tmp_path / "theirs", sd15, save_precision=None)
    assert {v.dtype for v in torch.load(theirs[0], weights_only=True)["unet"].values()} == {torch.float32}
    (back, _) = converted(theirs[0], "personalize", tmp_path / "back", sd15, save_precision=None)
    assert {value.dtype for value in load_file(back).values()} == {torch.float16}


def test_lora_there_and_back(root, pictures, tmp_path):
    options = {"learning_rate": 1e-2, "text_encoder_lr": 1e-2, "train_text_encoder": True, "rank": 4, "lora_alpha": 2.0}
    (path,) = train("lora", root, pictures, tmp_path / "lora", **options)
    assert kind_of(path) == "lora"
    base = root / CHECKPOINT
    (dora,) = train("lora", root, pictures, tmp_path / "dora", use_dora=True, max_train_steps=1)
    with pytest.raises(PersonalizeError, match="is a DoRA, whose lengths diffusers does not read"):
        converted(dora, "diffusers", tmp_path / "diffusers", base)
    (theirs,) = converted(path, "diffusers", tmp_path / "diffusers", base)
    (back,) = converted(theirs, "personalize", tmp_path / "back", base)
    before, after = load_file(path), load_file(back)
    assert before.keys() == after.keys()
    for key in before:
        if key.endswith("lora_up.weight"):
            layer = key.removesuffix(".lora_up.weight")
            changes = [
                (t[key] @ t[f"{layer}.lora_down.weight"] * t[f"{layer}.alpha"] / len(t[f"{layer}.lora_down.weight"]))
                for t in (before, after)
            ]
            torch.testing.assert_close(*changes, rtol=1e-5, atol=1e-7)
    plain, through = load_pipeline(base), load_pipeline(base)
    for pipeline, file in ((plain, path), (through, theirs)):
        pipeline.load_lora_weights(str(file))
        pipeline.fuse_lora()
    for one, other in ((plain.unet, through.unet), (plain.text_encoder, through.text_encoder)):
        for (name, value), (_, same_) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
            if "lora" not in name:
                torch.testing.assert_close(value, same_, rtol=1e-4, atol=1e-6)


def test_dreambooth_there_and_back(root, pictures, tmp_path):
    options = {"save_as": "both", "train_text_encoder": True, "max_train_steps": 1, "output_name": "mine"}
    full, delta = train("dreambooth", root, pictures, tmp_path / "trained", **options)
    base = root / CHECKPOINT
    assert kind_of(full) == kind_of(delta) == "dreambooth"
    (made,) = converted(full, "delta", tmp_path / "delta", base)
    before, after = load_file(delta), load_file(made)
    # the checkpoint is in half precision, the difference was taken in fp32
    assert after.keys() <= before.keys()
    for key, value in after.items():
        assert (value.float() - before[key].float()).abs().max() < 2e-3, key
    (whole,) = converted(made, "checkpoint", tmp_path / "checkpoint", base, output_name="again")
    same(full, whole, 2e-4)
    (cut,) = train(
        "dreambooth", root, pictures, tmp_path / "cut", **options | {"save_as": "delta", "delta_megabytes": 3.0}
    )
    (from_cut,) = converted(cut, "checkpoint", tmp_path / "from_cut", base)
    assert load_file(from_cut).keys() == load_file(full).keys()
    with pytest.raises(PersonalizeError, match="is a checkpoint already"):
        converted(full, "checkpoint", tmp_path, base)
    with pytest.raises(PersonalizeError, match="is there already"):
        converted(made, "checkpoint", full.parent, base)
    other = load_file(base)
    other["model.diffusion_model.time_embed.0.bias"] += 0.01
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(
        PersonalizeError, match=r"was trained on pocket_portraits\.safetensors, and other\.safetensors is"
    ):
        converted(delta, "checkpoint", tmp_path / "wrong", tmp_path / "other.safetensors")


def test_words(tmp_path):
    vectors = torch.randn(2, 64)
    torch.save({"string_to_param": {"*": vectors}, "name": "x", "step": 3}, tmp_path / "a1111.pt")
    save_file({"<cat>": vectors[0]}, tmp_path / "theirs.safetensors")
    (mine,) = converted(tmp_path / "a1111.pt", "personalize", tmp_path / "out")
    assert torch.equal(load_file(mine)["emb_params"], vectors)
    (one,) = converted(tmp_path / "theirs.safetensors", "personalize", tmp_path / "out")
    assert torch.equal(load_file(one)["emb_params"], vectors[:1])
    (back,) = converted(mine, "diffusers", tmp_path / "back", output_name="cat")
    assert torch.equal(load_file(back)["<cat>"], vectors)
    two = {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)}
    save_file(two, tmp_path / "xl.safetensors")
    (same_,) = converted(tmp_path / "xl.safetensors", "personalize", tmp_path / "out")
    assert all(torch.equal(load_file(same_)[key], value) for key, value in two.items())


def test_an_adapter(root, tmp_path):
    state = read_ip_adapter(root / ADAPTER)
    torch.save({part: dict(own) for part, own in state.items()}, tmp_path / "adapter.bin")
    (path,) = converted(tmp_path / "adapter.bin", "personalize", tmp_path / "out", save_precision="fp16")
    same(path, root / ADAPTER)


def test_what_is_wrong_is_said(root, concept, sd15, tmp_path):
    whole, _ = concept
    with pytest.raises(PersonalizeError) as caught:
        convert(Convert())
    assert str(caught.value).splitlines() == [
        "--file is missing: the file to convert.",
        "--to is missing: its new format.",
        "--output_dir is missing: the folder for the result.",
    ]
    with pytest.raises(
        PersonalizeError, match="is a custom_diffusion, which --to delta is not for: personalize, diffusers"
    ):
        converted(whole, "delta", tmp_path, sd15)
    with pytest.raises(PersonalizeError, match="--pretrained_model_name_or_path is missing: the base that mine"):
        converted(whole, "diffusers", tmp_path)
    with pytest.raises(PersonalizeError, match="has no place in the base model"):
        converted(whole, "diffusers", tmp_path, root / CHECKPOINT)
    with pytest.raises(PersonalizeError, match="is there already: name another --output_dir or --output_name"):
        converted(whole, "personalize", whole.parent, sd15)
    for name, said in (
        ("two words", "'two words' cannot be called in ComfyUI's prompts"),
        ("my,dog", "'my,dog' cannot be called in ComfyUI's prompts"),
        ("a/b", "'a/b' is no file name: set --output_name"),
        ("..", "'..' is no file name: set --output_name"),
        ("x.safetensors", "--output_name x.safetensors is without ending: write x"),
    ):
        with pytest.raises(PersonalizeError, match=re.escape(said)):
            converted(whole, "personalize", tmp_path / "out", sd15, output_name=name)
    save_file({f"x{i}": torch.zeros(1) for i in range(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(PersonalizeError, match="is of no kind that is known: its tensors are called x0, x1, x2"):
        converted(tmp_path / "odd.safetensors", "personalize", tmp_path / "out")
    with pytest.raises(PersonalizeError, match=r"gone\.safetensors"):
        converted(tmp_path / "gone.safetensors", "personalize", tmp_path / "out")


def test_words_that_were_moved_or_renamed(concept, sd15, tmp_path, capsys):
    whole, word = concept
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(word.read_bytes())
    paths = converted(whole, "personalize", tmp_path / "out", sd15, word=[str(renamed)])
    assert [path.name for path in paths] == [whole.name, word.name], "it is still what the file's trigger calls"
    other = tmp_path / "other.safetensors"
    tensors, metadata = read_safetensors(word)
    about = replace(read_about(metadata, word.name), trigger="embedding:someone_else")
    write_safetensors(other, tensors, about.as_metadata())
    said = f"{whole.name} is called by {word.stem}, but --word names someone_else: give the file of each of its words."
    with pytest.raises(PersonalizeError, match=re.escape(said)):
        converted(whole, "personalize", tmp_path / "no", sd15, word=[str(other)])
    for folder, one in (("loras", whole), ("embeddings", word)):  # as ComfyUI has them
        (tmp_path / folder).mkdir()
        (tmp_path / folder / one.name).write_bytes(one.read_bytes())
    assert len(converted(tmp_path / "loras" / whole.name, "adobe", tmp_path / "adobe", sd15)) == 1
    theirs = converted(whole, "diffusers", tmp_path / "theirs", sd15)
    (back, _) = converted(theirs[0], "personalize", tmp_path / "b", sd15, output_name="mine", class_name="tin robot")
    assert (
        read_about(read_safetensors(back)[1], "").trigger
        == f"embedding:mine_{word.stem.removeprefix('mine_')} tin robot"
    )
    with pytest.raises(
        PersonalizeError, match=r"^--class_name is 'dog, cat', but the words are .*: name a class for each"
    ):
        converted(theirs[0], "personalize", tmp_path / "c", sd15, output_name="mine", class_name="dog, cat")
    (tmp_path / "theirs" / "training_args.bin").write_bytes(b"what another program left")
    assert len(converted(theirs[0], "personalize", tmp_path / "with", sd15, output_name="mine")) == 2
    theirs[1].unlink()
    capsys.readouterr()
    assert len(converted(theirs[0], "personalize", tmp_path / "without", sd15, output_name="mine")) == 1
    assert f"No learned word lies beside {theirs[0]}" in capsys.readouterr().err
