"""Folders of pictures to a table: by the judge, whose truth is known, and by CLIP, DINO and Inception of random weights."""

import json
import shutil
import socket
from dataclasses import asdict

import numpy as np
import pytest
import torch
from finetuning import run
from pack.models.errors import PersonalizeError
from pack.training import evaluate as module
from pack.training import features
from pack.training.encoding import Cache
from pack.training.evaluate import Evaluation, evaluate, main
from pack.training.pocket.attributes import Scene, Subject, sample_scene
from pack.training.pocket.data import identity
from pack.training.pocket.draw import draw
from pack.training.pocket.photos import SUBJECTS
from pack.training.truth import NAMES, VALUES, count_attributes
from PIL import Image

PEOPLE = 5
DRAWS = 60


def write(folder, first, seed, pictures=4):
    """A folder for each of PEOPLE, "0", "1"...: drawings of identities from `first`, and what was asked for."""
    for number in range(PEOPLE):
        who, place = identity(SUBJECTS, first + number), folder / str(number)
        place.mkdir(parents=True)
        for i in range(pictures):
            rng = np.random.default_rng([seed, number, i])
            scene = sample_scene(rng, (who,))
            shown = scene.subjects[0]
            draw(scene).save(place / f"{i}.png")
            said = {"pose": shown.pose, "expression": shown.expression, "background": scene.background, "seed": i}
            (place / f"{i}.json").write_text(json.dumps(said))
            (place / f"{i}.txt").write_text(f"a {who.kind}, ohwx, {shown.expression}, in front of {scene.background}")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Real pictures, other drawings of the same people, and drawings of others under their names."""
    base = tmp_path_factory.mktemp("sets")
    real = write(base / "real", 0, 1)
    for number in range(PEOPLE):
        (real / str(number) / "attributes.json").write_text(json.dumps(asdict(identity(SUBJECTS, number))))
    return {"real": real, "good": write(base / "good", 0, 2), "bad": write(base / "bad", 100, 3)}


@pytest.fixture
def copies(sets, tmp_path):
    """The same, to be changed."""
    return {name: shutil.copytree(folder, tmp_path / "sets" / name) for name, folder in sets.items()}


def options(sets, output, methods=("good", "bad"), **values):
    made = {"bootstrap_draws": DRAWS, "generated": [str(sets[name]) for name in methods], "real": str(sets["real"])}
    return Evaluation(**{**made, "output_dir": str(output), **values})


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(*arguments):
        raise AssertionError("a network was loaded")

    for eye in ("JudgeEye", "InceptionEye", "ClipEye", "PocketClipEye", "DinoEye"):
        monkeypatch.setattr(features, eye, load)


@pytest.fixture
def no_network(monkeypatch):
    def connect(*arguments):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", connect)


def test_the_judge_tells_the_same_people_from_others(sets, tmp_path, capsys, no_network):
    result = evaluate(options(sets, tmp_path / "out", clip="pocket", trigger="ohwx"))
    good, bad, real = (result["figures"][name] for name in ("good", "bad", module.REAL))
    assert good["likeness"]["value"] > 0.75
    assert real["likeness"]["value"] > 0.75
    assert abs(bad["likeness"]["value"]) < 0.4
    assert abs(good["likeness_to_others"]["value"]) < 0.4
    assert good["attributes"]["value"] > 0.97
    assert real["attributes"]["value"] > 0.97
    assert bad["attributes"]["value"] < 0.6
    assert good["attributes"]["parts"]["kind"] == 1 > bad["attributes"]["parts"]["kind"]
    for method in (good, bad):
        assert method["prompt_following"]["value"] > 0.95
        assert set(method["prompt_following"]["parts"]) == {"pose", "expression", "background"}
        assert method["uniform_is"]["value"] >= method["is"]["value"] > 4
        assert method["clip_t"]["pictures"] == PEOPLE * 4
        for figure in method.values():
            assert figure["low"] <= figure["value"] <= figure["high"]
            assert (figure["groups"], figure["draws"]) == (PEOPLE, DRAWS)
    for name in ("fid", "kid", "clip_i"):
        assert (good[name]["value"] < bad[name]["value"]) == (name != "clip_i")
    assert set(real) == {"is", "uniform_is", "likeness", "likeness_to_others", "attributes", "clip_i"}
    (likeness,) = (d for d in result["differences"] if d["figure"] == "likeness")
    assert (likeness["of"], likeness["against"], likeness["apart"]) == ("good", "bad", True)
    assert likeness["difference"] == pytest.approx(good["likeness"]["value"] - bad["likeness"]["value"])
    assert any("160 features need 161" in remark for remark in result["remarks"])
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
        "is",
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
            ["--output_dir", f"{good}/out"],
            f"--output_dir {good}/out is in {good}, which is measured: its plots would be",
        ),
        (["--real", good], f"{good} is given as generated and as real: every distance would be zero."),
        (
            ["--real", f"{real}/0"],
            f"{good} has a folder for each identity, but {real}/0 has none: use folders of the same",
        ),
        (["--drawings", "3"], "There is no option drawings; see --help."),
    ):
        assert main([*common, *more]) == 1, more
        assert capsys.readouterr().err.rpartition("\r")[2].startswith(said)  # after the progress bar


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


def pictures_of(folder, sizes):
    """Drawings of several sizes, as files."""
    paths = []
    for i, size in enumerate(sizes):
        paths.append(folder / f"{i}.png")
        draw(sample_scene(np.random.default_rng(i), (identity(SUBJECTS, i),))).resize(size).save(paths[-1])
    return paths


def tiny_clip(folder, side=32, **framing):
    """A CLIPModel of random weights; its tokens are CLIP's."""
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = {**small, "bos_token_id": 49406, "eos_token_id": 49407}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**small, "image_size": side, "patch_size": 8}, projection_dim=12)
    )
    model.save_pretrained(folder)
    if framing:
        (folder / "preprocessor_config.json").write_text(json.dumps(framing))
    return model.eval()


@pytest.mark.parametrize("said", [True, False], ids=["by its configuration", "without one"])
def test_clip_sees_and_reads_as_its_own_processor_has_it(tmp_path, no_network, said):
    pytest.importorskip("torchvision")
    from pack.training.clip_tokenizer import clip_tokenizer
    from transformers import CLIPImageProcessor

    mean, std = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]) if said else (features.CLIP_MEAN, features.CLIP_STD)
    framing = {
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
        "image_mean": mean,
        "image_std": std,
    }
    model = tiny_clip(tmp_path / "clip", **(framing if said else {}))
    own = CLIPImageProcessor(**framing) if said else CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    paths = pictures_of(tmp_path, [(64, 64), (96, 64), (50, 70)])
    eye = features.clip(str(tmp_path / "clip"), Cache(tmp_path / "cache"), 2)
    seen = eye.pictures(paths, "test")["features"]
    texts = ["a dog on a beach", "a woman " + "very " * 90 + "happy"]
    ids = clip_tokenizer()(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        for row, path in zip(seen, paths, strict=True):
            pixels = own(Image.open(path), return_tensors="pt").pixel_values
            expected = model(**ids, pixel_values=pixels)
            torch.testing.assert_close(row / row.norm(), expected.image_embeds[0], rtol=0, atol=5e-3)  # 8 bit or not
        read = eye.texts(texts)
    torch.testing.assert_close(read / read.norm(dim=1, keepdim=True), expected.text_embeds, rtol=1e-4, atol=1e-5)


def test_dino_sees_as_its_authors_evaluate_it(tmp_path, no_network):
    transforms = pytest.importorskip("torchvision.transforms")
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(image_size=56, patch_size=8, **small), add_pooling_layer=False)
    model.save_pretrained(tmp_path / "dino")
    theirs = transforms.Compose(
        [
            transforms.ToTensor(),  # first, so that nothing is rounded to 8 bit in between
            transforms.Resize(64, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(56),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    paths = pictures_of(tmp_path, [(64, 64), (96, 80), (50, 70)])
    seen = features.dino(str(tmp_path / "dino"), Cache(tmp_path / "cache"), 2).pictures(paths, "test")["features"]
    with torch.no_grad():
        expected = torch.cat([model.eval()(theirs(Image.open(p))[None]).last_hidden_state[:, 0] for p in paths])
    torch.testing.assert_close(seen, expected, rtol=0, atol=5e-3)  # theirs overshoots 0..1


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """torch-fidelity's Inception with random weights, as a file."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_is_torch_fidelitys(inception_weights, tmp_path, no_network):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    paths = pictures_of(tmp_path, [(64, 64), (64, 64), (96, 80)])
    seen = features.inception(str(inception_weights), Cache(tmp_path / "cache"), 3).pictures(paths, "test")
    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(inception_weights))
    for i, path in enumerate(paths):
        expected = theirs(torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None])
        for name, row in zip(("features", "logits"), expected, strict=True):
            torch.testing.assert_close(seen[name][i], row[0], rtol=1e-4, atol=1e-5)
    assert (seen["features"].shape, seen["logits"].shape) == ((3, 2048), (3, 1008))


def test_photographs_are_measured_as_dreambench_has_it(sets, inception_weights, tmp_path, no_network):
    tiny_clip(tmp_path / "clip")
    asked = {"features": "inception", "inception_weights": str(inception_weights), "clip": str(tmp_path / "clip")}
    few = {name: shutil.copytree(folder, tmp_path / name) for name, folder in sets.items() if name != "bad"}
    for folder in few.values():
        for path in [*folder.glob("*/[23].png"), *(folder / str(i) for i in range(2, PEOPLE))]:
            path.unlink() if path.is_file() else shutil.rmtree(path)
    (few["good"] / "0" / "0.txt").unlink()
    result = evaluate(options(few, tmp_path / "out", ["good"], **asked))
    figures = result["figures"]["good"]
    assert set(figures) == {"fid", "kid", "is", "uniform_is", "clip_i", "clip_t"}
    assert (figures["clip_i"]["pictures"], figures["clip_t"]["pictures"]) == (4, 3)
    assert any("2048 features need 2049" in remark for remark in result["remarks"])


@pytest.mark.parametrize("what", ["code", "another network", "safetensors"])
def test_weights_that_are_no_inception(sets, tmp_path, nothing_loads, what):
    path = tmp_path / ("weights.safetensors" if what == "safetensors" else "weights.pth")
    if what == "code":
        path.write_bytes(b"cposix\nsystem\n(S'exit 3'\ntR.")
    else:
        torch.save({"fc.weight": torch.zeros(2, 3)}, path)
    said = {
        "code": "holds Python code, which was not run",
        "another network": "it has no fc.weight of 1008 x 2048.",
        "safetensors": "must be a .pth file, as torch-fidelity reads it.",
    }[what]
    with pytest.raises(PersonalizeError, match=said):
        evaluate(options(sets, tmp_path / "out", features="inception", inception_weights=str(path)))


def test_a_clip_that_is_not_whole(sets, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_clip(tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "text_projection.weight"}, tmp_path / "clip" / "model.safetensors"
    )
    with pytest.raises(PersonalizeError, match="holds a model of type clip without text_projection"):
        evaluate(options(sets, tmp_path / "out", clip=str(tmp_path / "clip")))


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
