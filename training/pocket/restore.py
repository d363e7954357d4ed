"""The shipped weights as checkpoints, to train a part further or anew on the others without starting from nothing."""

import json
from pathlib import Path

from diffusers.training_utils import EMAModel
from safetensors import safe_open
from torch import Tensor, nn

from ..base_model import load_pipeline
from ..shared import POCKET, read_safetensors
from .adapter import adapter_of
from .encoders import Encoders
from .files import ADAPTER, CHECKPOINT, IMAGE_ENCODER, JUDGE
from .judge import Judge
from .loop import save_checkpoint
from .unet import build_unet
from .vae import build


def restore(folder: Path, source: Path = POCKET) -> None:
    """Write a checkpoint of each part that has none in `folder`.

    The averaged weights are all that was shipped, so a training that goes on from them starts its own schedule, and the
    encoders' two helpers start untrained.
    """
    pipeline = load_pipeline(source / CHECKPOINT)
    vae, unet, encoders, judge = build(), build_unet(), Encoders(), Judge()
    vae.load_state_dict(pipeline.vae.state_dict())
    unet.load_state_dict(pipeline.unet.state_dict())
    text, _ = read_safetensors(source / CHECKPOINT)
    prefix = "cond_stage_model.transformer."
    encoders.text.load_state_dict({k.removeprefix(prefix): v for k, v in text.items() if k.startswith(prefix)})
    encoders.image.load_state_dict(read_safetensors(source / IMAGE_ENCODER)[0])
    judge.load_state_dict(read_safetensors(source / JUDGE)[0])
    adapter = adapter_of(unet, source / ADAPTER)
    with safe_open(source / CHECKPOINT, framework="pt") as file:
        steps = json.loads(file.metadata()["personalize.training_steps"])
    parts: dict[str, nn.Module] = {"vae": vae, "encoders": encoders, "judge": judge, "unet": unet, "adapter": adapter}
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in parts.items():
        path = folder / f"{name}.pt"
        if path.exists():
            print(f"{path} is there already and was left alone.")
            continue
        trained: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        state = {"module": module.state_dict(), "ema": EMAModel(trained).state_dict(), "step": 0, "before": steps[name]}
        save_checkpoint(state, path)
        print(f"{path}: {steps[name]} steps")
