"""ComfyUI in this process, and as a server."""

import pytest
import torch
from inprocess import BASE, Host
from pack.training.demo.server import Server
from structural.adapters import random_adapter, save_adapter


@pytest.fixture(scope="session")
def host(comfyui, root, tmp_path_factory):
    return Host(comfyui, tmp_path_factory.mktemp("host"), root)


@pytest.fixture(scope="session")
def models(host):
    """Adapters of each kind for the pocket model, with random weights, in the host's model folder."""
    folder = host.base / "models"
    (folder / "ipadapter").mkdir(exist_ok=True)
    for kind, width in (("base", 96), ("plus", 128), ("full-face", 128)):
        save_adapter(random_adapter(kind, width, 64, [96] * 10), folder / "ipadapter" / f"{kind}.safetensors")
    return folder


@pytest.fixture(scope="session")
def clip_vision(host):
    """The pocket model's image encoder as a CLIP_VISION."""
    return host.node("PersonalizeLoadImageEncoder").execute("pocket_portraits_vision.safetensors")[0]


@pytest.fixture(scope="module")
def loaded(host):
    """The pocket model: MODEL, CLIP and VAE."""
    return host.nodes.CheckpointLoaderSimple().load_checkpoint(BASE)


@pytest.fixture
def noise():
    """Two latents of the pocket model, 64 x 96 pixels."""
    return torch.randn(2, 32, 8, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    """ComfyUI in a process of its own."""
    with Server(comfyui, tmp_path_factory.mktemp("comfyui")) as running:
        yield running
