"""Mistakes that are told by a single sentence of the trainers' and converters' own."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from finetuning import CHECKPOINT, photos
from pack.models.errors import PersonalizeError
from pack.models.metadata import About
from pack.models.weight_files import read_safetensors, write_safetensors
from pack.training.base_model import load_base, load_vae
from pack.training.convert_networks import convert_dreambooth, convert_lora
from pack.training.dataset import Example
from pack.training.dreambooth import DreamBoothMethod
from pack.training.encoding import Cache, encode_pictures
from pack.training.features import check_model
from pack.training.following import excited_places
from pack.training.image_encoder import Features, View
from pack.training.picture_sets import find_set
from pack.training.subject_features import SubjectFeatures
from pack.training.truth import attributes_of


@pytest.fixture(scope="module")
def base(root):
    return load_base(str(root / CHECKPOINT))


def told(sentence, call, *arguments):
    with pytest.raises(PersonalizeError, match=sentence) as error:
        call(*arguments)
    assert "\n" not in str(error.value)


def test_attributes_that_are_a_list(tmp_path):
    (tmp_path / "attributes.json").write_text('["dog"]')
    real = SimpleNamespace(identities={"one": [tmp_path / "01.png"]})
    told(r'^attributes\.json in .* is no JSON object, such as \{"kind": "woman"\}\.$', attributes_of, real)


def test_empty_folders_among_identities(tmp_path):
    photos(tmp_path / "set" / "one", 1)
    for number in range(4):
        (tmp_path / "set" / f"empty{number}").mkdir()
    told(r"folders empty0, empty1, empty2, \.\.\. have no pictures: fill or delete", find_set, tmp_path / "set", "real")


def test_a_model_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    told(r"^--clip .* has no weights \(\.safetensors or \.bin\)\.$", check_model, str(tmp_path), "--clip", ("clip",))


def test_a_vae_that_is_none(tmp_path):
    told(r" cannot be loaded as a VAE: ", load_vae, tmp_path, "sd15")


def test_a_vae_of_numbers_that_are_none(base, root, tmp_path):
    vae = load_base(str(root / CHECKPOINT)).pipeline.vae
    for parameter in vae.parameters():
        parameter.data.fill_(torch.nan)
    path = photos(tmp_path / "photos", 1) / "01.png"
    example = Example(path, ("a cat",), (64, 64), False)
    given = vae, [example], Cache(tmp_path / "cache"), ""
    told(r"^The VAE gives no finite numbers for .*: use another --vae_path\.$", encode_pictures, *given)


def test_a_word_to_excite_that_is_not_in_the_prompt(base):
    told('^"a photo of a cat": .*dog', excited_places, base, "a photo of a cat", "dog")


@pytest.mark.parametrize(("kind", "key"), [(Features, View(None)), (SubjectFeatures, (None, 0))])
def test_a_cache_that_was_emptied_meanwhile(kind, key, tmp_path):
    own = object.__new__(kind)  # an encoder is not needed to look
    own.memory, own.keys, own.cache = {}, {key: {}}, Cache(tmp_path)
    told(f"^The cache {re.escape(str(tmp_path))} was changed while it was in use", kind.__getitem__, own, key)


def test_a_base_whose_file_has_other_names(base, tmp_path):
    state = {name: value for name, value in read_safetensors(base.file)[0].items() if name.startswith("model.")}
    write_safetensors(tmp_path / "other.safetensors", state, {})
    own = SimpleNamespace(
        base=replace(base, file=tmp_path / "other.safetensors"), text=[("text_encoder", base.text_encoders[0])]
    )
    sentence = (
        r"^other\.safetensors has no cond_stage_model\..* \(\d+ such names\), which would train: take a checkpoint in"
    )
    told(sentence + r" the usual layout, or use --no-train_text_encoder\.$", DreamBoothMethod.check_names, own)


def test_a_lora_that_is_none(base, tmp_path):
    write_safetensors(tmp_path / "odd.safetensors", {"lora_unet_nowhere.lora_up.weight": torch.zeros(2, 2)}, {})
    given = tmp_path / "odd.safetensors", tmp_path, "new", "diffusers", base, torch.float32
    told(r"^odd\.safetensors is no LoRA that diffusers reads on pocket_portraits\.safetensors: ", convert_lora, *given)


def test_a_difference_and_a_base_that_do_not_fit(base, tmp_path):
    name = "diffusion_model.out.2.bias.diff_b"
    about = About("dreambooth", "pocket", "theirs.safetensors", base_fingerprint="0" * 16)
    write_safetensors(tmp_path / "delta.safetensors", {name: torch.zeros(4)}, about.as_metadata())
    sentence = r"^delta\.safetensors was trained on theirs\.safetensors, and pocket_portraits\.safetensors is another"
    told(sentence, convert_dreambooth, tmp_path / "delta.safetensors", tmp_path, "new", "checkpoint", base)
    write_safetensors(tmp_path / "bare.safetensors", {name: torch.zeros(4)}, {})
    given = tmp_path / "bare.safetensors", tmp_path, "new", "checkpoint", replace(base, file=None)
    told(r"^--to checkpoint needs the base as a \.safetensors file, in which", convert_dreambooth, *given)
    given = base.file, tmp_path, "new", "delta", replace(base, family="sd15", name="own.safetensors")
    sentence = (
        r"^pocket_portraits\.safetensors is the pocket model, but own\.safetensors is SD1\.5: give its own base\.$"
    )
    told(sentence, convert_dreambooth, *given)
