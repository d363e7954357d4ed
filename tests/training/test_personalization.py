"""Trained files on a base that draws without ComfyUI: what is in the file is in the networks, and prompts call it."""

import shutil

import pytest
import torch
from finetuning import photos, train
from identity_sets import ADAPTER, CHECKPOINT, ENCODER, identities
from narrow_models import WIDTH, narrow_folder
from pack.models.custom_diffusion import concept_tensors
from pack.models.errors import PersonalizeError
from pack.models.textual_inversion import word_tensors
from pack.models.weight_files import read_safetensors, write_safetensors
from pack.training import evaluate as evaluation
from pack.training.base_model import load_base
from pack.training.convert_concepts import word_vectors
from pack.training.encoding import read_text
from pack.training.personalization import FILES, check_file, put_on
from pack.training.textual_inversion import add_words, find_the_end

DELTA = "models/pocket/loras/pocket_woman.delta.safetensors"


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """A file of two concepts with their words, and one of a single concept."""
    folder = tmp_path_factory.mktemp("trained")
    pictures, common = photos(folder / "photos", 2), {"max_train_steps": 2, "size_variants": 0, "learning_rate": 1e-3}
    mugs = photos(folder / "mugs", 2)
    both = {"concept": [f"{pictures}:ohwx:woman", f"{mugs}:zxcv:mug"], "instance_data_dir": None}
    train("custom_diffusion", root, pictures, folder / "both", output_name="both", **common, **both)
    train("custom_diffusion", root, pictures, folder / "one", output_name="one", **common)
    train("lora", root, pictures, folder / "lora", max_train_steps=1)
    return folder


def weights(base):
    return {name: value.clone() for name, value in base.pipeline.unet.state_dict().items()}


def said(base, text):
    with torch.no_grad():
        return read_text(base, [text])


def row(tokenizer, encoder, word):
    return encoder.get_input_embeddings().weight.detach()[tokenizer.convert_tokens_to_ids(word)]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_text_encoder_gets_its_own_vectors_of_a_word(family, tmp_path):
    where = narrow_folder(family, tmp_path / "narrow")
    base, trained = load_base(str(where)), load_base(str(where))
    vectors = [torch.randn(2, WIDTH) for _ in base.text_encoders]
    write_safetensors(tmp_path / "word.safetensors", word_tensors(vectors), {})
    for encoder in base.text_encoders:
        find_the_end(encoder, 2)  # as published configurations have it
    put_on(base, "textual_inversion", tmp_path / "word.safetensors", "ohwx")
    for tokenizer, encoder, own in zip(base.tokenizers, base.text_encoders, vectors, strict=True):
        for token, vector in zip(("ohwx", "ohwx_1"), own, strict=True):
            assert torch.equal(row(tokenizer, encoder, token), vector)
    rows = iter(vectors)
    add_words(trained, ["<0>", "<1>"], lambda *_: next(rows))
    ours, theirs = said(base, "a photo of ohwx, smiling"), said(trained, "a photo of <0><1>, smiling")
    torch.testing.assert_close(ours.states, theirs.states)
    if family == "sdxl":
        torch.testing.assert_close(ours.pooled, theirs.pooled)


def test_a_concept_changes_its_layers_and_brings_its_word(root, trained):
    base, path = load_base(str(root / CHECKPOINT)), trained / "one" / "one.safetensors"
    before = weights(base)
    put_on(base, "custom_diffusion", path, "ohwx")
    changes = {name: value - before[name] for name, value in weights(base).items()}
    changes = {name: change for name, change in changes.items() if change.any()}
    assert changes.keys() == {name for name in before if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    tensors = read_safetensors(path)[0]
    for name, change in concept_tensors(changes).items():
        torch.testing.assert_close(change, tensors[name], atol=1e-6, rtol=0)
    (vectors,) = read_safetensors(path.with_name("one_ohwx.safetensors"))[0].values()
    for word in ("ohwx", "embedding:one_ohwx"):
        assert torch.equal(row(base.tokenizers[0], base.text_encoders[0], word), vectors[0])
    text = "a photo of {} woman"
    one, other = (said(base, text.format(word)).states for word in ("ohwx", "embedding:one_ohwx"))
    assert torch.equal(one, other)
    assert not torch.allclose(one, said(load_base(str(root / CHECKPOINT)), text.format("ohwx")).states)


def test_of_several_concepts_the_trigger_calls_its_own(root, trained):
    base, path = load_base(str(root / CHECKPOINT)), trained / "both" / "both.safetensors"
    with pytest.raises(PersonalizeError, match=r"has the concepts both_ohwx, both_zxcv, of which none ends with 'rex'"):
        put_on(base, "custom_diffusion", path, "rex")
    put_on(base, "custom_diffusion", path, "zxcv")
    tokenizer, encoder = base.tokenizers[0], base.text_encoders[0]
    first, second, called = (row(tokenizer, encoder, w) for w in ("embedding:both_ohwx", "embedding:both_zxcv", "zxcv"))
    assert torch.equal(called, second)
    assert not torch.equal(called, first)


def test_what_does_not_fit_is_told(root, trained, tmp_path):
    base, path = load_base(str(root / CHECKPOINT)), trained / "one" / "one.safetensors"
    with pytest.raises(PersonalizeError, match=r"knows the word 'dog' already: let --word be another"):
        put_on(base, "textual_inversion", path.with_name("one_ohwx.safetensors"), "dog")
    write_safetensors(tmp_path / "word.safetensors", word_tensors([torch.zeros(2, 64)]), {})
    base.tokenizers[0].add_tokens("zzqx_1")
    with pytest.raises(PersonalizeError, match=r"knows the word 'zzqx_1' already: let --word be another"):
        put_on(base, "textual_inversion", tmp_path / "word.safetensors", "zzqx")
    with pytest.raises(PersonalizeError, match=r"The learned word one_ohwx.safetensors does not lie beside"):
        check_file("custom_diffusion", shutil.copy(path, tmp_path / "one.safetensors"))
    narrow = load_base(str(narrow_folder("sdxl", tmp_path / "narrow")))
    with pytest.raises(PersonalizeError, match=r"one_ohwx.safetensors has vectors of width 64, but .* needs 32 and 32"):
        put_on(narrow, "textual_inversion", path.with_name("one_ohwx.safetensors"), "ohwx")


@pytest.mark.parametrize("method", FILES)
def test_a_file_of_another_method_is_told_before_a_model_loads(root, trained, method):
    ours, lora = trained / "one", trained / "lora" / "ohwx.safetensors"
    files = {
        "custom_diffusion": (ours / "one.safetensors", "a Custom Diffusion"),
        "textual_inversion": (ours / "one_ohwx.safetensors", "a learned word"),
        "lora": (lora, "a LoRA"),
        "ip_adapter": (root / ADAPTER, "an IP-Adapter"),
        "dreambooth": (root / DELTA, "a checkpoint or DreamBooth's difference from one"),
    }
    for kind, (path, called) in files.items():
        if kind == method:
            check_file(method, path)
        else:
            with pytest.raises(PersonalizeError) as caught:
                check_file(method, path)
            assert str(caught.value) == f"--{method} {path} is {called}: give what python -m training.{method} wrote."
    with pytest.raises(PersonalizeError, match="is of no kind that is known"):
        check_file(method, root / ENCODER)


def test_words_of_other_programs_are_words(tmp_path):
    vector = torch.randn(2, WIDTH)
    files = {
        "a1111.pt": {"string_to_token": {"*": 265}, "string_to_param": {"*": vector}, "name": "a_lora_b", "step": 9},
        "diffusers.bin": {"<my_lora_word>": vector[0]},
        "several.bin": {f"<new{i}>": vector for i in range(3)},
        "three.bin": {"clip_l": vector, "clip_g": vector, "t5xxl": vector},
    }
    for name, tensors in files.items():
        torch.save(tensors, tmp_path / name)
        check_file("textual_inversion", tmp_path / name)
        assert word_vectors(tmp_path / name)


def test_a_lora_of_another_base_is_told_in_one_sentence(root, trained, tmp_path, capfd):
    lora = trained / "lora" / "ohwx.safetensors"
    narrow = load_base(str(narrow_folder("sd15", tmp_path / "narrow")))
    pocket = load_base(str(root / CHECKPOINT))
    tensors = read_safetensors(lora)[0]
    wide = {k: torch.cat([v, v], 1) if k.endswith("lora_down.weight") else v for k, v in tensors.items()}
    far = {f"transformer.blocks.0.to_q.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    odd = {"lora_unet_nowhere.lora_middle.weight": torch.zeros(2, 2)}
    for name, state in (("wide", wide), ("far", far), ("odd", odd)):
        write_safetensors(tmp_path / f"{name}.safetensors", state, {})
    capfd.readouterr()
    for base, path in (
        (narrow, lora),
        *((pocket, tmp_path / f"{name}.safetensors") for name in ("wide", "far", "odd")),
    ):
        check_file("lora", path)
        with pytest.raises(PersonalizeError, match=f"^{path.name} does not fit {base.name} .*: give a LoRA that was"):
            put_on(base, "lora", path, "ohwx")
    assert "size mismatch" not in "".join(capfd.readouterr())


def test_evaluate_draws_with_custom_diffusion_and_a_lora(root, trained, tmp_path, capsys):
    people = identities(tmp_path / "people", 1, 2)
    common = [
        *("--pretrained_model_name_or_path", str(root / CHECKPOINT), "--real", str(people), "--bootstrap_draws", "0"),
        *("--output_dir", str(tmp_path / "measured"), "--pictures_per_prompt", "1", "--num_inference_steps", "2"),
        *("--prompt", "a {trigger} {class}", "--class_name", "woman"),
    ]
    concept = ("--custom_diffusion", str(trained / "one" / "one.safetensors"))
    lora = ("--lora", str(trained / "lora" / "ohwx.safetensors"))
    for name, own in (("plain", ()), ("concept", concept), ("lora", lora), ("all", (*concept, *lora))):
        assert evaluation.main([*common, *own, "--name", name]) == 0, capsys.readouterr().err
    drawn = {path.read_bytes() for path in (tmp_path / "measured" / "drawn").rglob("*.png")}
    assert len(drawn) == 4
    word = ("--textual_inversion", str(trained / "one" / "one_ohwx.safetensors"))
    assert evaluation.main([*common, *concept, *word, "--name", "refused"]) == 1
    assert "--textual_inversion and --custom_diffusion both say what {trigger} is" in capsys.readouterr().err
    assert evaluation.main([*common, "--custom_diffusion", "gone.safetensors", "--name", "refused"]) == 1
    assert "--custom_diffusion gone.safetensors does not exist." in capsys.readouterr().err
