"""An adapter with trained self-attention: in ComfyUI as headless, and what it looks at."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import EulerDiscreteScheduler
from identity_sets import ADAPTER, CHECKPOINT, ENCODER, identities, train
from inprocess import node
from pack.models.ip_adapter import IPAdapter, read_ip_adapter
from pack.models.weight_files import read_safetensors, write_safetensors
from pack.training.base_model import load_base
from pack.training.generate import Job, ReferencePrompts, Sampling, draw_pictures
from pack.training.image_encoder import load_image_encoder
from PIL import Image
from sampling import PROMPT, pixels, sample

NAME = "trained.safetensors"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return next(identities(tmp_path_factory.mktemp("people") / "people", 1, 5).iterdir())


@pytest.fixture(scope="module", params=["features", "tokens"])
def file(request, host, root, tmp_path_factory):
    """Trained for a step, with its gate opened wide."""
    folder = tmp_path_factory.mktemp("training")
    stage = request.param
    trained = train(root, identities(folder / "people"), folder / "out", max_train_steps=1, aggregation_stage=stage)
    tensors, about = read_safetensors(trained)
    gate = f"aggregator.{stage}.gate"
    tensors[gate] = torch.randn(tensors[gate].shape, generator=torch.Generator().manual_seed(1))
    path = host.base / "models" / "ipadapter" / NAME
    write_safetensors(path, tensors, about)
    return path


def test_in_comfyui_as_headless(host, root, loaded, clip_vision, photos, file, tmp_path):
    adapter = node(host, "LoadIPAdapter")(NAME)[0]
    references = node(host, "EncodeReferences")(clip_vision, folder=str(photos), weights="1, 2, 1, 0.5, 1")[0]
    noise = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(3))
    shown = {}
    for aggregation in ("self-attention", "average"):
        model = node(host, "ApplyIPAdapter")(loaded[0], adapter, references, 1.0, aggregation)[0]
        latent = sample(host, loaded, noise.clone(), model=model)
        shown[aggregation] = pixels(loaded, latent).numpy()[0]
    assert np.abs(shown["self-attention"] - shown["average"]).max() * 255 > 20
    equal = node(host, "EncodeReferences")(clip_vision, folder=str(photos))[0]
    model = node(host, "ApplyIPAdapter")(loaded[0], adapter, equal, 1.0, "self-attention")[0]
    ours, first = headless(root, file, photos, tmp_path)
    sigma = loaded[0].get_model_object("model_sampling").sigma(torch.tensor(951.0))  # ComfyUI starts at this much noise
    latent = sample(host, loaded, noise * first / sigma, model=model)
    theirs = pixels(loaded, latent).numpy()[0]
    assert np.abs(ours - theirs).max() * 255 <= 2


def headless(root, file, photos, folder):
    """The same picture through diffusers, and how much noise Euler's method starts at there."""
    base = load_base(str(root / CHECKPOINT))
    scheduler = EulerDiscreteScheduler.from_config(base.pipeline.scheduler.config)
    scheduler.set_timesteps(20)
    adapter = IPAdapter.from_state(read_ip_adapter(file))
    showing = ReferencePrompts(
        base, adapter, load_image_encoder(root / ENCODER), "self-attention", "before projection", 1.0
    )
    job = Job(folder / "picture.png", PROMPT, 3, tuple(sorted(photos.glob("*.png"))))
    draw_pictures(Accelerator(), base, [job], Sampling(64), "Drawing", showing)
    return np.asarray(Image.open(job.path)).astype(np.float32) / 255, scheduler.init_noise_sigma


def test_what_it_looks_at(host, clip_vision, photos, file):
    adapter = node(host, "LoadIPAdapter")(NAME)[0]
    references = node(host, "EncodeReferences")(clip_vision, folder=str(photos), weights="1, 0, 1, 1, 1")[0]
    show = node(host, "ShowReferenceAttention")
    picture, numbers = show(adapter, references)
    assert (picture.ndim, picture.shape[-1]) == (4, 3)
    assert picture.min() < 0.5 < picture.max()
    lines = numbers.splitlines()
    assert len(lines) == 5
    shares = [float(line.rsplit(": ")[1]) for line in lines]
    assert shares[1] == 0
    assert sum(shares) == pytest.approx(1, abs=0.01)
    assert all(line.startswith(name) for line, name in zip(lines, references.names, strict=True))
    table, numbers = show(adapter, references, "each head")
    assert len(numbers.splitlines()[0].split(", ")) == 8
    assert table.shape[2] > picture.shape[2] * 0.5


def test_a_file_without_says_so(host, clip_vision, photos, root, loaded):
    adapter = node(host, "LoadIPAdapter")(ADAPTER.split("/")[-1])[0]
    references = node(host, "EncodeReferences")(clip_vision, folder=str(photos))[0]
    sentence = (
        r"^pocket_portraits_ip_adapter\.safetensors has no self-attention over the references: choose concatenate"
    )
    with pytest.raises(ValueError, match=sentence):
        node(host, "ApplyIPAdapter")(loaded[0], adapter, references, 1.0, "self-attention")
    with pytest.raises(ValueError, match=sentence):
        node(host, "ShowReferenceAttention")(adapter, references)
