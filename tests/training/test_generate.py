"""Drawing for a measurement: the same pictures whatever the batch, whoever stopped it; files that others load."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import EulerDiscreteScheduler
from identity_sets import ADAPTER, CHECKPOINT, ENCODER, identities, train
from pack.models.ip_adapter import IPAdapter, read_ip_adapter
from pack.training import evaluate as evaluation
from pack.training.base_model import load_base
from pack.training.generate import Job, ReferencePrompts, Sampling, draw_pictures
from pack.training.image_encoder import encode_references, load_image_encoder
from PIL import Image

SAMPLING = Sampling(64, steps=3, batch=2)
WORDS = ("a happy dog on a beach", "a sad cat", "a robot in space")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return identities(tmp_path_factory.mktemp("people") / "people", 3, 3)


@pytest.fixture
def base(root):
    return load_base(str(root / CHECKPOINT))


def jobs(folder, people):
    sets = [tuple(sorted(one.glob("*.png"))) for one in sorted(people.iterdir())]
    return [
        Job(folder / f"{i}.png", words, 40 + i, references, {"pose": "left"})
        for i, (words, references) in enumerate(zip(WORDS, sets, strict=True))
    ]


def showing(base, root, aggregation="average", weight=1.0, file=None):
    adapter = IPAdapter.from_state(read_ip_adapter(file or root / ADAPTER))
    return ReferencePrompts(base, adapter, load_image_encoder(root / ENCODER), aggregation, "before projection", weight)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_no_batch_and_no_stop_changes_a_picture(root, base, people, tmp_path):
    shown = showing(base, root, "concatenate")  # of different lengths in a batch, were they not all of three
    assert draw_pictures(Accelerator(), base, jobs(tmp_path / "a", people), SAMPLING, "a", shown) == 3
    assert draw_pictures(Accelerator(), base, jobs(tmp_path / "b", people)[1:], SAMPLING, "b", shown) == 2
    before = (tmp_path / "b" / "1.png").stat().st_mtime_ns
    assert draw_pictures(Accelerator(), base, jobs(tmp_path / "b", people), SAMPLING, "b", shown) == 1
    assert (tmp_path / "b" / "1.png").stat().st_mtime_ns == before
    for i, words in enumerate(WORDS):
        assert np.abs(pixels(tmp_path / "a" / f"{i}.png") - pixels(tmp_path / "b" / f"{i}.png")).max() <= 1
        assert (tmp_path / "a" / f"{i}.txt").read_text() == words + "\n"
        assert json.loads((tmp_path / "a" / f"{i}.json").read_text()) == {"pose": "left"}


def test_references_show_and_leave_no_trace(root, base, people, tmp_path):
    processors = dict(base.pipeline.unet.attn_processors)
    draw_pictures(Accelerator(), base, jobs(tmp_path / "with", people), SAMPLING, "", showing(base, root))
    assert base.pipeline.unet.attn_processors == processors
    draw_pictures(Accelerator(), base, jobs(tmp_path / "without", people), SAMPLING, "")
    draw_pictures(Accelerator(), base, jobs(tmp_path / "zero", people), SAMPLING, "", showing(base, root, weight=0.0))
    assert np.abs(pixels(tmp_path / "with" / "0.png") - pixels(tmp_path / "without" / "0.png")).max() > 20
    assert np.abs(pixels(tmp_path / "zero" / "0.png") - pixels(tmp_path / "without" / "0.png")).max() <= 1


def test_a_file_with_pooling_draws_the_same_in_diffusers_own_ip_adapter(root, base, people, tmp_path):
    file = train(root, people, tmp_path / "out", aggregation="average", max_train_steps=2)
    job = jobs(tmp_path / "ours", people)[0]
    draw_pictures(Accelerator(), base, [job], SAMPLING, "", showing(base, root, file=file, weight=0.8))
    pipeline = load_base(str(root / CHECKPOINT)).pipeline
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(0.8)
    mean = encode_references(load_image_encoder(root / ENCODER), job.references).pooled.mean(0)
    theirs = pipeline(
        job.prompt,
        ip_adapter_image_embeds=[torch.stack([torch.zeros_like(mean), mean])[:, None]],
        latents=torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(job.seed)),
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="np",
    ).images[0]
    assert np.abs(pixels(job.path) - theirs * 255).max() <= 2


def test_evaluate_draws_first(root, people, tmp_path, capsys):
    file = train(root, people, tmp_path / "out", max_train_steps=1)
    arguments = [
        *("--pretrained_model_name_or_path", str(root / CHECKPOINT), "--ip_adapter", str(file)),
        *("--image_encoder", str(root / ENCODER), "--real", str(people), "--output_dir", str(tmp_path / "measured")),
        *("--prompt", "a {class} on a beach", "--prompt", "a sad {class}", "--class_name", "dog"),
        *("--pictures_per_prompt", "2", "--num_inference_steps", "2", "--bootstrap_draws", "20", "--name", "mine"),
    ]
    assert evaluation.main(arguments) == 0, capsys.readouterr().err
    drawn = sorted((tmp_path / "measured" / "drawn" / "mine").rglob("*.png"))
    assert len(drawn) == 3 * 2 * 2
    assert drawn[0].with_suffix(".txt").read_text() == "a dog on a beach\n"
    figures = json.loads((tmp_path / "measured" / "figures.json").read_text())["figures"]
    assert {"fid", "is", "likeness"} <= figures["mine"].keys()
    times = [path.stat().st_mtime_ns for path in drawn]
    assert evaluation.main(arguments) == 0
    assert [path.stat().st_mtime_ns for path in drawn] == times


def test_what_cannot_be_drawn_is_told_at_once(root, people, tmp_path, capsys):
    arguments = [
        *("--pretrained_model_name_or_path", str(root / ENCODER), "--ip_adapter", str(root / CHECKPOINT)),
        *("--lora", str(tmp_path / "gone.safetensors"), "--real", str(tmp_path / "nobody")),
        *("--output_dir", str(tmp_path / "measured"), "--name", "a/b"),
    ]
    assert evaluation.main(arguments) == 1
    told = capsys.readouterr().err
    for sentence in (
        "is not a checkpoint",
        "--prompt is missing: what to draw.",
        "--image_encoder is missing",
        "is a checkpoint, not an IP-Adapter: move it to models/checkpoints",
        "gone.safetensors does not exist",
        "'a/b' is no name for a folder",
        "nobody does not exist",
    ):
        assert sentence in told
    assert "--generated is missing" not in told


def test_identities_without_references_are_named(root, people, tmp_path, capsys):
    fewer = tmp_path / "fewer"
    shutil.copytree(people, fewer)
    gone = sorted(fewer.iterdir())[0]
    shutil.rmtree(gone)
    arguments = [
        *("--pretrained_model_name_or_path", str(root / CHECKPOINT), "--ip_adapter", str(root / ADAPTER)),
        *("--image_encoder", str(root / ENCODER), "--real", str(people), "--references", str(fewer)),
        *("--output_dir", str(tmp_path / "measured"), "--prompt", "a dog", "--aggregation", "average"),
    ]
    assert evaluation.main(arguments) == 1
    assert f"has no pictures of {gone.name}, whom" in capsys.readouterr().err
