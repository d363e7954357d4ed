"""The shipped weights do what the model card says: small counts here, those of the card by `training.pocket measure`."""

import numpy as np
import pytest
from pack.training.pocket import sheet
from pack.training.pocket.data import VALIDATION
from pack.training.pocket.files import ADAPTER
from pack.training.pocket.judge import Windows, count_right
from pack.training.pocket.measure import fidelity, following, likeness, retrieval
from pack.training.pocket.shipped import load_pocket
from pack.training.shared import POCKET, IPAdapter, read_ip_adapter
from PIL import Image


@pytest.fixture(scope="module")
def pocket():
    return load_pocket()


def test_the_judge_reads_pictures(pocket, tmp_path):
    counts = count_right(pocket.judge, Windows(tmp_path, VALIDATION, 300))
    assert all(right >= 0.9 * of for right, of in counts.values()), counts
    assert sum(right for right, _ in counts.values()) > 0.99 * sum(of for _, of in counts.values())


def test_pictures_follow_captions(pocket):
    right, named = following(pocket, 60)
    for name, least in (("kind", 0.9), ("background", 0.9), ("pose", 0.9), ("expression", 0.7)):
        assert right[name] >= least * named[name], f"{name}: {right[name]} of {named[name]}"
    assert right["two subjects, both kinds"] >= 0.8 * named["two subjects, both kinds"]


def test_pictures_are_like_the_reference(pocket):
    adapter = IPAdapter.from_state(read_ip_adapter(POCKET / ADAPTER))
    none, half, full = likeness(pocket, adapter, 30, (0.0, 0.5, 1.0)).values()
    assert none["likeness"] < 0.15
    assert none["likeness"] + 0.2 < half["likeness"] < full["likeness"]
    assert none["kind"] < 0.4 < 0.7 < full["kind"]
    assert full["clothes"] > none["clothes"] + 0.2


def test_captions_and_pictures_find_each_other(pocket):
    scores = retrieval(pocket, 100)
    for pair in ("image to text", "text to image", "image to image"):
        assert scores[f"{pair}, first of 100"] > 0.8
    assert scores["chance, first"] == 0.01


def test_generated_pictures_are_near_real_ones(pocket, tmp_path):
    scores = fidelity(pocket, tmp_path, 40, 200)
    # so few differ much from any others, real or not
    assert 0 < scores["FID, generated to 200 fresh"] < 1.5 * scores["FID, real to 200 fresh"]
    assert scores["IS, reference"] > scores["IS, generated"] > 5


def test_a_sheet_of_prompts(tmp_path, monkeypatch):
    asked = []

    class Painter:
        def generate(self, prompts, width, seed):
            asked.extend(prompts)
            return np.full((len(prompts), 64, width, 3), 40 * seed, np.uint8)

    monkeypatch.setattr(sheet, "load_pocket", lambda weights: Painter())
    sheet.prompt_sheet(tmp_path / "new" / "sheet.png", POCKET)
    assert (tmp_path / "new" / "sheet.txt").read_text().splitlines() == asked
    assert len(set(asked)) == 64
    picture = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
    assert picture.shape == (6 * 132 - 4, 12 * 132 - 4, 3)
    for value, share in ((40, 4 / 6), (80, 2 / 6)):
        assert abs((picture == value).mean() - share) < 0.1
