"""Custom Diffusion: load a concept's file, or merge several in closed form on the loaded model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.custom_diffusion import calls_of, concept_changes
from ..models.file_kinds import taken_for
from ..models.merging import FRAMES, check_parts, merge_changes, prompts_of, read_captions, unique_rows
from ..models.metadata import About
from .folders import find_model, listed
from .personalization import TRIGGER, check_words, strength_input
from .prompt_words import end_of, tokens_of
from .schema import ADVANCED, Node, schema
from .trained_files import apply_patches, as_loaded, check_base, read_trained

NONE = "none"
MOST = 6
"""Files that are merged at once."""
EXAMPLES = ("pocket_woman_custom.safetensors", "pocket_dog_custom.safetensors")


def concept_file(model: Any, file: str) -> tuple[Path, dict[str, Tensor], About]:
    """A file of Custom Diffusion, checked: it is for this model, and its words can be called.

    Raises:
        PersonalizeError: it is another file, for another base, not finite, or a word is not in models/embeddings.
    """
    path = find_model("loras", file)
    tensors, about = read_trained(path)
    if about is None or about.method != "custom_diffusion":
        raise taken_for("a file of Custom Diffusion", path.name, tensors, about)
    check_base(model, about, path.name, exactly=False)
    check_words(model, about, path.name)
    return path, tensors, about


class LoadCustomDiffusion(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeLoadCustomDiffusion",
            display_name="Load Custom Diffusion",
            description="Adds the concepts of a file of python -m training.custom_diffusion to a model, and gives "
            "the words that call them.",
            search_aliases=["custom diffusion", "concept", "multi concept"],
            inputs=[
                io.Model.Input("model", tooltip="The base model that the file was trained on, or one like it."),
                io.Combo.Input(
                    "file",
                    options=listed("loras", EXAMPLES[0]),
                    tooltip="A file in models/loras; those of its words, which the training wrote beside it, belong into "
                    "models/embeddings.",
                ),
                strength_input("strength", "the model"),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the concepts."),
                io.String.Output(display_name="trigger", tooltip=TRIGGER),
            ],
        )

    @classmethod
    def execute(cls, model, file: str, strength: float) -> io.NodeOutput:
        path, tensors, about = concept_file(model, file)
        patched, _ = apply_patches(model, None, tensors, (strength, strength), path.name)
        return io.NodeOutput(patched, about.trigger)


class MergeCustomDiffusion(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeMergeCustomDiffusion",
            display_name="Merge Custom Diffusion",
            description="Brings concepts that were learned apart into one model, in closed form and without training "
            "(Custom Diffusion, Kumari et al. 2023, equation 4).",
            search_aliases=["custom diffusion", "merge concepts", "two subjects"],
            inputs=[
                io.Model.Input("model", tooltip="The base model that all files were trained on."),
                io.Clip.Input("clip", tooltip="Its text encoders, which read the concepts' words."),
                *(
                    io.Combo.Input(
                        f"file{i + 1}",
                        options=listed("loras", EXAMPLES[i]) if i < 2 else [NONE, *listed("loras")],
                        tooltip="A file of Custom Diffusion in models/loras.",
                    )
                    for i in range(MOST)
                ),
                strength_input("strength", "the model"),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="Everyday captions, one in each line, on which the model shall stay as it is. Empty: two hundred "
                    "that come with the pack.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with all concepts."),
                io.String.Output(
                    display_name="trigger",
                    tooltip="The words of all concepts, such as embedding:dog_ohwx dog, embedding:mug_zxcv mug: write each "
                    "where it stands in the scene.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="By how much the merged layers miss what each file gives, and how much everyday captions "
                    "change: where that is above 1, pictures suffer.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, file1: str, file2: str, strength: float, captions: str = "", **others
    ) -> io.NodeOutput:
        chosen = [file1, file2, *(others.get(f"file{i + 1}", NONE) for i in range(2, MOST))]
        read = [concept_file(model, file) for file in chosen if file != NONE]
        keys = {f"{name}.weight": key for name, key in comfy.lora.model_lora_keys_unet(model.model, {}).items()}
        weights = _Weights(model, keys)
        concepts = {
            f"{path.name} ({i})": concept_changes(tensors, weights.shapes, path.name)
            for i, (path, tensors, _) in enumerate(read, 1)
        }
        texts = [line.strip() for line in captions.splitlines() if line.strip()] or read_captions()
        calls = [[call.text for call in calls_of(about.trigger)] for _, _, about in read]
        check_parts(concepts, calls)
        prompts = [[text for call in own for text in prompts_of(call)] for own in calls]
        layers = {layer for changes in concepts.values() for layer in changes}
        bar = comfy.utils.ProgressBar(len(texts) + sum(map(len, prompts)) + len(layers))
        starts = [end_of(clip, tokens_of(clip.tokenize(frame))) for frame in FRAMES]
        everyday = features(clip, texts, bar)
        words = [features(clip, own, bar, starts * (len(own) // len(starts))) for own in prompts]
        merged = merge_changes(
            weights, list(concepts.values()), everyday, words, torch.float32, lambda names: _counted(names, bar)
        )
        patched = model.clone()
        patched.add_patches({keys[name]: ("diff", (change,)) for name, change in merged.changes.items()}, strength)
        trigger = ", ".join(dict.fromkeys(call for own in calls for call in own))
        return io.NodeOutput(patched, trigger, merged.report, ui={"text": (merged.report,)})


class _Weights:
    """A MODEL's matrices by their names in LoRA files, as they were loaded."""

    def __init__(self, model: Any, keys: Mapping[str, str]):
        self.model, self.keys = model, keys
        self.shapes = {
            name.removesuffix(".weight"): tuple(comfy.utils.get_attr(model.model, key).shape)
            for name, key in keys.items()
            if isinstance(key, str) and name.startswith("lora_unet_") and "_attn2_to_" in name
        }

    def __call__(self, name: str) -> Tensor:
        return as_loaded(self.model, self.keys[name]).detach().cpu()


def features(clip: Any, texts: Iterable[str], bar: Any, starts: Sequence[int] | None = None) -> Tensor:
    """What the UNet reads of texts, [R, width]: see `unique_rows`."""
    states, ends = [], []
    for text in _counted(texts, bar):
        ends.append(end_of(clip, tokens_of(clip.tokenize(text))))
        states.append(clip.encode_from_tokens(clip.tokenize(text))[0].float().cpu())
    length = min(len(one) for one in states)
    return unique_rows(torch.stack([one[:length] for one in states]), [min(one, length - 1) for one in ends], starts)


def _counted(things: Iterable[str], bar: Any) -> Iterator[str]:
    for thing in things:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield thing
        bar.update(1)
