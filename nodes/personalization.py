"""Loaders of trained files: LoRA, Textual Inversion, DreamBooth, and one that takes any of ours."""

import re
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..models.base_models import TEXT_WIDTHS, title_of
from ..models.checkpoints import read_header
from ..models.custom_diffusion import calls_of
from ..models.errors import PersonalizeError
from ..models.file_kinds import kind_of, taken_for
from ..models.metadata import About, folder_of
from ..models.textual_inversion import read_word
from .folders import LORA, find_model, listed
from .schema import Node, schema
from .trained_files import (
    apply_patches,
    check_base,
    family_of_model,
    is_difference,
    is_dreambooth,
    read_about_file,
    read_trained,
)

TEXT = ("lora_te", "text_encoder")
"""How names of what changes text encoders begin, in the files of any trainer."""
TRIGGER = (
    "What calls the subject, to wire into a prompt: its trigger and class, or the learned word; empty where the file "
    "does not say."
)


def strength_input(name: str, what: str, more: str = "") -> Any:
    """How much a file changes something."""
    return io.Float.Input(
        name,
        default=1.0,
        min=-10.0,
        max=10.0,
        step=0.05,
        tooltip=f"How much the file changes {what}: 0 not at all, 1 fully.{more}",
    )


def _model(
    optional: bool = False, tooltip: str = "The base model that the file was trained on, or one like it."
) -> Any:
    return io.Model.Input("model", optional=optional, tooltip=tooltip)


def _clip(tooltip: str) -> Any:
    return io.Clip.Input("clip", optional=True, tooltip=tooltip)


def _outputs(model: str) -> list[Any]:
    return [
        io.Model.Output(display_name="MODEL", tooltip=model),
        io.Clip.Output(display_name="CLIP", tooltip="Its text encoders."),
        io.Vae.Output(display_name="VAE", tooltip="Its VAE."),
        io.String.Output(display_name="trigger", tooltip=TRIGGER),
    ]


class LoadLora(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeLoadLoRA",
            display_name="Load LoRA (Personalize)",
            description="Adds a LoRA of any trainer to a model, gives its trigger words, and refuses what does not "
            "fit.",
            search_aliases=["lora loader", "load lora", "lora"],
            inputs=[
                _model(),
                _clip(
                    tooltip="The text encoders of the same checkpoint; not needed where the file does not change them, or "
                    "strength_clip is 0.",
                ),
                io.Combo.Input("file", options=listed("loras", LORA), tooltip="A file in models/loras."),
                strength_input("strength_model", "the model", " Below 0: the other way."),
                strength_input("strength_clip", "the text encoders"),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoders with the LoRA."),
                io.String.Output(display_name="trigger", tooltip=TRIGGER),
            ],
        )

    @classmethod
    def execute(cls, model, file: str, strength_model: float, strength_clip: float, clip=None) -> io.NodeOutput:
        path = find_model("loras", file)
        tensors, about = read_trained(path)
        if about is not None and (kind_of(tensors, about) or ("", ""))[1] != "loras":
            raise taken_for("a LoRA", path.name, tensors, about)
        check_base(model, about, path.name, exactly=about is not None and about.method == "dreambooth")
        if clip is None and strength_clip != 0 and any(key.startswith(TEXT) for key in tensors):
            raise PersonalizeError(
                f"{path.name} changes the text encoders, too: connect the checkpoint's CLIP, or set strength_clip to 0."
            )
        model, clip = apply_patches(model, clip, tensors, (strength_model, strength_clip), path.name)
        return io.NodeOutput(model, clip, about.call if about else "")


class LoadTextualInversion(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeLoadTextualInversion",
            display_name="Load Textual Inversion",
            description="Gives the text that calls a learned word. ComfyUI reads the word itself when the text is in "
            "a prompt, but leaves out one that does not fit the model; this node refuses it.",
            search_aliases=["embedding", "textual inversion loader"],
            inputs=[
                _model(tooltip="The model that the word is for; it is given on as it is."),
                _clip(tooltip="Its text encoders; they are given on as they are."),
                io.Combo.Input(
                    "file",
                    options=listed("embeddings", "pocket_woman_embedding.safetensors"),
                    tooltip="A file in models/embeddings: of this pack's trainer, or of another (A1111's .pt, too).",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="The word's weight in the prompt: 1 leaves it as it was learned.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model as it came."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoders as they came."),
                io.String.Output(
                    display_name="trigger",
                    tooltip='The word, to wire into a prompt: "a photo of" + trigger + "on a beach".',
                ),
            ],
        )

    @classmethod
    def execute(cls, model, file: str, strength: float, clip=None) -> io.NodeOutput:
        return io.NodeOutput(model, clip, checked_word(model, find_model("embeddings", file), file, strength))


def checked_word(model: Any, path: Path, file: str, strength: float) -> str:
    """The prompt's text for a learned word.

    Raises:
        PersonalizeError: it was made for another base model, or a prompt cannot call it.
    """
    if re.search(r"[\s()]", file):
        better = re.sub(r"[\s()]+", "_", file)
        raise PersonalizeError(
            f'A prompt cannot call "{file}", as a name in it ends at a space or a bracket: rename it, to "{better}" say.'
        )
    tensors, about = read_trained(path)
    kind = kind_of(tensors, about)
    if about.method != "textual_inversion" if about else kind is not None and kind[1] != folder_of("textual_inversion"):
        raise taken_for("a learned word", path.name, tensors, about)
    check_base(model, about, path.name, exactly=False)
    family = family_of_model(model)
    if family in TEXT_WIDTHS:
        read_word(tensors, TEXT_WIDTHS[family], path.name, title_of(family))
    word = f"embedding:{file.rsplit('.', 1)[0]}"
    return word if strength == 1 else f"({word}:{strength:g})"


def check_words(model: Any, about: About, name: str) -> None:
    """Whether the learned words that a file of Custom Diffusion names can be called.

    Raises:
        PersonalizeError: one is not in models/embeddings, or for another base.
    """
    there = {
        Path(file).stem: file for file in folder_paths.get_filename_list("embeddings")
    }  # it looks into folders, too
    for word in (call.word for call in calls_of(about.trigger) if call.word):
        if word not in there:
            raise PersonalizeError(
                f"The word {word}.safetensors of {name} is not in models/embeddings, where ComfyUI looks for it: put it "
                "there and refresh."
            )
        checked_word(model, find_model("embeddings", there[word]), there[word], 1.0)


class LoadDreamBooth(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeLoadDreamBooth",
            display_name="Load DreamBooth",
            description="Loads what python -m training.dreambooth wrote: a whole checkpoint, or a difference, which "
            "is far smaller and is added to the base that it was trained from.",
            search_aliases=["dreambooth", "checkpoint", "delta"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list(dreambooth_files()),
                    tooltip="A checkpoint in models/checkpoints, which brings all its parts, or a difference "
                    "(NAME.delta.safetensors) in models/loras.",
                ),
                strength_input("strength", "its base, if it is a difference", " 0.7 often follows prompts better."),
                _model(optional=True, tooltip="The base; needed for a difference only."),
                _clip(tooltip="The base's text encoders; needed for a difference only."),
                io.Vae.Input("vae", optional=True, tooltip="The base's VAE, given on; for a difference only."),
            ],
            outputs=_outputs("The fine-tuned model."),
        )

    @classmethod
    def execute(cls, file: str, strength: float, model=None, clip=None, vae=None) -> io.NodeOutput:
        kind, name = dreambooth_files().get(file, ("checkpoints", file))
        return io.NodeOutput(*load_dreambooth(find_model(kind, name), strength, model, clip, vae))


def dreambooth_files() -> dict[str, tuple[str, str]]:
    """Folder and name of differences, then of checkpoints, by how they are listed.

    That is by their names; a difference that has a checkpoint's name is listed with its folder.
    """
    checkpoints = {name: ("checkpoints", name) for name in folder_paths.get_filename_list("checkpoints")}
    differences = {}
    for name in folder_paths.get_filename_list("loras"):
        path = folder_paths.get_full_path("loras", name)
        if path is not None and is_dreambooth(Path(path)):
            differences[f"loras/{name}" if name in checkpoints else name] = ("loras", name)
    return differences | checkpoints


def load_dreambooth(path: Path, strength: float, model: Any, clip: Any, vae: Any) -> tuple[Any, Any, Any, str]:
    """MODEL, CLIP, VAE and trigger of a whole checkpoint, or of a base with a difference."""
    about = read_about_file(path)
    if about is not None and about.method != "dreambooth":
        raise taken_for("a DreamBooth checkpoint", path.name, read_header(path)[0], about)
    trigger = about.call if about else ""
    if is_difference(path):
        return *with_difference(path, strength, model, clip), vae, trigger
    return *whole_checkpoint(path), trigger


def with_difference(path: Path, strength: float, model: Any, clip: Any) -> tuple[Any, Any]:
    """MODEL and CLIP of a base with a trained model's difference.

    Raises:
        PersonalizeError: there is no base, or another one.
    """
    tensors, about = read_trained(path)
    if model is None:
        base = about.base_name if about else "its base"
        raise PersonalizeError(f"{path.name} is a difference from {base}: connect that checkpoint's MODEL and CLIP.")
    check_base(model, about, path.name, exactly=True)
    if clip is None and any(key.startswith("text_encoders.") for key in tensors):
        raise PersonalizeError(f"{path.name} changes the text encoders, too: connect the checkpoint's CLIP.")
    return apply_patches(model, clip, tensors, (strength, strength), path.name)


def whole_checkpoint(path: Path) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a checkpoint."""
    folders = folder_paths.get_folder_paths("embeddings")
    return tuple(
        comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=True, output_clip=True, embedding_directory=folders
        )[:3]
    )


class LoadPersonalization(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = [f"{kind}/{name}" for kind in KINDS for name in listed(kind, LORA)]
        return schema(
            node_id="PersonalizeLoadPersonalization",
            display_name="Load Personalization",
            description="Takes any file of this pack's trainers, reads in it which method it is of, and does what "
            "the method's own loader does.",
            search_aliases=["personalize", "lora", "dreambooth", "textual inversion"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files,
                    tooltip="A file of this pack's trainers in models/loras, models/embeddings or models/checkpoints.",
                ),
                strength_input(
                    "strength",
                    "the model (and the text encoders, if it is a LoRA)",
                    " Of a learned word: its weight in the prompt.",
                ),
                _model(optional=True, tooltip="The base; a whole checkpoint brings its own."),
                _clip(tooltip="The base's text encoders; a whole checkpoint brings its own."),
                io.Vae.Input(
                    "vae", optional=True, tooltip="The base's VAE, given on; a whole checkpoint brings its own."
                ),
            ],
            outputs=_outputs("The personalised model."),
        )

    @classmethod
    def execute(cls, file: str, strength: float, model=None, clip=None, vae=None) -> io.NodeOutput:
        kind, _, name = file.partition("/")
        path = find_model(kind, name)
        about = read_about_file(path)
        if about is None:
            raise PersonalizeError(f"{name} does not say how it was trained: use the loader of its method.")
        if about.method not in ("dreambooth", "textual_inversion", "lora", "custom_diffusion"):
            raise taken_for("a personalisation", name, read_header(path)[0], about)
        names = read_header(path)[0]
        what, place = kind_of(names, about) or ("", kind)
        if kind != place:
            raise PersonalizeError(f"{name} is {what}, which is looked for in models/{place} only: move it there.")
        if about.method == "dreambooth":
            return io.NodeOutput(*load_dreambooth(path, strength, model, clip, vae))
        if model is None:
            raise PersonalizeError(f"{name} is {what} for {about.base_name}: connect that checkpoint's MODEL and CLIP.")
        if about.method == "textual_inversion":
            return io.NodeOutput(model, clip, vae, checked_word(model, path, name, strength))
        if about.method == "custom_diffusion":
            check_words(model, about, name)
        model, clip, trigger = LoadLora.execute(model, name, strength, strength, clip).result
        return io.NodeOutput(model, clip, vae, trigger)


KINDS = ("loras", "embeddings", "checkpoints")
