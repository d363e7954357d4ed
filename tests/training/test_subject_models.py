"""BLIP-2, the tagger, Grounding DINO and SAM of real classes and random weights, one by one and together."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import spacy
import torch
from finetuning import run
from pack.models.errors import PersonalizeError
from pack.models.pictures import box_of
from pack.training import subject_models
from pack.training.build_subject_data import main, suppress, within
from pack.training.subject_data import METADATA, Detection, read_subjects
from pack.training.subject_models import (
    NO_NOUN,
    Captioner,
    Detector,
    Segmenter,
    Tagger,
    check_processor,
    check_tagger,
    noun_of,
)
from PIL import Image
from tiny_models import NOUNS, save_models

LOOSE = {  # what random models find
    "longest_side": 64, "white": 1, "min_nouns": 1, "max_nouns": 30, "min_boxes": 1, "box_threshold": 0.6,
    "text_threshold": 0.6, "overlap": 1, "contained": 1, "mask_threshold": 0.3, "min_area": 0, "max_area": 1,
    "min_aspect": 0, "max_aspect": 99, "fill": 0, "regions": 9, "batch_size": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def pictures(root, tmp_path_factory):
    """Seven, some with captions: photographs where there are any beside this checkout."""
    folder = tmp_path_factory.mktemp("pictures")
    photographs = sorted((root.parent / "shared" / "data" / "dreambooth").glob("*/00.jpg"))[:7]
    for i in range(7):
        if photographs:
            picture = Image.open(photographs[i])
        else:
            picture = Image.effect_noise((200, 150 + 10 * i), 40 + 20 * i).convert("RGB")
        picture.thumbnail((160, 120 + 10 * i))
        picture.save(folder / f"{i}.png")
        if i % 2:
            (folder / f"{i}.txt").write_text("a Dog and a cat beside the basketball on grass")
    return folder


def opened(folder, count):
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))[:count]]


def arguments(models, **values):
    return [word for name, value in (models | LOOSE | values).items() for word in (f"--{name}", str(value))]


# each by itself


def test_captions_are_words_alone(models, pictures, no_network):
    captioner, shown = Captioner(models["captioner"], 6), opened(pictures, 3)
    texts = captioner(shown)
    assert texts == [captioner([one])[0] for one in shown]
    assert any(texts)
    known = {"a", "the", "and", "on", "beside", "red", "big", *NOUNS}
    for text in texts:
        assert len(text.split()) <= 6
        assert set(text.split()) <= known


def test_the_nouns_as_they_stand_in_the_caption(models):
    tagger = Tagger(models["tagger"])
    assert tagger(["A Dog, two dogs and a Café.", "nothing here", ""]) == [["Dog", "dogs", "Café"], [], []]


@pytest.mark.parametrize(
    ("label", "nouns", "noun"),
    [
        ("dog", ["cat", "dog"], "dog"),
        ("dog", ["cat", "Dog", "dog"], "Dog"),
        (" dog. ", ["dog"], "dog"),
        ("dog.dog", ["dog"], "dog"),
        ("dog cat", ["dog", "cat"], "dog cat"),
        (".cat..dog.", ["dog", "cat"], "cat dog"),
        ("cafe", ["Café"], "Café"),
        ("##ball", ["basketball", "dog"], "basketball"),
        ("basket", ["basketball", "dog"], "basketball"),
        ("ball", ["basketball", "ball"], "ball"),
        ("ball", ["basketball", "football"], NO_NOUN),
        ("horse", ["dog"], NO_NOUN),
        ("", ["dog"], NO_NOUN),
        (" . ", ["dog"], NO_NOUN),
        ("dog", [], NO_NOUN),
    ],
)
def test_which_noun_a_label_is(label, nouns, noun):
    assert noun_of(label, nouns) == noun


def test_labels_and_boxes_of_the_detector(models, pictures, monkeypatch):
    """What the model gives is made up; what is before and behind it is real."""
    detector, asked = Detector(models["detector"], 0.25, 0.2), {}
    shown = [one.resize(size) for one, size in zip(opened(pictures, 2), ((100, 50), (40, 80)), strict=True)]
    #           [CLS] dog  .  cafe  .  basket ##ball  .  [SEP], and [CLS] cat  .  [SEP]
    first = [
        [(1, 0.9)],
        [(0, 0.3), (3, 0.8), (4, 0.3), (8, 0.5)],
        [(5, 0.7), (6, 0.6)],
        [(6, 0.5), (1, 0.19)],
        [(1, 0.4), (3, 0.3)],
        [(2, 0.35)],
        [(1, 0.25)],
    ]
    second = [[(1, 0.6)], [], [], [], [], [], [(3, 0.3)]]

    def says(**inputs):
        asked.update(inputs)
        logits = torch.full((2, 7, 256), -torch.inf)
        for i, queries in enumerate((first, second)):
            for query, tokens in enumerate(queries):
                for place, score in tokens:
                    logits[i, query, place] = torch.tensor(score).logit()
        boxes = torch.tensor([0.5, 0.5, 0.4, 0.2]).repeat(2, 7, 1)
        boxes[0, 2] = torch.tensor([0.9, 0.1, 0.4, 0.4])  # over the edge
        return SimpleNamespace(logits=logits, pred_boxes=boxes, input_ids=inputs["input_ids"])

    monkeypatch.setattr(detector, "model", says)
    found = detector(shown, [["Dog", "Café", "dog", "basketball"], ["cat"]])
    texts = detector.processor.tokenizer.batch_decode(asked["input_ids"])
    assert texts[0] == "[CLS] dog. cafe. basketball. [SEP]"
    assert texts[1].startswith("[CLS] cat. [SEP] [PAD]")
    assert [one.label for one in found[0]] == ["Dog", "Café", "basketball", "basketball", "dog cafe", NO_NOUN]
    assert [one.score for one in found[0]] == pytest.approx([0.9, 0.8, 0.7, 0.5, 0.4, 0.35])
    assert [one.label for one in found[1]] == ["cat", NO_NOUN]
    assert found[0][0].box == pytest.approx((30, 20, 70, 30))  # 100 wide, 50 high
    assert found[0][2].box == pytest.approx((70, 0, 100, 15))
    assert found[1][0].box == pytest.approx((12, 32, 28, 48))


def test_the_detector_is_the_library_s(models, pictures):
    from transformers import AutoProcessor, GroundingDinoForObjectDetection

    where, shown = models["detector"], opened(pictures, 2)
    found = Detector(where, 0.3, 0.5)(shown, [["dog", "cat"], ["ball"]])
    processor, model = (
        AutoProcessor.from_pretrained(where),
        GroundingDinoForObjectDetection.from_pretrained(where).eval(),
    )
    inputs = processor(images=shown, text=["dog. cat.", "ball."], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    best = logits.sigmoid().amax(2)
    assert [len(own) for own in found] == (best > 0.3).sum(1).tolist()
    assert sum(map(len, found)) > 3
    for own, scores in zip(found, best, strict=True):
        assert [one.score for one in own] == pytest.approx(scores[scores > 0.3].tolist(), rel=1e-4)


def test_masks_of_few_and_many_boxes_together(models, pictures):
    segmenter, shown = Segmenter(models["segmenter"], 0.2), opened(pictures, 3)
    boxes = [[(5.0, 5.0, 80.0, 60.0)], [(1.0, 2.0, 30.0, 40.0), (20.0, 9.0, 90.0, 99.0)], [(0.0, 0.0, 50.0, 50.0)] * 2]
    masks = segmenter(shown, boxes)
    for picture, own, found in zip(shown, boxes, masks, strict=True):
        assert found.shape == (len(own), picture.height, picture.width)
        assert found.dtype == bool
        assert 0 < found.mean() < 1
        alone = segmenter([picture], [own])[0]
        assert (alone != found).mean() < 0.001
    assert (masks[1][0] != masks[1][1]).any()
    assert (masks[2][0] == masks[2][1]).all()
    assert Segmenter(models["segmenter"], 0.3)(shown[:1], boxes[:1])[0].mean() < masks[0].mean()


def test_boxes_that_overlap_are_suppressed():
    boxes = [(0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 8.0), (0.0, 0.0, 10.0, 4.0), (50.0, 0.0, 60.0, 10.0)]
    found = [Detection("dog", box, score) for box, score in zip(boxes, (0.5, 0.9, 0.4, 0.3), strict=True)]
    assert suppress(found, 0.51) == [1, 2, 3]  # 0.8, 0.5
    assert suppress(found, 0.49) == [1, 3]
    assert suppress(found, 1) == [1, 0, 2, 3]


def test_a_mask_ends_with_its_box():
    cut = within(np.ones((20, 30), bool), (2.7, 3.0, 9.1, 8.0))
    assert box_of(torch.from_numpy(cut)) == (2, 3, 10, 8)
    assert cut.sum() == 8 * 5


# what can be wrong


def test_spacy_is_named_where_it_is_missing(models, monkeypatch):
    monkeypatch.setattr(subject_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PersonalizeError) as caught:
        check_tagger("en_core_web_sm")
    assert str(caught.value) == (
        "Finding the nouns of captions needs the package spacy: pip install spacy, then python -m spacy download "
        "en_core_web_sm."
    )


def test_pipelines_that_cannot_tag(models, tmp_path):
    check_tagger(models["tagger"])
    with pytest.raises(PersonalizeError, match=r"--tagger en_no_such is no installed spaCy pipeline, and no folder"):
        check_tagger("en_no_such")
    pipeline = spacy.blank("en")
    pipeline.add_pipe("sentencizer")
    pipeline.to_disk(tmp_path / "sentences")
    with pytest.raises(
        PersonalizeError, match=r"does not tag parts of speech \(it has sentencizer\): use one that does"
    ):
        check_tagger(str(tmp_path / "sentences"))
    (tmp_path / "sentences" / "config.cfg").write_text("[nlp")
    with pytest.raises(PersonalizeError, match=r"^--tagger .*sentences cannot be loaded: "):
        Tagger(str(tmp_path / "sentences"))


def test_folders_that_are_not_whole(models, tmp_path, no_network):
    for option, kind, texts in (("captioner", "blip-2", True), ("detector", "grounding-dino", True), ("segmenter", "sam", False)):  # fmt: skip
        check_processor(models[option], f"--{option}", kind, texts)
    check_processor("owner/name", "--detector", "grounding-dino", True)
    for where, said in (
        (tmp_path / "none", "--detector .*none is no folder, and no hub id"),
        (models["segmenter"], "holds a model of type sam, but must be grounding-dino"),
    ):
        with pytest.raises(PersonalizeError, match=said):
            check_processor(str(where), "--detector", "grounding-dino", True)
    folder = tmp_path / "detector"
    folder.mkdir()
    for name in ("config.json", "processor_config.json"):
        (folder / name).write_bytes((spacy.util.ensure_path(models["detector"]) / name).read_bytes())
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(
        PersonalizeError, match=r"has no tokenizer.json or tokenizer_config.json or .*: download all of"
    ):
        check_processor(str(folder), "--detector", "grounding-dino", True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((spacy.util.ensure_path(models["detector"]) / name).read_bytes())
    check_processor(str(folder), "--detector", "grounding-dino", True)
    with pytest.raises(PersonalizeError, match=r"^--detector .*detector cannot be loaded: .*$"):
        Detector(str(folder), 0.25, 0.2)


# all together


def test_a_folder_of_pictures_becomes_a_data_set(models, pictures, tmp_path, capsys, no_network):
    output = tmp_path / "out"
    assert main(["--pictures", str(pictures), "--output_dir", str(output), *arguments(models)]) == 0
    said = capsys.readouterr().out
    assert said.strip() == (output / "report.md").read_text().strip()
    read = read_subjects(output)
    lines = [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]
    dropped = {line["file_name"].removesuffix(".png") for line in lines if line["reason"]}
    assert read
    assert {one.path.stem for one in read} | dropped == {str(i) for i in range(7)}
    for one in read:
        size = Image.open(one.path).size
        for subject in one.subjects:
            assert subject.entity in one.text
            assert subject.entity.lower() in NOUNS
            assert Image.open(subject.mask).size == size
            left, top, right, bottom = box_of(torch.from_numpy(np.asarray(Image.open(subject.mask)) > 127))
            shares = (left / size[0], top / size[1], right / size[0], bottom / size[1])
            assert subject.box == pytest.approx(shares, abs=1e-6)
    own = [one.text for one in read if int(one.path.stem) % 2]
    assert set(own) <= {"a Dog and a cat beside the basketball on grass"}


def test_killed_at_random_moments_the_data_set_is_the_same(root, models, pictures, tmp_path):
    script = [sys.executable, __file__.replace("test_subject_models", "killed_build"), "3", "2", str(tmp_path / "out")]
    done = run(root, *script, "--pictures", str(pictures), *arguments(models, sheet=4))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["-9"] * 2
    files = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "out", tmp_path / "out-whole")
    ]
    assert METADATA in files[0]
    assert files[0] == files[1]
