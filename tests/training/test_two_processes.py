"""Two processes are together one with twice the batch."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from finetuning import command, material, photos, run, train
from pack.models.errors import PersonalizeError
from safetensors.torch import load_file


def test_processes_that_do_not_train_together(root, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PersonalizeError, match=r"^2 processes were started, but they do not train together: start"):
        train("lora", root, photos(tmp_path / "photos", 1), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == []


@pytest.mark.parametrize("method", ["dreambooth", "lora", "custom_diffusion", "ip_adapter"])
def test_two_processes_equal_one_with_twice_the_batch(root, tmp_path, method):
    folder, classes = material(method, tmp_path / "photos"), photos(tmp_path / "classes", 4)
    options = ["--max_train_steps", "4", "--save_precision", "fp32", "--checkpointing_steps", "2"]
    options += ["--gradient_accumulation_steps", "2", "--validation_prompt", "a photo of {trigger} {class}"]
    if method == "ip_adapter":  # so much is left out that one of the two often has no gradient of the aggregator
        options += ["--train_adapter", "--reference_dropout", "0.5", "--validation_identities", "1"]
    else:
        options += ["--with_prior_preservation", "--class_data_dir", str(classes), "--num_class_images", "4"]
        own = {"dreambooth": ["--save_as", "delta"], "lora": ["--train_text_encoder"]}
        options += own.get(method, ["--size_variants", "2"])
    done = run(root, *command(method, root, folder, tmp_path / "one", *options, "--train_batch_size", "2"))
    assert done.returncode == 0, done.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", f"training.{method}"]
    arguments = [*launch, *command(method, root, folder, tmp_path / "two", *options)[3:]]
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    both = [
        subprocess.Popen(
            arguments,
            cwd=root,
            env={**os.environ, **places, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    losses = [
        [x["loss"] for x in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines()) if "loss" in x]
        for name in ("one", "two")
    ]
    assert len(losses[0]) == 4
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=0)
    one, two = (load_file(min((tmp_path / name).glob("*.safetensors"))) for name in ("one", "two"))
    assert one.keys() == two.keys()
    ours, theirs = (torch.cat([x[key].float().flatten() for key in one]) for x in (one, two))
    assert (ours - theirs).norm() <= 1e-3 * ours.norm()
    assert (tmp_path / "two" / "samples" / "step-0000004.png").is_file()


def test_two_killed_processes_go_on_bit_for_bit(root, tmp_path):
    folder, outputs = photos(tmp_path / "photos"), [tmp_path / "whole", tmp_path / "killed"]
    options = ["--max_train_steps", "12", "--checkpointing_steps", "2", "--train_text_encoder", "--rank", "2"]
    arguments = command("lora", root, folder, outputs[0], *options)[3:]
    script = [sys.executable, __file__.replace("test_two_processes", "pairs"), *map(str, outputs), "lora"]
    done = run(root, *script, *arguments, timeout=900)
    assert done.stdout.splitlines() == ["0 0", "-9 -9", "0 0"], done.stderr
    whole, killed = ((output / "ohwx.safetensors").read_bytes() for output in outputs)
    assert whole == killed
    steps = [json.loads(line)["step"] for line in (outputs[1] / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))
