"""Score Images and Contact Sheet: the numbers of the headless measurement, and clear sentences."""

import math

import numpy as np
import pytest
import torch
from finetuning import photos
from inprocess import node
from pack.training.features import JudgeEye, PocketClipEye
from PIL import Image
from torch.nn.functional import cosine_similarity

PROMPT = "a photo of a smiling woman"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six of one subject: a folder, and [6, H, W, 3]."""
    folder = photos(tmp_path_factory.mktemp("scores") / "photos", 6)
    files = [np.asarray(Image.open(path).convert("RGB"), np.float32) / 255 for path in sorted(folder.glob("*.png"))]
    return folder, torch.from_numpy(np.stack(files))


def test_the_numbers_of_the_headless_measurement(host, loaded, clip_vision, pictures):
    _, batch = pictures
    drawn, real = batch[:4], batch[4:]
    score = node(host, "ScoreImages")
    wired = {"image0": real[:1], "image1": real[1:]}
    clip_i, clip_t, likeness, summary, table = score(
        drawn, clip_vision, wired, clip=loaded[1], prompt=PROMPT, likeness="pocket judge"
    )
    eye, judge = PocketClipEye(), JudgeEye()
    with torch.no_grad():
        seen, known = (eye.pictures(list(some))["features"] for some in (drawn, real))
        told = eye.texts([PROMPT])
        who, whose = (judge.pictures(list(some))["who"] for some in (drawn, real))

    def mean(a, b):
        return cosine_similarity(a[:, None], b[None], dim=-1).mean().item()

    assert clip_i == pytest.approx(mean(seen, known), abs=1e-4)
    assert clip_t == pytest.approx(mean(seen, told), abs=1e-4)
    assert likeness == pytest.approx(mean(who, whose), abs=1e-4)
    assert summary == f"CLIP-I {clip_i:.3f} | CLIP-T {clip_t:.3f} | likeness {likeness:.3f}"
    assert len(table.splitlines()) == 2 + 4 + 1
    assert f"{cosine_similarity(seen[2], told[0], dim=0).item():.3f}" in table.splitlines()[4]


def test_prompts_of_each_picture_a_folder_and_what_is_not_measured(host, loaded, clip_vision, pictures):
    folder, batch = pictures
    score = node(host, "ScoreImages")
    clip_i, clip_t, likeness, summary, _ = score(batch, clip_vision, folder=str(folder))
    assert clip_i == pytest.approx(score(batch, clip_vision, {"image0": batch})[0])
    assert math.isnan(clip_t)
    assert math.isnan(likeness)
    assert summary == f"CLIP-I {clip_i:.3f}"
    one_by_one = [score(batch[i : i + 1], clip_vision, clip=loaded[1], prompt=f"a cat {i}")[1] for i in range(6)]
    together = score(batch, clip_vision, clip=loaded[1], prompt="\n".join(f"a cat {i}" for i in range(6)))
    assert math.isnan(together[0])
    assert together[1] == pytest.approx(np.mean(one_by_one), abs=1e-5)
    own = score(batch, clip_vision, {"image0": batch}, likeness="likeness_encoder", likeness_encoder=clip_vision)
    assert own[2] == pytest.approx(clip_i)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "There is nothing to compare with"),
        ({"prompt": PROMPT}, "connect clip"),
        ({"clip": True}, "no prompt for clip"),
        ({"clip": True, "prompt": "a\nb"}, "2 prompts but 6 pictures"),
        ({"clip": True, "prompt": PROMPT, "likeness": "pocket judge"}, "Likeness is measured to references"),
        ({"references": True, "likeness": "likeness_encoder"}, "is not connected"),
        ({"references": True, "likeness_encoder": True}, "likeness is none, but likeness_encoder is connected"),
        ({"folder": "nowhere"}, 'There is no folder "nowhere"'),
        ({"references": {"image0": torch.zeros(6, 64, 64)}}, "image0 has the shape"),
        ({"pictures": torch.zeros(6, 64, 64)}, "pictures has the shape"),
        ({"clip_vision": None, "references": True}, "The image encoder is empty"),
    ],
)
def test_bad_input(host, loaded, clip_vision, pictures, given, sentence):
    batch = pictures[1]
    values = {"pictures": batch, "clip_vision": clip_vision} | given
    if given.get("clip"):
        values["clip"] = loaded[1]
    if given.get("references") is True:
        values["references"] = {"image0": batch}
    if given.get("likeness_encoder"):
        values["likeness_encoder"] = clip_vision
    with pytest.raises(Exception, match=sentence) as raised:
        node(host, "ScoreImages")(**values)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("lacks", ["projected", "weights"])
def test_a_text_encoder_without_a_projection_is_told(host, loaded, clip_vision, pictures, monkeypatch, lacks):
    """SD1.5's, or a file that has lost it: the cosine would mean nothing."""
    tower = loaded[1].cond_stage_model.clip_l
    if lacks == "projected":
        monkeypatch.setattr(tower, "options_default", (*tower.options_default[:2], False))
    else:
        own = tower.transformer.text_projection
        monkeypatch.setattr(tower.transformer, "text_projection", torch.nn.Linear(*own.weight.shape[::-1], bias=False))
        torch.nn.init.zeros_(tower.transformer.text_projection.weight)
    with pytest.raises(Exception, match="no projection to as many"):
        node(host, "ScoreImages")(pictures[1], clip_vision, clip=loaded[1], prompt=PROMPT)


def test_a_sheet_of_rows(host, pictures):
    batch = pictures[1]
    sheet = node(host, "ContactSheet")
    rows = {"row0": batch[:3], "row1": batch[3:, :32], "row2": None}
    (bare,) = sheet(rows, cell=64)
    assert bare.shape == (1, 12 + 2 * 76, 12 + 3 * 76, 3)
    assert (bare[0, 12:76, 12:76] - batch[0]).abs().max() <= 1 / 255, "a picture in its own size"
    said = {
        "labels": "LoRA | rank 16\nDreamBooth",
        "headings": "a\nb\nc",
        "note": "foot",
        "details": {"detail1": "x | y"},
    }
    (full,) = sheet(rows, references=batch[:5], cell=64, **said)
    assert full.shape[1] > bare.shape[1]
    (other,) = sheet(rows, references=batch[:5], cell=64, **said | {"details": {"detail1": "x | z"}})
    assert not torch.equal(full, other)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"rows": {"row0": None}}, "There are no pictures"),
        ({"rows": None}, "There are no pictures"),
        ({"rows": {"row0": torch.zeros(64, 64, 3)}}, "row0 has the shape"),
        ({"labels": "a\nb"}, "2 labels but 1 row: "),
        ({"details": {"detail3": "x"}}, "detail3 has no row"),
        ({"cell": 1024, "rows": {"row0": torch.zeros(20, 8, 8, 3)}}, "lower cell"),
        ({"headings": "a\n" * 5000}, r"The sheet would be 860012x250 pixels, but a side may have 16384: lower cell"),
        ({"cell": 320, "rows": {f"row{i}": torch.zeros(1, 8, 8, 3) for i in range(50)}}, "x16612 pixels"),
    ],
)
def test_a_sheet_that_cannot_be(host, given, sentence):
    with pytest.raises(Exception, match=sentence):
        node(host, "ContactSheet")(**{"rows": {"row0": torch.zeros(1, 64, 64, 3)}} | given)
