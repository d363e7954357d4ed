"""Trainers: LoRA, Textual Inversion and DreamBooth from pictures on wires, by the code of `python -m training.<method>`."""

import hashlib
import json
import random
import re
import shutil
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

from ..models.errors import PersonalizeError
from ..models.metadata import FOLDERS, folder_of
from .folders import POCKET, find_model, find_pictures, state_of
from .personalization import TRIGGER, LoadPersonalization, whole_checkpoint
from .pictures import as_image, as_tensor, connected, folder_of_pictures, growing_pictures
from .schema import ADVANCED, schema

PREVIEW = 512
"""Pixels of the longer side of what is shown while it trains."""
FINISHED = "result.json"
"""In the folder of a training that came to its end: its files."""


def _shared(class_name: str) -> list[Any]:
    open_ = "0: what suits the base model and the method."
    return [
        io.Combo.Input(
            "checkpoint",
            options=folder_paths.get_filename_list("checkpoints"),
            tooltip="The base model: SD1.5, SD2, SDXL or pocket portraits. It stays as it is.",
        ),
        growing_pictures("images", "image", "Pictures of the subject, five to twenty"),
        folder_of_pictures(
            "instead of connected ones: inside ComfyUI's input folder, or a full path. photo.txt beside photo.jpg is its "
            "caption."
        ),
        io.String.Input(
            "class_name", default=class_name, tooltip="What the subject is, as one noun: dog, backpack, woman, logo."
        ),
        io.String.Input("trigger", default="ohwx", tooltip="The word that will call the subject."),
        io.String.Input(
            "name",
            default="my_subject",
            tooltip="Of the file. An existing file is kept, and the new one gets a number.",
        ),
        io.Int.Input(
            "steps",
            display_name="steps (0: automatic)",
            default=0,
            min=0,
            max=1_000_000,
            tooltip=f"Steps of the optimiser. {open_}",
        ),
        io.Float.Input(
            "learning_rate",
            display_name="learning_rate (0: automatic)",
            default=0.0,
            min=0.0,
            max=1.0,
            step=1e-6,
            round=1e-9,
            tooltip=f"How much changes in a step. {open_}",
        ),
        io.Int.Input(
            "resolution",
            display_name="resolution (0: automatic)",
            default=0,
            min=0,
            max=4096,
            step=8,
            tooltip=f"Pixels of the side. {open_}",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**32 - 1,
            control_after_generate=False,  # or each queueing would train another file
            tooltip="The same seed gives the same file.",
        ),
        io.String.Input(
            "captions",
            default="",
            multiline=True,
            tooltip="Of the connected pictures, one in each line; {trigger} and {class} are put in. Empty: "
            "'a photo of {trigger} {class}'.",
            extra_dict=ADVANCED,
        ),
        io.String.Input(
            "sample_prompt",
            default="a photo of {trigger} {class}",
            tooltip="Drawn while it trains, and shown on the node; empty: nothing is.",
            extra_dict=ADVANCED,
        ),
        io.Int.Input(
            "sample_steps", default=100, min=1, max=1_000_000, tooltip="Steps between samples.", extra_dict=ADVANCED
        ),
        io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures in each step.", extra_dict=ADVANCED),
        io.Boolean.Input(
            "gradient_checkpointing", default=False, tooltip="Less memory, a third slower.", extra_dict=ADVANCED
        ),
    ]


def _outputs() -> list[Any]:
    return [
        io.Model.Output(display_name="MODEL", tooltip="The base model that knows the subject."),
        io.Clip.Output(display_name="CLIP", tooltip="Its text encoders."),
        io.Vae.Output(display_name="VAE", tooltip="Its VAE."),
        io.String.Output(display_name="trigger", tooltip=TRIGGER),
        io.String.Output(display_name="file", tooltip="The file that was written, in ComfyUI's models folder."),
        io.Image.Output(
            display_name="samples",
            tooltip="The last pictures of the sample prompt; without one, the loss over the steps.",
        ),
    ]


class TrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeTrainLoRA",
            display_name="Train LoRA (Personalize)",
            description="Trains a LoRA on pictures of a subject: details at small size. The file lands in models/loras.",
            search_aliases=["train lora", "lora trainer", "fine-tune"],
            inputs=[
                *_shared("person"),
                io.Int.Input("rank", default=16, min=1, max=256, tooltip="More holds more details, in a larger file."),
                io.Boolean.Input(
                    "train_text_encoder", default=False, tooltip="Change the text encoders, too.", extra_dict=ADVANCED
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, folder="", **_) -> str:
        return state_of(folder)

    @classmethod
    def execute(cls, rank: int, train_text_encoder: bool = False, **shared) -> io.NodeOutput:
        return _train("lora", shared, {"rank": rank, "train_text_encoder": train_text_encoder or None})


class TrainTextualInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeTrainTextualInversion",
            display_name="Train Textual Inversion",
            description="Learns a word for a subject or a style: a tiny file, for looks rather than details. The file lands "
            "in models/embeddings.",
            search_aliases=["train embedding", "textual inversion trainer"],
            inputs=[
                *_shared("person"),
                io.Int.Input(
                    "num_vectors", default=1, min=1, max=75, tooltip="Tokens of the word: more hold more details."
                ),
                io.Combo.Input(
                    "learnable_property",
                    options=["object", "style"],
                    tooltip="Whether the word is for what the pictures show, or for how.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, folder="", **_) -> str:
        return state_of(folder)

    @classmethod
    def execute(cls, num_vectors: int, learnable_property: str, **shared) -> io.NodeOutput:
        own = {"num_vectors": num_vectors, "learnable_property": learnable_property}
        return _train("textual_inversion", shared, own)


class TrainDreamBooth(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeTrainDreamBooth",
            display_name="Train DreamBooth",
            description="Trains the whole model on pictures of a subject: the best likeness, in a large file. A checkpoint "
            "lands in models/checkpoints, a difference in models/loras.",
            search_aliases=["dreambooth trainer", "fine-tune checkpoint"],
            inputs=[
                *_shared("person"),
                io.Combo.Input(
                    "save_as",
                    options=["full", "delta"],
                    tooltip="A whole checkpoint, or its difference from the base, which has a strength.",
                ),
                io.Int.Input(
                    "class_pictures",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Prior preservation: so many pictures of the class, drawn by the base, keep it what it was.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, folder="", **_) -> str:
        return state_of(folder)

    @classmethod
    def execute(cls, save_as: str, class_pictures: int, **shared) -> io.NodeOutput:
        own: dict[str, Any] = {"save_as": save_as}
        if class_pictures:
            own |= {"with_prior_preservation": True, "num_class_images": class_pictures}
        return _train("dreambooth", shared, own)


def _train(method: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> io.NodeOutput:
    """Train, or find what the same training made before; the file where the loaders find it, and the model with it."""
    base, name = find_model("checkpoints", given["checkpoint"]), given["name"].strip()
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise PersonalizeError(f'"{name}" is no name of a file: write letters, digits, _ and -.')
    prompt = given.get("sample_prompt", "").strip()
    values = {
        **{key: value for key, value in own.items() if value is not None},
        "pretrained_model_name_or_path": str(base),
        "class_name": given["class_name"],
        "trigger": given["trigger"],
        "train_batch_size": given.get("batch_size", 1),
        "gradient_checkpointing": given.get("gradient_checkpointing", False),
        "seed": given["seed"],
        "validation_prompt": [prompt] if prompt else [],
        "validation_steps": given.get("sample_steps", 100),
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
        / f"{name}-{_digest(values, pictures, captions, folder)}"
    )
    if folder:
        values["instance_data_dir"] = str(find_pictures(folder))
    else:
        values["instance_data_dir"] = str(_write(place / "pictures", pictures, captions))
    files = _finished(place)
    if not files:
        files = _run(method, values | {"output_dir": str(place)}, place, name)
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
            f"There are {len(captions)} captions but {len(pictures)} pictures: write a line for each."
        )


def _digest(values: Mapping[str, Any], pictures: list[Image.Image], captions: list[str], folder: str) -> str:
    """Of everything that a training depends on: another one has a folder of its own."""
    digest = hashlib.sha256(json.dumps([values, captions, folder], sort_keys=True).encode())
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


def _finished(place: Path) -> list[Path]:
    """The files of a training that came to its end, if they are still there."""
    try:
        files = [Path(path) for path in json.loads((place / FINISHED).read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        return []
    return files if all(path.is_file() for path in files) else []


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
    made = settings.make_settings(run.METHODS[method][0], values)
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    stop = Stop(asked=comfy.model_management.processing_interrupted)
    with _as_before(), torch.inference_mode(False), torch.enable_grad():
        paths = run.train(method, made, stop, _Progress(place))
    if not paths:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise comfy.model_management.InterruptProcessingException
    target.mkdir(parents=True, exist_ok=True)
    files = [Path(shutil.move(path, target / path.name)) for path in paths if path.name.startswith(free)]
    (place / FINISHED).write_text(json.dumps([str(path) for path in files]), encoding="utf-8")
    return files


def _free(folder: Path, name: str) -> str:
    """A name that no file there has."""
    taken = {path.name.split(".")[0] for path in folder.glob("*")} if folder.is_dir() else set()
    number, free = 2, name
    while free.split(".")[0] in taken:
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
        self.bar: Any = None
        self.seen: Path | None = None

    def __call__(self, done: int, steps: int) -> None:
        self.bar = self.bar or comfy.utils.ProgressBar(steps)
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
