"""Where a training stands, on disk: everything that the next step depends on, so that it goes on bit for bit.

A checkpoint is a folder, which is there whole or not at all. Nothing random is in it: what a step draws
follows from the seed and the step's number.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from .shared import PersonalizeError, read_safetensors, sweep, whole, write_safetensors

PREFIX = "step-"


def checkpoints_in(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / "state.json").is_file())


def save_checkpoint(
    folder: Path,
    step: int,
    weights: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None,
    state: Mapping[str, Any],
    settings: Mapping[str, Any],
    limit: int,
) -> Path:
    """Write a checkpoint, and then delete those beyond `limit`.

    Args:
        folder: of all checkpoints.
        step: how many are done.
        weights: what trains, by name.
        average: the same, averaged, or None.
        state: of optimiser, schedule and gradient scaler.
        settings: which a run that goes on must share.
        limit: how many to keep.
    """
    path = folder / f"{PREFIX}{step:07}"
    with whole(path) as part:
        part.mkdir()
        write_safetensors(part / "weights.safetensors", {k: v.detach().cpu() for k, v in weights.items()}, {})
        if average is not None:
            write_safetensors(part / "average.safetensors", {k: v.cpu() for k, v in average.items()}, {})
        torch.save(dict(state), part / "state.pt")
        (part / "state.json").write_text(json.dumps({"step": step, "settings": settings}, indent=2))
    for old in [other for other in checkpoints_in(folder) if other != path][: 1 - limit or None]:
        shutil.rmtree(old)
    return path


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints of more than `step` steps: the training goes another way from there.

    Also deletes what a killed process left half written.
    """
    sweep(folder)
    for path in checkpoints_in(folder):
        if read_settings_of(path)[0] > step:
            kept = path.with_name(f"before-{path.name}")
            shutil.rmtree(kept, ignore_errors=True)
            path.rename(kept)


def find_checkpoint(folder: Path, wanted: str) -> Path | None:
    """The checkpoint to go on from, if any.

    Args:
        folder: of all checkpoints.
        wanted: "latest", "none", the name of one, or a path.

    Raises:
        PersonalizeError: the one that was named does not exist.
    """
    if wanted == "none":
        return None
    found = checkpoints_in(folder)
    if wanted == "latest":
        return found[-1] if found else None
    for path in (folder / wanted, Path(wanted).expanduser()):
        if (path / "state.json").is_file():
            return path
    names = ", ".join(path.name for path in found) or "none"
    raise PersonalizeError(f"There is no checkpoint {wanted}; in {folder} there are: {names}.")


def read_settings_of(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """The steps that were done, and the settings they were done with.

    Raises:
        PersonalizeError: it is damaged.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        return int(state["step"]), dict(state["settings"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged(checkpoint, error) from None


def damaged(checkpoint: Path, why: object) -> PersonalizeError:
    """What to do about a checkpoint that cannot be read."""
    return PersonalizeError(
        f"The checkpoint {checkpoint} is damaged ({' '.join(str(why).split())[:200]}): delete this folder, and the same "
        "command goes on from the one before, or starts anew."
    )


def load_checkpoint(
    checkpoint: Path, weights: Mapping[str, Tensor], average: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """Put the checkpoint's weights in place; returns the state of optimiser, schedule and scaler.

    Raises:
        PersonalizeError: it is damaged, or holds other weights.
    """
    for name, into in (("weights", weights), ("average", average)):
        if into is None:
            continue
        if name == "average" and not (checkpoint / "average.safetensors").exists():
            raise PersonalizeError(f"{checkpoint} has no average: go on without --use_ema, or in another output_dir.")
        try:
            stored, _ = read_safetensors(checkpoint / f"{name}.safetensors")
        except PersonalizeError:
            raise damaged(checkpoint, f"{name}.safetensors cannot be read") from None
        if stored.keys() != into.keys() or any(stored[key].shape != value.shape for key, value in into.items()):
            raise PersonalizeError(
                f"{checkpoint} holds other weights than are trained now: start in another output_dir."
            )
        for key, value in into.items():
            value.data.copy_(stored[key])
    try:
        return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise damaged(checkpoint, error) from None
