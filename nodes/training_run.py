"""A training of a node: in this process, once for the same inputs, and its files where the loaders find them."""

import hashlib
import json
import random
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..models.errors import PersonalizeError, plural
from ..models.metadata import FOLDERS, folder_of
from .folders import POCKET, find_model, find_pictures, state_of
from .personalization import LoadPersonalization, whole_checkpoint
from .pictures import as_image, as_tensor, connected

SAMPLE_STEPS = 100
PREVIEW = 512
"""Pixels of the longer side of what is shown while it trains."""
FINISHED = "result.json"
"""In the folder of a training that came to its end: its files."""
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}"
NAMED = {
    "trigger": "trigger",
    "class_name": "class_name",
    "seed": "seed",
    "learning_rate": "learning_rate",
    "resolution": "resolution",
    "rank": "rank",
    "num_vectors": "num_vectors",
    "gradient_checkpointing": "gradient_checkpointing",
    "max_train_steps": "steps",
    "train_batch_size": "batch_size",
    "validation_prompt": "sample_prompt",
    "validation_steps": "sample_steps",
    "num_class_images": "class_pictures",
    "instance_data_dir": "folder",
    "pretrained_model_name_or_path": "checkpoint",
    "output_name": "name",
}
"""Options of the trainer, and what the nodes call them."""

_made: dict[str, list[Path]] = {}
"""By a node's name the files that it made last."""


def train(method: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> io.NodeOutput:
    """Train, or find what the same training made before; the file where the loaders find it, and the model with it."""
    base, name = find_model("checkpoints", given["checkpoint"]), given["name"].strip()
    if not re.fullmatch(NAME, name):
        raise PersonalizeError(
            f'"{name[:300]}" is no name of a file: write letters, digits, _ and -, a hundred at most.'
        )
    prompt = given.get("sample_prompt", "").strip()
    values = {
        **{key: value for key, value in own.items() if value is not None},
        "pretrained_model_name_or_path": str(base),
        "class_name": given["class_name"],
        "trigger": given["trigger"],
        "train_batch_size": given.get("batch_size", 1),
        "seed": given["seed"],
    }
    asked = {"max_train_steps": "steps", "learning_rate": "learning_rate", "resolution": "resolution"}
    values |= {option: given[key] for option, key in asked.items() if given[key]}
    pictures = [as_image(picture.pixels) for picture in connected(given.get("images") or {})]
    captions = [line.strip() for line in given.get("captions", "").splitlines() if line.strip()]
    folder = given["folder"].strip()
    _check_pictures(pictures, captions, folder)
    place = (
        Path(folder_paths.get_output_directory())
        / "personalize"
        / f"{name}-{_digest(method, base, values, pictures, captions, folder)}"
    )
    values["gradient_checkpointing"] = given.get("gradient_checkpointing", False)
    if prompt:
        values |= {"validation_prompt": [prompt], "validation_steps": given.get("sample_steps", SAMPLE_STEPS)}
    if values.get("with_prior_preservation"):
        values["class_data_dir"] = str(place / "class")
    if folder:
        values["instance_data_dir"] = str(find_pictures(folder))
    else:
        values["instance_data_dir"] = str(_write(place / "pictures", pictures, captions))
    files = _finished(place)
    if not files:
        files = _run(method, values | {"output_dir": str(place)}, place, name)
    _made[given["name"]] = files
    return io.NodeOutput(*_loaded(base, files[0]), str(files[0]), _shown(place))


def _check_pictures(pictures: list[Image.Image], captions: list[str], folder: str) -> None:
    if bool(pictures) == bool(folder):
        both = (
            "both connected pictures and a folder: use one of them"
            if folder
            else "no pictures: connect some, or write a folder of them"
        )
        raise PersonalizeError(f"There are {both}.")
    if captions and folder:
        raise PersonalizeError("The captions are for connected pictures: those of a folder are .txt files beside them.")
    if captions and len(captions) != len(pictures):
        raise PersonalizeError(
            f"{plural(len(captions), 'caption')} but {plural(len(pictures), 'picture')}: write a line for each."
        )


def lost(name: str) -> str:
    """Another text each time as long as a file that a node of this name made is gone, so that the host asks it again."""
    return "" if all(path.exists() for path in _made.get(name, ())) else uuid.uuid4().hex


def _digest(
    method: str, base: Path, values: Mapping[str, Any], pictures: list[Image.Image], captions: list[str], folder: str
) -> str:
    """Of everything that a training's result depends on: another one has a folder of its own."""
    where = str(find_pictures(folder)) if folder else ""
    digest = hashlib.sha256(json.dumps([method, _state(base), values, captions, where], sort_keys=True).encode())
    for picture in pictures:
        digest.update(repr(picture.size).encode() + picture.tobytes())
    if folder:
        digest.update(state_of(folder).encode())
    return digest.hexdigest()[:8]


def _write(folder: Path, pictures: list[Image.Image], captions: list[str]) -> Path:
    """As a user of the headless trainer has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        path = folder / f"{i + 1:03}.png"
        if not path.exists():
            picture.save(path)
        if captions:
            path.with_suffix(".txt").write_text(captions[i], encoding="utf-8")
    return folder


def _state(path: Path) -> list[int]:
    """Of a file: another one under its name has another."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _finished(place: Path) -> list[Path]:
    """The files of a training that came to its end, if they are still there and no other took their names."""
    try:
        files = json.loads((place / FINISHED).read_text(encoding="utf-8"))
        return [Path(path) for path in files] if all(_state(Path(path)) == was for path, was in files.items()) else []
    except (OSError, ValueError):
        return []


def _run(method: str, values: dict[str, Any], place: Path, name: str) -> list[Path]:
    """Train in this process; returns the files, where the loaders find them.

    Raises:
        PersonalizeError: whatever the user can mend.
        InterruptProcessingException: it was cancelled; the same inputs go on from its last step.
    """
    try:
        from ..training import run, settings
        from ..training.stopping import Stop
    except ImportError as error:
        raise PersonalizeError(
            f"Training needs the package {error.name}: run pip install -r requirements.txt in {POCKET.parent.parent}, with "
            "ComfyUI's Python."
        ) from None
    kind = folder_of(method, values.get("save_as") == "delta")
    target = next(Path(path) for path in folder_paths.get_folder_paths(kind) if Path(path) != POCKET / kind)
    values["output_name"] = free = _free(target, name)
    try:
        made = settings.make_settings(run.METHODS[method][0], values)
    except PersonalizeError as error:
        raise PersonalizeError(_as_inputs(str(error))) from None
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    progress = _Progress(place)
    stop = Stop(asked=comfy.model_management.processing_interrupted, told=progress.before)
    try:
        with _as_before(), torch.inference_mode(False), torch.enable_grad():
            paths = run.train(method, made, stop, progress)
    except PersonalizeError as error:
        raise PersonalizeError(_as_inputs(str(error))) from None
    if not paths:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise comfy.model_management.InterruptProcessingException
    target.mkdir(parents=True, exist_ok=True)
    files = [Path(shutil.move(path, target / path.name)) for path in paths if path.name.startswith(free)]
    (place / FINISHED).write_text(json.dumps({str(path): _state(path) for path in files}), encoding="utf-8")
    return files


def _as_inputs(message: str) -> str:
    """A message of the trainer, with its options by the names of the node's inputs."""
    message = re.sub(r"go on with --resume_from_checkpoint \S+?(?=\.?$)", "start again", message)
    return re.sub(r"--(\w+)", lambda option: NAMED.get(option[1], option[0]), message)


def _free(folder: Path, name: str) -> str:
    """A name that no file there has."""
    taken = {path.name.split(".")[0].casefold() for path in folder.glob("*")} if folder.is_dir() else set()
    number, free = 2, name
    while free.casefold() in taken:
        free, number = f"{name}_{number:02}", number + 1
    return free


@contextmanager
def _as_before() -> Iterator[None]:
    """What is random goes on afterwards as if nothing had been."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class _Progress:
    """The host's bar, with the last samples."""

    def __init__(self, place: Path):
        self.place = place
        self.bar: Any = comfy.utils.ProgressBar(1)
        self.seen: Path | None = None

    def before(self, done: int, things: int) -> None:
        """Before the first step: pictures and captions are encoded, pictures of the class drawn."""
        self.bar.update_absolute(done, things)

    def __call__(self, done: int, steps: int) -> None:
        newest, preview = _newest(self.place), None
        if newest is not None and newest != self.seen:
            with Image.open(newest) as picture:
                self.seen, preview = newest, ("JPEG", picture.convert("RGB"), PREVIEW)
        self.bar.update_absolute(done, steps, preview)


def _newest(place: Path) -> Path | None:
    return max((place / "samples").glob("step-*.png"), default=None)


def _shown(place: Path) -> torch.Tensor:
    """[1, H, W, 3]."""
    with Image.open(_newest(place) or place / "loss.png") as picture:
        return as_tensor(picture)


def _loaded(base: Path, file: Path) -> tuple[Any, ...]:
    """MODEL, CLIP, VAE and the words that call the subject."""
    kind = next(kind for kind in FOLDERS.values() if str(file.parent) in folder_paths.get_folder_paths(kind))
    if kind == "checkpoints":
        return LoadPersonalization.execute(f"{kind}/{file.name}", 1.0).result
    return LoadPersonalization.execute(f"{kind}/{file.name}", 1.0, *whole_checkpoint(base)).result
