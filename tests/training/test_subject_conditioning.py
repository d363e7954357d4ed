"""What Subject-Diffusion's trainer tells the networks of a picture's subjects, against the data set itself."""

from collections import Counter

import numpy as np
import pytest
import torch
from identity_sets import ENCODER
from pack.models.subject_diffusion import localisation_loss, slots
from pack.training import run as running
from pack.training.image_encoder import load_image_encoder
from pack.training.subject_conditioning import Dropout
from pack.training.subject_features import encode_subjects, look_of
from PIL import Image
from subject_sets import train_subjects

NEVER = Dropout(0, 0, 0)


@pytest.fixture(scope="module")
def trainer(root, subject_set, tmp_path_factory):
    """After a step at a high rate, so that nothing is zero."""
    kept, prepare = [], running.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "prepare", lambda *a: kept.append(prepare(*a)) or kept[-1])
        values = {"augmentations": 0, "max_train_steps": 1, "learning_rate": 1e-2}
        train_subjects(root, subject_set, tmp_path_factory.mktemp("out"), **values)
    return kept[0]


@pytest.fixture
def told(trainer):
    """Its conditioning, which drops nothing."""
    conditioning = trainer.method.conditioning
    conditioning.dropout = NEVER
    return conditioning


@pytest.fixture(scope="module")
def looks(root):
    """Of a picture's subjects, CLS features and patch tokens, seen anew."""
    encoder = load_image_encoder(root / ENCODER)

    def look(picture):
        size = encoder.config.image_size
        seen = [look_of(one.crop, 0, None, np.random.default_rng(0), size) for one in picture.subjects]
        return encode_subjects(encoder, torch.stack(seen))

    return look


def masks_of(picture):
    return [np.asarray(Image.open(one.mask)) > 127 for one in picture.subjects]


def boxes_of(picture):
    """Left, top, right, bottom of each mask, as shares."""
    rows = []
    for mask in masks_of(picture):
        (down,), (across,) = np.nonzero(mask.any(1)), np.nonzero(mask.any(0))
        height, width = mask.shape
        rows.append([across[0] / width, down[0] / height, (across[-1] + 1) / width, (down[-1] + 1) / height])
    return torch.tensor(rows, dtype=torch.float32)


def picked(trainer, count):
    """An example with so many subjects, in its picture's own size, which no mask is changed for."""
    pictures = trainer.method.conditioning.pictures
    example = next(one for one in trainer.examples if len(pictures[one.path].subjects) == count)
    assert masks_of(pictures[example.path])[0].shape == example.size
    return example


def test_the_networks_are_told_of_each_subject_its_box_and_its_looks(trainer, told, looks):
    examples = [picked(trainer, 2), picked(trainer, 1)]
    examples = [one for one in examples if one.size == examples[0].size]
    network, pictures = trainer.method.network, [told.pictures[one.path] for one in examples]
    assert told.tell(examples, 3, list(range(len(examples)))) == [True] * len(examples)
    vectors = []
    for i, picture in enumerate(pictures):
        boxes, (pooled, patches) = boxes_of(picture), looks(picture)
        with torch.no_grad():
            expected = network.objects(*(part[None] for part in slots(patches, boxes, told.most)))
            vectors.append(network.word(pooled))
        torch.testing.assert_close(network.seen[i : i + 1].detach(), expected, atol=1e-5, rtol=1e-5)
        height, width = examples[i].size
        for y, x in np.ndindex(height // told.scale, width // told.scale):
            across, down = x * told.scale / width, y * told.scale / height
            inside = any(l <= across < r and t <= down < b for l, t, r, b in boxes.tolist())  # noqa: E741
            assert network.conv_in.mask[i, 0, y, x] == (not inside), (y, x)
    torch.testing.assert_close(trainer.method.placeholders.vectors.detach(), torch.cat(vectors), atol=1e-5, rtol=1e-5)


def test_what_is_dropped_is_dropped_as_often_as_asked(trainer, told):
    example, network = picked(trainer, 2), trainer.method.network
    told.dropout = Dropout(0.2, 0.3, 0.1)
    found = Counter()
    with torch.no_grad():
        for number in range(400):
            (text,) = told.tell([example], number, [0])
            shown = bool(network.seen.any())
            assert shown == bool(network.conv_in.mask.any())
            assert text == (trainer.method.placeholders.vectors is not None)
            found[text, shown] += 1
        for (text, shown), share in {
            (False, True): 0.2,
            (True, False): 0.3,
            (False, False): 0.1,
            (True, True): 0.4,
        }.items():
            assert found[text, shown] / 400 == pytest.approx(share, abs=0.08)
        told.dropout = Dropout(0.4, 0.3, 0.3)
        assert all(told.tell([example], -1, [place]) == [True] for place in range(20)), "what is measured is told"


@pytest.mark.parametrize("count", [1, 2])
def test_attention_is_drawn_to_where_each_word_is(trainer, told, count):
    example = picked(trainer, count)
    picture, tokenizer = told.pictures[example.path], trainer.base.pipeline.tokenizer
    assert told.tell([example], 5, [0]) == [True]
    ids = tokenizer(example.captions[0]).input_ids
    placeholders = [i for i, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids("sks</w>")]
    nouns = [i - 2 for i in placeholders]
    assert [tokenizer.decode(ids[i]).strip() for i in nouns] == [one.entity for one in picture.subjects]
    (height, width), lack = example.size, told.most - count
    maps = [torch.rand(1, 2, height // told.scale, width // told.scale, 77) for _ in range(2)]
    masks = [torch.from_numpy(mask.copy()).float() for mask in masks_of(picture)] + [torch.zeros(height, width)] * lack
    words = [*placeholders, *[0] * lack, *nouns, *[0] * lack]
    there = ([True] * count + [False] * lack) * 2
    given = torch.stack(masks * 2)[None], torch.tensor([words]), torch.tensor([there])
    kind, weight = told.control
    told.watch.maps[:] = maps
    expected = weight * sum(localisation_loss(one, *given, kind) for one in maps) / 2
    torch.testing.assert_close(told.loss_beside([example], 5, [0]), expected)
    assert expected != 0
    told.told = [False]
    assert told.loss_beside([example], 5, [0]) == 0, "without a caption there is no word"
    told.watch.maps.clear()
    assert told.loss_beside([example], 5, [0]) is None
