"""Custom Diffusion: diffusers' processors on the same weights, what trains and what does not, and the files."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, CustomDiffusionAttnProcessor
from finetuning import CHECKPOINT, photos, settings_of, train
from pack.models.custom_diffusion import ALL, KEYS_AND_VALUES, RARE, concept_changes, leading_rank
from pack.models.errors import PersonalizeError
from pack.models.lora import host_layers
from pack.models.metadata import read_about
from pack.models.weight_files import read_safetensors
from pack.training import run as running
from pack.training.base_model import load_base
from pack.training.custom_diffusion import CustomDiffusionMethod
from pack.training.preflight import preflight
from PIL import Image
from safetensors.torch import load_file
from test_finetuning_parity import STEPS, batches, read, reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("photos"))


def processors(unet, parts):
    """diffusers' own, with the weights of the layers that they stand for."""
    made, weights = {}, unet.state_dict()
    for name in unet.attn_processors:
        layer = name.removesuffix(".processor")
        if "attn2" not in name:
            made[name] = AttnProcessor2_0()
            continue
        shape = weights[f"{layer}.to_k.weight"].shape
        made[name] = CustomDiffusionAttnProcessor(True, parts == ALL, shape[0], shape[1]).to(unet.dtype)
        for part in ("to_k", "to_v", "to_q", "to_out.0") if parts == ALL else KEYS_AND_VALUES:
            for kind in ("weight", "bias"):
                if f"{layer}.{part}.{kind}" in weights:
                    head, _, tail = part.partition(".")
                    own = ".".join(filter(None, (f"{head}_custom_diffusion", tail, kind)))
                    made[name].get_parameter(own).data.copy_(weights[f"{layer}.{part}.{kind}"])
    return made


def named(processor_parameter):
    """Of a processor's parameter the name of the layer's."""
    return processor_parameter.replace(".processor.", ".").replace("_custom_diffusion", "")


@pytest.mark.parametrize("layers", ["kv", "all"])
def test_loss_and_gradients_are_those_of_diffusers(root, where, tmp_path, layers):
    """In float64: also that the token that begins the text learns nothing."""
    options = {"pretrained_model_name_or_path": str(where), "train_layers": layers, "learning_rate": 1e-3}
    settings = settings_of("custom_diffusion", root, tmp_path, tmp_path, text_encoder_lr=1e-3, **options)
    results = []
    generator = torch.Generator().manual_seed(0)
    for ours in (True, False):
        base = load_base(str(where))
        unet = base.pipeline.unet
        unet.requires_grad_(False)
        if ours:
            CustomDiffusionMethod(base, settings)
            unet.double()
        else:
            unet.double()
            unet.set_attn_processor(processors(unet, ALL if layers == "all" else KEYS_AND_VALUES))
        if ours:
            z = torch.randn(2, unet.config.in_channels, 8, 8, generator=generator, dtype=torch.float64)
            text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator, dtype=torch.float64)
        states, added = text.clone().requires_grad_(True), {}
        if base.layout == "sdxl":
            pooled = torch.ones(2, base.pipeline.text_encoder_2.config.projection_dim, dtype=torch.float64)
            added = {"text_embeds": pooled, "time_ids": torch.ones(2, 6, dtype=torch.float64) * 64}
        loss = unet(z, 500, states, added_cond_kwargs=added).sample.square().mean()
        loss.backward()
        gradients = {
            named(name): p.grad for name, p in unet.named_parameters() if p.requires_grad and p.grad is not None
        }
        results.append((loss, gradients, states.grad))
    (loss, gradients, own), (theirs, expected, other) = results
    assert abs(loss / theirs - 1) < 1e-6
    assert gradients.keys() == expected.keys()
    assert len(gradients) == (2 if layers == "kv" else 5) * sum("attn2" in n for n in unet.attn_processors)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm(), name
    torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-12)
    assert torch.equal(own[:, 0], torch.zeros_like(own[:, 0]))
    assert (own[:, 1:].norm(dim=2) > 0).all()


def test_five_steps_are_those_of_a_plain_loop_with_diffusers_processors(root, where, folder, tmp_path):
    options = {"train_batch_size": 2, "max_train_steps": STEPS, "learning_rate": 1e-3, "text_encoder_lr": 1e-2}
    options |= {"seed": 7, "resolution": 64, "size_variants": 0, "pretrained_model_name_or_path": str(where)}
    options |= {"timestep_bias_strategy": "none", "lr_scheduler": "constant"}
    settings = settings_of("custom_diffusion", root, folder, tmp_path, **options)
    weights, word = (load_file(path) for path in train("custom_diffusion", root, folder, tmp_path, **options))
    base = load_base(str(where))
    unet = base.pipeline.unet
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    unet.requires_grad_(False)
    unet.set_attn_processor(processors(unet, KEYS_AND_VALUES))
    tables, began = [], []
    for tokenizer, encoder in zip(base.tokenizers, base.text_encoders, strict=True):
        encoder.requires_grad_(False)
        tokenizer.add_tokens(["<a>"])
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tables.append(encoder.get_input_embeddings().weight)
        with torch.no_grad():
            tables[-1][-1] = tables[-1][tokenizer.convert_tokens_to_ids(RARE[0])]
        began.append(tables[-1][-1:].detach().clone())
        tables[-1].requires_grad_(True)

    def masked():
        for table in tables:
            table.grad[:-1] = 0

    trained = {named(name): p for name, p in unet.named_parameters() if p.requires_grad}
    groups = [
        {"params": list(trained.values()), "lr": 1e-3, "weight_decay": 0.01},
        {"params": tables, "lr": 1e-2, "weight_decay": 0.0},
    ]
    reference(base, groups, batches(base, settings, folder), read, "<a>", masked)
    layers = host_layers({name: tuple(value.shape) for name, value in before.items()}, [])
    changes = concept_changes(weights, layers, "ours")
    assert len(changes) == len(weights) == len(trained)
    pairs = [
        (changes[f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}.weight"], p.detach() - before[name])
        for name, p in trained.items()
    ]
    ours, theirs = (torch.cat([part.flatten() for part in parts]) for parts in zip(*pairs, strict=True))
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), "attention in two steps rounds otherwise"
    names = ("clip_l", "clip_g") if base.layout == "sdxl" else ("emb_params",)
    for name, table, start in zip(names, tables, began, strict=True):
        change = (table[-1:] - start).detach().norm()
        assert change > 0
        assert (word[name] - table[-1:].detach()).norm() <= 1e-4 * change


def test_nothing_else_moves(root, folder, tmp_path, monkeypatch):
    kept = {}
    write = CustomDiffusionMethod.write

    def keep(self, *arguments):
        kept["base"], kept["words"], kept["before"] = self.base, self.words, self.before
        return write(self, *arguments)

    monkeypatch.setattr(running.CustomDiffusionMethod, "write", keep)
    train("custom_diffusion", root, folder, tmp_path, learning_rate=1e-3)
    fresh = load_base(str(root / CHECKPOINT))
    after = kept["base"].pipeline.unet.state_dict()
    moved = {name for name, value in fresh.pipeline.unet.state_dict().items() if not torch.equal(value, after[name])}
    assert moved == kept["before"].keys()
    assert {name.partition(".attn2.")[2] for name in moved} == {"to_k.weight", "to_v.weight"}
    (word,) = kept["words"]
    old = fresh.text_encoders[0].get_input_embeddings().weight
    assert torch.equal(word.table.weight, old)
    assert not torch.equal(word.vectors[0], old[fresh.pipeline.tokenizer.convert_tokens_to_ids(RARE[0])])


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    """--concept of two subjects."""
    other = photos(tmp_path_factory.mktemp("other"), 2)
    return [f"{folder}:ohwx:woman", f"{other}:zxcv:old man"]


def test_several_concepts_have_a_word_each_and_one_file(root, two, tmp_path):
    options = {"concept": two, "instance_data_dir": None, "size_variants": 2, "train_layers": "all"}
    paths = train("custom_diffusion", root, None, tmp_path, with_prior_preservation=False, **options)
    assert [path.name for path in paths] == [
        "woman_old_man.safetensors", "woman_old_man_ohwx.safetensors", "woman_old_man_zxcv.safetensors",
    ]  # fmt: skip
    whole, *words = (read_about(read_safetensors(path)[1], path.name) for path in paths)
    assert (whole.method, whole.class_name) == ("custom_diffusion", "woman, old man")
    assert whole.trigger == "embedding:woman_old_man_ohwx woman, embedding:woman_old_man_zxcv old man"
    assert [word.method for word in words] == ["textual_inversion"] * 2
    assert [word.trigger for word in words] == [f"embedding:{path.stem}" for path in paths[1:]]
    assert whole.extra["modelspec.trigger_phrase"] == whole.trigger
    assert whole.extra["modelspec.architecture"].endswith("/custom-diffusion")
    assert words[1].extra["modelspec.architecture"].endswith("/textual-inversion")
    assert words[1].extra["modelspec.trigger_phrase"] == "embedding:woman_old_man_zxcv"
    assert whole.extra["ss_num_train_images"] == "7"
    assert whole.settings["trigger"] == "ohwx"
    assert whole.settings["concept"] == ["ohwx:woman", "zxcv:old man"], "where pictures lie is nobody else's business"
    first, second = (load_file(path)["emb_params"] for path in paths[1:])
    assert first.shape == second.shape == (1, 64)
    assert not torch.equal(first, second)
    base = load_base(str(root / CHECKPOINT))
    tokenizer, table = base.pipeline.tokenizer, base.text_encoders[0].get_input_embeddings().weight
    start = table[[tokenizer.convert_tokens_to_ids(word) for word in RARE[:2]]].detach()
    still = train(
        "custom_diffusion", root, None, tmp_path / "still", **options, text_encoder_lr=1e-9, max_word_norm=0.0
    )
    for path, vector in zip(still[1:], start, strict=True):
        torch.testing.assert_close(load_file(path)["emb_params"][0].float(), vector, rtol=2e-3, atol=1e-4)
    tensors = load_file(paths[0])
    assert sum(key.endswith(".diff") for key in tensors) == 4 * 10
    assert sum(key.endswith(".diff_b") for key in tensors) == 10


def test_a_compressed_file_is_the_leading_part_of_the_whole_one(root, folder, tmp_path):
    options = {"output_name": "mine", "timestep_bias_strategy": "none", "lr_scheduler": "constant"}
    (whole, _), (cut, _) = (
        train("custom_diffusion", root, folder, tmp_path / str(share), compression=share, **options)
        for share in (None, 0.6)
    )
    base = load_base(str(root / CHECKPOINT))
    layers = host_layers({name: tuple(v.shape) for name, v in base.pipeline.unet.state_dict().items()}, [])
    full, part = (concept_changes(load_file(path), layers, path.name) for path in (whole, cut))
    assert full.keys() == part.keys()
    for name, change in full.items():
        values = torch.linalg.svdvals(change)
        rank = leading_rank(values, 0.6)
        assert values[:rank].sum() <= 0.6 * values.sum() < values[: rank + 1].sum()
        torch.testing.assert_close((change - part[name]).norm(), values[rank:].norm(), rtol=1e-3, atol=1e-6)
    assert cut.stat().st_size < whole.stat().st_size


def refused(root, output, **values):
    with pytest.raises(PersonalizeError) as caught:
        preflight(settings_of("custom_diffusion", root, None, output, instance_data_dir=None, **values), quiet=True)
    return str(caught.value)


def test_what_is_wrong_with_concepts_is_told(root, folder, two, tmp_path):
    said = refused(root, tmp_path / "out", concept=["photos:cat", ":x:b", two[0]], output_name="two words")
    assert said.splitlines() == [
        "'two words' cannot be called in ComfyUI's prompts, which take one word: set --output_name.",
        "--concept photos:cat is not FOLDER:TRIGGER:CLASS, such as photographs/rex:ohwx:dog.",
        "--concept :x:b is not FOLDER:TRIGGER:CLASS, such as photographs/rex:ohwx:dog.",
    ]
    assert "--instance_data_dir is missing" in refused(root, tmp_path / "out")
    for concept, sentence in (
        (f"{folder}:OHWX:cat", "The triggers 'ohwx' and 'OHWX' cannot be told apart: use two words."),
        (f"{folder}:woman:cat", "The triggers 'ohwx' and 'woman' cannot be told apart: use two words."),
        (
            f"{folder}:my dog:dog",
            "The trigger 'my dog' cannot be called in ComfyUI's prompts: take one word of letters.",
        ),
        (
            f"{folder}:<new1>:dog",
            "The trigger '<new1>' cannot be called in ComfyUI's prompts: take one word of letters.",
        ),
        (
            f"{folder}:x:dog (toy)",
            "The class 'dog (toy)' has a comma, a colon, a bracket or a slash, which a prompt or a folder reads as its own.",
        ),
        (f"{folder}:x:../dog", "The class '../dog' has a comma, a colon, a bracket or a slash"),
        (f"{folder}:old:old man", "The trigger 'old' is a word that captions say anyway: take one that is in none."),
        (f"{folder}:photo:dog", "The trigger 'photo' is a word that captions say anyway: take one that is in none."),
        (f"{tmp_path / 'gone'}:x:cat", f"The folder {tmp_path / 'gone'} does not exist"),
        (f"{folder}:x:cat", f"{folder} is given to ohwx and to x: each needs its own pictures."),
    ):
        assert sentence in refused(root, tmp_path / "out", concept=[*two, concept])
    said = refused(root, folder, concept=two)
    assert f"{folder} has ohwx's pictures and is --output_dir, too: what is written would be trained on." in said
    said = refused(root, tmp_path / "out", concept=two, with_prior_preservation=True)
    assert "--with_prior_preservation needs --class_data_dir" in said
    own = folder.parent / "woman"
    own.symlink_to(folder)
    values = {"class_data_dir": str(folder.parent), "with_prior_preservation": True, "concept": two}
    said = refused(root, tmp_path / "out", **values)
    assert f"{folder} has ohwx's pictures and is class_data_dir of woman, too" in said
    own.unlink()
    with pytest.raises(PersonalizeError, match="--instance_data_dir and --concept say the same thing"):
        preflight(settings_of("custom_diffusion", root, folder, tmp_path / "out", concept=two), quiet=True)
    four = [*two, f"{folder}:c:cat", f"{folder}:d:dog"]
    assert "--initializer_token has by default 3 words for 4 concepts: name one" in refused(
        root, tmp_path, concept=four
    )
    for words, sentence in (("ktn", "names 1 word for 2 concepts"), ("ktn, two words", "'two words' is 2 tokens")):
        assert sentence in refused(root, tmp_path / "out", concept=two, initializer_token=words)
    values = {"instance_data_dir": None, "class_name": "person", "trigger": "mine", "concept": two}
    found = preflight(settings_of("custom_diffusion", root, None, tmp_path / "out", **values), quiet=True)
    assert any("--trigger and --class_name beside --concept has no effect" in one for one in found.warnings)


def test_triggers_are_replaced_all_at_once(root, folder, tmp_path):
    concepts = [f"{folder}:ohwx:cat", f"{folder}:concept:dog"]
    settings = settings_of("custom_diffusion", root, None, tmp_path, concept=concepts, instance_data_dir=None)
    method = CustomDiffusionMethod(load_base(str(root / CHECKPOINT)), settings)
    assert method.spoken("a ohwx cat, a concept dog, preconcept") == "a <concept-0> cat, a <concept-1> dog, preconcept"


def test_each_class_has_a_folder_and_pictures_of_its_own(root, two, tmp_path, monkeypatch):
    seen = []
    prepare = running.prepare
    monkeypatch.setattr(running, "prepare", lambda *a: seen.append(prepare(*a)) or seen[-1])
    classes = tmp_path / "classes"
    options = {"concept": two, "instance_data_dir": None, "class_data_dir": str(classes), "num_class_images": 2}
    options["cut_mix"] = 0
    train("custom_diffusion", root, None, tmp_path / "out", with_prior_preservation=True, max_train_steps=1, **options)
    assert {path.name: len(list(path.iterdir())) for path in classes.iterdir()} == {"woman": 2, "old man": 2}
    examples = seen[0].examples
    prior = {(one.path.parent.name, one.captions[0]) for one in examples if one.is_prior}
    assert prior == {("woman", "a woman"), ("old man", "a old man")}
    called = {text for one in examples if not one.is_prior for text in one.captions if one.framing is None}
    assert called == {"a photo of ohwx woman", "a photo of zxcv old man"}


def test_each_size_has_pictures_of_the_class(root, tmp_path, monkeypatch):
    """Also those of a second concept of the same class."""
    square, wide = photos(tmp_path / "square", 2), photos(tmp_path / "wide", 2)
    for path in wide.glob("*.png"):
        Image.open(path).resize((128, 64)).save(path)
    seen = []
    prepare = running.prepare
    monkeypatch.setattr(running, "prepare", lambda *a: seen.append(prepare(*a)) or seen[-1])
    options = {"concept": [f"{square}:ohwx:cat", f"{wide}:zxcv:cat"], "instance_data_dir": None, "num_class_images": 2}
    options |= {
        "class_data_dir": str(photos(tmp_path / "cats", 2)),
        "with_prior_preservation": True,
        "size_variants": 0,
        "cut_mix": 0,
    }
    train("custom_diffusion", root, None, tmp_path / "out", max_train_steps=1, **options)
    own, priors = ({e.size for e in seen[0].examples if e.is_prior == prior} for prior in (False, True))
    assert len(own) == 2
    assert own == priors
    assert all(sum(seen[0].examples[i].is_prior for i in seen[0].order(k)) == 1 for k in range(4))


def test_what_is_shared_with_the_other_trainers(root, folder, tmp_path):
    """Checkpointing changes nothing, an average is taken, and samples call the concept."""
    options = {"max_train_steps": 2, "train_batch_size": 2, "seed": 3}
    plain, _ = train("custom_diffusion", root, folder, tmp_path / "plain", **options)
    less, _ = train("custom_diffusion", root, folder, tmp_path / "less", gradient_checkpointing=True, **options)
    one, other = load_file(plain), load_file(less)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-5)
    values = {
        "use_ema": True,
        "ema_decay": 0.5,
        "validation_prompt": ["a {trigger} {class}"],
        "num_validation_images": 1,
    }
    averaged, _ = train("custom_diffusion", root, folder, tmp_path / "ema", **options, **values)
    assert not torch.equal(next(iter(load_file(averaged).values())), next(iter(one.values())))
    assert (tmp_path / "ema" / "samples" / "step-0000002.png").exists()


def test_half_precision_learns_the_same(root, folder, tmp_path):
    """bf16 while it trains, fp16 in the file."""
    options = {"max_train_steps": 4, "train_batch_size": 2, "seed": 3, "learning_rate": 1e-3}
    plain, _ = train("custom_diffusion", root, folder, tmp_path / "plain", **options)
    half, _ = train(
        "custom_diffusion", root, folder, tmp_path / "half", mixed_precision="bf16", save_precision="fp16", **options
    )
    one, other = load_file(plain), load_file(half)
    assert one.keys() == other.keys()
    changes = [key for key, value in one.items() if key.endswith(".diff")]
    assert changes
    assert all(other[key].dtype == torch.float16 for key in changes)
    a, b = (torch.cat([state[key].float().flatten() for key in changes]) for state in (one, other))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.95
    assert not torch.equal(a, b)


@pytest.mark.parametrize("more", [{}, {"optimizer": "muon"}, {"fused_backward": True}], ids=["adamw", "muon", "fused"])
def test_learned_words_get_no_longer_than_they_may(root, two, tmp_path, more):
    """And no shorter by it: without a limit they have another length each."""
    usual = load_base(str(root / CHECKPOINT)).text_encoders[0].get_input_embeddings().weight.norm(dim=1).mean().item()
    options = {
        "concept": two,
        "instance_data_dir": None,
        "text_encoder_lr": 0.3,
        "max_train_steps": 4,
        "save_precision": "fp32",
    }
    lengths = {}
    for norm in (0.0, 1.5):
        _, *words = train("custom_diffusion", root, None, tmp_path / str(norm), max_word_norm=norm, **options, **more)
        lengths[norm] = [load_file(path)["emb_params"].norm().item() / usual for path in words]
    assert min(lengths[0.0]) > 2
    assert lengths[1.5] == pytest.approx([1.5, 1.5], rel=1e-4)


def test_concepts_in_another_order_do_not_go_on(root, two, tmp_path):
    options = {"instance_data_dir": None, "max_train_steps": 2, "output_name": "both"}
    train("custom_diffusion", root, None, tmp_path, concept=two, **options)
    with pytest.raises(PersonalizeError, match=r"triggers was 'ohwx, zxcv', is 'zxcv, ohwx'.*another --output_dir, or"):
        train("custom_diffusion", root, None, tmp_path, concept=two[::-1], **(options | {"max_train_steps": 3}))
