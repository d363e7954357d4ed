"""Everything that is wrong is told at once, before a model is loaded."""

import json
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from finetuning import CHECKPOINT, photos, settings_of, train
from pack.models.errors import PersonalizeError
from pack.training import base_checks, preflight, run
from pack.training.base_model import unet_blocks_of
from PIL import Image
from safetensors.torch import load_file, save_file


@pytest.fixture(autouse=True)
def nothing_loads(monkeypatch):
    def load(*arguments):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run, "load_base", load)


def problems(root, folder, output, method="lora", **values):
    with pytest.raises(PersonalizeError) as caught:
        train(method, root, folder, output, **values)
    return str(caught.value).splitlines()


def png(width, height):
    """The beginning of a PNG of any size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def test_twelve_bad_files_are_told_at_once(root, tmp_path):
    folder = photos(tmp_path / "photos", 3)
    picture = Image.effect_noise((64, 48), 80).convert("RGB")
    for name in ("cut", "caption-empty", "caption-latin", "mask-aspect", "mask-broken"):
        picture.save(folder / f"{name}.png")
    whole = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "caption-empty.txt").write_text(" \n")
    (folder / "caption-latin.txt").write_bytes("Käse".encode("latin-1"))
    Image.linear_gradient("L").resize((48, 64)).save(folder / "mask-aspect-masklabel.png")
    (folder / "mask-broken-masklabel.png").write_bytes(b"no mask")
    (folder / "text.jpg").write_text("hello")
    (folder / "empty.png").touch()
    (folder / "phone.heic").write_bytes(b"....ftypheic")
    (folder / "camera.dng").write_bytes(b"II*\0")
    Image.new("RGB", (8, 8)).save(folder / "tiny.png")
    (folder / "folder.png").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "bomb.png").write_bytes(png(60000, 60000))
    bad = ["bomb", "camera", "caption-empty", "caption-latin", "cut", "empty", "folder", "gone", "mask-aspect"]
    bad += ["mask-broken", "phone", "text", "tiny"]
    # what people's folders hold besides, and what can be read
    (folder / "._0001.jpg").write_bytes(b"\0\5\x16\7")
    (folder / "Thumbs.db").write_bytes(b"x")
    picture.convert("CMYK").save(folder / "print.jpg")
    Image.fromarray((np.arange(4096, dtype=np.uint16) * 16).reshape(64, 64)).save(folder / "deep.png")
    picture.save(folder / "moving.gif", save_all=True, append_images=[picture.rotate(90)])
    picture.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "palette.png", transparency=0)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=turned)
    said = problems(root, folder, tmp_path / "out")
    assert len(said) == len(bad) >= 12
    for name, sentence in zip(bad, said, strict=True):
        assert name in sentence, (name, sentence)
        assert sentence.endswith((".", ")."))


def test_every_other_problem_is_told_with_them(root, tmp_path):
    folder = photos(tmp_path / "photos", 2)
    (folder / "empty.png").touch()
    said = problems(
        root,
        folder,
        tmp_path / "out",
        pretrained_model_name_or_path="/nowhere/base.safetensors",
        with_prior_preservation=True,
        trigger=" ",
        output_name="a/b",
    )
    assert len(said) == 5
    for part, sentence in zip(("class_data_dir", "'a/b' is no file name", "--trigger is empty", "base.safetensors does not exist", "empty.png"), said, strict=True):  # fmt: skip
        assert part in sentence


@pytest.mark.parametrize("option", ["output_name", "trigger"])
@pytest.mark.parametrize("name", ["my word", "a,b", "(a)"])
def test_a_learned_word_is_one_word(root, tmp_path, option, name):
    folder, output = photos(tmp_path / "photos", 1), tmp_path / "out"
    said = problems(root, folder, output, "textual_inversion", **{option: name})
    assert said == [f"{name!r} cannot be called in ComfyUI's prompts, which take one word: set --output_name."]
    preflight.preflight(settings_of("lora", root, folder, output, **{option: name}))  # any file name will do


def test_nothing_said_at_all(capsys):
    assert run.main("lora", "", []) == 1
    assert capsys.readouterr().err.splitlines() == [
        "--pretrained_model_name_or_path is missing: the base model.",
        "--instance_data_dir is missing: the folder with your pictures.",
        "--output_dir is missing: the folder for the result.",
    ]


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("lora", {"clip_skip": 50}, "--clip_skip 50: the pocket model's text encoder has 4 layers."),
        ("lora", {"block_ranks": ["up_blocks.9=4"]}, "--block_ranks: the pocket model has no up_blocks.9, but down_bl"),
        (
            "lora",
            {"block_ranks": [f"{block}=0" for block in unet_blocks_of("pocket")]},
            "--block_ranks leaves every block out: nothing would train.",
        ),
        (
            "lora",
            {"lr_warmup_steps": 4},
            "--lr_warmup_steps 4 are more than the 3 steps of the training: the learning rate",
        ),
        (
            "lora",
            {"validation_data_dir": "PHOTOS"},
            "--instance_data_dir and --validation_data_dir are the same folder: the validation loss would be of pictures",
        ),
        ("lora", {"num_train_epochs": 2}, "--max_train_steps and --num_train_epochs say the same thing: give one"),
        ("dreambooth", {"delta_megabytes": 1.0}, "--delta_megabytes cuts a difference: use it with --save_as delta"),
        ("lora", {"output_name": "a.safetensors"}, "--output_name a.safetensors is without ending: write a."),
        ("lora", {"output_name": "a\udcff"}, "--output_name 'a\\udcff' is not UTF-8: rename it."),
        ("lora", {"vae_path": "TEXT"}, "text.txt is no VAE: --vae_path takes a folder or a file in .safetensors"),
        ("lora", {"vae_path": "PHOTOS"}, "photos is no VAE in diffusers' layout: it has no config.json."),
        ("lora", {"vae_path": CHECKPOINT}, "pocket_portraits.safetensors is no VAE that is supported: it has no dec"),
        ("lora", {"cache_dir": "TEXT/x"}, "text.txt/x (--cache_dir) cannot be written to (Not a directory)."),
        (
            "dreambooth",
            {"with_prior_preservation": True, "class_data_dir": "PHOTOS"},
            "--instance_data_dir and --class_data_dir are the same folder: what is written would be trained on.",
        ),
    ],
)
def test_options_that_cannot_be(root, tmp_path, method, values, said):
    places = {
        "TEXT": str(tmp_path / "text.txt"),
        "PHOTOS": str(tmp_path / "photos"),
        CHECKPOINT: str(root / CHECKPOINT),
    }
    (tmp_path / "text.txt").write_text("no weights")
    for name, value in values.items():
        for short, place in places.items():
            if isinstance(value, str) and value.startswith(short):
                values = values | {name: value.replace(short, place)}
    sentences = problems(root, photos(tmp_path / "photos", 1), tmp_path / "out", method, **values)
    assert len(sentences) == 1
    assert said in sentences[0]


def test_what_has_no_effect_is_a_warning(root, tmp_path):
    folder = photos(tmp_path / "photos", 1)

    def warned(method, **values):
        return preflight.preflight(settings_of(method, root, folder, tmp_path / "out", **values)).warnings

    assert warned("lora") == []
    assert warned("lora", train_text_encoder=True, text_encoder_rank=2, text_encoder_lr=1e-3) == []
    for method, values, said in (
        ("lora", {"text_encoder_rank": 2}, "--text_encoder_rank has no effect: the text encoder does not train"),
        ("textual_inversion", {"train_text_encoder": True}, "--train_text_encoder has no effect: Textual Inversion"),
        ("lora", {"fused_backward": True, "max_grad_norm": 0.5}, "--max_grad_norm has no effect with --fused_backward"),
        ("lora", {"optimizer": "prodigy", "learning_rate": 0.1}, "--learning_rate scales what prodigy finds by itself"),
        ("lora", {"masked_loss": True}, "--masked_loss has no effect: no picture in"),
        ("lora", {"class_data_dir": "x"}, "--class_data_dir has no effect without --with_prior_preservation."),
        ("lora", {"revision": "main"}, "--revision has no effect without --pretrained_model_name_or_path OWNER/NAME."),
        ("lora", {"variant": "fp16"}, "--variant has no effect without --pretrained_model_name_or_path of a folder."),
        ("lora", {"ema_decay": 0.9}, "--ema_decay has no effect without --use_ema."),
        ("lora", {"num_validation_images": 2}, "--num_validation_images has no effect without --validation_prompt."),
        (
            "lora",
            {"validation_steps": 7},
            "--validation_steps 7 says only how often loss.png is drawn, because nothing",
        ),
        (
            "lora",
            {"validation_prompt": ["a"], "num_validation_images": 0, "validation_steps": 7},
            "--validation_steps 7 says only how often loss.png is drawn, because nothing is validated: set --num_v",
        ),
        ("lora", {"lr_power": 2.0}, "--lr_power has no effect without --lr_scheduler polynomial."),
        ("lora", {"lr_num_cycles": 2}, "--lr_num_cycles has no effect without --lr_scheduler cosine_with_restarts."),
        (
            "lora",
            {"optimizer": "adafactor", "adam_beta1": 0.5},
            "--adam_beta1 has no effect without --optimizer adamw,",
        ),
    ):
        (warning,) = warned(method, **values)
        assert warning.startswith(said)


def test_how_often_to_validate_is_no_warning_where_something_is_validated(root, tmp_path):
    folder, held = photos(tmp_path / "photos", 1), tmp_path / "held"
    held.mkdir()
    Image.new("RGB", (64, 48), "red").save(held / "a.png")
    for given in ({"validation_prompt": ["a {trigger}"]}, {"validation_data_dir": str(held)}):
        settings = settings_of("lora", root, folder, tmp_path / "out", validation_steps=7, **given)
        assert preflight.preflight(settings).warnings == []


@pytest.mark.parametrize("method", ["lora", "custom_diffusion"])
def test_copies_to_validate_on_are_counted(root, tmp_path, method):
    folder, held = photos(tmp_path / "photos", 3), tmp_path / "held"
    shutil.copytree(folder, held)
    first = sorted(held.iterdir())[0]
    size = first.stat().st_size
    Image.new("RGB", (64, 48), "red").save(first)
    first.write_bytes(first.read_bytes().ljust(size, b"\0"))  # of the same size, but another picture
    settings = settings_of(method, root, folder, tmp_path / "out", validation_data_dir=str(held))
    (warning,) = preflight.preflight(settings).warnings
    assert warning.startswith(
        f"2 of the 3 pictures from {held} to validate on are copies of pictures that are trained on"
    )


def test_captions_from_which_a_word_learns_nothing(root, tmp_path):
    folder = photos(tmp_path / "photos", 1)
    (picture,) = folder.glob("*.png")
    picture.with_suffix(".txt").write_text("ohwxen in a forest")
    (said,) = problems(root, folder, tmp_path / "out", "textual_inversion")
    assert said == f"No caption in {folder} has the trigger 'ohwx': the word would learn nothing."


def test_the_base_of_another_configuration(root, tmp_path):
    said = problems(root, photos(tmp_path / "photos", 1), tmp_path / "out", base_family="sdxl")
    assert said == [
        "These settings are for SDXL (base_family), but pocket_portraits.safetensors is the pocket model: use a "
        "configuration for the pocket model, or a checkpoint of SDXL."
    ]


def test_files_that_are_no_base(root, tmp_path):
    folder = photos(tmp_path / "photos", 1)
    save_file({"a": torch.zeros(2)}, tmp_path / "odd.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"<html>404</html>")
    (tmp_path / "empty").mkdir()
    whole = load_file(root / CHECKPOINT)
    save_file({k: v for k, v in whole.items() if "cond_stage" not in k}, tmp_path / "mute.safetensors")
    data = (root / CHECKPOINT).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    shutil.copy(root / CHECKPOINT, tmp_path / "loud.SAFETENSORS")
    for name, config, index in (
        ("indexless", {"in_channels": 4, "block_out_channels": [320], "cross_attention_dim": 768}, False),
        ("refiner", {"in_channels": 4, "block_out_channels": [384], "cross_attention_dim": 1280}, True),
        ("listed", {"in_channels": 4, "block_out_channels": 320, "cross_attention_dim": [768]}, True),
        ("array", [], True),
    ):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "config.json").write_text(json.dumps(config))
        if index:
            (tmp_path / name / "model_index.json").write_text('{"_class_name": "StableDiffusionXLImg2ImgPipeline"}')
    for name, part in (
        ("mute.safetensors", "has no text encoder: take a whole checkpoint."),
        ("cut.safetensors", " bytes; tensors are missing at its end): download it again."),
        ("loud.SAFETENSORS", "must end in .safetensors, in small letters: rename it."),
        ("indexless", "is no base model in diffusers' layout: model_index.json is missing or says nothing."),
        ("refiner", "is a StableDiffusionXLImg2ImgPipeline; SD1.5, SD2.x and SDXL models are supported."),
        ("listed", "unet/config.json is missing or another model's."),
        ("array", "unet/config.json is missing or another model's."),
        ("odd.safetensors", "odd.safetensors"),
        ("broken.safetensors", "is damaged or cut short (16 bytes; its header cannot be read): download it again."),
        ("empty", "is no base model in diffusers' layout: unet/config.json is missing or another model's."),
        ("missing.safetensors", "does not exist: it is no file, no folder, and no hub id (owner/name)."),
    ):
        (said,) = problems(root, folder, tmp_path / "out", pretrained_model_name_or_path=str(tmp_path / name))
        assert part in said
        assert name in said


def test_an_output_that_cannot_be_written(root, tmp_path):
    (tmp_path / "file").write_text("x")
    (said,) = problems(root, photos(tmp_path / "photos", 1), tmp_path / "file" / "out")
    assert said == f"The folder {tmp_path}/file/out (--output_dir) cannot be written to (Not a directory)."


def test_a_full_disk(root, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    folder = photos(tmp_path / "photos", 1)
    for steps, gigabytes in ((1, 0.2), (1000, 0.5)):  # one checkpoint, or three at a time
        said = problems(root, folder, tmp_path / "out", method="dreambooth", max_train_steps=steps)
        needed = f"checkpoints and the result need about {gigabytes} GB."
        assert said == [f"The disk of {tmp_path}/out has 0.0 GB free, but {needed}"]


def test_options_that_do_not_fit_the_base(root, tmp_path):
    folder = photos(tmp_path / "photos", 1)
    common = {"resolution": 72, "vae_path": "/nowhere/vae", "block_ranks": ["up=3"]}
    said = problems(root, folder, tmp_path / "out", **common)
    for part, sentence in zip(("block_ranks has 'up=3'", "--resolution 72 is no multiple of 16, which the pocket model needs.", "The VAE /nowhere/vae does not exist"), said, strict=True):  # fmt: skip
        assert part in sentence


def test_nothing_of_the_users_is_written_over_or_trained_on_by_mistake(root, tmp_path):
    folder = photos(tmp_path / "photos", 1)
    shutil.copy(root / CHECKPOINT, folder / "ohwx.safetensors")
    base = str(folder / "ohwx.safetensors")
    said = problems(root, folder, folder, method="dreambooth", pretrained_model_name_or_path=base)
    assert said == [
        "--output_dir and --instance_data_dir are the same folder: what is written would be trained on.",
        f"The result would overwrite the base model {base}: set --output_name.",
    ]


def test_results_of_others_are_not_written_over(root, tmp_path):
    folder, output = photos(tmp_path / "photos", 1), tmp_path / "out"
    output.mkdir()
    (output / "ohwx.safetensors").write_text("precious")
    (said,) = problems(root, folder, output)
    assert said == f"{output}/ohwx.safetensors is there already, and this trainer did not write it: set --output_name."
    assert (output / "ohwx.safetensors").read_text() == "precious"
    shutil.copy(root / CHECKPOINT, base := output / "mine.delta.safetensors")
    (said,) = problems(
        root, folder, output, "dreambooth", pretrained_model_name_or_path=str(base), save_as="delta", output_name="mine"
    )
    assert said == f"The result would overwrite the base model {base}: set --output_name."


def test_bases_that_are_not_whole(root, tmp_path):
    folder = photos(tmp_path / "photos", 1)
    bare = {name: value for name, value in load_file(root / CHECKPOINT).items() if "first_stage" not in name}
    save_file(bare, tmp_path / "bare.safetensors")
    (said,) = problems(root, folder, tmp_path / "out", pretrained_model_name_or_path=str(tmp_path / "bare.safetensors"))
    assert said == "bare.safetensors has no VAE: give one with --vae_path, or take a whole checkpoint."
    (tmp_path / "inpainting" / "unet").mkdir(parents=True)
    config = json.loads((root / "training" / "configs" / "sd15" / "unet" / "config.json").read_text())
    (tmp_path / "inpainting" / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    (said,) = problems(root, folder, tmp_path / "out", pretrained_model_name_or_path=str(tmp_path / "inpainting"))
    assert said.endswith("takes 9 channels (an inpainting or editing model): use a plain text-to-image model.")


def test_a_mistyped_path_is_no_hub_id(root, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for where in ("models/bsae", "../base", "base.ckpt"):
        with pytest.raises(PersonalizeError, match="does not exist: it is no file, no folder, and no hub id"):
            base_checks.family_at(where)


def test_a_class_folder_with_hidden_files_only_is_filled(root, tmp_path):
    folder, others = photos(tmp_path / "photos", 1), tmp_path / "class"
    others.mkdir()
    (others / ".DS_Store").write_bytes(b"x")
    options = {"with_prior_preservation": True, "class_data_dir": str(others)}
    assert preflight.preflight(settings_of("dreambooth", root, folder, tmp_path / "out", **options)).family == "pocket"


def test_pictures_that_are_not_there(root, tmp_path):
    photos(tmp_path / "sets" / "10_ohwx dog", 1)
    (said,) = problems(root, tmp_path / "sets", tmp_path / "out")
    assert said.endswith("sets has no pictures itself, but folders with pictures (10_ohwx dog): name one of these.")
    (said,) = problems(root, next((tmp_path / "sets" / "10_ohwx dog").iterdir()), tmp_path / "out")
    assert said.endswith(".png is no folder.")
    (said,) = problems(root, tmp_path / "nowhere", tmp_path / "out")
    assert said == f"The folder {tmp_path}/nowhere does not exist."
    (tmp_path / "nothing").mkdir()
    (said,) = problems(root, tmp_path / "nothing", tmp_path / "out")
    assert said.startswith(f"The folder {tmp_path}/nothing has no pictures (")


def test_captions_without_the_trigger_are_a_warning(root, tmp_path):
    folder = photos(tmp_path / "photos", 2)
    for path in sorted(folder.iterdir()):
        path.with_suffix(".txt").write_text("a woman on a beach")
    found = preflight.preflight(settings_of("lora", root, folder, tmp_path / "out"))
    assert found.family == "pocket"
    assert found.pictures == 2
    (warning,) = found.warnings
    assert warning.startswith("2 of 2 captions do not have the trigger 'ohwx' (")


@pytest.mark.parametrize("package", ["prodigy", "muon", "tensorboard"])
def test_packages_that_are_missing(root, tmp_path, monkeypatch, package):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    option = "report_to" if package == "tensorboard" else "optimizer"
    (said,) = problems(root, photos(tmp_path / "photos", 1), tmp_path / "out", **{option: package})
    name = {"prodigy": "prodigyopt", "muon": "timm"}.get(package, package)
    assert said == f"{package} needs the package {name}: pip install {name}."


def test_the_base_is_found(root):
    assert base_checks.family_at(str(root / CHECKPOINT)) == "pocket"
    assert base_checks.family_at("owner/name") is None
