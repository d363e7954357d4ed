"""Composable Diffusion: a guider for several prompts joined by AND and NOT, in one batched model call."""

import math
from collections.abc import Sequence
from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.composable_diffusion import compose, parse_concepts, parse_scales
from ..models.errors import PersonalizeError
from .guiding import Guider
from .pictures import number_of
from .schema import CFG, Node, schema

_LIMITS = {"area", "mask", "timestep_start", "timestep_end"}
"""What keeps a conditioning from a part of the picture or of the steps."""
_CFG = {**CFG, "default": 7.5, "tooltip": "The guidance scale of a concept of weight 1."}
_MODEL = "Any model that is guided by cfg."
_AWAY = "What all concepts are guided away from, often an empty prompt."


class ComposableGuider(Guider):
    """eps_u + sum_i cfg w_i (eps_i - eps_u), each concept where its areas, masks and steps let it."""

    weights: tuple[float, ...]

    def set_concepts(self, concepts: Sequence[Any], weights: Sequence[float], negative: Any) -> None:
        """Args:
        concepts: CONDITIONING of each.
        weights: w_i.
        negative: CONDITIONING of u.
        """
        self.weights = tuple(weights)
        rest = {f"positive {i + 2}": concept for i, concept in enumerate(concepts[1:])}
        self.inner_set_conds({"positive": concepts[0], "negative": negative, **rest})

    def predict_noise(self, x, timestep, model_options: dict[str, Any] | None = None, seed=None):
        """Denoised [B, C, H, W], by one call for all concepts."""
        options = model_options or {}
        scales = [self.cfg * weight for weight in self.weights]
        # The first concept is 0 and the negative prompt is 1, as in the host's own guider.
        conds = [self.conds["positive"], self.conds["negative"]]
        conds += [self.conds[f"positive {i + 2}"] for i in range(len(scales) - 1)]
        if len(scales) == 1 and math.isclose(scales[0], 1.0) and not options.get("disable_cfg1_optimization", False):
            conds[1] = None  # it would count for nothing
        out, common = self.predictions(conds, x, timestep, options)
        u = out[1]
        sides = [out[0], *out[2:]]
        own = [conds[0], *conds[2:]]
        sides = [within(side, u, cond, x, timestep) for side, cond in zip(sides, own, strict=True)]
        # What a single concept would have to be for guidance to give the same: what the host's functions get.
        whole = sides[0] if self.weights == (1.0,) else compose(u, sides, self.weights)
        told = {"cond_denoised": whole, "uncond_denoised": u, "cond_scale": self.cfg, **common}
        if "sampler_cfg_function" in options:
            arguments = {"cond": x - whole, "uncond": x - u, "timestep": timestep, **told}
            done = x - options["sampler_cfg_function"](arguments | {"input_cond": conds[0], "input_uncond": conds[1]})
        else:
            done = compose(u, sides, scales)
        return self.finished(done, conds, told)


def within(side: Tensor, negative: Tensor, conds: Sequence[dict[str, Any]], x: Tensor, timestep: Tensor) -> Tensor:
    """A concept's prediction, and the negative prompt's where none of the concept's conditionings acts.

    Where they act by halves, as at the edge of an area or of a soft mask, it is between the two.
    """
    if any(not _LIMITS & cond.keys() and cond.get("strength", 1.0) >= 1 for cond in conds):
        return side
    covered = torch.zeros_like(x)
    for cond in conds:
        acting = comfy.samplers.get_area_and_mult(cond, x, timestep)
        if acting is None:
            continue
        part = covered
        if acting.area is not None:
            count = len(acting.area) // 2
            for i in range(count):
                part = part.narrow(i + 2, acting.area[count + i], acting.area[i])
        part += acting.mult
    return torch.lerp(negative, side, covered.clamp(0, 1))


class ComposeConcepts(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        concept = io.Conditioning.Input(
            "concept", tooltip="It may have its own area, mask, range of steps or ControlNet."
        )
        return schema(
            node_id="PersonalizeComposeConcepts",
            display_name="Compose Concepts",
            description="Guides by several conditionings at once, each at its own weight (Composable Diffusion, Liu "
            "et al. 2022).",
            search_aliases=["composable diffusion", "AND", "NOT", "conditioning combine"],
            inputs=[
                io.Model.Input("model", tooltip=_MODEL),
                io.Autogrow.Input(
                    "concepts",
                    template=io.Autogrow.TemplatePrefix(concept, prefix="concept", min=0, max=20),
                    tooltip="What the picture shows, a conditioning each; a new input appears as you connect one.",
                ),
                io.Conditioning.Input("negative", tooltip=_AWAY),
                io.String.Input(
                    "weights",
                    default="",
                    placeholder="1, 0.8, -1 ...",
                    tooltip="Of each concept in order, times cfg, such as 1, 0.8, -1. Empty: all 1. A negative one is "
                    "NOT: it keeps the concept away.",
                ),
                io.Float.Input("cfg", **_CFG),
            ],
            outputs=[io.Guider.Output(tooltip="To SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, negative, concepts=None, weights="", cfg=7.5) -> io.NodeOutput:
        given = {name: value for name, value in (concepts or {}).items() if value is not None}
        ordered = sorted(given, key=number_of)
        if not ordered:
            raise PersonalizeError("There are no concepts: connect a conditioning to Compose Concepts.")
        scales = parse_scales(weights, len(ordered))
        return io.NodeOutput(_guider(model, [given[name] for name in ordered], scales, negative, cfg))


class ComposePrompt(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeComposePrompt",
            display_name="Compose Prompt",
            description="Guides by several concepts at once, written in one text (Composable Diffusion, Liu et al. "
            "2022).",
            search_aliases=["composable diffusion", "AND", "NOT", "prompt"],
            inputs=[
                io.Model.Input("model", tooltip=_MODEL),
                io.Clip.Input("clip", tooltip="Reads the concepts, each by itself."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="AND (in capitals) or | joins concepts, NOT before one keeps it away, :0.8 behind one is its "
                    "weight: a red cat AND a blue dog :0.8 AND NOT rain.",
                ),
                io.Conditioning.Input("negative", tooltip=_AWAY),
                io.Float.Input("cfg", **_CFG),
            ],
            outputs=[
                io.Guider.Output(tooltip="To SamplerCustomAdvanced."),
                io.String.Output(
                    display_name="concepts", tooltip="How the text was understood, a line for each concept."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, clip, text, negative, cfg=7.5) -> io.NodeOutput:
        concepts = parse_concepts(text)
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(concept.text)) for concept in concepts]
        guider = _guider(model, encoded, [concept.weight for concept in concepts], negative, cfg)
        lines = "\n".join(f"{concept.weight:g}: {concept.text}" for concept in concepts)
        return io.NodeOutput(guider, lines, ui={"text": (lines,)})


def _guider(model, concepts: Sequence[Any], weights: Sequence[float], negative, cfg: float) -> ComposableGuider:
    guider = ComposableGuider(model)
    guider.set_concepts(concepts, weights, negative)
    guider.set_cfg(cfg)
    return guider
