"""ComfyUI in this process, and as a server."""

import pytest
from inprocess import Host
from structural import checkpoints


@pytest.fixture(scope="session")
def host(comfyui, root, tmp_path_factory):
    return Host(comfyui, tmp_path_factory.mktemp("host"), root)


@pytest.fixture(scope="session")
def models(host):
    """Miniature model files in the host's model folders, by their names."""
    folder = host.base / "models"
    for name in ("checkpoints", "clip_vision", "ipadapter"):
        (folder / name).mkdir(exist_ok=True)
    checkpoints.miniature_checkpoint(folder / "checkpoints" / "miniature.safetensors")
    checkpoints.small_image_encoder(folder / "clip_vision" / "small.safetensors")
    for kind in ("base", "plus", "full-face"):
        checkpoints.miniature_adapter(kind, folder / "ipadapter" / f"{kind}.safetensors")
    return folder


@pytest.fixture(scope="session")
def clip_vision(host, models):
    """The small image encoder as a CLIP_VISION."""
    return host.nodes.NODE_CLASS_MAPPINGS["CLIPVisionLoader"]().load_clip("small.safetensors")[0]
