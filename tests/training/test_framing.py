"""How Custom Diffusion shows pictures: smaller, larger, two in one (Cut-Mix); what is said of them, where they count."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from finetuning import photos, train
from identity_sets import CHECKPOINT
from pack.models.pictures import MASK_ENDING
from pack.training.base_model import load_base
from pack.training.dataset import Example, Framing, Sizes, load_pixels, reframe
from pack.training.denoising import stack_masks
from pack.training.encoding import Cache, encode_pictures, latent_key
from pack.training.shared import read_safetensors
from pack.training.side_by_side import side_by_side
from pack.training.sizes import sized
from PIL import Image

SIZES = Sizes(64, 8, True)


def examples(folder, word, count, captions=None, size=(64, 64)):
    texts = captions or (f"a photo of a {word}, smiling",)
    return [Example(Path(folder) / f"{i}.png", texts, size) for i in range(count)]


def test_each_picture_is_shown_beside_those_of_others():
    cats, dogs, mugs = (examples(word, word, 20) for word in ("cat", "dog", "mug"))
    found = side_by_side([cats, dogs, mugs], 3, SIZES, 5)
    assert found == side_by_side([cats, dogs, mugs], 3, SIZES, 5)
    assert found != side_by_side([cats, dogs, mugs], 3, SIZES, 6)
    assert len(found) == 3 * 60
    words = Counter()
    for example in found:
        left, right = example.path.parent.name, example.beside.path.parent.name
        assert example.captions == (f"a photo of a {left}, smiling, and a {right}, smiling",)
        assert (example.size, example.beside.size, example.is_prior) == ((64, 96), (64, 48), False)
        words[left, right] += 1
    assert words.keys() == {(a, b) for a in ("cat", "dog", "mug") for b in ("cat", "dog", "mug") if a != b}
    assert min(words.values()) > 15
    assert side_by_side([cats], 3, SIZES, 5) == side_by_side([cats, dogs], 0, SIZES, 5) == []


def test_sides_are_multiples_and_captions_are_matched():
    wide = examples("cat", "cat", 1, ("one", "two", "three"), (64, 104))
    other = examples("dog", "dog", 1, ("A close-up photo of a dog", "a bowl of dogs"), (80, 56))
    captions = {
        "cat": ("one, and a dog", "two, and a bowl of dogs", "three, and a dog"),
        "dog": ("A close-up photo of a dog, and one", "a bowl of dogs, and two"),
    }
    found = side_by_side([wide, other], 8, SIZES, 0)
    assert {(example.size, example.beside.size) for example in found} == {((64, 160), (64, 80)), ((80, 80), (80, 40))}
    assert {example.path.parent.name for example in found} == captions.keys()
    assert all(example.captions == captions[example.path.parent.name] for example in found)


def test_the_middle_of_both_is_seen_and_the_seam_does_not_count(root, tmp_path):
    one, other = (tmp_path / name for name in ("one", "other"))
    for folder, colour in ((one, (255, 0, 0)), (other, (0, 0, 255))):
        folder.mkdir()
        picture = Image.new("RGB", (64, 64), colour)
        picture.paste((0, 255, 0), (0, 0, 8, 64))  # cut away
        picture.save(folder / "0.png")
    pair = next(
        e for e in side_by_side([examples(one, "a", 1), examples(other, "b", 1)], 1, SIZES, 0) if e.path.parent == one
    )
    pixels, mask = load_pixels(pair)
    assert mask is None
    assert pixels.shape == (3, 64, 96)
    assert torch.equal(pixels[:, :, :48], torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 64, 48))
    assert torch.equal(pixels[:, :, 48:], torch.tensor([-1.0, -1, 1])[:, None, None].expand(3, 64, 48))

    vae = load_base(str(root / CHECKPOINT)).pipeline.vae
    (latent,) = encode_pictures(vae, [pair], Cache(tmp_path / "cache"), "vae").values()
    h, w = latent.mean.shape[1:]
    factor = 64 // h
    counts = stack_masks([latent], False)
    assert counts.shape == (1, 1, h, w)
    seam = 48 // factor
    columns = counts[0, 0].sum(0)
    assert columns[seam - 1] == columns[seam] == 0
    assert columns[: seam - 1].min() == columns[seam + 1 :].min() == h

    keys = [latent_key(e, "vae") for e in (pair, *examples(one, "a", 1, size=(64, 96)))]
    assert keys[0] != keys[1]
    half = Image.new("L", (64, 64), 255)
    half.paste(0, (32, 0, 64, 64))
    half.save(other / f"0{MASK_ENDING}.png")
    assert latent_key(pair, "vae") != keys[0]
    _, mask = load_pixels(pair)
    assert mask[:, :, :72].min() == 1
    assert mask[:, :, 72:].max() == 0


def test_a_training_shows_both_together(root, tmp_path):
    concepts = [f"{photos(tmp_path / word, 2)}:{word}:woman" for word in ("ohwx", "zxcv")]
    common = {"concept": concepts, "instance_data_dir": None, "max_train_steps": 4, "output_name": "x"}
    made = {}
    for count in (None, 0, 1):
        path, *_ = train("custom_diffusion", root, None, tmp_path / str(count), cut_mix=count, **common)
        made[count] = read_safetensors(path)[0]
    assert all(torch.equal(value, made[1][name]) for name, value in made[None].items()), "the pocket model's default"
    assert any(not torch.equal(value, made[1][name]) for name, value in made[0].items())


def test_sizes_and_the_words_that_say_them(folder):
    paths = sorted(folder.glob("*.png"))
    examples = [Example(path, ("A photo of ohwx cat", "ohwx"), (64, 64)) for path in paths]
    examples.append(Example(paths[0], ("a cat",), (64, 64), is_prior=True))
    assert sized(examples, 0, 3) == examples
    found = sized(examples, 400, 3)
    assert found == sized(examples, 400, 3)
    assert found.count(examples[-1]) == 1, "pictures of the class stay as they are"
    own = [one for one in found if not one.is_prior]
    small = [one for one in own if one.framing and one.framing.side < 1]
    large = [one for one in own if one.framing and one.framing.side > 1]
    for some, share, low, high, words in (
        (small, 2 / 3 * 0.4, 1 / 3, 0.6, {"a far away", "a very small"}),
        (large, 1 / 3, 1.2, 1.4, {"a zoomed in", "a close up"}),
    ):
        assert len(some) / len(own) == pytest.approx(share, abs=0.04)
        assert all(low <= one.framing.side <= high for one in some)
        assert {" ".join(text.split()[:3]) for one in some for text in one.captions} == words
        assert all(one.captions[0].endswith(("away photo of ohwx cat", "small photo of ohwx cat",
                                             "in photo of ohwx cat", "up photo of ohwx cat")) for one in some)  # fmt: skip
    assert len(own) - len(small) - len(large) == own.count(examples[0]) + sum(own.count(e) for e in examples[1:-1])


def test_a_picture_in_its_frame_and_where_its_error_counts(root, folder, tmp_path):
    path = sorted(folder.glob("*.png"))[0]
    plain, _ = load_pixels(Example(path, (), (64, 64)))
    small, inside = reframe(plain, Framing(0.5, 1.0, 0.0))
    assert torch.equal(inside[0].nonzero().amin(0), torch.tensor([0, 32]))
    assert inside.sum() == 32 * 32
    assert (small[:, 32:] == 0).all()
    assert (small[:, :32, :32] == 0).all()
    shrunk = torch.nn.functional.avg_pool2d(plain, 2)
    assert (small[:, :32, 32:] - shrunk).abs().mean() < 0.05
    large, everywhere = reframe(plain, Framing(1.25, 0.5, 0.5))
    assert large.shape == plain.shape
    assert everywhere.all()
    middle = torch.nn.functional.interpolate(plain[None, :, 6:58, 6:58], (64, 64), mode="bilinear")[0]
    assert (large - middle).abs().mean() < 0.05
    vae = load_base(str(root / CHECKPOINT)).pipeline.vae
    frames = [None, Framing(0.59, 0.5, 0.5), Framing(1 / 3, 0, 0), Framing(1.3, 0, 0)]
    examples = [Example(path, (), (64, 64), framing=framing) for framing in frames]
    latents = encode_pictures(vae, examples, Cache(tmp_path), "vae")
    whole, some, few, zoomed = (latents[example] for example in examples)
    assert whole.inside is None
    assert zoomed.inside is None
    assert few.inside.sum() == 4, "cells without any that is not at the border keep those"
    assert some.inside[0].nonzero().tolist() == [[y, x] for y in (3, 4) for x in (3, 4)]
    again = encode_pictures(vae, examples, Cache(tmp_path), "vae")
    assert all(torch.equal(again[e].mean, latents[e].mean) for e in examples)
    assert len({latents[e].mean.sum().item() for e in examples}) == 4
