"""Every script of the pocket model starts from nothing, and goes on where it was killed."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from filelock import FileLock
from pack.training.pocket import data
from pack.training.pocket.adapter import adapter_of
from pack.training.pocket.data import Pictures, cache_folder, generator_version, make_once
from pack.training.pocket.draw import draw
from pack.training.pocket.encoders import Encoders
from pack.training.pocket.judge import Judge
from pack.training.pocket.loop import average
from pack.training.pocket.unet import build_unet
from pack.training.pocket.vae import build
from safetensors.torch import load_file

TRAININGS = ("vae", "encoders", "judge", "unet", "adapter")
SMALL = ("--batch", "12", "--pictures", "200")


def command(folder, part, *options):
    return [sys.executable, "-m", "training.pocket", part, "--folder", str(folder), *options]


def run(root, folder, part, *options):
    done = subprocess.run(command(folder, part, *options), cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def failed(root, words, lines=1):
    """The last lines that a command says when it ends with status 1."""
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    return "\n".join(done.stderr.splitlines()[-lines:])


def untrained(part, folder):
    """The tensors that a part starts from."""
    torch.manual_seed(0)
    made = {"vae": build, "encoders": Encoders, "judge": Judge, "unet": build_unet}
    if part != "adapter":
        return [p for p in made[part]().parameters() if p.requires_grad]
    unet = build_unet()
    average(unet, folder, "unet")
    return list(adapter_of(unet.requires_grad_(False)).parameters())


def parts(shipped):
    """What these scripts train; beside it are examples and the benchmark's adapters, which are trained on it."""
    return list(shipped.rglob("pocket_portraits*.safetensors"))


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
        after = state["ema"]["shadow_params"]
        changed = [not torch.equal(a, b) for a, b in zip(after, untrained(part, folder), strict=True)]
        assert all(changed), f"{part}: {changed.count(False)} of {len(changed)} tensors were not trained"
    assert "dB on 200 fresh pictures" in printed["vae"]
    assert "judge, background: " in printed["judge"]


def test_the_parts_become_the_shipped_files(root, trained, tmp_path):
    folder, _ = trained
    printed = run(root, folder, "export", "--output", str(tmp_path))
    shipped = root / "models" / "pocket"
    names = {path.relative_to(shipped) for path in parts(shipped)}
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
    for path in parts(shipped):
        ours, again = load_file(path), load_file(tmp_path / "again" / path.relative_to(shipped))
        assert ours.keys() == again.keys()
        assert all(torch.equal(ours[name], again[name]) for name in ours)
    run(root, tmp_path, "unet", "--steps", "2", *SMALL)
    before, after = (torch.load(tmp_path / "unet.pt", weights_only=True)[key] for key in ("before", "step"))
    assert before > 1000
    assert after == 2


@pytest.mark.parametrize(
    ("part", "steps"), [("vae", 12), ("encoders", 20), ("judge", 20), ("unet", 20), ("adapter", 20)]
)
def test_a_killed_run_continues_bit_for_bit(root, trained, tmp_path, part, steps):
    folder, _ = trained
    for name in ("pictures", "vae.pt", "encoders.pt", "unet.pt"):
        if name != f"{part}.pt":
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
    log = tmp_path / f"{part}.jsonl"
    with log.open("a") as file:
        file.write('{"step": 4, "l')  # killed while it wrote
    run(root, tmp_path, part, *options)
    continued = torch.load(checkpoint, weights_only=True)
    continued_log = log.read_text()
    checkpoint.unlink()
    log.unlink()
    run(root, tmp_path, part, *options)
    at_once = torch.load(checkpoint, weights_only=True)
    assert continued["step"] == at_once["step"] == steps
    assert continued_log == log.read_text()
    for part_of in ("module", "ema"):
        first, second = continued[part_of], at_once[part_of]
        values = [(first[key], second[key]) for key in first] if part_of == "module" else []
        values += list(zip(first["shadow_params"], second["shadow_params"], strict=True)) if part_of == "ema" else []
        assert values
        assert all(torch.equal(a, b) for a, b in values)


def test_what_is_made_once_is_whole_and_made_by_one(tmp_path):
    path, made = tmp_path / "cache" / "a.npy", []

    def broken(file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    def make(file):
        made.append(file)
        time.sleep(0.2)
        np.save(file, np.arange(3))

    with pytest.raises(KeyboardInterrupt):
        make_once(path, broken)
    assert not path.exists()
    threads = [threading.Thread(target=make_once, args=(path, make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.load(path).tolist() == [0, 1, 2]
    assert len(made) == 1


def test_other_drawings_are_drawn_anew(tmp_path, monkeypatch):
    drawn = Pictures(tmp_path, 8, 12)
    assert cache_folder(tmp_path) == tmp_path / "pictures" / generator_version()
    monkeypatch.setattr(data, "draw", lambda shown: draw(replace(shown, light="warm")))
    generator_version.cache_clear()
    try:
        again = Pictures(tmp_path, 8, 12)
        assert len(list((tmp_path / "pictures").iterdir())) == 2
        assert not np.array_equal(drawn.single, again.single)
    finally:
        generator_version.cache_clear()


def test_other_data_is_not_gone_on_with(root, trained):
    folder, _ = trained
    done = failed(root, command(folder, "judge", "--steps", "6", "--batch", "12", "--pictures", "240"))
    assert done == (
        f"{folder / 'judge.pt'} was trained with --batch 12 --pictures 200, not 12 and 240: give the same, or start in "
        "another --folder."
    )


def test_a_damaged_checkpoint_is_named(root, trained, tmp_path):
    folder, _ = trained
    (tmp_path / "pictures").symlink_to(folder / "pictures")
    for content in (b"", (folder / "judge.pt").read_bytes()[:5000], (folder / "vae.pt").read_bytes()):
        (tmp_path / "judge.pt").write_bytes(content)
        assert failed(root, command(tmp_path, "judge", "--steps", "6", *SMALL)) == (
            f"{tmp_path / 'judge.pt'} is damaged or another training's checkpoint: remove it, and that training starts "
            "anew."
        )
        assert (tmp_path / "judge.pt").read_bytes() == content


def test_one_training_at_a_time(root, trained):
    folder, _ = trained
    before = (folder / "judge.pt").read_bytes()
    with FileLock(folder / "judge.lock"):
        sentence = f"judge is being trained in {folder} already: wait for it, or name another."
        assert failed(root, command(folder, "judge", "--steps", "6", *SMALL)) == sentence
    assert before == (folder / "judge.pt").read_bytes()


def test_a_killed_drawing_leaves_no_process(root, tmp_path):
    words = command(tmp_path, "judge", "--steps", "4", "--batch", "12", "--pictures", "100000")
    process = psutil.Popen(words, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers = []
    while not workers and process.poll() is None:
        time.sleep(0.2)
        workers = process.children()
    time.sleep(1)
    process.kill()
    process.wait()
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]


def test_a_part_that_is_not_trained_yet(root, tmp_path):
    def sentences(*names):
        return "\n".join(
            f"{name}.pt is not in {tmp_path}: train it first, python -m training.pocket {name}." for name in names
        )

    assert failed(root, command(tmp_path, "export"), lines=5) == sentences(
        "vae", "encoders", "judge", "unet", "adapter"
    )
    assert failed(root, command(tmp_path, "unet"), lines=2) == sentences("vae", "encoders")
    assert failed(root, command(tmp_path, "adapter"), lines=3) == sentences("vae", "encoders", "unet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "options", "sentence"),
    [
        ("vae", ("--pictures", "50"), "--pictures 50 is too few for a batch of 16: draw at least 128."),
        ("vae", ("--steps", "0"), "argument --steps: 0 is less than 1"),
        ("vae", ("--batch", "x"), "argument --batch: invalid whole number value: 'x'"),
        ("sheet", ("--output", "sheet"), "--output sheet is no picture: give it a name that ends with .png or .jpg."),
        ("photos", ("--count", "0"), "argument --count: 0 is less than 1"),
        (
            "identities",
            ("--crop", "0.5", "1.5"),
            "--crop 0.5 1.5 are no two shares: above 0, at most 1, the smaller first.",
        ),
        (
            "identities",
            ("--crop", "0.5", "0.2"),
            "--crop 0.5 0.2 are no two shares: above 0, at most 1, the smaller first.",
        ),
        ("identities", ("--whole", "0.5"), "--whole 0.5 is no share, at most 1, of what --crop would cut."),
        (
            "identities",
            ("--crop", "0.5", "1", "--whole", "1.5"),
            "--whole 1.5 is no share, at most 1, of what --crop would cut.",
        ),
        ("photos", ("--identity", "-1"), "argument --identity: -1 is less than 0"),
        (
            "photos",
            ("--logo", "moon:red"),
            "--logo moon:red is not shape:colour:place, where the shape is one of star,",
        ),
        ("photos", ("--logo", "moon:red:shirt", "--style", "neon"), "--style and --logo are two things to learn: give"),
    ],
)
def test_wrong_options_are_told(root, tmp_path, part, options, sentence):
    done = subprocess.run(command(tmp_path, part, *options), cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"error: {sentence}" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_wrong_places_are_told(root, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert "Not a directory" in failed(root, command(file, "vae"))
    assert str(tmp_path / "gone") in failed(root, command(tmp_path, "sheet", "--weights", str(tmp_path / "gone")))
    assert file.read_text() == "mine"


def test_photos_leave_other_pictures_alone(root, tmp_path):
    folder = tmp_path / "mine"
    photos = command(tmp_path, "photos", "--output", str(folder), "--count", "3")
    printed = subprocess.run(photos, cwd=root, capture_output=True, text=True, timeout=60)
    assert printed.stdout == f"3 pictures with captions in {folder}\n"
    assert subprocess.run(photos, cwd=root, capture_output=True, timeout=60).returncode == 0  # the same again
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for options, name in ((("--identity", "1"), "01.png"), (("--count", "2"), "03.png")):
        sentence = f"{folder} holds another picture, {name}: name another folder, or empty it."
        assert failed(root, [*photos, *options]) == sentence
    for name, kind in (("02.txt", "caption"), ("01.png", "picture")):
        (folder / name).write_bytes(before[name][:30])
        sentence = f"{folder} holds another {kind}, {name}: name another folder, or empty it."
        assert failed(root, photos) == sentence
        assert (folder / name).read_bytes() == before[name][:30]
        (folder / name).write_bytes(before[name])
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
