"""What each option changes in a training, and what it leaves alone."""

import io
import logging
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning import CHECKPOINT, losses_of, photos, settings_of, train
from pack.models.errors import PersonalizeError
from pack.models.losses import denoising_losses, prior_preservation_loss
from pack.models.weight_files import read_safetensors, write_safetensors
from pack.training import class_images, dataset, encoding, loop
from pack.training import run as running
from pack.training.base_model import load_base
from pack.training.export import whole_checkpoint
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def same_file(first, second):
    one, two = load_file(first), load_file(second)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_difference_cut_to_a_size(root, folder, tmp_path, capsys):
    options = {"save_as": "delta", "max_train_steps": 1}
    (path,) = train("dreambooth", root, folder, tmp_path / "cut", delta_megabytes=3.0, **options)
    size = path.stat().st_size
    assert 2.9e6 < size < 3.2e6  # the tensors, and a header
    assert f"{path.name} has {size / 1e6:.1f} MB and " in capsys.readouterr().out
    with pytest.raises(
        PersonalizeError, match=r"^The difference cannot be cut to 0\.01 MB: .* need at least 0\.\d+ MB\.$"
    ):
        train("dreambooth", root, folder, tmp_path / "small", delta_megabytes=0.01, **options)
    assert not (tmp_path / "small" / "log.jsonl").exists()  # before the first step


def test_captions_that_are_too_long_are_told(root, tmp_path, capsys, monkeypatch):
    pictures = photos(tmp_path / "photos", 2)
    sorted(pictures.iterdir())[0].with_suffix(".txt").write_text("ohwx " + "very " * 80 + "tall")
    logged = []
    monkeypatch.setattr(logging.getLogger("transformers.tokenization_utils_base"), "handle", logged.append)
    train("lora", root, pictures, tmp_path / "out", max_train_steps=1)
    assert [record.getMessage() for record in logged if "sequence length" in record.getMessage()] == []
    name = sorted(pictures.glob("*.png"))[0].name
    assert f"1 caption is longer than the 77 tokens that are read ({name}): their end" in capsys.readouterr().err


def test_the_prior_loss_is_its_equation(root, folder, tmp_path, monkeypatch):
    losses = torch.tensor([1.0, 2.0, 3.0, 5.0])
    prior = torch.tensor([False, False, True, True])
    assert prior_preservation_loss(losses, prior, 0.5) == (1 + 2) / 2 + 0.5 * (3 + 5) / 2
    seen = []
    one = running.prepare

    def watching(*arguments):
        trainer = one(*arguments)
        loss = trainer.loss

        def both(number):
            batch = [trainer.examples[i] for i in trainer.order(number)]
            seen.append([example.is_prior for example in batch])
            return loss(number)

        trainer.loss = both
        return trainer

    monkeypatch.setattr(running, "prepare", watching)
    classes = photos(tmp_path / "classes", 3)
    options = {"class_data_dir": str(classes), "with_prior_preservation": True, "num_class_images": 3}
    output = tmp_path / "out"
    train("dreambooth", root, folder, output, train_batch_size=2, save_as="delta", prior_loss_weight=0.7, **options)
    assert seen == [[False, False, True, True]] * 3
    # λ = 0 is the training without
    first, without = tmp_path / "zero", tmp_path / "without"
    train("lora", root, folder, first, prior_loss_weight=0.0, **options)
    train("lora", root, folder, without)
    np.testing.assert_allclose(losses_of(first), losses_of(without), rtol=1e-5)


def test_class_pictures_are_drawn_once_and_kept(root, folder, tmp_path, monkeypatch):
    drawn = []
    one = class_images.draw_samples
    monkeypatch.setattr(class_images, "draw_samples", lambda *a: drawn.append(a) or one(*a))
    classes = tmp_path / "classes"
    options = {"class_data_dir": str(classes), "with_prior_preservation": True, "max_train_steps": 1}
    train("lora", root, folder, tmp_path / "one", num_class_images=2, **options)
    names = {path.name for path in classes.iterdir()}
    assert len(drawn) == len(names) == 2
    assert all(Image.open(path).size == (64, 64) for path in classes.iterdir())
    train("lora", root, folder, tmp_path / "two", num_class_images=3, **options)
    assert len(drawn) == 3
    assert names < {path.name for path in classes.iterdir()}
    pictures = [np.asarray(Image.open(path)) for path in classes.iterdir()]
    assert not np.array_equal(pictures[0], pictures[1])


def test_a_mask_says_where_the_error_counts(root, folder, tmp_path):
    prediction, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, :2] = 1
    half = denoising_losses(prediction[:, :, :2], target[:, :, :2])
    torch.testing.assert_close(denoising_losses(prediction, target, mask), half)
    for path in folder.glob("*.png"):
        Image.linear_gradient("L").resize((64, 64)).point(lambda v: 255 * (v > 128)).save(
            path.with_name(f"{path.stem}-masklabel.png")
        )
    outputs = [tmp_path / name for name in ("plain", "masked")]
    for output, masked in zip(outputs, (False, True), strict=True):
        train("lora", root, folder, output, masked_loss=masked, max_train_steps=2)
    assert losses_of(outputs[0])[0] != losses_of(outputs[1])[0]


def test_gradient_checkpointing_changes_nothing(root, folder, tmp_path):
    plain = {"train_text_encoder": True, "max_train_steps": 2, "train_batch_size": 4}
    train("lora", root, folder, tmp_path / "plain", **plain)
    train("lora", root, folder, tmp_path / "checkpointed", gradient_checkpointing=True, **plain)
    np.testing.assert_allclose(losses_of(tmp_path / "plain"), losses_of(tmp_path / "checkpointed"), rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_fused_backward_pass_is_the_same_training(root, folder, tmp_path, optimizer):
    options = {"optimizer": optimizer, "max_grad_norm": 0.0, "save_as": "delta", "train_text_encoder": True}
    plain = train("dreambooth", root, folder, tmp_path / "plain", **options)[0]
    fused = train("dreambooth", root, folder, tmp_path / "fused", fused_backward=True, **options)[0]
    np.testing.assert_allclose(losses_of(tmp_path / "plain"), losses_of(tmp_path / "fused"), rtol=1e-6)
    ours, theirs = load_file(plain), load_file(fused)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-6)
    with pytest.raises(PersonalizeError, match="keeps no gradients to accumulate"):
        train("lora", root, folder, tmp_path / "wrong", fused_backward=True, gradient_accumulation_steps=2)


def watched(monkeypatch):
    """The trainers that are made from now on."""
    made, prepare = [], running.prepare
    monkeypatch.setattr(running, "prepare", lambda *arguments: made.append(prepare(*arguments)) or made[-1])
    return made


@pytest.mark.parametrize(
    ("method", "options", "needed"),
    [
        ("lora", {}, set()),
        ("lora", {"validation_prompt": ["a photo of ohwx dog"], "validation_steps": 9}, {"vae"}),
        ("textual_inversion", {}, {"text"}),
        ("dreambooth", {"train_text_encoder": True, "save_as": "delta"}, {"text"}),
    ],
)
def test_networks_that_are_not_needed_leave_the_memory(method, options, needed, root, folder, tmp_path, monkeypatch):
    watches, alive = {}, set()
    load, step = running.load_base, loop.Trainer.step

    def loading(*arguments):
        base = load(*arguments)
        watches["vae"] = weakref.ref(base.pipeline.vae)
        watches["text"] = weakref.ref(base.pipeline.text_encoder)
        return base

    def stepping(trainer, number):
        alive.update(name for name, watch in watches.items() if watch() is not None)
        return step(trainer, number)

    monkeypatch.setattr(running, "load_base", loading)
    monkeypatch.setattr(loop.Trainer, "step", stepping)
    train(method, root, folder, tmp_path / "out", max_train_steps=1, **options)
    assert alive == needed


def test_channels_last_is_the_same_training(root, folder, tmp_path, monkeypatch):
    """Convolutions add in another order: losses to 1e-4, and the change that was learned to 1e-3 of its length."""
    trainers = watched(monkeypatch)
    options = {"save_as": "delta", "max_train_steps": 4, "checkpointing_steps": 2, "train_batch_size": 2}
    plain = train("dreambooth", root, folder, tmp_path / "plain", **options)[0]
    last = train("dreambooth", root, folder, tmp_path / "last", channels_last=True, **options)[0]
    # a training may also go on with the other layout
    halfway = Path("checkpoints", "step-0000002")
    shutil.copytree(tmp_path / "plain" / halfway, tmp_path / "turned" / halfway)
    turned = train("dreambooth", root, folder, tmp_path / "turned", channels_last=True, **options)[0]
    for trainer, expected in zip(trainers, (False, True, True), strict=True):
        convolution = trainer.base.pipeline.unet.conv_in.weight
        assert convolution.is_contiguous(memory_format=torch.channels_last) == expected
    losses = losses_of(tmp_path / "plain")
    np.testing.assert_allclose(losses_of(tmp_path / "last"), losses, rtol=1e-4)
    np.testing.assert_allclose(losses_of(tmp_path / "turned"), losses[2:], rtol=1e-4)
    ours = load_file(plain)
    for theirs in (load_file(last), load_file(turned)):
        assert ours.keys() == theirs.keys()
        length, difference = (
            torch.cat([x.float().flatten() for x in values]).norm()
            for values in (ours.values(), [theirs[key] - value for key, value in ours.items()])
        )
        assert difference <= 1e-3 * length, f"{float(difference / length):.1e}"


def test_the_average_is_what_is_written(root, folder, tmp_path):
    plain = train("lora", root, folder, tmp_path / "plain", learning_rate=1e-2)[0]
    followed = train("lora", root, folder, tmp_path / "followed", learning_rate=1e-2, use_ema=True, ema_decay=0.0)[0]
    slow = train("lora", root, folder, tmp_path / "slow", learning_rate=1e-2, use_ema=True, ema_decay=0.9)[0]
    ours, theirs = load_file(plain), load_file(followed)
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-5, atol=1e-7)
    assert not same_file(plain, slow)


def test_a_base_of_zero_terminal_snr(root, folder, tmp_path, monkeypatch):
    trainers, base = watched(monkeypatch), tmp_path / "ztsnr.safetensors"
    tensors, about = read_safetensors(root / CHECKPOINT)
    write_safetensors(base, tensors | {"ztsnr": torch.zeros(0)}, about)
    one = loop.draw

    def noisiest(*arguments):
        drawn = one(*arguments)
        return replace(drawn, timesteps=torch.full_like(drawn.timesteps, 999))

    monkeypatch.setattr(loop, "draw", noisiest)
    options = {"pretrained_model_name_or_path": str(base), "max_train_steps": 2, "train_text_encoder": False}
    output = tmp_path / "out"
    (full,) = train("dreambooth", root, folder, output, **options)
    schedule = trainers[0].scheduler
    assert schedule.config.prediction_type == "v_prediction"
    assert schedule.alphas_cumprod[-1] == 0
    assert 0 < schedule.alphas_cumprod[-2] < 1e-4
    assert np.isfinite(losses_of(output)).all()
    assert min(losses_of(output)) > 0
    with safe_open(full, framework="pt") as file:
        assert {"v_pred", "ztsnr"} <= set(file.keys())
    again = load_base(str(full))
    assert again.v_prediction
    assert again.pipeline.scheduler.alphas_cumprod[-1] == 0
    assert {"v_pred", "ztsnr"} <= whole_checkpoint(again).keys()


def test_nothing_but_the_word_changes(root, folder, tmp_path, monkeypatch):
    kept = []
    write = running.TextualInversionMethod.write

    def watching(self, *arguments):
        kept.append((self.words[0].table.weight.clone(), self.base.pipeline.unet.state_dict()))
        return write(self, *arguments)

    monkeypatch.setattr(running.TextualInversionMethod, "write", watching)
    (path,) = train("textual_inversion", root, folder, tmp_path / "out", num_vectors=3, learning_rate=0.1)
    base = load_base(str(root / CHECKPOINT), torch.float32).pipeline
    table, unet = kept[0]
    assert torch.equal(table, base.text_encoder.get_input_embeddings().weight)
    assert all(torch.equal(value, unet[key]) for key, value in base.unet.state_dict().items())
    vectors = load_file(path)["emb_params"]
    assert vectors.shape == (3, 64)
    assert path.stat().st_size < 10_000


def test_ranks_of_blocks(root, folder, tmp_path):
    ranks = ["up_blocks.1=8", "mid_block=0"]
    (path,) = train(
        "lora", root, folder, tmp_path / "out", rank=2, lora_alpha=1.0, block_ranks=ranks, max_train_steps=1
    )
    tensors = load_file(path)
    assert not any("mid_block" in key for key in tensors)
    for key, value in tensors.items():
        if key.endswith("lora_down.weight"):
            assert value.shape[0] == (8 if "up_blocks_1" in key else 2)
        if key.endswith("alpha"):
            assert value == (4 if "up_blocks_1" in key else 1)
    with pytest.raises(PersonalizeError, match="block_ranks has 'up=8', but must be BLOCK=RANK"):
        train("lora", root, folder, tmp_path / "wrong", block_ranks=["up=8"])


def test_pictures_keep_their_aspect(root, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate([(80, 60), (200, 150), (60, 90), (64, 64), (65, 64)]):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{i}.png")
    settings = settings_of("lora", root, folder, tmp_path / "out")
    sizes = dataset.Sizes(64, 16, True)
    examples = dataset.find_examples(folder, settings.data, sizes, ("a",))
    by_name = {example.path.stem: example.size for example in examples}
    assert by_name["0"] == by_name["1"]
    assert by_name["0"][1] > by_name["0"][0]
    assert by_name["2"][0] > by_name["2"][1]
    assert by_name["3"] == by_name["4"] == (64, 64)
    assert all(side % 16 == 0 for size in by_name.values() for side in size)
    order = dataset.Order(examples, 2, 0)
    for number in range(12):
        assert len({examples[i].size for i in order(number)}) == 1
    shown = [i for number in range(5) for i in order(number)]
    assert sorted(shown) == sorted([*range(5)] * 2)
    squares = dataset.find_examples(folder, settings.data, dataset.Sizes(64, 16, False), ("a",))
    assert {example.size for example in squares} == {(64, 64)}
    train("lora", root, folder, tmp_path / "out", resolution=64, train_batch_size=2, max_train_steps=3)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what it maps")
def test_what_is_read_from_a_cache_maps_no_file(tmp_path):
    """Tens of thousands of pictures are more than may be mapped."""
    cache = encoding.Cache(tmp_path)
    cache.put({"a": 1}, {"features": torch.arange(5000.0)})
    stored = cache.get({"a": 1})
    assert torch.equal(stored["features"], torch.arange(5000.0))
    assert str(cache.path({"a": 1})) not in Path("/proc/self/maps").read_text()


def test_a_cache_is_used_again_and_not_for_anything_else(root, folder, tmp_path, monkeypatch):
    encoded = []
    one = encoding._encode
    monkeypatch.setattr(encoding, "_encode", lambda *a: encoded.append(a) or one(*a))
    cache = {"cache_dir": str(tmp_path / "cache"), "max_train_steps": 1}
    counts = []
    for changes in ({}, {}, {"resolution": 32}, {"random_flip": True}):
        encoded.clear()
        train("lora", root, folder, tmp_path / f"out{len(counts)}", **cache, **changes)
        counts.append(len(encoded))
    assert counts == [5, 0, 5, 5]
    picture = folder / "01.png"
    Image.open(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(picture)
    encoded.clear()
    train("lora", root, folder, tmp_path / "changed", **cache)
    assert len(encoded) == 1


def test_what_is_transparent_is_white(tmp_path):
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    alpha = Image.new("L", (64, 64))
    alpha.paste(255, (16, 16, 48, 48))
    for name in ("alpha", "beside"):
        image.save(tmp_path / f"{name}.png")
    alpha.save(tmp_path / "beside-masklabel.png")
    image.putalpha(alpha)
    image.save(tmp_path / "alpha.png")
    (pixels, mask), (whole, other) = (
        dataset.load_pixels(dataset.Example(tmp_path / f"{name}.png", ("a",), (64, 64))) for name in ("alpha", "beside")
    )
    assert torch.equal(mask, other)
    assert (pixels[mask.expand(3, -1, -1) == 0] == 1).all()
    assert torch.equal(pixels * mask, whole * mask)
    assert (whole[:, 0] < 0.9).any()  # a mask beside it hides nothing


def test_a_gamma_of_zero_is_off(root, folder, tmp_path):
    plain = train("lora", root, folder, tmp_path / "plain")[0]
    assert same_file(plain, train("lora", root, folder, tmp_path / "off", snr_gamma=0.0)[0])


def test_tensorboard_has_everything(root, folder, tmp_path):
    options = {"validation_prompt": ["a {trigger}", "a {class}"], "validation_steps": 2, "num_validation_images": 1}
    others = photos(tmp_path / "others", 1)
    train("lora", root, folder, tmp_path / "out", report_to="tensorboard", validation_data_dir=str(others), **options)
    (file,) = (tmp_path / "out").rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    assert {"loss", "lr", "validation_loss"} <= set(events.Tags()["scalars"])
    (first, _) = events.Images("samples")
    with Image.open(tmp_path / "out" / "samples" / "step-0000002.png") as sheet:
        assert (first.step, first.width, first.height) == (2, *sheet.size)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(first.encoded_image_string))), np.asarray(sheet))


@pytest.mark.parametrize(
    "options",
    [
        {"snr_gamma": 5.0},
        {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 1000.0},
        {"noise_offset": 0.1},
        {"lr_warmup_steps": 3},
        {"random_flip": True},
        {"repeats": 2, "num_train_epochs": 1, "max_train_steps": None},
        {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2},
        {"mixed_precision": "bf16"},
        {"optimizer": "prodigy"},
        {"clip_skip": 2},
        {"report_to": "tensorboard"},
        {"save_precision": "bf16"},
        {"use_dora": True, "lora_layers": "linear"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_is_taken(root, folder, tmp_path, options):
    plain = train("lora", root, folder, tmp_path / "plain")[0]
    other = train("lora", root, folder, tmp_path / "other", **options)[0]
    if "report_to" in options:
        assert list((tmp_path / "other").rglob("events.out.tfevents*"))
    else:
        assert not same_file(plain, other)
    if "repeats" in options:
        assert len(losses_of(tmp_path / "other")) == 10
