"""Which word of the prompt went where: the maps of cross-attention, recorded while a picture is sampled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import numpy as np
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..models.attend_and_excite import cross_attention_maps, pick_level
from ..models.blocks import Layer
from ..models.errors import PersonalizeError, plural
from ..models.pictures import cover_picture, same_aspect
from ..models.words import find_words, parse_words
from .attention_capture import LEVELS, LOOK, layer_levels, looking, resolution_input, wrapped
from .pictures import as_tensor
from .prompt_words import phrases_of, tokens_of, words_of
from .schema import ADVANCED, AttentionMapsType, Node, schema

KEY = "personalize_attention_maps"
AVERAGE, EACH_STEP = "average", "each step"
LABEL, GAP = 20, 4  # pixels: of a word below its map, between maps
HEAT = ((0.0, (20, 11, 53)), (0.35, (133, 33, 107)), (0.7, (237, 105, 37)), (1.0, (252, 255, 164)))
SHOWN = 0.75  # of the map's colour over the picture, where the attention is strongest


@dataclass
class AttentionRecord:
    """The maps of one run of a sampler; the next run with the same MODEL takes their place."""

    layers: tuple[Layer, ...]
    """In the order they run."""
    steps: list[dict[UUID, Tensor]] = field(default_factory=list)
    """Of each noise level, for each positive conditioning: the mean over heads and layers, [pictures, h, w, T]."""
    order: tuple[UUID, ...] = ()
    """The positive conditionings."""
    sigma: float | None = None

    def apply_to(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of the model that is recorded here."""
        return wrapped(model, KEY, self.around_sampler, self.around_unet)

    def around_sampler(self, executor, guider, *args, **kwargs):
        """Begin anew."""
        self.steps, self.sigma = [], None
        whole = [
            cond["uuid"]
            for name, conds in guider.conds.items()
            for cond in conds or ()
            if "negative" not in name and "uuid" in cond and cond.get("area") is None
        ]
        self.order = tuple(dict.fromkeys(whole))
        return executor(guider, *args, **kwargs)

    def around_unet(
        self, executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs
    ):
        """One model call."""
        options = dict(transformer_options or {})
        uuids = options.get("uuids", ())
        places = {uuid: i for i, uuid in enumerate(uuids) if uuid in self.order}
        if places and not options.get(LOOK):
            pictures = x.shape[0] // len(uuids)
            sums = dict[UUID, Tensor]()

            def keep(layer: Layer, q: Tensor, k: Tensor, own: Mapping[str, Any]) -> None:
                rows, columns = own["activations_shape"][-2:]
                for uuid, place in places.items():
                    part = slice(place * pictures, (place + 1) * pictures)
                    maps = cross_attention_maps(q[part], k[part], own["n_heads"]).mean(1)
                    maps = rearrange(maps, "b (h w) t -> b h w t", h=rows, w=columns)
                    sums[uuid] = maps if uuid not in sums else sums[uuid] + maps
                if layer == self.layers[-1]:
                    self._add(float(options["sigmas"][0]), {u: (m / len(self.layers)).cpu() for u, m in sums.items()})

            options["patches_replace"] = looking(options, self.layers, keep)
        return executor(x, timesteps, context, y, control, options, **kwargs)

    def _add(self, sigma: float, maps: dict[UUID, Tensor]) -> None:
        if sigma != self.sigma:
            self.steps.append({})
            self.sigma = sigma
        self.steps[-1].update(maps)

    def of(self, number: int) -> Tensor:
        """The maps of one positive conditioning, [steps, pictures, h, w, T].

        Raises:
            PersonalizeError: there are none.
        """
        if not self.steps:
            raise PersonalizeError(
                "No attention maps were recorded: connect the MODEL of Record Attention Maps to the sampler that makes "
                "the image."
            )
        seen = [uuid for uuid in self.order if any(uuid in step for step in self.steps)]
        if number > len(seen):
            raise PersonalizeError(f"There are attention maps of {plural(len(seen), 'conditioning')}, not of {number}.")
        return torch.stack([step[seen[number - 1]] for step in self.steps if seen[number - 1] in step])


class RecordAttentionMaps(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeRecordAttentionMaps",
            display_name="Record Attention Maps",
            description="Keeps the cross-attention maps of the next sampling: which part of the picture looked at "
            "which word. The picture is the same, bit for bit.",
            search_aliases=["cross attention", "daam", "heat map", "which word"],
            inputs=[
                io.Model.Input("model", tooltip="SD1.5, SD2 or SDXL, with whatever patches."),
                resolution_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="To the sampler."),
                AttentionMapsType.Output(
                    display_name="maps", tooltip="To Show Attention Maps, with the sampled picture."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, resolution="auto") -> io.NodeOutput:
        levels = layer_levels(model, "Record Attention Maps")
        level = pick_level(set(levels.values()), LEVELS[resolution])
        record = AttentionRecord(tuple(layer for layer, own in levels.items() if own == level))
        return io.NodeOutput(record.apply_to(model), record)


class ShowAttentionMaps(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PersonalizeShowAttentionMaps",
            display_name="Show Attention Maps",
            description="Shows over the picture where each word of the prompt was looked at. Each word has a scale "
            "of its own: bright is where it was looked at most.",
            search_aliases=["cross attention", "daam", "heat map", "which word"],
            inputs=[
                AttentionMapsType.Input("maps", tooltip="From Record Attention Maps."),
                io.Image.Input("image", tooltip="The picture that was sampled with the recorded model."),
                io.Clip.Input("clip", tooltip="The text encoders that read the prompt."),
                io.String.Input(
                    "prompt", multiline=True, dynamic_prompts=True, tooltip="The positive prompt, as it was."
                ),
                io.String.Input(
                    "words",
                    default="",
                    placeholder="cat, bowl",
                    tooltip='Whose maps are shown, for example cat, "coffee cup". Empty: every word of the prompt.',
                ),
                io.Combo.Input(
                    "show",
                    options=[AVERAGE, EACH_STEP],
                    default=AVERAGE,
                    tooltip="One map for each word, or a row of them for each step.",
                ),
                io.Int.Input(
                    "conditioning",
                    default=1,
                    min=1,
                    max=100,
                    tooltip="Which positive conditioning, counted from 1, where the sampler gets several: combined ones, or the "
                    "concepts of Compose Concepts.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="sheets",
                    tooltip="For each picture a column for each word, and a row, or one for each step.",
                ),
                io.Mask.Output(
                    display_name="maps",
                    tooltip="Masks from 0 to 1 in the picture's size: for each picture, step and word, in this order.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, maps: AttentionRecord, image, clip, prompt, words="", show=AVERAGE, conditioning=1
    ) -> io.NodeOutput:
        recorded = maps.of(conditioning)
        names = parse_words(words) or list(dict.fromkeys(words_of(prompt)))
        found = word_maps(recorded, places_of_words(clip, prompt, names))
        if show == AVERAGE:
            found = found.mean(0, keepdim=True)
        count, (height, width) = image.shape[0], image.shape[1:3]
        rows, columns = found.shape[-2:]
        if found.shape[1] != count or not same_aspect(rows, columns, height, width):
            raise PersonalizeError(
                f"The attention maps are of {plural(found.shape[1], 'picture')} of {columns}:{rows}, but the image "
                f"is {count} of "
                f"{width}x{height}: connect the picture that was sampled with the recorded model."
            )
        scaled = found / found.amax((0, 3, 4), keepdim=True).clamp(min=1e-12)  # of each picture and word over its steps
        large = F.interpolate(scaled.flatten(0, 2)[:, None], (height, width), mode="bicubic").clamp(0, 1)
        large = large.reshape(*scaled.shape[:3], height, width).transpose(0, 1)  # [pictures, steps, words, H, W]
        sheets = torch.stack([draw_sheet(one, own, names) for one, own in zip(image, large, strict=True)])
        return io.NodeOutput(sheets, large.flatten(0, 2))


def places_of_words(clip, prompt: str, names: Sequence[str]) -> list[list[int]]:
    """All tokens of each word or phrase in a prompt.

    Raises:
        PersonalizeError: the prompt has no words, or one is not in it.
    """
    if not names:
        raise PersonalizeError("The prompt has no words: write the one that was sampled.")
    tokens, listed = tokens_of(clip.tokenize(prompt)), words_of(prompt)
    find_words(tokens, phrases_of(clip, names), listed)  # one message for all that are missing
    return [
        [place for places in find_words(tokens, phrases_of(clip, [name]), listed) for place in places] for name in names
    ]


def word_maps(recorded: Tensor, places: Sequence[Sequence[int]]) -> Tensor:
    """[steps, pictures, h, w, T] -> [steps, pictures, words, h, w], the mean of each word's tokens."""
    if max(max(own) for own in places) >= recorded.shape[-1]:
        raise PersonalizeError("The recorded prompt is shorter than this one: give the prompt that was sampled.")
    return torch.stack([recorded[..., list(own)].mean(-1) for own in places], dim=2)


def draw_sheet(picture: Tensor, maps: Tensor, names: Sequence[str]) -> Tensor:
    """A picture [H, W, 3] under maps [steps, words, H, W], a row for each step: [h, w, 3]."""
    height, width = picture.shape[:2]
    scale = max(1, -(-128 // min(height, width)))  # so that words can be read
    size = (height * scale, width * scale)
    under = np.asarray(cover_picture(picture[..., :3].float().cpu(), *size))
    large = F.interpolate(maps[:, :, None].flatten(0, 1).float().cpu(), size, mode="bilinear").reshape(
        *maps.shape[:2], *size
    )
    sheet = Image.new(
        "RGB",
        (len(names) * (size[1] + GAP) + GAP, len(maps) * (size[0] + GAP) + GAP + LABEL),
        "white",
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for row, own in enumerate(large.numpy()):
        for column, heat in enumerate(own):
            shown = under * (1 - SHOWN * heat[..., None]) + _coloured(heat) * SHOWN * heat[..., None]
            tile = Image.fromarray((shown.clip(0, 1) * 255).round().astype(np.uint8))
            sheet.paste(tile, (GAP + column * (size[1] + GAP), GAP + row * (size[0] + GAP)))
    for column, name in enumerate(names):
        middle = GAP + column * (size[1] + GAP) + size[1] / 2
        pen.text((middle, sheet.height - LABEL), name, fill=(30, 30, 36), font=font, anchor="ma")
    return as_tensor(sheet)[0]


def _coloured(heat: np.ndarray) -> np.ndarray:
    """[H, W], 0..1 -> RGB, 0..1."""
    stops = [stop for stop, _ in HEAT]
    return np.stack([np.interp(heat, stops, [colour[i] / 255 for _, colour in HEAT]) for i in range(3)], axis=-1)
