"""A training that is killed, stopped, or fails: nothing is lost, and it goes on bit for bit."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock
from finetuning import command, material, photos, run, settings_of, train
from pack.models.errors import PersonalizeError
from pack.training import checkpoint as checkpoints
from pack.training import run as running
from pack.training.loop import Trainer
from pack.training.lora import LoraMethod
from pack.training.stopping import Stop

# everything that draws at random, and everything that a checkpoint must hold
OPTIONS = {
    "lora": ["--train_text_encoder", "--lora_dropout", "0.1", "--caption_dropout", "0.3", "--random_flip", "--use_ema",
             "--ema_decay", "0.9", "--gradient_accumulation_steps", "2", "--lr_scheduler", "cosine", "--rank", "4"],
    "dreambooth": ["--save_as", "delta", "--snr_gamma", "5", "--noise_offset", "0.1", "--train_batch_size", "2"],
    "textual_inversion": ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "5"],
    "custom_diffusion": ["--size_variants", "3", "--train_batch_size", "2", "--lr_scheduler", "linear"],
    "ip_adapter": ["--train_adapter", "--warmup_steps", "6", "--train_batch_size", "2", "--use_ema", "--random_flip"],
    "subject_diffusion": ["--train_batch_size", "2", "--augmentations", "1", "--text_dropout", "0.3", "--buckets"],
}  # fmt: skip
KILLS = [("lora", 10), ("dreambooth", 3), ("textual_inversion", 3), ("custom_diffusion", 2), ("ip_adapter", 3)]
KILLS += [("subject_diffusion", 2)]


@pytest.mark.parametrize(("method", "kills"), KILLS)
def test_killed_at_random_moments_the_file_is_the_same(root, tmp_path, method, kills):
    folder = material(method, tmp_path / "photos")
    files, steps = [], 30
    for name, times in (("uninterrupted", 0), ("killed", kills)):
        log = tmp_path / name / "log.jsonl"
        options = command(method, root, folder, tmp_path / name)[3:]
        options += ["--max_train_steps", str(steps), "--checkpointing_steps", "3", *OPTIONS[method]]
        script = [sys.executable, __file__.replace("test_stopping", "killed"), "1", str(times), str(steps), str(log)]
        done = run(root, *script, method, *options, timeout=900)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["-9"] * times + ["0"]
        files.append([path.read_bytes() for path in sorted((tmp_path / name).glob("*.safetensors"))])
        logged = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert logged == list(range(1, steps + 1))
    assert files[0] == files[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits(root, tmp_path, number):
    folder, output = photos(tmp_path / "photos"), tmp_path / "out"
    arguments = command("lora", root, folder, output, "--max_train_steps", "5000", "--rank", "2")
    process = subprocess.Popen(arguments, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = output / "log.jsonl"
    for _ in range(1200):
        if log.exists() and log.read_text().count("\n") > 2:
            break
        time.sleep(0.1)
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    step = int(said.split("Stopped after step ")[1].split()[0])
    assert "The same command goes on from there." in said
    newest = checkpoints.find_checkpoint(output / "checkpoints", "latest")
    assert checkpoints.read_settings_of(newest)[0] == step
    assert not list(output.glob("*.safetensors"))


def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(root, tmp_path):
    folder, output = photos(tmp_path / "photos"), tmp_path / "out"
    options = {"max_train_steps": 4, "checkpointing_steps": 2, "checkpoints_total_limit": 2}
    first = train("lora", root, folder, output, **options)[0].read_bytes()
    newest = output / "checkpoints" / "step-0000004"
    for file in ("state.json", "state.pt", "weights.safetensors"):
        whole = (newest / file).read_bytes()
        (newest / file).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(
            PersonalizeError, match=rf"^The checkpoint {newest} is damaged \(.*\): delete this folder, "
        ):
            train("lora", root, folder, output, **options)
        (newest / file).write_bytes(whole)
    shutil.rmtree(newest)
    assert train("lora", root, folder, output, **options)[0].read_bytes() == first


def test_one_training_at_a_time_writes_to_a_folder(root, tmp_path):
    folder, output = photos(tmp_path / "photos"), tmp_path / "out"
    output.mkdir()
    with FileLock(output / ".lock"):
        done = run(root, *command("lora", root, folder, output, "--max_train_steps", "1"))
    assert done.returncode == 1
    assert done.stderr.strip() == f"Another run writes to {output}: wait for it, or use another --output_dir."
    assert not list(output.glob("*.safetensors"))


def test_asked_to_stop_it_goes_on_with_the_same_settings_only(root, tmp_path):
    folder, output = photos(tmp_path / "photos"), tmp_path / "out"
    stop = Stop(asked=lambda: (output / "log.jsonl").exists() and len((output / "log.jsonl").read_text()) > 0)
    settings = settings_of("lora", root, folder, output, max_train_steps=5)
    assert running.personalize("lora", settings, stop) == []
    with pytest.raises(
        PersonalizeError, match=r"has a training of 1 step that began otherwise \(rank was 16, is 8\): use"
    ):
        train("lora", root, folder, output, max_train_steps=5, rank=8)
    with pytest.raises(PersonalizeError, match=r"^There is no checkpoint step-9; in .* there are: step-0000001\.$"):
        train("lora", root, folder, output, max_train_steps=5, resume_from_checkpoint="step-9")
    first = train("lora", root, folder, output, max_train_steps=5)[0].read_bytes()
    again = train("lora", root, folder, tmp_path / "other", max_train_steps=5)[0].read_bytes()
    assert first == again


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"optimizer": "prodigy"}),
        ("lora", {"optimizer": "adafactor", "lora_layers": "all"}),
        ("lora", {"use_dora": True, "lora_layers": "linear"}),
        ("lora", {"use_ema": True, "ema_decay": 0.5}),
        ("lora", {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine"}),
        ("dreambooth", {"optimizer": "adafactor", "save_as": "delta", "channels_last": True}),
        ("textual_inversion", {"optimizer": "prodigy", "num_vectors": 2}),
        ("dreambooth", {"optimizer": "muon", "save_as": "delta", "learning_rate": 1e-3}),
        ("textual_inversion", {"optimizer": "muon", "num_vectors": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "=".join(map(str, next(iter(value.items())))),
)
def test_stopped_and_gone_on_the_file_is_the_same(root, tmp_path, method, options):
    folder, output = photos(tmp_path / "photos", 3), tmp_path / "stopped"
    common = options | {"max_train_steps": 6, "cache_dir": str(tmp_path / "cache")}

    def steps():
        log = output / "log.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    # twice, so that what was read from a checkpoint goes into one again
    for done in (2, 4):
        stop = Stop(asked=lambda done=done: steps() == done)
        assert running.personalize(method, settings_of(method, root, folder, output, **common), stop) == []
        newest = checkpoints.find_checkpoint(output / "checkpoints", "latest")
        assert checkpoints.read_settings_of(newest)[0] == done
    stopped = train(method, root, folder, output, **common)[0].read_bytes()
    assert stopped == train(method, root, folder, tmp_path / "uninterrupted", **common)[0].read_bytes()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": 2}, "holds other weights than are trained now"),
        ({"use_ema": True}, "has no average: go on without --use_ema"),
    ],
)
def test_a_run_that_cannot_go_on_changes_nothing(root, tmp_path, values, said):
    folder, output = photos(tmp_path / "photos", 2), tmp_path / "out"
    train("lora", root, folder, output, checkpointing_steps=1, rank=4)

    def everything():
        return {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}

    before = everything()
    with pytest.raises(
        PersonalizeError, match=r"began otherwise.*use the same, another --output_dir, or --resume_from"
    ):
        train("lora", root, folder, output, **{"rank": 4, **values})
    with pytest.raises(PersonalizeError, match=said):
        train("lora", root, folder, output, resume_from_checkpoint="step-0000002", **{"rank": 4, **values})
    with pytest.raises(PersonalizeError, match=r"method was 'lora', is 'dreambooth'"):
        train("dreambooth", root, folder, output)
    assert everything() == before


def test_it_does_not_go_on_with_other_pictures(root, tmp_path):
    folder, output = photos(tmp_path / "photos"), tmp_path / "out"
    train("lora", root, folder, output, max_train_steps=2)
    picture = sorted(folder.iterdir())[0]
    picture.with_suffix(".txt").write_text("ohwx in the rain")
    with pytest.raises(
        PersonalizeError, match=r"has a training of 2 steps that began otherwise \(other pictures or captio"
    ):
        train("lora", root, folder, output, max_train_steps=2)
    assert train("lora", root, folder, output, max_train_steps=2, resume_from_checkpoint="step-0000002")


def test_a_result_that_was_not_written_is_written_by_the_same_command(root, tmp_path, monkeypatch, capsys):
    folder, output, write = photos(tmp_path / "photos"), tmp_path / "out", LoraMethod.write

    def full(self, *_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LoraMethod, "write", full)
    options = command("lora", root, folder, output, "--max_train_steps", "3")[3:]
    assert running.main("lora", "", options) == 1
    assert f"{output} cannot be read or written (No space left on device): mend that and run" in capsys.readouterr().err
    monkeypatch.setattr(LoraMethod, "write", write)
    monkeypatch.setattr(Trainer, "step", None)
    assert running.main("lora", "", options) == 0
    size = (output / "ohwx.safetensors").stat().st_size / 1e6
    told = (
        f"{output / 'ohwx.safetensors'} ({size:.2f} MB), for models/loras of ComfyUI; prompts call it by: ohwx woman\n"
    )
    assert capsys.readouterr().out.endswith(told)


def test_too_little_memory_to_begin(root, tmp_path, monkeypatch, capsys):
    def exhausted(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(running, "encode_pictures", exhausted)
    assert running.main("lora", "", command("lora", root, photos(tmp_path / "photos"), tmp_path / "out")[3:]) == 1
    assert "There is not enough memory for the base model: use --mixed_precision bf16" in capsys.readouterr().err


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(root, tmp_path, monkeypatch):
    folder, output = photos(tmp_path / "photos"), tmp_path / "out"
    loss = Trainer.loss
    monkeypatch.setattr(Trainer, "loss", lambda self, number: loss(self, number) * (float("nan") if number == 4 else 1))
    with pytest.raises(
        PersonalizeError,
        match=r"^The loss of step 5 is nan: the training has diverged\. Lower --learning_rate \(now 0\.001\), "
        r"and go on with --resume_from_checkpoint step-0000004\.$",
    ):
        train("lora", root, folder, output, max_train_steps=8, checkpointing_steps=2)
    newest = checkpoints.find_checkpoint(output / "checkpoints", "latest")
    step, _ = checkpoints.read_settings_of(newest)
    assert step == 4
    weights = checkpoints.read_safetensors(newest / "weights.safetensors")[0]
    assert all(value.isfinite().all() for value in weights.values())
    # what it advises can be done
    monkeypatch.setattr(Trainer, "loss", loss)
    options = {"max_train_steps": 8, "checkpointing_steps": 2, "learning_rate": 5e-4}
    with pytest.raises(PersonalizeError, match=r"learning_rate was 0\.001, is 0\.0005"):
        train("lora", root, folder, output, **options)
    assert train("lora", root, folder, output, **options, resume_from_checkpoint="step-0000004")
    rates = {line["step"]: line["lr"] for line in map(json.loads, (output / "log.jsonl").read_text().splitlines())}
    assert [rates[step] for step in (4, 6, 8)] == [1e-3, 5e-4, 5e-4]


def test_a_gradient_that_is_no_number_is_not_kept(root, tmp_path, monkeypatch):
    folder, output = photos(tmp_path / "photos"), tmp_path / "out"
    share = Trainer.share_gradients

    def broken(self):
        share(self)
        if self.schedule.last_epoch == 3:
            self.parameters[0].grad.fill_(float("nan"))

    monkeypatch.setattr(Trainer, "share_gradients", broken)
    for steps in (4, 8):  # at the end, and at a checkpoint
        with pytest.raises(PersonalizeError, match=r"^The weights after step 4 are not finite: the training has div"):
            train("lora", root, folder, output / str(steps), max_train_steps=steps, checkpointing_steps=2)
        assert [path.name for path in (output / str(steps) / "checkpoints").iterdir()] == ["step-0000002"]
        assert not list((output / str(steps)).glob("*.safetensors"))


def test_starting_anew_keeps_its_own_checkpoints(root, tmp_path):
    folder, output = photos(tmp_path / "photos"), tmp_path / "out"
    options = {"max_train_steps": 8, "checkpointing_steps": 2, "checkpoints_total_limit": 1}
    train("lora", root, folder, output, **options)
    stop = Stop(asked=lambda: (output / "checkpoints" / "step-0000002").exists())
    anew = settings_of("lora", root, folder, output, resume_from_checkpoint="none", rank=8, **options)
    assert running.personalize("lora", anew, stop) == []
    newest = checkpoints.find_checkpoint(output / "checkpoints", "latest")
    step, settings = checkpoints.read_settings_of(newest)
    assert step < 6
    assert settings["rank"] == 8
    assert (output / "checkpoints" / "before-step-0000008").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [(torch.OutOfMemoryError("CUDA out of memory."), "There is not enough memory"), (ValueError("odd"), "odd")],
)
def test_samples_that_fail_do_not_end_the_training(root, tmp_path, monkeypatch, capsys, error, said):
    def failing(*_arguments):
        raise error

    monkeypatch.setattr(running, "draw_samples", failing)
    folder, others = photos(tmp_path / "photos"), photos(tmp_path / "others", 1)
    options = {"validation_prompt": ["{trigger}"], "validation_steps": 2, "validation_data_dir": str(others)}
    assert train("lora", root, folder, tmp_path / "out", **options)
    assert f"No samples after step 2: {said}" in capsys.readouterr().err
    logged = map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
    assert [line["step"] for line in logged if "validation_loss" in line] == [2, 3]


def stopping_within(count):
    """Asked after so many questions."""
    asked = iter(range(10**6))
    return Stop(asked=lambda: next(asked) >= count)


def test_within_samples_it_stops_at_once_and_goes_on(root, tmp_path, capsys):
    """The step that was just done is kept, also where no checkpoint was due."""
    folder, output = photos(tmp_path / "photos"), tmp_path / "out"
    options = {
        "max_train_steps": 4,
        "validation_prompt": ["{trigger}"],
        "validation_steps": 2,
        "checkpointing_steps": 3,
    }
    whole = train("lora", root, folder, tmp_path / "whole", **options)
    drawing = []
    stop = Stop(asked=lambda: (output / "loss.png").exists() and len(drawing.append(0) or drawing) > 5)
    assert running.train("lora", settings_of("lora", root, folder, output, **options), stop) == []
    assert not (output / "samples" / "step-0000002.png").exists()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-0000002"]
    said = capsys.readouterr()
    assert "No samples after step 2: they were stopped." in said.err
    assert "Stopped after step 2 of 4." in said.out
    (path,) = train("lora", root, folder, output, **options)
    assert path.read_bytes() == whole[0].read_bytes()


def test_no_pictures_of_a_prompt_are_no_samples(root, tmp_path):
    options = {"validation_prompt": ["{trigger}"], "num_validation_images": 0}
    assert train("lora", root, photos(tmp_path / "photos"), tmp_path / "out", **options)
    assert not (tmp_path / "out" / "samples").exists()


def test_within_the_last_samples_the_result_is_there_all_the_same(root, tmp_path):
    folder, output = photos(tmp_path / "photos"), tmp_path / "out"
    options = {"max_train_steps": 2, "validation_prompt": ["{trigger}"]}
    stop = Stop(asked=(output / "loss.png").exists)
    (path,) = running.train("lora", settings_of("lora", root, folder, output, **options), stop)
    assert path.is_file()
    assert not (output / "samples" / "step-0000002.png").exists()


@pytest.mark.parametrize("asked", [0, 3], ids=["at once", "after three pictures"])
def test_before_the_first_step_it_stops_between_pictures(root, tmp_path, capsys, asked):
    """The host asks so; a signal ends it right away."""
    folder, output = photos(tmp_path / "photos", 5), tmp_path / "out"
    assert running.train("lora", settings_of("lora", root, folder, output), stopping_within(asked)) == []
    assert len(list((output / "cache").glob("*"))) == asked
    assert "Stopped before the first step." in capsys.readouterr().out
    assert train("lora", root, folder, output)


def test_pictures_of_the_class_can_be_stopped(root, tmp_path):
    folder, output, classes = photos(tmp_path / "photos"), tmp_path / "out", tmp_path / "classes"
    options = {"with_prior_preservation": True, "num_class_images": 3, "class_data_dir": str(classes)}
    made = settings_of("dreambooth", root, folder, output, **options)
    assert running.train("dreambooth", made, stopping_within(25)) == [], "in the second picture of twenty steps"
    assert len(list(classes.glob("*.png"))) == 1


def test_too_little_memory_says_what_to_turn_on(root, tmp_path, monkeypatch):
    def exhausted(self, number):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "loss", exhausted)
    with pytest.raises(
        PersonalizeError,
        match=r"^There is not enough memory for a step\. These need less: --gradient_checkpointing, --train_batch_size 1 "
        r"with --gradient_accumulation_steps, --mixed_precision bf16, .*, a --resolution below 64\.$",
    ):
        train("dreambooth", root, photos(tmp_path / "photos"), tmp_path / "out", train_batch_size=4)


def test_a_full_disk_keeps_the_last_checkpoint(root, tmp_path, monkeypatch):
    output, real = tmp_path / "out", checkpoints.write_safetensors

    def full(path, tensors, metadata):
        if "step-0000004" in str(path):
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
            try:
                real(path, tensors, metadata)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        else:
            real(path, tensors, metadata)

    monkeypatch.setattr(checkpoints, "write_safetensors", full)
    with pytest.raises(
        PersonalizeError,
        match=r"^The checkpoint of step 4 cannot be written to .*out/checkpoints \(.*File too large.*\): make room "
        r"there and run the same command again; it goes on from step 2\.$",
    ):
        train("lora", root, photos(tmp_path / "photos"), output, max_train_steps=6, checkpointing_steps=2)
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-0000002"]
