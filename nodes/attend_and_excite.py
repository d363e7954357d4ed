"""Attend-and-Excite: every chosen word of the prompt gets its place in the picture."""

import uuid

import node_helpers
from comfy_api.latest import io

from ..models.attend_and_excite import Excitement, parse_thresholds, pick_level
from ..models.errors import PersonalizeError
from ..models.words import find_words, parse_words
from .attention_capture import LEVELS, layer_levels, resolution_input
from .excitation import KEY, Excitation
from .prompt_words import phrases_of, tokens_of, words_of
from .schema import ADVANCED, Node, schema
from .subject_network import has_subjects

PAPER = Excitement()
THRESHOLDS = ", ".join(f"{step}:{value:g}" for step, value in PAPER.thresholds.items())


class AttendAndExcite(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeAttendAndExcite",
            display_name="Attend-and-Excite",
            description="Moves the latent in the first steps so that the most neglected of the chosen words is "
            "looked at more: for objects that the prompt lost (Attend-and-Excite, Chefer et al. 2023). Nothing is "
            "trained.",
            search_aliases=["attend and excite", "excite", "missing subject", "two subjects", "attribute binding"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="SD1.5, SD2 or SDXL; LoRA, IP-Adapter and other patches may come before or after."
                ),
                io.Clip.Input("clip", tooltip="The text encoders, which read the prompt."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The whole prompt, such as: a blue cat and a yellow bowl. Weights such as (cat:1.2) and more "
                    "than 77 tokens work.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    placeholder="cat, bowl",
                    tooltip="What must be in the picture, nouns at best, such as: cat, bowl. Quotes hold a phrase "
                    'together: "coffee cup". Empty: nothing is moved, and the picture is the same bit for bit.',
                ),
                io.Int.Input(
                    "steps",
                    default=PAPER.steps,
                    min=0,
                    max=1000,
                    tooltip="How many of the first sampling steps move the latent.",
                    extra_dict=ADVANCED,
                ),
                io.String.Input(
                    "thresholds",
                    default=THRESHOLDS,
                    tooltip="At these steps each word's attention must reach a value, 0.05 at step 0 and so on, and the "
                    "latent is moved until it does. Empty: none.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "scale",
                    default=PAPER.scale,
                    min=0.0,
                    max=1000.0,
                    step=0.5,
                    tooltip="How far a move goes: less if pictures look burnt, more if words stay lost.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "refinements",
                    default=PAPER.refinements,
                    min=0,
                    max=200,
                    tooltip="At most so many moves at a step whose threshold is not reached.",
                    extra_dict=ADVANCED,
                ),
                resolution_input(),
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
                io.Conditioning.Output(
                    tooltip="The prompt, to the sampler's positive input; areas, masks and ControlNet may be applied to "
                    "it."
                ),
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
        thresholds=THRESHOLDS,
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
