"""Subject-Diffusion: subjects from a picture and a box each, without training for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import node_helpers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..models.blocks import Layer
from ..models.errors import PersonalizeError
from ..models.pictures import cut_out, on_ground, subject_region
from ..models.subject_diffusion import (
    BOXES,
    CLS,
    IMAGE_SCALE,
    PLACEHOLDER,
    TEXT_SCALE,
    SubjectParts,
    SubjectTensors,
    check_subjects,
    fused_prompt,
    read_subject_diffusion,
    slots,
    three_way,
)
from .attention_patch import unet_layout
from .encoder import input_size
from .folders import find_model
from .guiding import Guider
from .prompt_words import tokens_of
from .schema import CFG, Node, SubjectDiffusionType, SubjectsType, schema
from .subject_network import Told, has_subjects, located, patcher_of, with_weights
from .subjects import OneSubject
from .trained_files import check_base


@dataclass(frozen=True)
class SubjectFile:
    """What *Load Subject-Diffusion* gives."""

    tensors: SubjectTensors
    name: str


class LoadSubjectDiffusion(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeLoadSubjectDiffusion",
            display_name="Load Subject-Diffusion",
            description="Loads what python -m training.subject_diffusion wrote, for the base model that it was "
            "trained on or one like it, and for the image encoder that it was trained with.",
            search_aliases=["subject diffusion", "gligen", "multi subject"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list("subject_diffusion"),
                    tooltip="A file in models/subject_diffusion.",
                )
            ],
            outputs=[
                SubjectDiffusionType.Output(display_name="subject_diffusion", tooltip="To Apply Subject-Diffusion.")
            ],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path: Path = find_model("subject_diffusion", file)
        return io.NodeOutput(SubjectFile(read_subject_diffusion(path), path.name))


class ApplySubjectDiffusion(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeApplySubjectDiffusion",
            display_name="Apply Subject-Diffusion",
            description="Puts one subject or two into a prompt, each from its picture and in its box, without "
            "training for them (Subject-Diffusion, Ma et al. 2023).",
            search_aliases=["subject diffusion", "gligen", "multi subject"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The base that the file was trained on, or one like it. LoRA, Apply IP-Adapter and other "
                    "patches may come before or after, another of these nodes not: it takes all subjects at once.",
                ),
                io.Clip.Input("clip", tooltip="The text encoders, which read the prompt."),
                io.ClipVision.Input("clip_vision", tooltip="The image encoder that the file was trained with."),
                SubjectDiffusionType.Input("subject_diffusion", tooltip="From Load Subject-Diffusion."),
                SubjectsType.Input(
                    "subjects", tooltip="From Subject; as many as the file knows, two if it does not say."
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="With every subject's word in it; the rest is added by itself.",
                ),
                io.String.Input(
                    "negative_prompt", default="", multiline=True, tooltip="What is guided away from; often nothing."
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="To the sampler or to Subject Guider."),
                io.Conditioning.Output(display_name="positive", tooltip="Prompt and subjects."),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The negative prompt, with the subjects left out as in training."
                ),
                io.Conditioning.Output(
                    display_name="subjects only", tooltip="The subjects without the prompt: to Subject Guider."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        clip_vision,
        subject_diffusion: SubjectFile,
        subjects: Sequence[OneSubject],
        prompt: str,
        negative_prompt: str = "",
    ) -> io.NodeOutput:
        file = subject_diffusion
        check_base(model, file.tensors.about, file.name, exactly=False)
        check_subjects(prompt, [(one.word, one.box) for one in subjects], file.tensors.most, file.name)
        if has_subjects(model):
            raise PersonalizeError(
                "The model comes from another Apply Subject-Diffusion: connect the plain one here, and all subjects, one Subject "
                "to the next."
            )
        parts = SubjectParts(file.tensors.parts)
        layers = layers_of(model, parts, file.name)
        pooled, patches = look_at(clip_vision, subjects, parts, file.name)
        patched, text = with_weights(model, clip, file.tensors, file.name)
        patched.set_model_input_block_patch(located)
        words = None if CLS in file.tensors.without else parts.word(pooled)
        positive = encode(text, fused_prompt(prompt, [one.word for one in subjects]), words)
        negative, empty = (text.encode_from_tokens_scheduled(text.tokenize(own)) for own in (negative_prompt, ""))
        shown = told_of(subjects, patches, parts, file.tensors)
        nobody, patcher = Told(torch.zeros_like(shown.objects), None), patcher_of(parts, layers)
        conditionings = (positive, shown), (negative, nobody), (empty, shown)
        return io.NodeOutput(patched, *(with_subjects(cond, patcher, told) for cond, told in conditionings))


def layers_of(model: Any, parts: SubjectParts, name: str) -> list[Layer]:
    """The model's blocks in the order of the adapters. Raises PersonalizeError where it has others."""
    layout, _ = unet_layout(model, "Subject-Diffusion")
    layers = layout.file_order()
    if len(layers) != len(parts.adapters):
        raise PersonalizeError(
            f"{name} has {len(parts.adapters)} adapters, but this model has {len(layers)} blocks for them: it was trained "
            "on another base."
        )
    return layers


def told_of(subjects: Sequence[OneSubject], patches: Tensor, parts: SubjectParts, file: SubjectTensors) -> Told:
    """What a conditioning says of subjects, whose patch tokens are [n, T, H]; of missing ones what was learned."""
    boxes = torch.tensor([one.box for one in subjects])
    given = slots(patches, torch.zeros_like(boxes) if BOXES in file.without else boxes, file.most)
    return Told(parts.objects(*(part[None] for part in given)), boxes)


def with_subjects(cond: Any, patcher: ModelPatcher, told: Told) -> Any:
    """CONDITIONING that brings its subjects with it, as the host knows GLIGEN."""
    return node_helpers.conditioning_set_values(cond, {"gligen": ("position", patcher, told)})


def look_of(one: OneSubject, size: int) -> Tensor:
    """A subject as the trainer shows it to the encoder: alone on white, [size, size, 3]."""
    return on_ground(cut_out(one.image, subject_region(one.image, one.mask)), size)


def look_at(clip_vision: Any, subjects: Sequence[OneSubject], parts: SubjectParts, name: str) -> tuple[Tensor, Tensor]:
    """CLS features [n, D] and the last layer's patch tokens [n, T, H]."""
    size = input_size(clip_vision)
    seen = torch.stack([look_of(one, size) for one in subjects])
    with torch.no_grad():
        output = clip_vision.encode_image(seen)
    pooled, patches = output["image_embeds"].float().cpu(), output["last_hidden_state"].float().cpu()[:, 1:]
    wanted, found = tuple(parts.objects.null_features.shape), tuple(patches.shape[1:])
    if wanted != found or pooled.shape[1] != parts.word.norm.weight.shape[0]:
        raise PersonalizeError(
            f"{name} takes {wanted[0]} image tokens of width {wanted[1]}, but this image encoder gives {found[0]} of width "
            f"{found[1]}: use the one that it was trained with."
        )
    return pooled, patches


def encode(clip: Any, prompt: str, words: Tensor | None) -> Any:
    """A prompt whose placeholders are vectors, [n, width], in the order in which they come; None: the placeholder's own."""
    tokens = clip.tokenize(prompt)
    if words is None:
        return clip.encode_from_tokens_scheduled(tokens)
    (name,) = tokens.keys()
    places = iter(words)
    number = placeholder_of(clip)
    found = sum(entry[0] == number for window in tokens[name] for entry in window)
    if found != len(words):
        raise PersonalizeError(
            f"The prompt has {found} of {len(words)} placeholders: its end, which names the subjects, is cut off: write a shorter one."
        )
    windows = [
        [(next(places) if entry[0] == number else entry[0], *entry[1:]) for entry in window] for window in tokens[name]
    ]
    return clip.encode_from_tokens_scheduled({name: windows})


def placeholder_of(clip: Any) -> Any:
    """The placeholder's number in a CLIP."""
    return tokens_of(clip.tokenize(PLACEHOLDER))[1]


class SubjectGuider(Guider):
    """e_0 + s_i (e_img - e_0) + s_t (e_txt - e_img); the host's pre- and post-CFG functions as in its own guider."""

    scales: tuple[float, float] = (IMAGE_SCALE, TEXT_SCALE)

    def set_three(self, positive: Any, image: Any, negative: Any, image_cfg: float, text_cfg: float) -> None:
        """Args:
        positive: CONDITIONING of prompt and subjects.
        image: of the subjects alone.
        negative: of neither.
        image_cfg, text_cfg: s_i and s_t.
        """
        self.scales = image_cfg, text_cfg
        self.inner_set_conds({"positive": positive, "negative": negative, "image": image})
        self.set_cfg(text_cfg)

    def predict_noise(self, x, timestep, model_options: dict[str, Any] | None = None, seed=None):
        """Denoised [B, C, H, W]."""
        conds = [self.conds[name] for name in ("positive", "negative", "image")]
        (text, nothing, image), common = self.predictions(conds, x, timestep, model_options or {})
        done = three_way(nothing, image, text, *self.scales)
        told = {"cond_denoised": text, "uncond_denoised": nothing, "cond_scale": self.cfg, **common}
        return self.finished(done, conds, told)


class GuideSubjects(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeSubjectGuider",
            display_name="Subject Guider",
            description="Guides by the prompt and by the subjects of Apply Subject-Diffusion, each at its own scale.",
            search_aliases=["subject diffusion", "three way guidance", "dual cfg"],
            inputs=[
                io.Model.Input("model", tooltip="From Apply Subject-Diffusion."),
                io.Conditioning.Input("positive", tooltip="From Apply Subject-Diffusion."),
                io.Conditioning.Input("negative", tooltip="From Apply Subject-Diffusion."),
                io.Conditioning.Input(
                    "subjects_only", display_name="subjects only", tooltip="From Apply Subject-Diffusion."
                ),
                io.Float.Input(
                    "text_cfg",
                    **CFG,
                    default=TEXT_SCALE,
                    tooltip="How much the prompt guides: 7.5 for SD1.5.",
                ),
                io.Float.Input(
                    "subject_cfg",
                    **CFG,
                    default=IMAGE_SCALE,
                    tooltip="How much the subjects guide: more holds closer to their pictures.",
                ),
            ],
            outputs=[io.Guider.Output(tooltip="To SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, subjects_only, text_cfg, subject_cfg) -> io.NodeOutput:
        if not has_subjects(model):
            raise PersonalizeError(
                "The model does not come from Apply Subject-Diffusion: connect its MODEL, positive, negative and subjects only "
                "here."
            )
        guider = SubjectGuider(model)
        guider.set_three(positive, subjects_only, negative, subject_cfg, text_cfg)
        return io.NodeOutput(guider)
