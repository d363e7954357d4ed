"""The trained parts as the files that ComfyUI and diffusers load, in half precision, where the pack keeps them."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..export import checkpoint_tensors
from ..shared import POCKET, VISION_CONFIG, write_safetensors
from .adapter import adapter_of
from .encoders import Encoders
from .files import ADAPTER, CHECKPOINT, IMAGE_ENCODER, JUDGE
from .judge import Judge
from .loop import average, require
from .unet import build_unet
from .vae import build


def metadata(title: str, method: str) -> dict[str, str]:
    """What every file of the pocket model says of itself."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "pocket-portraits",
        "modelspec.title": title,
        "modelspec.license": "Apache-2.0",
        "modelspec.resolution": "64x64",
        "personalize.method": method,
        "personalize.format": "1",
    }


def save(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str]) -> None:
    """In half precision."""
    write_safetensors(path, {name: value.detach().half().contiguous() for name, value in tensors.items()}, about)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def export(folder: Path, to: Path = POCKET) -> None:
    """Write what has been trained in `folder` so far."""
    require(folder, "vae", "encoders", "judge", "unet", "adapter")
    vae, unet, encoders, judge = build(), build_unet(), Encoders(), Judge()
    adapter = adapter_of(unet)
    trained = {"vae": vae, "encoders": encoders, "judge": judge, "unet": unet, "adapter": adapter}
    steps = json.dumps({name: average(module, folder, name) for name, module in trained.items()})
    print(f"Steps: {steps}")

    def about(title: str, method: str) -> dict[str, str]:
        return metadata(title, method) | {"personalize.training_steps": steps}

    checkpoint = checkpoint_tensors(unet, [encoders.text], vae, "sd", v_prediction=True)
    save(to / CHECKPOINT, checkpoint, about("Pocket portraits", "base_model") | {"modelspec.prediction_type": "v"})
    config = {VISION_CONFIG: json.dumps(encoders.image.config.to_dict())}
    save(
        to / IMAGE_ENCODER,
        encoders.image.state_dict(),
        about("Pocket portraits, image encoder", "image_encoder") | config,
    )
    save(to / ADAPTER, adapter.tensors(), about("Pocket portraits, IP-Adapter", "ip_adapter"))
    save(to / JUDGE, judge.state_dict(), about("Pocket portraits, judge", "judge"))
