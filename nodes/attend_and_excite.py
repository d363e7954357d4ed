"""Attend-and-Excite: every chosen word of the prompt gets its place in the picture."""

import uuid

import node_helpers
from comfy_api.latest import io

from ..models.attend_and_excite import Excitement, parse_thresholds, pick_level
from ..models.errors import PersonalizeError
from ..models.words import find_words, parse_words
from .attention_capture import LEVELS, layer_levels
from .excitation import KEY, Excitation
from .prompt_words import phrases_of, tokens_of, words_of
from .schema import ADVANCED, Node, schema
from .subject_network import has_subjects

PAPER = Excitement()


class AttendAndExcite(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeAttendAndExcite",
            display_name="Attend-and-Excite",
            description="Moves the latent while it is sampled so that every chosen word of the prompt is in the picture.",
            search_aliases=["attend and excite", "excite", "missing subject", "two subjects", "attribute binding"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="SD1.5 or SDXL, with LoRA, IP-Adapter and other patches before or after."
                ),
                io.Clip.Input("clip", tooltip="The text encoders, which read the prompt."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The whole prompt: a blue cat and a yellow bowl.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    placeholder="cat, bowl",
                    tooltip="The words that must be in the picture, for example cat, bowl. Quotes hold a phrase together: "
                    '"coffee cup". Empty: nothing is moved.',
                ),
                io.Int.Input(
                    "steps",
                    default=PAPER.steps,
                    min=0,
                    max=1000,
                    tooltip="The latent is moved before the first so many steps.",
                    extra_dict=ADVANCED,
                ),
                io.String.Input(
                    "thresholds",
                    default=", ".join(f"{step}:{value:g}" for step, value in PAPER.thresholds.items()),
                    tooltip="At step 0 every word's attention must reach 0.05, at 10 0.5, at 20 0.8: there the latent is moved "
                    "again and again.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "scale",
                    default=PAPER.scale,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    tooltip="How far each move of the latent goes.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "refinements",
                    default=PAPER.refinements,
                    min=0,
                    max=200,
                    tooltip="Moves at a threshold, at most.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "resolution",
                    options=list(LEVELS),
                    default="auto",
                    tooltip="Of the attention maps, as a share of the latent's sides. Auto: 1/4, as in the paper; the "
                    "finest where the model has none of that size.",
                    extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "low_memory",
                    default=False,
                    tooltip="Computes parts of the model twice instead of keeping them: slower, the same picture.",
                    extra_dict=ADVANCED,
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="Of this prompt, where another node has read it, as Apply Subject-Diffusion does: it is taken instead.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="To the sampler."),
                io.Conditioning.Output(tooltip="The prompt, to the sampler's positive input."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        prompt,
        words="",
        steps=PAPER.steps,
        thresholds="0:0.05, 10:0.5, 20:0.8",
        scale=PAPER.scale,
        refinements=PAPER.refinements,
        resolution="auto",
        low_memory=False,
        conditioning=None,
    ) -> io.NodeOutput:
        tokens = clip.tokenize(prompt)
        if conditioning is None and has_subjects(model):
            raise PersonalizeError(
                "The model comes from Apply Subject-Diffusion: connect that node's positive to conditioning, too, which "
                "brings the subjects."
            )
        if conditioning is None:
            conditioning = clip.encode_from_tokens_scheduled(tokens)
        wanted, settings = parse_words(words), Excitement(steps, parse_thresholds(thresholds), scale, refinements)
        levels = layer_levels(model, "Attend-and-Excite")
        level = pick_level(set(levels.values()), LEVELS[resolution])
        found = find_words(tokens_of(tokens), phrases_of(clip, wanted), words_of(prompt)) if wanted else []
        if not found or not (settings.steps or settings.thresholds):
            return io.NodeOutput(model, conditioning)
        mark = uuid.uuid4().hex
        layers = tuple(layer for layer, own in levels.items() if own == level)
        patched = Excitation(mark, found, settings, layers, low_memory).apply_to(model)
        return io.NodeOutput(patched, node_helpers.conditioning_set_values(conditioning, {KEY: mark}))
