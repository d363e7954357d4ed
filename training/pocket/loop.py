"""One training loop for every part: progress, log, checkpoints, and a resume that continues bit for bit."""

import json
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from filelock import FileLock, Timeout
from timm.optim import Muon
from timm.optim import muon as _muon
from torch import Tensor, nn
from tqdm import tqdm

from ..shared import whole
from .device import DEVICE

# Half precision pays only where the processor has it: elsewhere it is emulated, twenty times slower.
HALF = torch.cuda.is_bf16_supported(False) if DEVICE == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
if not HALF:
    _muon.zeropower_via_newtonschulz = partial(_muon.zeropower_via_newtonschulz, dtype=torch.float32)

Step = Callable[[int, np.random.Generator], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Run:
    """What the command line says of a training."""

    folder: Path
    """Of checkpoints and logs; `folder/pictures` holds what was drawn."""
    steps: int
    batch: int
    pictures: int
    """How many pictures to draw and train on."""
    save_minutes: float = 3.0
    """Between checkpoints."""


def train(
    module: nn.Module,
    step: Step,
    run: Run,
    name: str,
    learning_rate: float = 2e-3,
    warmup: int = 200,
    weight_decay: float = 0.01,
    ema_decay: float = 0.999,
) -> None:
    """Train until `run.steps`, and leave the averaged weights in `module`.

    `step(number, rng)` returns the loss and figures for the log. Both generators are seeded from the step's number, so
    that a run killed at any moment repeats from its last checkpoint (`name.pt`) what it would have done.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SystemExit(f"{name} is being trained in {run.folder} already: wait for it, or name another.") from None
    path, log = run.folder / f"{name}.pt", run.folder / f"{name}.jsonl"
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = Muon(_groups(module), lr=learning_rate, weight_decay=weight_decay, nesterov=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=run.steps)
    ema = EMAModel(trained, decay=ema_decay, use_ema_warmup=True, power=0.75)
    start, before = 0, 0
    if path.exists():
        state = load_checkpoint(path, module)
        before = state["before"]
        if "optimizer" in state:  # else it was restored from the shipped weights
            if state["data"] != [run.batch, run.pictures]:
                raise SystemExit(
                    f"{path} was trained with --batch {state['data'][0]} --pictures {state['data'][1]}, not "
                    f"{run.batch} and {run.pictures}: give the same, or start in another --folder."
                )
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            ema.load_state_dict(state["ema"])
        start = state["step"]
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # the last may not be, if it was killed
    log.write_text("".join(line for line in whole if json.loads(line)["step"] <= start))

    def save(done: int) -> None:
        state = {
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "ema": ema.state_dict(),
            "step": done,
            "before": before,
            "data": [run.batch, run.pictures],
        }
        save_checkpoint(state, path)

    saved, figures = time.monotonic(), dict[str, float]()
    module.train()
    for number in (bar := tqdm(range(start, run.steps), initial=start, total=run.steps, desc=name, unit=" steps")):
        torch.manual_seed(number)
        loss, figures = step(number, np.random.default_rng([7, number]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        ema.step(trained)
        if number % 50 == 49 or number + 1 == run.steps:
            figures = {"loss": loss.item(), **figures}
            bar.set_postfix({key: f"{value:.3f}" for key, value in figures.items()})
            with log.open("a") as file:
                file.write(json.dumps({"step": number + 1, "lr": schedule.get_last_lr()[0], **figures}) + "\n")
        if time.monotonic() - saved > 60 * run.save_minutes or number + 1 == run.steps:
            save(number + 1)
            saved = time.monotonic()
    ema.copy_to(trained)
    module.eval()
    lock.release()


def autocast() -> torch.autocast:
    """bfloat16 for what bears it, where the processor computes in it."""
    return torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=HALF)


def save_checkpoint(state: dict, path: Path) -> None:
    """All of it or nothing."""
    with whole(path) as part, part.open("wb") as file:
        torch.save(state, file)


def load_checkpoint(path: Path, module: nn.Module) -> dict:
    """A checkpoint, its weights loaded into the module. Raises SystemExit with a sentence if it is not whole."""
    try:
        state = torch.load(path, weights_only=True, map_location=torch.get_default_device())
        module.load_state_dict(state["module"])
    except (PermissionError, torch.OutOfMemoryError):  # nothing is wrong with the file
        raise
    except (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise SystemExit(
            f"{path} is damaged or another training's checkpoint: remove it, and that training starts anew."
        ) from error
    return state


def require(folder: Path, *names: str) -> None:
    """Raises SystemExit with a sentence for each checkpoint that is missing."""
    missing = [name for name in names if not (folder / f"{name}.pt").exists()]
    if missing:
        raise SystemExit(
            "\n".join(
                f"{name}.pt is not in {folder}: train it first, python -m training.pocket {name}." for name in missing
            )
        )


def _groups(module: nn.Module) -> list[dict]:
    """Muon for matrices and convolutions; its AdamW for vectors, and for embeddings, whose rows are independent."""
    rows = {id(p) for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    trained = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict] = [
        {"params": [p for p in trained if id(p) not in rows]},
        {"params": [p for p in trained if id(p) in rows], "use_fallback": True, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def average(module: nn.Module, folder: Path, name: str) -> int:
    """Load the averaged weights of a run's checkpoint; the number of steps done."""
    require(folder, name)
    state = load_checkpoint(folder / f"{name}.pt", module)
    trained = [p for p in module.parameters() if p.requires_grad]
    ema = EMAModel(trained)
    ema.load_state_dict(state["ema"])
    ema.copy_to(trained)
    module.eval()
    return state["before"] + state["step"]
