"""Folders of pictures to a table: by the judge, whose truth is known, and by CLIP, DINO and Inception of random weights."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from finetuning import run
from measured_sets import DRAWS, PEOPLE, options
from pack.models.errors import PersonalizeError
from pack.training import evaluate as module
from pack.training import features
from pack.training.evaluate import evaluate, main
from pack.training.figure_kinds import KINDS
from pack.training.pocket.attributes import Scene, Subject
from pack.training.pocket.data import identity
from pack.training.pocket.photos import SUBJECTS
from pack.training.truth import NAMES, VALUES, count_attributes
from PIL import Image


def test_the_judge_tells_the_same_people_from_others(sets, tmp_path, capsys, no_network):
    result = evaluate(options(sets, tmp_path / "out", clip="pocket", trigger="ohwx"))
    good, bad, real = (result["figures"][name] for name in ("good", "bad", module.REAL))
    assert good["likeness"]["value"] > 0.75
    assert real["likeness"]["value"] > 0.75
    assert abs(bad["likeness"]["value"]) < 0.4
    assert abs(good["likeness_to_others"]["value"]) < 0.4
    assert good["identity_is"]["value"] > 0.9 * PEOPLE > bad["identity_is"]["value"] + 1
    assert good["attributes"]["value"] > 0.97
    assert real["attributes"]["value"] > 0.97
    assert bad["attributes"]["value"] < 0.6
    assert good["attributes"]["parts"]["kind"] == 1 > bad["attributes"]["parts"]["kind"]
    for method in (good, bad):
        assert method["prompt_following"]["value"] > 0.95
        assert set(method["prompt_following"]["parts"]) == {"pose", "expression", "background"}
        assert method["uniform_is"]["value"] >= method["is"]["value"] > 4
        assert 1 <= method["identity_is"]["value"] <= PEOPLE
        assert method["clip_t"]["pictures"] == PEOPLE * 4
        for figure in method.values():
            assert figure["low"] <= figure["value"] <= figure["high"]
            assert (figure["groups"], figure["draws"]) == (PEOPLE, DRAWS)
    for name in ("fid", "kid", "clip_i"):
        assert (good[name]["value"] < bad[name]["value"]) == (name != "clip_i")
    assert good["wcfid"]["value"] < bad["wcfid"]["value"]
    alone = {"is", "bcis", "identity_is", "uniform_is", "likeness", "likeness_to_others", "attributes", "clip_i"}
    assert set(real) == alone
    (likeness,) = (d for d in result["differences"] if d["figure"] == "likeness")
    assert (likeness["of"], likeness["against"], likeness["apart"]) == ("good", "bad", True)
    assert likeness["difference"] == pytest.approx(good["likeness"]["value"] - bad["likeness"]["value"])
    assert any("FID of good, bad is of" in remark and "160 features need 161" in remark for remark in result["remarks"])
    assert any(
        "FID within identities of good, bad is of as few as 4 pictures" in remark for remark in result["remarks"]
    )
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == result
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()[:5]] == ["", "-" * 15, "good", "bad", module.REAL]
    assert "good - bad" in table
    for name in good:
        picture = np.asarray(Image.open(tmp_path / "out" / f"{name}.png").convert("L"))
        assert picture.shape[1] == 900
        assert 0.01 < (picture < 200).mean() < 0.6


def test_what_is_not_there_is_left_out(copies, tmp_path, no_network):
    for folder in copies.values():
        for path in [*folder.glob("*/*.json"), *folder.glob("*/*.txt")]:
            path.unlink()
    result = evaluate(options(copies, tmp_path / "out", clip="pocket", bootstrap_draws=0))
    assert set(result["figures"]["good"]) == {
        "fid",
        "kid",
        "wcfid",
        "bcfid",
        "is",
        "bcis",
        "identity_is",
        "uniform_is",
        "likeness",
        "likeness_to_others",
        "clip_i",
    }
    assert result["differences"] == []
    assert result["figures"]["good"]["fid"]["low"] is None
    table = (tmp_path / "out" / "table.md").read_text()
    assert "[" not in table
    assert "brackets" not in table
    assert not (tmp_path / "out" / "attributes.png").exists()


def test_a_method_that_shows_some_of_the_identities(copies, tmp_path):
    shutil.rmtree(copies["good"] / "0")
    result = evaluate(options(copies, tmp_path / "out", bootstrap_draws=20))
    assert {"wcfid", "bcfid"} & set(result["figures"]["good"]) == set()
    assert {"wcfid", "bcfid"} <= set(result["figures"]["bad"])
    (remark,) = (remark for remark in result["remarks"] if "of the real pictures" in remark)
    assert remark.startswith(
        f"good shows {PEOPLE - 1} of the {PEOPLE} identities of the real pictures: its FID and KID"
    )


def test_fid_and_is_of_one_seed_at_a_time(copies, tmp_path):
    """The mean of what the pictures of each seed have by themselves, with the same identities drawn."""
    names = [f"p{i // 2:02}-s{i % 2}" for i in range(4)]
    for path in [path for folder in copies.values() for path in folder.glob("*/[0-3].*")]:
        path.rename(path.with_stem(names[int(path.stem)]))
    alone = []
    for seed in (0, 1):
        some = {name: tmp_path / f"{seed}" / name for name in copies}
        for name, folder in some.items():
            shutil.copytree(copies[name], folder, ignore=shutil.ignore_patterns(f"*-s{1 - seed}.*"))
        alone.append(evaluate(options(some, tmp_path / f"out{seed}"))["figures"])
        assert not {"seed_fid", "seed_is"} & set(alone[-1]["good"])
    both = evaluate(options(copies, tmp_path / "out"))["figures"]
    for method, kind in (("good", "fid"), ("bad", "fid"), ("good", "is"), ("bad", "is"), (module.REAL, "is")):
        found = both[method][f"seed_{kind}"]
        assert found["value"] == pytest.approx(np.mean([figures[method][kind]["value"] for figures in alone]))
        assert found["value"] != pytest.approx(both[method].get(kind, {"value": None})["value"])
        assert found["low"] < found["value"] < found["high"]
    assert "seed_fid" not in both[module.REAL]
    few = [remark for remark in evaluate(options(copies, tmp_path / "out"))["remarks"] if "by seed" in remark]
    assert few == [
        "FID by seed of good, bad is of 10 pictures a seed, but 160 features need 161: it is too high, and to be compared "
        "with that of as many pictures a seed only."
    ]
    (copies["good"] / "0" / "p01-s1.png").unlink()
    less = evaluate(options(copies, tmp_path / "less"))
    assert not {"seed_fid", "seed_is"} & set(less["figures"]["good"])
    assert "seed_fid" in less["figures"]["bad"]
    left = "FID and IS by seed of good are left out: its 2 seeds do not show the same prompts of the same identities."
    assert left in less["remarks"]


def test_seeds_as_large_as_comfyui_has_them(copies, tmp_path):
    for path in [path for name in ("good", "bad") for path in copies[name].glob("*/[0-3].*")]:
        path.rename(path.with_stem(f"p{int(path.stem) // 2:02}-s{2**64 - 1 - int(path.stem) % 2}"))
    result = evaluate(options(copies, tmp_path / "out"))
    assert {"seed_fid", "seed_is"} <= set(result["figures"]["good"]), "against all real pictures, which have no seeds"


def test_no_interval_reaches_what_cannot_be(copies, tmp_path):
    """Real pictures, each under another's name: those of a name that is drawn twice are far from whom it stands for."""
    shutil.rmtree(copies["good"])
    for number in range(PEOPLE):
        shutil.copytree(copies["real"] / str(number), copies["good"] / str((number + 1) % PEOPLE))
        (copies["good"] / str((number + 1) % PEOPLE) / "attributes.json").unlink()
    for name in ("good", "real"):
        for path in copies[name].glob("*/[0-3].*"):
            path.rename(path.with_stem(f"p{int(path.stem) // 2:02}-s{int(path.stem) % 2}"))
    figures = evaluate(options(copies, tmp_path / "out", ["good"], bootstrap_draws=300))["figures"]["good"]
    for name in ("fid", "seed_fid", "bcfid"):
        assert figures[name]["low"] == 0 < figures[name]["high"]
    assert {name for name, kind in KINDS.items() if kind.least == 0} == {"fid", "seed_fid", "wcfid", "bcfid"}
    scores = {"is", "seed_is", "bcis", "identity_is", "uniform_is"}
    assert {name for name, kind in KINDS.items() if kind.least == 1} == scores


def test_a_second_time_no_network_is_loaded(copies, tmp_path, monkeypatch):
    asked = options(copies, tmp_path / "out", clip="pocket")
    first = evaluate(asked)
    loaded = []

    def load(*arguments):
        loaded.append(arguments)
        raise PersonalizeError("a network is loaded")

    monkeypatch.setattr(features, "JudgeEye", load)
    monkeypatch.setattr(features, "PocketClipEye", load)
    assert evaluate(asked) == first
    assert not loaded
    Image.new("RGB", (64, 64), "red").save(copies["bad"] / "0" / "0.png")
    with pytest.raises(PersonalizeError, match="a network is loaded"):
        evaluate(asked)


def test_one_subject(copies, tmp_path):
    single = {name: folder / "0" for name, folder in copies.items()}
    result = evaluate(options(single, tmp_path / "out", ["good"]))  # "0" is the folder's name
    figures = result["figures"]["0"]
    assert figures["likeness"]["value"] > 0.7
    assert figures["attributes"]["value"] > 0.95
    assert (figures["likeness"]["groups"], "likeness_to_others" in figures) == (4, False)
    assert any("all pictures are taken as one subject's" in remark for remark in result["remarks"])
    for path in list(single["good"].glob("*.png"))[1:]:
        path.unlink()
    result = evaluate(options(single, tmp_path / "out", ["good"]))
    assert set(result["figures"]["0"]) == {"likeness", "attributes", "prompt_following"}
    assert any("1 generated and 4 real pictures are no distribution" in remark for remark in result["remarks"])
    assert any("IS of 0 is left out" in remark for remark in result["remarks"])
    result = evaluate(
        options({**copies, "good": copies["good"] / "1"}, tmp_path / "out", ["good"], real=str(copies["bad"] / "1"))
    )
    assert result["figures"]["1"]["likeness"]["value"] < 0.5


def test_pictures_of_any_size_are_judged(copies, tmp_path):
    for path in copies["good"].glob("*/*.png"):
        Image.open(path).resize((512, 512), Image.Resampling.LANCZOS).save(path)
    tall = copies["good"] / "0" / "0.png"
    wide = Image.new("RGB", (700, 512), "white")
    wide.paste(Image.open(tall), (94, 0))
    wide.save(tall)
    figures = evaluate(options(copies, tmp_path / "out", ["good"], bootstrap_draws=0))["figures"]["good"]
    assert figures["likeness"]["value"] > 0.7
    assert figures["attributes"]["value"] > 0.95


def test_every_problem_is_told_at_once(copies, tmp_path, nothing_loads):
    good, bad, real = (copies[name] for name in ("good", "bad", "real"))
    (good / "0" / "0.png").write_bytes(b"no picture")
    (good / "0" / "1.json").write_text('{"pose": "up"}')
    (good / "0" / "2.txt").write_bytes("Käse".encode("latin-1"))
    (good / "1" / "1.json").write_text("[")
    (good / "stranger").mkdir()
    shutil.copy(good / "1" / "0.png", good / "stranger")
    shutil.copy(good / "1" / "0.png", bad)
    (real / "3" / "attributes.json").write_text('{"kind": "dog", "colour": "brown"}')
    (tmp_path / "dino").mkdir()
    (tmp_path / "dino" / "config.json").write_text('{"model_type": "clip"}')
    asked = options(
        copies, tmp_path / "out", clip=str(tmp_path / "clip"), dino=str(tmp_path / "dino"), inception_weights="x"
    )
    asked.generated.append(str(tmp_path / "nowhere"))
    with pytest.raises(PersonalizeError) as caught:
        evaluate(asked)
    said = str(caught.value).splitlines()
    expected = [
        "--inception_weights is for --features inception, but --features is judge: give both or neither.",
        f"--clip {tmp_path / 'clip'} is no folder, and no hub id (owner/name).",
        f"--dino {tmp_path / 'dino'} holds a model of type clip, but must be vit or dinov2 or dinov2_with_registers.",
        f"The folder {bad} has pictures itself (0.png) and folders with pictures (0): put them all into a folder for each",
        f"The folder {tmp_path / 'nowhere'} does not exist.",
        f"{good} has pictures of stranger, of whom {real} has no folder: add real pictures, or delete the generated ones.",
        f"0.png in {good / '0'} cannot be read as a picture (it is damaged or of an unknown type).",
        f"The caption 2.txt in {good / '0'} is not UTF-8: save it as that.",
        f"1.json in {good / '0'} has pose 'up', but it must be one of left, front, right.",
        f"1.json in {good / '1'} cannot be read as JSON (",
        f"attributes.json in {real / '3'} has 'colour', but the judge knows kind, eyes, ",
    ]
    assert len(said) == len(expected), said
    for sentence, beginning in zip(said, expected, strict=True):
        assert sentence.startswith(beginning)
        assert sentence.endswith((".", ")."))


def test_options_that_cannot_be(sets, tmp_path, nothing_loads, capsys):
    assert main([]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "--generated is missing: the folder with generated pictures.",
        "--real is missing: the folder with real pictures.",
        "--output_dir is missing: the folder for the results.",
    ]
    good, real = str(sets["good"]), str(sets["real"])
    common = ["--generated", good, "--real", real, "--output-dir", str(tmp_path / "out")]
    for more, said in (
        (["--generated", good], f"--generated {good} is given twice."),
        (["--features", "inception"], "--features inception needs --inception_weights: torch-fidelity's weights-"),
        (["--features", "inception", "--inception_weights", str(tmp_path / "x.pth")], "x.pth is not in "),
        (["--features", "eyes"], "features is 'eyes', but must be one of judge, inception."),
        (["--bootstrap_draws", "-1"], "bootstrap_draws is -1, but must be at least 0."),
        (
            ["--bootstrap_draws", "5"],
            "--bootstrap_draws 5 are too few for an interval: give 20 or more, or 0 for none.",
        ),
        (
            ["--output_dir", f"{good}/out"],
            f"--output_dir {good}/out is in {good}, whose pictures are read: give a folder outside of it.",
        ),
        (
            ["--cache_dir", f"{real}/cache"],
            f"--cache_dir {real}/cache is in {real}, whose pictures are read: give a folder outside of it.",
        ),
        (["--cache_dir", f"{good}/0/cache"], f"--cache_dir {good}/0/cache is in {good}, whose pictures are read"),
        (["--real", good], f"{good} is given as generated and as real: every distance would be zero."),
        (
            ["--real", f"{real}/0"],
            f"{good} has a folder for each identity, but {real}/0 has none: use folders of the same",
        ),
        (["--drawings", "3"], "There is no option drawings; see --help."),
    ):
        assert main([*common, *more]) == 1, more
        assert capsys.readouterr().err.rpartition("\r")[2].startswith(said)  # after the progress bar
    assert not [path for name in ("good", "real") for path in sets[name].rglob("cache")]


def test_torch_fidelity_is_named_where_it_is_missing(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PersonalizeError, match=r"needs the package torch-fidelity: pip install torch-fidelity\."):
        evaluate(options(sets, tmp_path / "out", features="inception", inception_weights="download"))


def test_as_a_user_runs_it(root, sets, tmp_path):
    method = ["--generated", str(sets["good"]), "--real", str(sets["real"]), "--bootstrap_draws", "20"]
    done = run(root, module.sys.executable, "-m", "training.evaluate", *method, "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "| good" in done.stdout
    assert {"table.md", "figures.json", "fid.png", "is.png", "likeness.png"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


# what each network is shown


def test_clip_text_follows_the_pictures(sets, tmp_path):
    """The pocket model's own encoders prefer a picture's prompt to another's."""
    right = evaluate(options(sets, tmp_path / "out", ["good"], clip="pocket"))["figures"]["good"]["clip_t"]
    mixed = shutil.copytree(sets["good"], tmp_path / "good")
    texts = sorted(mixed.glob("*/*.txt"))
    for path, other in zip(texts, [*texts[5:], *texts[:5]], strict=True):
        path.write_text((sets["good"] / other.relative_to(mixed)).read_text())
    wrong = evaluate(options({**sets, "good": mixed}, tmp_path / "out", ["good"], clip="pocket"))
    assert right["low"] > wrong["figures"]["good"]["clip_t"]["high"]


# what the judge is asked


def reading(scene):
    """[1, 26] of a judge that is always right; what cannot be seen it takes for the first value."""
    values = scene.subject_values()[0] | scene.values()
    return torch.tensor([[VALUES[name].index(values[name]) if name in values else 0 for name in NAMES]])


@pytest.mark.parametrize(
    ("changes", "wish", "hidden"),
    [
        ({}, {}, {"hat", "hat_colour"}),
        ({"hat_worn": True}, {}, {"hair_style"}),
        ({"expression": "sleeping"}, {}, {"hat", "hat_colour", "eyes"}),
        ({}, {"expression": "sleeping"}, {"hat", "hat_colour", "eyes"}),
        ({"framing": "close-up"}, {}, {"hat", "hat_colour", "clothes", "pattern"}),
    ],
)
def test_only_what_can_be_seen_counts(changes, wish, hidden):
    who = next(
        w for i in range(200) if (w := identity(SUBJECTS, i)).kind == "woman" and w.glasses == "none" and w.hair_colour
    )
    subject = Subject(who, "front", changes.get("expression", "sad"), changes.get("hat_worn", False))
    seen = reading(Scene((subject,), "beach", framing=changes.get("framing", "portrait")))
    known = {name: value for name, value in asdict(who).items() if value is not None}
    counts = count_attributes(seen, ["ann"], {"ann": known}, [wish])
    assert set(counts) == set(known) - hidden
    assert all(values.tolist() == [1.0] for values in counts.values())
    some = count_attributes(seen.repeat(2, 1), ["ann", "ben"], {"ann": {"kind": "dog", "skin": who.skin}}, [wish] * 2)
    assert {name: values[0].item() for name, values in some.items()} == {"kind": 0.0, "skin": 1.0}
    assert all(values[1].isnan() for values in some.values())
