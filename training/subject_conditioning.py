"""What the network is told about the subjects of a picture in each step of Subject-Diffusion."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from .dataset import Example
from .denoising import generator_of
from .shared import (
    ADAPTER,
    BOXES,
    CLS,
    CONTROL,
    LOCATION,
    box_of,
    cover_picture,
    fused_prompt,
    localisation_loss,
)
from .subject_data import SubjectPicture
from .subject_features import SubjectFeatures
from .subject_network import AttentionWatch, Placeholders, SubjectNetwork

SUBJECTS = 2  # which of a picture's generators in a step
NOUN_BEFORE = 2
"""Tokens from a placeholder back to its noun: "the dog is sks"."""


@dataclass(frozen=True)
class Dropout:
    """Shares of steps without the text, without the location and the subjects, without all: for guidance."""

    text: float
    subjects: float
    both: float


@dataclass(frozen=True)
class Place:
    """Where a subject is in its picture as the training frames it."""

    box: Tensor
    """[4], shares."""
    mask: Tensor
    """[H, W], 1 where it is."""


def places_of(picture: SubjectPicture, size: tuple[int, int]) -> tuple[Place, ...]:
    """The subjects' masks and boxes in a picture that was brought to a size; of one that is cut off, an empty box."""
    found = []
    for one in picture.subjects:
        mask = torch.from_numpy(np.asarray(Image.open(one.mask).convert("L"), np.float32) / 255)
        framed = cover_picture(mask[..., None], *size)[..., 0] > 0.5
        box = torch.zeros(4)
        if bool(framed.any()):
            left, top, right, bottom = box_of(framed)
            box = torch.tensor([left / size[1], top / size[0], right / size[1], bottom / size[0]])
        found.append(Place(box, framed.float()))
    return tuple(found)


class SubjectConditioning:
    """Tells the UNet and the text encoder of the subjects, and draws attention to where they are."""

    def __init__(
        self,
        network: SubjectNetwork,
        unet: UNet2DConditionModel,
        placeholders: Placeholders,
        features: SubjectFeatures,
        pictures: Mapping[Path, SubjectPicture],
        most: int,
        dropout: Dropout,
        control: tuple[str, float],
        without: Sequence[str],
        places_of_tokens: Mapping[str, Sequence[int]],
        sizes: Mapping[Path, tuple[int, int]],
        scale: int,
        seed: int,
    ):
        """Args:
        network: which trains, attached to the UNet.
        unet: on its device.
        placeholders: of the text encoder.
        features: of all subjects.
        pictures: by the path of the picture.
        most: subjects of a picture.
        dropout: how often what is left out.
        control: which attention control, and its weight.
        without: of models.subject_diffusion.PARTS.
        places_of_tokens: of each caption the places of its placeholders.
        sizes: that pictures are brought to, height and width in pixels.
        scale: pixels of a latent.
        seed: of the run.
        """
        self.network, self.unet, self.placeholders, self.features = network, unet, placeholders, features
        self.pictures, self.most, self.dropout, self.control = pictures, most, dropout, control
        self.without, self.tokens, self.scale, self.seed = set(without), places_of_tokens, scale, seed
        self.sizes = sizes
        self.places: dict[Example, tuple[Place, ...]] = {}
        self.watch = AttentionWatch(unet)
        self.told: list[bool] = []
        self.material = {"image encoder": features.digest, "subjects": str(sorted(self.without))}

    def _places(self, example: Example) -> tuple[Place, ...]:
        if example not in self.places:
            self.places[example] = places_of(self.pictures[example.path], example.size)[: self.most]
        return self.places[example]

    def early_loss(self, examples: Sequence[Example], number: int, places: Sequence[int]) -> Tensor | None:
        """Nothing is learned without the UNet."""
        return None

    def tell(self, examples: Sequence[Example], number: int, places: Sequence[int]) -> list[bool]:
        """Give the UNet and the text encoder a batch's subjects; returns of each picture whether it gets its caption."""
        text, subjects, views = [], [], []
        for place in places:
            generator = generator_of(self.seed, number, place, SUBJECTS)
            fate = float(torch.rand((), generator=generator)) if number >= 0 else 1.0  # below 0 it is measured
            drop = self.dropout
            text.append(fate >= drop.text + drop.both)
            subjects.append(not drop.text <= fate < drop.text + drop.both + drop.subjects)
            changed = number >= 0 and self.features.views > 0
            least, most = (1, self.features.views) if changed else (0, 0)
            views.append(torch.randint(least, most + 1, (self.most,), generator=generator).tolist())
        self.told = text
        self._show(examples, subjects, text, views)
        if CONTROL not in self.without and number >= 0:
            self.watch.on(self.unet, [side // self.scale for side in examples[0].size])
        else:
            self.watch.off(self.unet)
        return text

    def _show(
        self,
        examples: Sequence[Example],
        subjects: Sequence[bool],
        text: Sequence[bool],
        views: Sequence[Sequence[int]],
    ) -> None:
        """Everything about the subjects of a batch, on the network's device."""
        most, network = self.most, self.network
        pictures = [self.pictures[example.path].subjects[:most] for example in examples]
        features = [
            [self.features[one.crop, view] for one, view in zip(own, seen, strict=False)]
            for own, seen in zip(pictures, views, strict=True)
        ]
        boxes = [torch.stack([place.box for place in self._places(example)]) for example in examples]
        objects, location = network.shown(
            features, boxes, most, examples[0].size, self.scale, placed=BOXES not in self.without
        )
        kept = torch.tensor(subjects, device=objects.device).to(objects.dtype)[:, None, None]
        network.seen = None if ADAPTER in self.without else objects * kept
        network.conv_in.mask = None if LOCATION in self.without else location * kept[..., None]
        spoken = [own for own, whether in zip(features, text, strict=True) if whether and CLS not in self.without]
        self.placeholders.vectors = network.vectors(spoken)

    def loss_beside(self, examples: Sequence[Example], number: int, places: Sequence[int]) -> Tensor | None:
        """Attention control: at each subject's placeholder and at its noun, of pictures that have their captions."""
        if not self.watch.maps:
            return None
        device = self.network.conv_in.weight.device
        masks, words, there = [], [], []
        for example, spoken in zip(examples, self.told, strict=True):
            known = self._places(example)
            tokens = list(self.tokens[example.captions[0]])[: self.most]
            empty = [torch.zeros(*example.size)] * (self.most - len(known))
            masks.append(torch.stack([place.mask for place in known] + empty).repeat(2, 1, 1))
            padded = tokens + [0] * (self.most - len(tokens))
            words.append(padded + [max(0, token - NOUN_BEFORE) for token in padded])
            there.append([spoken and i < len(tokens) for i in range(self.most)] * 2)
        given = torch.stack(masks).to(device), torch.tensor(words, device=device), torch.tensor(there, device=device)
        kind, weight = self.control
        losses = [localisation_loss(maps, *given, kind) for maps in self.watch.maps]
        return weight * torch.stack(losses).mean()

    @contextmanager
    def showing(self, references: Sequence[Path]) -> Iterator[None]:
        """For a guided batch, [without, with], of one picture: until the end of the block the network is told of its subjects.

        Args:
            references: the picture, a single one.
        """
        (path,) = references
        picture = self.pictures[path]
        example = Example(path, (picture.text,), self.sizes[path])
        before = self.network.seen, self.network.conv_in.mask, self.placeholders.vectors
        with torch.no_grad():
            self.watch.off(self.unet)
            self._show([example], [True], [True], [[0] * self.most])
            for what, holder in (("seen", self.network), ("mask", self.network.conv_in)):
                value = getattr(holder, what)
                setattr(holder, what, None if value is None else torch.cat([torch.zeros_like(value), value]))
        try:
            yield
        finally:
            self.network.seen, self.network.conv_in.mask, self.placeholders.vectors = before

    def frame(self, references: Sequence[Path], resolution: int) -> tuple[int, int]:
        """The picture's own, as it is trained on."""
        return self.sizes[references[0]]

    def said(self, references: Sequence[Path], prompt: str) -> str:
        """The prompt with the picture's subjects; `{entity}` in it is the first one's word."""
        words = [one.entity for path in references for one in self.pictures[path].subjects[: self.most]]
        return fused_prompt(prompt.replace("{entity}", words[0]), words)
