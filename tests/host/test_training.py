"""Training inside ComfyUI: the same file as headless, stopped and gone on with, and nothing of the host's is changed."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning import photos, train
from inprocess import BASE, node
from pack.models.checkpoints import read_header
from pack.models.metadata import read_about
from PIL import Image
from safetensors.torch import load_file

METHODS = {
    "lora": ("TrainLoRA", "loras", {"rank": 4}, {"rank": 4}),
    "textual_inversion": (
        "TrainTextualInversion",
        "embeddings",
        {"num_vectors": 2, "learnable_property": "object"},
        {"num_vectors": 2},
    ),
    "dreambooth": ("TrainDreamBooth", "checkpoints", {"save_as": "full", "class_pictures": 0}, {"save_as": "full"}),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("training") / "photos", 3)


def on_wires(folder):
    paths = sorted(folder.glob("*.png"))
    tensors = [torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), np.float32) / 255)[None] for path in paths]
    return {f"image{i}": tensor for i, tensor in enumerate(tensors)}


def asked(name, /, **values):
    common = {"checkpoint": BASE, "folder": "", "class_name": "woman", "trigger": "ohwx", "name": name, "steps": 3}
    return common | {"learning_rate": 0.0, "resolution": 0, "seed": 5, "sample_prompt": ""} | values


def ask(host, name, /, **values):
    """As the host runs a node."""
    with torch.inference_mode():
        return node(host, name)(**values)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_file_as_headless(host, root, pictures, tmp_path, method):
    name, kind, own, options = METHODS[method]
    with torch.inference_mode():
        *_, file, shown = node(host, name)(**asked(f"wired_{method}", images=on_wires(pictures), **own))
    path = Path(file)
    assert path.parent == host.base / "models" / kind
    # PNGs of the very pixels, as a user of the headless trainer may have them
    (headless,) = train(
        method,
        root,
        pictures,
        tmp_path,
        trigger="ohwx",
        seed=5,
        output_name=path.stem,
        save_precision="fp16",
        **options,
    )
    ours, theirs = path.read_bytes(), headless.read_bytes()
    start, begin = (8 + int.from_bytes(data[:8], "little") for data in (ours, theirs))
    assert ours[start:] == theirs[begin:]
    assert load_file(path).keys() == load_file(headless).keys()
    assert shown.ndim == 4
    assert shown.shape[-1] == 3


def test_the_model_comes_with_it_and_the_loaded_one_is_as_before(host, loaded, pictures):
    before = {key: value.clone() for key, value in loaded[0].model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    model, clip, vae, trigger, file, _ = ask(
        host, "TrainLoRA", **asked("comes_with_it", images=on_wires(pictures), rank=4, learning_rate=1e-2)
    )
    assert trigger == "ohwx woman"
    assert model.patches
    assert not loaded[0].patches
    assert all(torch.equal(value, before[key]) for key, value in loaded[0].model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert clip is not None
    assert vae is not None
    changed = Path(file).stat().st_mtime_ns
    again = ask(host, "TrainLoRA", **asked("comes_with_it", images=on_wires(pictures), rank=4, learning_rate=1e-2))
    assert again[4] == file, "what is there is not trained again"
    assert Path(file).stat().st_mtime_ns == changed
    watched = asked("comes_with_it", images=on_wires(pictures), rank=4, learning_rate=1e-2, sample_prompt="a {class}")
    assert ask(host, "TrainLoRA", **watched, gradient_checkpointing=True)[4] == file, "nor for what only shows it"
    other = ask(host, "TrainLoRA", **asked("comes_with_it", images=on_wires(pictures), rank=2, learning_rate=1e-2))
    assert Path(other[4]).name == "comes_with_it_02.safetensors"
    assert Path(file).stat().st_mtime_ns == changed


def test_a_file_that_is_deleted_is_made_again(host, pictures):
    values = asked("deleted", images=on_wires(pictures), rank=4)
    fingerprint = host.node("PersonalizeTrainLoRA").fingerprint_inputs
    before = fingerprint(**values)
    path = Path(ask(host, "TrainLoRA", **values)[4])
    content = load_file(path)
    assert fingerprint(**values) == before, "the host keeps what it has"
    path.unlink()
    assert fingerprint(**values) != before
    assert Path(ask(host, "TrainLoRA", **values)[4]) == path
    assert fingerprint(**values) == before
    again = load_file(path)
    assert all(torch.equal(again[key], value) for key, value in content.items())


def test_a_training_that_diverges_speaks_of_the_node_s_inputs(host, pictures, monkeypatch):
    run = host.module("training.run")

    def diverging(*_arguments):
        raise host.module("models.errors").PersonalizeError(
            "Lower --learning_rate (now 1), see --optimizer, and go on with --resume_from_checkpoint step-0000004."
        )

    monkeypatch.setattr(run, "train", diverging)
    with pytest.raises(ValueError, match=r"^Lower learning_rate \(now 1\), see --optimizer, and start again\.$"):
        ask(host, "TrainLoRA", **asked("diverging", images=on_wires(pictures), rank=4))


def test_a_file_that_another_training_took_the_name_of_is_not_taken_for_it(host, pictures):
    def made(seed):
        values = asked("reused", images=on_wires(pictures), rank=4, learning_rate=1e-2, seed=seed)
        return Path(ask(host, "TrainLoRA", **values)[4])

    first = made(1)
    content = first.read_bytes()
    first.unlink()
    assert made(2) == first
    assert first.read_bytes() != content
    again = made(1)
    assert again.name == "reused_02.safetensors"
    ours, theirs = load_file(again), load_file(first)
    assert any(not torch.equal(value, theirs[key]) for key, value in ours.items())


def test_class_pictures_are_drawn_and_trained_on(host, pictures):
    own = {"save_as": "delta", "class_pictures": 2}
    *_, file, _ = ask(host, "TrainDreamBooth", **asked("preserved", images=on_wires(pictures), **own) | {"steps": 1})
    assert Path(file).name == "preserved.delta.safetensors"
    (place,) = (host.base / "output" / "personalize").glob("preserved-*")
    assert len(list((place / "class").glob("*.png"))) == 2
    settings = read_about(read_header(Path(file))[1], "").settings
    assert settings["with_prior_preservation"]
    assert settings["num_class_images"] == 2


def test_samples_and_progress(host, pictures, monkeypatch):
    import comfy.utils

    told = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar,
        "update_absolute",
        lambda self, value, total=None, preview=None: told.append((value, total, preview)),
    )
    values = asked("sampled", images=on_wires(pictures), rank=4) | {"sample_prompt": "a {trigger} {class}", "steps": 4}
    *_, shown = ask(host, "TrainLoRA", **values, sample_steps=2)
    before, steps = told[:-4], told[-4:]
    assert [(value, total) for value, total, _ in before[:3]] == [(0, 3), (1, 3), (2, 3)], "pictures are encoded"
    assert [(value, total) for value, total, _ in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [preview is not None for *_, preview in steps] == [False, True, False, True]
    assert shown.shape[2] >= 4 * 64, "four pictures side by side"
    assert float(shown.std()) > 0.05


def test_cancelled_it_goes_on_from_its_last_step(host, root, pictures, tmp_path, monkeypatch):
    import comfy.model_management
    import comfy.utils

    monkeypatch.setattr(
        comfy.utils.ProgressBar,
        "update_absolute",
        lambda self, value, total=None, preview=None: (
            comfy.model_management.interrupt_current_processing() if (value, total) == (2, 6) else None
        ),
    )
    values = asked("stopped", images=on_wires(pictures), rank=4) | {"steps": 6}
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ask(host, "TrainLoRA", **values)
    (run,) = (host.base / "output" / "personalize").glob("stopped-*")
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    assert checkpoint.name == "step-0000003", "within one step"
    assert not (host.base / "models" / "loras" / "stopped.safetensors").exists()
    assert not comfy.model_management.processing_interrupted()
    monkeypatch.undo()
    *_, file, _ = ask(host, "TrainLoRA", **values)
    options = {"rank": 4, "max_train_steps": 6, "output_name": "stopped", "save_precision": "fp16"}
    (whole,) = train("lora", root, pictures, tmp_path, trigger="ohwx", seed=5, **options)
    ours, theirs = load_file(file), load_file(whole)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_folder_and_captions(host, pictures):
    values = asked("foldered", rank=4) | {"folder": str(pictures), "steps": 1}
    *_, file, _ = ask(host, "TrainLoRA", **values)
    assert Path(file).is_file()
    captions = "a {trigger} {class} on a beach\n\na {trigger} {class}\nsomebody"
    ask(host, "TrainLoRA", **asked("captioned", rank=4, images=on_wires(pictures), captions=captions) | {"steps": 1})
    (run,) = (host.base / "output" / "personalize").glob("captioned-*")
    texts = [path.read_text() for path in sorted((run / "pictures").glob("*.txt"))]
    assert texts == ["a {trigger} {class} on a beach", "a {trigger} {class}", "somebody"]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"images": {}}, r"There are no pictures: connect some, or write a folder of them\."),
        ({"folder": "."}, r"There are both connected pictures and a folder: use one of them\."),
        ({"captions": "one\ntwo"}, r"^2 captions but 3 pictures: write a line for each\."),
        (
            {"images": {}, "folder": "nowhere"},
            r'There is no folder "nowhere" \(looked for .*\): write a folder with pict.*',
        ),
        ({"name": "../up"}, r'"\.\./up" is no name of a file: write letters, digits, _ and -, a hundred at most\.'),
        ({"name": "v1.1"}, r'"v1\.1" is no name of a file.*'),
        ({"name": "a" * 101}, r'"a*" is no name of a file.*'),
        ({"checkpoint": "none.safetensors"}, r"none.safetensors is not in .*: put it there and refresh\."),
        ({"trigger": ""}, r"^trigger is empty"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_one_sentence(host, pictures, wrong, sentence):
    values = asked("wrong", images=on_wires(pictures), rank=4) | wrong
    with pytest.raises(host.module("models.errors").PersonalizeError, match=sentence) as error:
        node(host, "TrainLoRA")(**values)
    assert "\n" not in str(error.value)
    assert not list((host.base / "models" / "loras").glob("wrong*"))
