"""What the image encoder sees of subjects: each alone, on white or on another picture, turned a little; kept on disk."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from transformers import CLIPVisionModelWithProjection

from .encoding import Cache, digest_of_path
from .image_encoder import CachedFeatures, encode
from .shared import CLIP_MEAN, CLIP_STD, on_ground
from .subject_data import SubjectPicture

BATCH = 32
TURN, DISTORTION = 10, 0.5
"""Degrees, and the strength of a perspective, which half of the views have; half are mirrored (the authors' code)."""


SubjectView = tuple[Path, int]
"""A subject's crop, and which view of it; 0 is the plain crop."""


class SubjectFeatures(CachedFeatures[SubjectView]):
    """The CLS feature [D] and the patch tokens [T, H] of each view of each subject."""

    def __init__(self, cache: Cache, encoder: CLIPVisionModelWithProjection, views: int, backgrounds: float):
        """Args:
        cache: on disk.
        encoder: on its device; it is not kept.
        views: changed ones, beside the plain crop.
        backgrounds: share of these that stand on another picture instead of on white.
        """
        super().__init__(cache, encoder)
        self.views, self.backgrounds, self.size = views, backgrounds, encoder.config.image_size

    def add(
        self,
        encoder: CLIPVisionModelWithProjection,
        pictures: Iterable[SubjectPicture],
        others: Sequence[SubjectPicture],
    ) -> None:
        """Encode what is not in the cache; `others` are what subjects may stand on."""
        waiting: list[tuple[SubjectView, Tensor]] = []
        for picture in pictures:
            for one in picture.subjects:
                crop = digest_of_path(one.crop)
                for view in range(self.views + 1):
                    rng = np.random.default_rng([int(crop[:16], 16), view])
                    behind = None
                    if view and others and rng.random() < self.backgrounds:
                        behind = others[int(rng.integers(len(others)))].path
                    key = {"subject": crop, "view": view, "encoder": self.digest}
                    key["behind"] = "" if behind is None else digest_of_path(behind)
                    self.keys[one.crop, view] = key
                    if self.find((one.crop, view)):
                        continue
                    waiting.append(((one.crop, view), look_of(one.crop, view, behind, rng, self.size)))
                    if len(waiting) == BATCH:
                        self._encode(encoder, waiting)
                        waiting.clear()
        if waiting:
            self._encode(encoder, waiting)

    def _encode(self, encoder: CLIPVisionModelWithProjection, waiting: Sequence[tuple[SubjectView, Tensor]]) -> None:
        pooled, patches = encode_subjects(encoder, torch.stack([seen for _, seen in waiting]))
        for (where, _), one, tokens in zip(waiting, pooled, patches, strict=True):
            self.store(where, {"pooled": one.clone(), "patches": tokens.clone()})

    def __getitem__(self, where: SubjectView) -> tuple[Tensor, Tensor]:
        found = self.tensors(where)
        return found["pooled"], found["patches"]


def encode_subjects(encoder: CLIPVisionModelWithProjection, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The CLS features [n, D] and the last layer's patch tokens [n, T, H] of [n, 3, size, size], on the CPU."""
    pooled, states = encode(encoder, seen, layer=-1)
    return pooled, states[:, 1:]


def look_of(crop: Path, view: int, behind: Path | None, rng: np.random.Generator, size: int) -> Tensor:
    """One view of a subject as the encoder takes it, [3, size, size]."""
    with Image.open(crop) as file:
        planes = v2.functional.pil_to_tensor(file.convert("RGBA")).float() / 255
    planes[:3] *= planes[3:]  # so that what is outside of the subject does not run into it
    if view:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**62)))
            planes = _turned(planes)
    ground = None if behind is None else _ground(behind, rng, size)
    seen = on_ground(planes.movedim(0, 2), size, ground)
    return ((seen - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).movedim(2, 0)


def _turned(planes: Tensor) -> Tensor:
    """Mirrored, turned and seen aslant, at random; what comes in from outside is not the subject's."""
    change = v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.RandomRotation(TURN, InterpolationMode.BILINEAR),
            v2.RandomPerspective(DISTORTION, 0.5, InterpolationMode.BILINEAR),
        ]
    )
    return change(planes)


def _ground(path: Path, rng: np.random.Generator, size: int) -> Tensor:
    """A random square of a picture, [size, size, 3]."""
    picture = Image.open(path).convert("RGB")
    side = round(min(picture.size) * rng.uniform(0.5, 1))
    left, top = (int(rng.integers(whole - side + 1)) for whole in picture.size)
    square = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square, np.float32) / 255)
