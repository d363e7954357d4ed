"""The benchmark from nothing to its report, small; what it is stopped in, it takes up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from identity_sets import CHECKPOINT, ENCODER
from pack.models.errors import PersonalizeError
from pack.models.ip_adapter import IPAdapter, read_ip_adapter
from pack.models.weight_files import read_safetensors
from pack.training import benchmark as running
from pack.training.benchmark_data import EXCHANGED, TRUTH, pocket_material, real_material, with_trigger
from pack.training.benchmark_stages import ROWS, TRAININGS, TUNED, find_adapters
from pack.training.look import alone
from pack.training.settings import make_groups
from pack.training.shared import POCKET
from PIL import Image

SMALL = {
    "identities": 3,
    "seeds": 1,
    "references": 3,
    "tuned_identities": 2,
    "tuned_steps": 2,
    "train": True,
    "train_identities": 11,
    "max_train_steps": 3,
    "train_batch_size": 2,
    "bootstrap_draws": 20,
}


def options_of(**values):
    return make_groups((running.Benchmark,), values)[0]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    return running.benchmark(options_of(output_dir=str(folder), **SMALL)), folder


def test_every_method_draws_everybody_with_the_same_noise_and_prompts(done):
    _, folder = done
    people = sorted(path.name for path in (folder / "held_out").iterdir())
    train = {path.name for path in (folder / "train").iterdir()}
    assert len(people) == 3
    assert not train & set(people)
    prompts = {}
    for title in [row.title for row in ROWS] + list(TUNED.values()):
        drawn = sorted((folder / "generated" / title).rglob("*.png"))
        shown = people if title not in TUNED.values() else people[:2]
        assert len(drawn) == 8 * len(shown)
        for path in drawn:
            text = path.with_suffix(".txt").read_text().replace("ohwx ", "")
            key = path.parent.name, path.name
            assert prompts.setdefault(key, text) == text
    assert {path.name for path in (folder / "real").iterdir()} == set(people)


def test_the_four_were_trained_alike(done):
    _, folder = done
    configs = {}
    differing = ("output", *{option for own in TRAININGS.values() for option in own})
    for name in TRAININGS:
        text = (folder / "adapters" / name / "config.toml").read_text()
        configs[name] = [line for line in text.splitlines() if not line.startswith(differing)]
    assert all(config == configs["single"] for config in configs.values())
    assert any(line.endswith('start.safetensors"') for line in configs["single"])


def test_the_report_has_tables_plots_and_pictures(done):
    report, folder = done
    text = report.read_text()
    for title in [row.title for row in ROWS] + list(TUNED.values()):
        assert title in text
    for name in ("sheet.png", "likeness.png", "adapters/fid.png", "tuned/likeness.png"):
        assert f'src="{name}"' in text
        assert Image.open(report.parent / name).width > 300
    figures = json.loads((folder / "report" / "adapters" / "figures.json").read_text())["figures"]
    assert {row.title for row in ROWS} | {TRUTH, EXCHANGED} < figures.keys()
    assert all(found["likeness"]["groups"] == 3 for found in figures.values())
    right, wrong = figures[TRUTH], figures[EXCHANGED]
    assert right["likeness"]["value"] > 0.8 > 0.5 > wrong["likeness"]["value"]
    assert right["wcfid"]["value"] < wrong["wcfid"]["value"]
    assert right["fid"]["value"] == pytest.approx(wrong["fid"]["value"]), "which is why there is wcfid"
    tuned = json.loads((folder / "report" / "tuned" / "figures.json").read_text())["figures"]
    assert len(tuned) == len(ROWS) + len(TUNED) + 1


def test_a_second_run_draws_and_trains_nothing(done, monkeypatch):
    report, folder = done
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png") if "report" not in path.parts}
    monkeypatch.setattr("pack.training.benchmark_stages.load_base", None)
    monkeypatch.setattr("pack.training.benchmark_stages.personalize", None)
    assert running.benchmark(options_of(output_dir=str(folder), **SMALL)) == report
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_the_adapters_that_come_with_the_pack_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("pack.training.benchmark_stages.personalize", None)
    options = options_of(output_dir=str(tmp_path), identities=1, seeds=1, references=2)
    material = pocket_material(options, tmp_path)
    found = find_adapters(Accelerator(), options, material, tmp_path, POCKET / "ipadapter")
    assert list(found) == list(TRAININGS)
    assert not (tmp_path / "train").exists()
    states = {name: IPAdapter.from_state(read_ip_adapter(path)) for name, path in found.items()}
    assert {name: state.trained is not None for name, state in states.items()} == {
        name: name == "self_attention" for name in TRAININGS
    }
    settings = [json.loads(read_safetensors(path)[1]["personalize.settings"]) for path in found.values()]
    own = {option for values in TRAININGS.values() for option in values} | {"output_name"}
    assert all(
        {name: value for name, value in one.items() if name not in own}
        == {name: value for name, value in settings[0].items() if name not in own}
        for one in settings
    ), "trained alike"
    assert settings[0]["max_train_steps"] == material.training["max_train_steps"]


def test_a_folder_is_of_one_benchmark(done, capsys):
    _, folder = done
    with pytest.raises(
        PersonalizeError, match=r"was begun with --seeds 1 \(now 2\), --weight 1.0 \(now 0.5\): use another"
    ):
        running.benchmark(options_of(output_dir=str(folder), **SMALL | {"seeds": 2, "weight": 0.5}))


def test_a_damaged_note_is_told(tmp_path):
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(PersonalizeError, match=r"settings.json is damaged: use another --output_dir"):
        running.benchmark(options_of(output_dir=str(tmp_path), **SMALL))


def test_what_cannot_be_is_told_before_anything_is_drawn(tmp_path, capsys):
    assert running.main(["--output_dir", str(tmp_path), "--max_train_steps", "9", "--identities", "1001"]) == 1
    told = capsys.readouterr().err
    assert "--max_train_steps is for training, and the adapters that come with the pack are taken" in told
    assert "--identities 1001: at most 1000" in told
    given = ["--data", "x", "--base", "x", "--image_encoder", "x", "--inception_weights", str(tmp_path / "none.pth")]
    assert running.main(["--preset", "lfw", "--output_dir", str(tmp_path), *given]) == 1
    assert "none.pth is not in" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"train_identities": 5},
            "--train_identities is for training, and the adapters that come with the pack are taken",
        ),
        ({"tuned_identities": 3, "identities": 2}, "--tuned_identities 3 are more than the 2 that are drawn."),
        ({"tuned_identities": 0, "tuned_steps": 5}, "--tuned_steps has no effect with --tuned_identities 0"),
        ({"resolution": 100}, "--resolution 100 is no multiple of 16, which the pocket model needs."),
        ({"preset": "lfw", "base": CHECKPOINT, "resolution": 100}, "--resolution 100 is no multiple of 16"),
        ({"preset": "lfw", "train": True}, "--train is for --preset pocket: lfw always trains"),
        ({"preset": "lfw", "train_identities": 7}, "--train_identities is for --preset pocket"),
        ({"preset": "lfw", "base": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"preset": "lfw", "base": CHECKPOINT, "image_encoder": "nowhere.safetensors"}, "nowhere.safetensors"),
        (
            {"preset": "lfw", "base": CHECKPOINT, "image_encoder": ENCODER, "ip_adapter": "nowhere.safetensors"},
            "nowhere.safetensors",
        ),
    ],
)
def test_what_would_do_nothing_or_fail_late_is_told_first(tmp_path, given, sentence):
    with pytest.raises(PersonalizeError) as told:
        running.benchmark(options_of(output_dir=str(tmp_path / "out"), **given))
    assert any(sentence in line for line in str(told.value).splitlines()), told.value
    assert not list((tmp_path / "out").iterdir())


def test_few_identities_to_train_on_leave_some_to_train_on(tmp_path):
    options = options_of(output_dir=str(tmp_path), identities=1, seeds=1, references=2, train=True, train_identities=3)
    assert pocket_material(options, tmp_path).training["validation_identities"] == 1


def test_two_benchmarks_do_not_share_a_folder(tmp_path, capsys):
    with alone(tmp_path):
        assert running.main(["--output_dir", str(tmp_path)]) == 1
    assert (
        capsys.readouterr().err.strip()
        == f"Another run writes to {tmp_path}: wait for it, or use another --output_dir."
    )


def test_what_is_missing_is_told_at_once(capsys):
    assert running.main(["--preset", "lfw"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == [
        "--output_dir is missing",
        *(f"--preset lfw needs --{name}." for name in ("base", "data", "image_encoder", "inception_weights")),
    ]
    assert running.main(["--base", "x", "--output_dir", "/proc/no"]) == 1
    told = capsys.readouterr().err
    assert "--base is for --preset lfw" in told
    assert "cannot be written to" in told


def test_two_processes_share_the_work(root, tmp_path):
    options = {"identities": 2, "seeds": 1, "references": 2, "tuned_identities": 1, "tuned_steps": 1}
    given = [text for name, value in (options | {"bootstrap_draws": 20}).items() for text in (f"--{name}", str(value))]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "training.benchmark"]
    arguments = [sys.executable, *launch, "--output_dir", str(tmp_path), *given]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(arguments, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for row in ROWS:
        assert len(list((tmp_path / "generated" / row.title).rglob("*.png"))) == 2 * 8
    for method, title in TUNED.items():
        assert len(list((tmp_path / "generated" / title).rglob("*.png"))) == 8
        (own,) = (tmp_path / "tuned" / method).iterdir()
        assert (own / "result.safetensors").exists() == (method != "dreambooth")
        assert not (own / "checkpoints").exists()
    assert done.stdout.splitlines()[-1] == str(tmp_path / "report" / "index.html")
    tuned = json.loads((tmp_path / "report" / "tuned" / "figures.json").read_text())["figures"]
    assert set(TUNED.values()) <= tuned.keys()


def people(folder, counts):
    for name, count in counts.items():
        for i in range(count):
            path = folder / name / f"{name}_{i:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (40 * i % 255, 10, 10)).save(path)
    return folder


def lfw(folder, data, **values):
    given = {"preset": "lfw", "data": str(data), "base": CHECKPOINT, "image_encoder": ENCODER, "inception_weights": "x"}
    return options_of(output_dir=str(folder), **given, **values)


def test_people_with_enough_pictures_are_held_out(tmp_path):
    data = people(tmp_path / "lfw", {"ann": 12, "ben": 11, "cid": 3, "dan": 2, "eve": 1})
    material = real_material(lfw(tmp_path / "out", data, identities=2), tmp_path / "out")
    assert [person.name for person in material.people] == ["ann", "ben"]
    assert [len(person.references) for person in material.people] == [10, 10]
    assert sorted(path.name for path in (tmp_path / "out" / "train").iterdir()) == ["cid", "dan"]
    assert all(Path(path).exists() for person in material.people for path in person.references)
    with pytest.raises(
        PersonalizeError, match=r"real holds ann, ben, which this run does not|holds ann, which this run"
    ):
        real_material(lfw(tmp_path / "out", people(tmp_path / "others", {"x": 12, "y": 2})), tmp_path / "out")
    few = people(tmp_path / "few", {"ann": 12})
    with pytest.raises(PersonalizeError, match=r"has 1 people with two pictures or more, 1 of them with 10 or more"):
        real_material(lfw(tmp_path / "none", few), tmp_path / "none")
    with pytest.raises(PersonalizeError, match="1 of them with 4 or more"):
        real_material(lfw(tmp_path / "none", few, references=4), tmp_path / "none")


def test_captions_call_by_the_trigger():
    assert with_trigger("a happy cat, in a hat", "cat") == "a happy {trigger} {class}, in a hat"
    assert with_trigger("a concatenated dog", "cat") == "a concatenated dog"
