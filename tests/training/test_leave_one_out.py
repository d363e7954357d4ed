"""Which picture is predicted from which: never from itself, each as often as any other, from any number of others."""

import shutil
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from pack.models.errors import PersonalizeError
from pack.training.dataset import Example, Order
from pack.training.denoising import generator_of
from pack.training.identities import find_identities, hold_out
from pack.training.leave_one_out import Dropout, draw_references
from PIL import Image

SET = [Path(f"ann/ann_{i:04}.jpg") for i in range(1, 11)]
DRAWS = 10_000
NONE, SOME = Dropout(0, 0, 0), Dropout(0.05, 0.05, 0.05)


def draws(target, most=None, dropout=NONE, others=SET):
    return [draw_references(others, target, most, dropout, generator_of(0, i, 0, 1)) for i in range(DRAWS)]


def test_the_target_is_never_among_its_references():
    for i in range(DRAWS):
        target = SET[i % len(SET)]
        told = draw_references(SET, target, None, SOME, generator_of(0, i, 3, 1))
        paths = [view.path for view in told.references]
        assert target not in paths
        assert len(set(paths)) == len(paths)
        assert set(paths) <= set(SET)


def test_the_target_is_not_seen_through_a_square_either():
    for i in range(DRAWS):
        target = SET[i % len(SET)]
        told = draw_references(SET, target, None, NONE, generator_of(0, i, 0, 1), crops=3)
        assert target not in [view.path for view in told.references]


def test_every_square_of_a_reference_is_as_likely_as_the_whole():
    told = [draw_references(SET, SET[0], None, NONE, generator_of(0, i, 0, 1), crops=3) for i in range(DRAWS)]
    seen = Counter(view.crop for one in told for view in one.references)
    expected = sum(seen.values()) / 4
    assert sorted(seen) == [0, 1, 2, 3]
    assert all(abs(count - expected) < 5 * expected**0.5 for count in seen.values())
    without = [draw_references(SET, SET[0], None, NONE, generator_of(0, i, 0, 1)) for i in range(DRAWS)]
    paths = [[view.path for view in one.references] for one in told]
    assert paths == [[view.path for view in one.references] for one in without]


def test_any_number_of_references_is_as_likely_and_any_of_them_in_any_place():
    told = draws(SET[0])
    sizes = Counter(len(one.references) for one in told)
    assert sorted(sizes) == list(range(1, 10))
    assert all(abs(count - DRAWS / 9) < 5 * (DRAWS / 9) ** 0.5 for count in sizes.values())
    for place in range(3):
        seen = Counter(one.references[place] for one in told if len(one.references) > place)
        expected = sum(seen.values()) / 9
        assert len(seen) == 9
        assert all(abs(count - expected) < 5 * expected**0.5 for count in seen.values())


def test_at_most_as_many_as_wanted():
    assert {len(one.references) for one in draws(SET[0], most=3)} == {1, 2, 3}
    assert {len(one.references) for one in draws(SET[0], most=1)} == {1}
    assert {len(one.references) for one in draws(SET[0], most=50, others=SET[:3])} == {1, 2}


def test_text_references_and_both_are_left_out_as_often_as_said():
    told = draws(SET[0], dropout=Dropout(0.05, 0.1, 0.2))
    kinds = Counter((bool(one.references), one.text) for one in told)
    for kind, share in {(True, False): 0.05, (False, True): 0.1, (False, False): 0.2, (True, True): 0.65}.items():
        assert abs(kinds[kind] / DRAWS - share) < 0.02


def examples_of(*counts):
    """So many pictures of each size."""
    return [
        Example(Path(f"ann/{16 * k}_{i}.jpg"), ("a photo",), (64, 64 + 16 * k))
        for k, count in enumerate(counts)
        for i in range(count)
    ]


def shown(order, first, last):
    """How often each example is in the batches from one to before another."""
    return Counter(i for number in range(first, last) for i in order(number))


@pytest.mark.parametrize("counts", [(10,), (1,), (3,), (12, 8), (7, 1, 4, 2), (1, 1, 1), (97, 3, 30, 1, 5)])
@pytest.mark.parametrize("batch", [1, 3, 4, 8])
def test_every_picture_is_the_target_as_often(counts, batch):
    examples = examples_of(*counts)
    order = Order(examples, batch, 5)
    for round_ in range(2):
        seen = shown(order, round_ * len(examples), (round_ + 1) * len(examples))
        assert seen == dict.fromkeys(range(len(examples)), batch)
    batches = -(-DRAWS // batch)
    seen, expected = shown(order, 1000, 1000 + batches), batches * batch / len(examples)
    assert all(abs(seen[i] - expected) < 3 * batch + 0.02 * expected for i in range(len(examples)))


@pytest.mark.parametrize("counts", [(10,), (7, 1, 4, 2), (3,)])
def test_every_picture_is_the_target_as_often_in_the_first_epoch(counts):
    """Whatever its size: over seeds, by a chi-square of as many degrees as there are pictures, less one."""
    examples, seen = examples_of(*counts), Counter()
    for seed in range(DRAWS // 4):
        order = Order(examples, 4, seed)
        seen.update(shown(order, 0, order.batches(1)))
    expected = sum(seen.values()) / len(examples)
    degrees = len(examples) - 1
    assert sum((seen[i] - expected) ** 2 / expected for i in range(len(examples))) < degrees + 5 * (2 * degrees) ** 0.5


def test_a_batch_is_of_one_size_and_an_epoch_shows_every_picture_once_where_batches_are_full():
    examples = examples_of(8, 12, 4, 3)
    order = Order(examples, 4, 0)
    batches = [order(number) for number in range(4 * len(examples))]
    assert all(len({examples[i].size for i in batch}) == 1 for batch in batches)
    whole = [i for batch in batches for i in batch if examples[i].size[1] < 64 + 16 * 3]
    for epoch in range(len(whole) // 24):
        assert sorted(whole[24 * epoch : 24 * (epoch + 1)]) == list(range(24))
    assert batches[30] == Order(examples, 4, 0)(30), "by the seed and the number alone"
    assert batches != [Order(examples, 4, 1)(number) for number in range(len(batches))]
    firsts = Counter(examples[Order(examples_of(10), 1, seed)(0)[0]].path for seed in range(DRAWS))
    assert all(abs(count - DRAWS / 10) < 5 * (DRAWS / 10) ** 0.5 for count in firsts.values())


def test_epochs_are_whole_steps():
    assert [Order(examples_of(10), 4, 0).batches(epochs) for epochs in (1, 2, 3)] == [3, 5, 8]
    assert [Order(examples_of(1, 2), 8, 0).batches(epochs) for epochs in (1, 2, 3, 8)] == [1, 1, 2, 3]


def test_an_only_picture_has_no_references():
    with pytest.raises(ValueError, match="the only picture of its identity"):
        draw_references(SET[:1], SET[0], None, NONE, torch.Generator())


def picture(path, grey=None):
    """No two are the same, but those of the same grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    value = zlib.crc32(str(path).encode()) % 2**24 if grey is None else grey * 0x010101
    Image.new("RGB", (32, 32), f"#{value:06x}").save(path)


def test_folders_of_identities(tmp_path):
    for name, count in (("ann", 3), ("ben", 2), ("eve", 1), ("zed", 1)):
        for i in range(count):
            picture(tmp_path / name / f"{name}_{i:04}.png")
    picture(tmp_path / "loose.png")
    picture(tmp_path / "ann" / "old" / "x.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    found = find_identities(tmp_path)
    assert {folder.name: len(pictures) for folder, pictures in found.sets.items()} == {"ann": 3, "ben": 2}
    one, other = found.warnings(tmp_path)
    assert one.startswith("2 of the identities in ")
    assert "a single picture (eve, zed) and are left out" in one
    assert other.startswith("2 pictures are in no identity's folder (loose.png, ann/old/x.png)")


def test_a_copy_of_a_picture_is_left_out(tmp_path):
    """Or it would be predicted from itself; that of another identity is another picture."""
    for name, greys in (("ann", (1, 2, 1, 3, 2, 1)), ("ben", (1, 2)), ("cid", (5, 5))):
        for i, grey in enumerate(greys):
            picture(tmp_path / name / f"{i}.png", grey)
    shutil.copy(tmp_path / "ann" / "0.png", tmp_path / "ann" / "a_copy.jpg")
    (tmp_path / "ben" / "gone.png").symlink_to(tmp_path / "nowhere.png")  # which the preflight tells
    found = find_identities(tmp_path)
    assert {folder.name: [path.name for path in paths] for folder, paths in found.sets.items()} == {
        "ann": ["0.png", "1.png", "3.png"],
        "ben": ["0.png", "1.png", "gone.png"],
    }
    single, copies = found.warnings(tmp_path)
    assert "have a single picture (cid)" in single
    assert copies == (
        "5 pictures are copies of others of the same identity (ann/2.png, ann/4.png, ann/5.png, ...) and are left out: a "
        "picture would be predicted from itself."
    )


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: None, r"there are no folders with pictures\): every identity needs a folder of its own"),
        (lambda folder: picture(folder / "ann" / "1.png"), r"each of 1 has a single picture"),
        (lambda folder: picture(folder / "1.png"), r"\(1\.png\) are in no identity's folder: put those of each"),
        (lambda folder: folder.rmdir(), r"does not exist"),
    ],
)
def test_folders_that_cannot_be_learned_from(tmp_path, make, sentence):
    folder = tmp_path / "people"
    folder.mkdir()
    make(folder)
    with pytest.raises(PersonalizeError, match=sentence):
        find_identities(folder)


def test_held_out_identities_are_chosen_by_the_seed():
    sets = {Path(f"{i:03}"): (Path("a"), Path("b")) for i in range(100)}
    train, held = hold_out(sets, None, 0)
    assert (len(train), len(held)) == (96, 4)
    assert not set(train) & set(held)
    assert hold_out(dict(reversed(sets.items())), None, 0) == (train, held)
    assert hold_out(sets, None, 1)[1] != held
    assert hold_out(sets, 0, 0) == (sorted(sets), [])
    assert len(hold_out(sets, 60, 0)[1]) == 60
    with pytest.raises(PersonalizeError, match="--validation_identities 100 leaves none of the 100 identities"):
        hold_out(sets, 100, 0)
