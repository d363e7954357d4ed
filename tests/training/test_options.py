"""Options and configurations: read, told, filled in and saved."""

import json
import re
import tomllib

import pytest
from finetuning import CHECKPOINT, command, photos, run, settings_of, train
from pack.models.errors import PersonalizeError
from pack.training import run as running
from pack.training.base_model import load_base
from pack.training.drawing import Drawing
from pack.training.options import TextualInversion
from pack.training.run import METHODS
from pack.training.settings import make_groups, make_settings, read_settings, save_settings
from PIL import Image
from safetensors import safe_open


def test_a_command_from_options_and_a_file(root, folder, tmp_path):
    output = tmp_path / "out"
    config = tmp_path / "my.toml"
    config.write_text('trigger = "sks"\n[training]\nmax_train_steps = 9\nlearning_rate = 1e-3\n[lora]\nrank = 2\n')
    options = ["--config", str(config), "--max-train-steps", "2", "--validation_prompt", "a {trigger} {class}"]
    options += [
        "--num_validation_images",
        "2",
        "--validation_steps",
        "1",
        "--validation_data_dir",
        str(photos(tmp_path / "others", 1)),
    ]
    done = run(root, *command("lora", root, folder, output, *options))
    assert done.returncode == 0, done.stderr
    assert "sks.safetensors" in done.stdout
    assert "2/2" in done.stderr  # the bar
    with safe_open(output / "sks.safetensors", framework="pt") as file:
        about = file.metadata()
    assert about["personalize.method"] == "lora"
    assert about["personalize.trigger"] == "sks"
    assert about["personalize.base_name"] == "pocket_portraits.safetensors"
    assert len(about["personalize.base_hash"]) == 64
    assert about["ss_network_dim"] == "2"
    assert str(tmp_path) not in json.dumps(about)
    effective = tomllib.loads((output / "config.toml").read_text())
    assert effective["training"]["max_train_steps"] == 2
    assert effective["training"]["text_encoder_lr"] == 2e-4  # what was open was filled in
    assert read_settings(METHODS["lora"][0], "", "", ["--config", str(output / "config.toml")]).flat()["rank"] == 2
    assert Image.open(output / "loss.png").size == (900, 420)
    sheets = sorted((output / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-0000001.png", "step-0000002.png"]
    assert Image.open(sheets[0]).size == (240, 80)
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert sum("validation_loss" in line for line in lines) == 2


def test_help_names_every_option(root):
    done = run(root, *command("dreambooth", root, "x", "y", "--help"))
    assert done.returncode == 0
    for name in settings_of("dreambooth", root, "x", "y").flat():
        assert f"  --{name}" in done.stdout


def test_other_trainers_names_of_options():
    words = ["--train_data_dir", "photos", "--placeholder_token", "sks", "--use_8bit_adam"]
    settings = read_settings(TextualInversion, "", "", words)
    assert settings == make_settings(TextualInversion, {"train_data_dir": "photos", "placeholder_token": "sks", "use_8bit_adam": True})  # fmt: skip
    assert (settings.data.instance_data_dir, settings.data.trigger) == ("photos", "sks")
    assert settings.training.optimizer == "adamw8bit"


def test_wrong_options_are_told_at_once(tmp_path):
    config = tmp_path / "my.toml"
    config.write_text('learning_rat = 1\nbuckets = "False"\ntrain_batch_size = 0\nmixed_precision = "bf61"\n')
    with pytest.raises(PersonalizeError) as caught:
        read_settings(METHODS["lora"][0], "", "", ["--config", str(config), "--rank", "many"])
    assert str(caught.value).splitlines() == [
        "There is no option learning_rat: do you mean learning_rate?",
        "buckets is 'False', but must be true or false.",
        "train_batch_size is 0, but must be at least 1.",
        "mixed_precision is 'bf61', but must be one of no, fp16, bf16.",
        "rank is 'many', but must be a whole number.",
    ]
    for text, said in (
        ("[lora", "cannot be read"),
        ("[optimiser]\nx = 1\n", r"^\[optimiser\] in .* is no group of options"),
        ("[dreambooth]\nx = 1\n", r"^\[dreambooth\] in .* is no group of options"),
    ):
        config.write_text(text)
        with pytest.raises(PersonalizeError, match=said):
            read_settings(METHODS["lora"][0], "", "", ["--config", str(config)])
    with pytest.raises(PersonalizeError, match=r"^The configuration .*gone\.toml does not exist\.$"):
        read_settings(METHODS["lora"][0], "", "", ["--config", str(tmp_path / "gone.toml")])


@pytest.mark.parametrize("name", ["adam_beta1", "adam_beta2", "ema_decay", "caption_dropout", "lora_dropout"])
def test_a_share_is_below_one(name):
    with pytest.raises(PersonalizeError, match=rf"^{name} is 1\.0, but must be below 1\.$"):
        make_settings(METHODS["lora"][0], {name: 1})
    assert make_settings(METHODS["lora"][0], {name: 0.99}).flat()[name] == 0.99


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999"])
def test_a_number_is_finite(tmp_path, value):
    """Of the command line and of a file, of every float: nothing but the settings' reader looks at that."""
    said = rf"^{{}} is {float(value)}, but must be a finite number\.$"
    with pytest.raises(PersonalizeError, match=said.format("learning_rate")):
        read_settings(METHODS["lora"][0], "", "", [f"--learning_rate={value}"])
    with pytest.raises(PersonalizeError, match=said.format("weight")):
        make_groups((Drawing,), {"weight": float(value)})
    config = tmp_path / "my.toml"
    config.write_text(f"adam_epsilon = {value}\n")
    with pytest.raises(PersonalizeError, match=said.format("adam_epsilon")):
        read_settings(METHODS["lora"][0], "", "", ["--config", str(config)])


@pytest.mark.parametrize("table", ["textual_inversion", "textualinversion"])
def test_the_table_of_textual_inversion(tmp_path, table):
    config = tmp_path / "my.toml"
    config.write_text(f"[{table}]\nnum_vectors = 7\n")
    settings = read_settings(METHODS["textual_inversion"][0], "", "", ["--config", str(config)])
    assert settings.method.num_vectors == 7


def test_the_defaults_of_a_hub_id_are_those_of_what_it_turns_out_to_be(root, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "load_base", lambda _, *rest: load_base(str(root / CHECKPOINT), *rest))
    hub, output = {"pretrained_model_name_or_path": "owner/name", "max_train_steps": 2}, tmp_path / "out"
    train("lora", root, folder, output, checkpointing_steps=1, **hub)
    effective = tomllib.loads((output / "config.toml").read_text())
    assert effective["data"]["resolution"] == 64
    assert effective["training"]["learning_rate"] == 1e-3
    assert effective["training"]["text_encoder_lr"] == 2e-4
    with pytest.raises(PersonalizeError, match=r"has a training of 2 steps that began otherwise \(rank was 16, is 8\)"):
        train("lora", root, folder, output, rank=8, **hub)
    with pytest.raises(
        PersonalizeError, match=r"^These settings are for SDXL \(base_family\), but name is the pocket model"
    ):
        train("lora", root, folder, output, base_family="sdxl", **hub)


def test_shipped_configurations(root):
    """Each says in its first lines which command it is for, and is understood by it."""
    configs = sorted((root / "training" / "configs").glob("*.toml"))
    assert len(configs) == 22
    for path in configs:
        text = path.read_text()
        method = re.search(r"python -m training\.(\w+) --config training/configs/(\S+)", text)
        assert method is not None
        assert method[2] == path.name
        assert "# Expected: " in text
        assert "# Memory: " in text
        settings = read_settings(METHODS[method[1]][0], "", "", ["--config", str(path)])
        assert path.name.startswith(f"{settings.base.base_family}_")


def test_the_command_line_says_how_long(tmp_path):
    for inside, outside, left in (
        ("max_train_steps", "num_train_epochs", 2),
        ("num_train_epochs", "max_train_steps", 2),
    ):
        config = tmp_path / "long.toml"
        config.write_text(f"{inside} = 9\n")
        flat = read_settings(METHODS["lora"][0], "", "", ["--config", str(config), f"--{outside}", str(left)]).flat()
        assert (flat[inside], flat[outside]) == (None, left)


def test_a_warm_up_that_epochs_do_not_last_for_is_told(root, folder, tmp_path):
    """Only the pictures tell how many steps those are: five in two epochs are ten."""
    options = {"num_train_epochs": 2, "max_train_steps": None, "lr_warmup_steps": 11}
    with pytest.raises(PersonalizeError, match="--lr_warmup_steps 11 are more than the 10 steps of the training"):
        train("lora", root, folder, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "config.toml").exists()


def test_odd_values_come_back_from_the_file(root, tmp_path):
    settings = settings_of("lora", root, tmp_path, tmp_path, class_name='a\x7f"\\\nä')
    save_settings(settings, tmp_path / "config.toml")
    again = read_settings(METHODS["lora"][0], "", "", ["--config", str(tmp_path / "config.toml")])
    assert again.flat() == settings.flat()


def test_unknown_options_are_told_at_once():
    with pytest.raises(PersonalizeError) as caught:
        read_settings(METHODS["lora"][0], "", "", ["--learning_rte", "1", "--rank", "2", "--zzz"])
    first, second = str(caught.value).splitlines()
    assert first == "There is no option learning_rte: do you mean learning_rate?"
    assert second == "There is no option zzz; see --help."


def test_help_says_what_is_filled_in(capsys):
    with pytest.raises(SystemExit):
        running.main("textual_inversion", "", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "of the UNet; of the words in Textual Inversion; of the adapter [0.005; pocket 0.01]" in text
    assert "[512 for SD1.5, 768 for SD2.x, 1024 for SDXL, 64 for the pocket model]" in text


def test_help_says_what_suits_each_method(capsys):
    with pytest.raises(SystemExit):
        running.main("custom_diffusion", "", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(none, earlier, later) [none; pocket later]" in text
    assert "polynomial) [constant; pocket cosine]" in text
    assert "0 shows all as they are [12; pocket 0]" in text
