"""Every script of the pocket model starts from nothing, and goes on where it was killed."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

TRAININGS = ("vae", "encoders", "judge", "unet", "adapter")
SMALL = ("--batch", "12", "--pictures", "200")


def command(folder, part, *options):
    return [sys.executable, "-m", "training.pocket", part, "--folder", str(folder), *options]


def run(root, folder, part, *options):
    done = subprocess.run(command(folder, part, *options), cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """A folder in which every part was trained for four steps, in order, and what each printed."""
    folder = tmp_path_factory.mktemp("pocket")
    printed = {part: run(root, folder, part, "--steps", "4", *SMALL) for part in TRAININGS}
    return folder, printed


def test_every_training_starts_from_nothing(trained):
    folder, printed = trained
    for part in TRAININGS:
        assert "min on two CPU cores" in printed[part]
        state = torch.load(folder / f"{part}.pt", weights_only=True)
        assert state["step"] == 4
        assert all(value.isfinite().all() for value in state["module"].values())
        assert '"step": 4' in (folder / f"{part}.jsonl").read_text()
    assert "dB on 200 fresh pictures" in printed["vae"]
    assert "judge, background: " in printed["judge"]


def test_the_parts_become_the_shipped_files(root, trained, tmp_path):
    folder, _ = trained
    printed = run(root, folder, "export", "--output", str(tmp_path))
    shipped = root / "models" / "pocket"
    names = {path.relative_to(shipped) for path in shipped.rglob("*.safetensors")}
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors")} == names
    for name in names:
        assert name.name in printed
        assert (tmp_path / name).stat().st_size == pytest.approx((shipped / name).stat().st_size, rel=0.01)


def test_the_shipped_files_become_checkpoints_to_go_on_from(root, trained, tmp_path):
    folder, _ = trained
    (tmp_path / "pictures").symlink_to(folder / "pictures")
    shutil.copy(folder / "vae.pt", tmp_path)
    printed = run(root, tmp_path, "restore")
    assert f"{tmp_path / 'vae.pt'} is there already and was left alone." in printed
    (tmp_path / "vae.pt").unlink()
    run(root, tmp_path, "restore")
    run(root, tmp_path, "export", "--output", str(tmp_path / "again"))
    shipped = root / "models" / "pocket"
    for path in shipped.rglob("*.safetensors"):
        ours, again = load_file(path), load_file(tmp_path / "again" / path.relative_to(shipped))
        assert ours.keys() == again.keys()
        assert all(torch.equal(ours[name], again[name]) for name in ours)
    run(root, tmp_path, "unet", "--steps", "2", *SMALL)
    before, after = (torch.load(tmp_path / "unet.pt", weights_only=True)[key] for key in ("before", "step"))
    assert before > 1000
    assert after == 2


@pytest.mark.parametrize(("part", "steps"), [("vae", 12), ("unet", 30)])
def test_a_killed_run_continues_bit_for_bit(root, trained, tmp_path, part, steps):
    folder, _ = trained
    for name in ("pictures", "vae.pt", "encoders.pt"):
        if not (part == "vae" and name == "vae.pt"):
            (tmp_path / name).symlink_to(folder / name)
    options = ("--steps", str(steps), "--save-minutes", "0", *SMALL)
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(command(tmp_path, part, *options), cwd=root, stdout=output, stderr=output)
        checkpoint = tmp_path / f"{part}.pt"
        for _ in range(2400):
            if checkpoint.exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    stopped = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < stopped < steps
    run(root, tmp_path, part, *options)
    continued = torch.load(checkpoint, weights_only=True)
    checkpoint.unlink()
    run(root, tmp_path, part, *options)
    at_once = torch.load(checkpoint, weights_only=True)
    assert continued["step"] == at_once["step"] == steps
    for part_of in ("module", "ema"):
        first, second = continued[part_of], at_once[part_of]
        values = [(first[key], second[key]) for key in first] if part_of == "module" else []
        values += list(zip(first["shadow_params"], second["shadow_params"], strict=True)) if part_of == "ema" else []
        assert values
        assert all(torch.equal(a, b) for a, b in values)


def test_too_few_pictures_for_a_batch(root, tmp_path):
    done = subprocess.run(
        command(tmp_path, "vae", "--pictures", "50"), cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--pictures 50 is too few for a batch of 16: draw at least 128.")
    assert not list(tmp_path.iterdir())


def test_a_part_that_is_not_trained_yet(root, tmp_path):
    done = subprocess.run(command(tmp_path, "export"), cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    sentence = f"vae.pt is not in {tmp_path}: train it first, python -m training.pocket vae."
    assert done.stderr.splitlines()[-1] == sentence
