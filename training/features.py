"""Pictures as features: by the pocket judge, Inception, CLIP and DINO, each with its own preprocessing, once.

What a network says of a set of pictures is kept on disk by the bytes of the pictures and of the network, so that a second
measurement reads no picture.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from .base_model import is_hub_id
from .clip_tokenizer import clip_tokenizer
from .dataset import visible_picture
from .encoding import Cache, digest_of_path
from .pocket.device import DEVICE
from .shared import CLIP_MEAN, CLIP_STD, POCKET, PersonalizeError, read_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JOINT = ("kind", "clothes", "background")
"""Attributes whose values together are the judge's 648 classes, for IS."""
DOWNLOAD = "download"
VIT_TYPES = ("vit", "dinov2", "dinov2_with_registers")
VERSION = 1  # of the preprocessing: a change here makes old caches useless


class Eye(Protocol):
    """A network that looks at pictures."""

    def pictures(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        """Rows [n, ...] by name, of pictures [H, W, 3] in 0..1 of any sizes."""


@dataclass(frozen=True)
class Extractor:
    """A network that is loaded when something is not in the cache."""

    name: str
    """For the progress bar."""
    key: Mapping[str, Any]
    """What its numbers depend on, beside the pictures."""
    load: Callable[[], Eye]
    """Loads it; one that reads texts has `texts`, too."""
    cache: Cache
    batch_size: int

    @cached_property
    def eye(self) -> Any:
        """Loaded once."""
        return self.load()

    def pictures(self, paths: Sequence[Path], title: str) -> dict[str, Tensor]:
        """Rows by name of pictures in order; `title` is for the progress bar.

        Raises:
            PersonalizeError: the network cannot be loaded, or gives no finite numbers.
        """

        def see() -> dict[str, Tensor]:
            parts = []
            with tqdm(total=len(paths), desc=f"{self.name}, {title}", unit=" pictures", leave=False) as bar:
                for start in range(0, len(paths), self.batch_size):
                    batch = [visible_picture(path).pixels for path in paths[start : start + self.batch_size]]
                    parts.append(self.eye.pictures(batch))
                    bar.update(len(batch))
            return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}

        return self._kept({"pictures": [digest_of_path(path) for path in paths]}, see)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """[n, d] of texts in order; errors as in `pictures`."""

        def read() -> dict[str, Tensor]:
            starts = range(0, len(texts), self.batch_size)
            return {"texts": torch.cat([self.eye.texts(texts[i : i + self.batch_size]) for i in starts]).cpu()}

        return self._kept({"texts": list(texts)}, read)["texts"]

    def _kept(self, what: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        key = {**self.key, **what, "preprocessing": VERSION}
        stored = self.cache.get(key)
        if stored is None:
            with torch.no_grad():
                stored = make()
            if not all(bool(rows.isfinite().all()) for rows in stored.values()):
                raise PersonalizeError(f"{self.name} gives numbers that are not finite: its weights are damaged.")
            self.cache.put(key, stored)
        return stored


def _framed(pictures: Sequence[Tensor], size: int, crop: int) -> Tensor:
    """[n, 3, crop, crop] in 0..1: the shorter side to `size`, bicubic and antialiased, and the middle; rounded as
    torchvision does it."""
    squares = []
    for pixels in pictures:
        height, width = (int(size * side / min(pixels.shape[:2])) for side in pixels.shape[:2])
        x = pixels.permute(2, 0, 1)[None]
        if x.shape[-2:] != (height, width):
            x = interpolate(x, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = round((height - crop) / 2), round((width - crop) / 2)
        squares.append(x[0, :, top : top + crop, left : left + crop])
    return torch.stack(squares)


def _normalised(x: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    return ((x - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]).to(DEVICE)


class JudgeEye:
    """The pocket judge: features [n, 160] for FID, logits [n, 648] of JOINT for IS, who it is [n, 64], and what it sees
    [n, 26]."""

    def __init__(self) -> None:
        from .pocket.judge import NAMES
        from .pocket.shipped import load_judge

        self.judge, self.names = load_judge(), NAMES

    def pictures(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        features = self.judge.features(_framed(pictures, 64, 64) * 2 - 1)
        read = dict(zip(self.names, self.judge.read(features), strict=True))
        kind, clothes, background = (read[name].log_softmax(1) for name in JOINT)
        joint = kind[:, :, None, None] + clothes[:, None, :, None] + background[:, None, None, :]
        seen = torch.stack([logits.argmax(1) for logits in read.values()], 1)
        return {"features": features, "logits": joint.flatten(1), "who": self.judge.likeness(features), "seen": seen}


def judge(cache: Cache, batch_size: int) -> Extractor:
    """The shipped one."""
    from .pocket.files import JUDGE

    return Extractor("Judge", {"eye": "judge", "weights": digest_of_path(POCKET / JUDGE)}, JudgeEye, cache, batch_size)


class InceptionEye:
    """torch-fidelity's Inception: features [n, 2048] for FID and KID, logits [n, 1008] without bias for IS.

    It resizes as the original does, so that it gets each picture in its own size.
    """

    def __init__(self, weights: Path | None):
        """Args:
        weights: the file; None downloads torch-fidelity's own.

        Raises:
            PersonalizeError: the file has other weights, or the download fails.
        """
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if weights is not None:
            check_inception(weights)  # torch-fidelity unpickles whatever is in it: see that it is tensors only
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], None if weights is None else str(weights)
            ).to(DEVICE)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise PersonalizeError(f"{weights} (--inception_weights) does not fit the Inception: {reason}") from None
        except OSError as error:
            raise PersonalizeError(
                f"Inception's weights cannot be downloaded ({error}): name a file by --inception_weights."
            ) from None

    def pictures(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        eight_bit = [(pixels * 255).round().byte().permute(2, 0, 1) for pixels in pictures]
        one_size = len({picture.shape for picture in eight_bit}) == 1
        batches = [torch.stack(eight_bit)] if one_size else [picture[None] for picture in eight_bit]
        seen = [self.network(batch.to(DEVICE)) for batch in batches]
        return {"features": torch.cat([s[0] for s in seen]), "logits": torch.cat([s[1] for s in seen])}


def inception(weights: str, cache: Cache, batch_size: int) -> Extractor:
    """By a file of weights, or DOWNLOAD."""
    path = None if weights == DOWNLOAD else Path(weights).expanduser()
    key = {"eye": "inception", "weights": DOWNLOAD if path is None else digest_of_path(path), "device": DEVICE}
    return Extractor("Inception", key, lambda: InceptionEye(path), cache, batch_size)


def check_inception(weights: Path) -> None:
    """Look at a file of weights.

    Raises:
        PersonalizeError: it is missing, damaged, holds more than tensors, or is another network's.
    """
    if weights.suffix.lower() in (".safetensors", ".sft"):
        raise PersonalizeError(f"{weights} (--inception_weights) must be a .pth file, as torch-fidelity reads it.")
    head = read_weights(weights).get("fc.weight")
    if not isinstance(head, Tensor) or head.shape != (1008, 2048):
        raise PersonalizeError(
            f"{weights} (--inception_weights) is not the Inception of the original FID (weights-inception-2015-12-05-"
            "6726825d.pth of torch-fidelity): it has no fc.weight of 1008 x 2048."
        )


class ClipEye:
    """A CLIPModel of transformers: [n, d] of pictures and of texts in one space."""

    def __init__(self, where: str):
        """Args:
        where: folder or hub id.

        Raises:
            PersonalizeError: it cannot be loaded, or is no whole CLIPModel.
        """
        from transformers import AutoTokenizer, CLIPModel

        self.model = _load(CLIPModel, where, "--clip")
        framing = json.loads(found.read_text()) if (found := _file(where, "preprocessor_config.json")) else {}
        side = self.model.config.vision_config.image_size
        self.size = _side(framing.get("size"), side)
        self.crop = _side(framing.get("crop_size"), side)
        self.mean, self.std = framing.get("image_mean", CLIP_MEAN), framing.get("image_std", CLIP_STD)
        own = _file(where, "tokenizer_config.json") or _file(where, "tokenizer.json")
        self.tokenizer = AutoTokenizer.from_pretrained(where) if own else clip_tokenizer()

    def pictures(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        x = _normalised(_framed(pictures, self.size, self.crop), self.mean, self.std)
        return {"features": self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output)}

    def texts(self, texts: Sequence[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
        ids = self.tokenizer(list(texts), **options).to(DEVICE)
        states = self.model.text_model(input_ids=ids.input_ids, attention_mask=ids.attention_mask)
        return self.model.text_projection(states.pooler_output)


class PocketClipEye:
    """The pocket model's image and text encoders, [n, 96]."""

    def __init__(self) -> None:
        from .pocket.shipped import load_pocket

        self.pocket = load_pocket()

    def pictures(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        squares = (_framed(pictures, 64, 64).permute(0, 2, 3, 1) * 255).round().byte()
        return {"features": self.pocket.embed(squares.numpy())}

    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.pocket.embed_text(texts)


def clip(where: str, cache: Cache, batch_size: int) -> Extractor:
    """A folder, a hub id, or "pocket"."""
    if where == "pocket":
        from .pocket.files import CHECKPOINT, IMAGE_ENCODER

        weights = [digest_of_path(POCKET / file) for file in (CHECKPOINT, IMAGE_ENCODER)]
        return Extractor("Pocket CLIP", {"eye": "pocket", "weights": weights}, PocketClipEye, cache, batch_size)
    key = {"eye": "clip", "weights": _digest_of(where), "device": DEVICE}
    return Extractor("CLIP", key, lambda: ClipEye(where), cache, batch_size)


class DinoEye:
    """A ViT of transformers: its CLS token [n, d], of pictures as DINO evaluates them (Caron et al. 2021): the shorter
    side to 256, the middle 224 x 224, ImageNet's mean and deviation; other input sizes in proportion."""

    def __init__(self, where: str):
        """Args:
        where: folder or hub id.

        Raises:
            PersonalizeError: it cannot be loaded, or is no ViT.
        """
        from transformers import AutoModel

        self.model = _load(AutoModel, where, "--dino")
        self.crop = 224 if self.model.config.model_type != "vit" else self.model.config.image_size
        self.size = round(self.crop * 256 / 224)

    def pictures(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        x = _normalised(_framed(pictures, self.size, self.crop), IMAGENET_MEAN, IMAGENET_STD)
        return {"features": self.model(pixel_values=x).last_hidden_state[:, 0]}


def dino(where: str, cache: Cache, batch_size: int) -> Extractor:
    """A folder or a hub id."""
    key = {"eye": "dino", "weights": _digest_of(where), "device": DEVICE}
    return Extractor("DINO", key, lambda: DinoEye(where), cache, batch_size)


def check_model(where: str, option: str, types: tuple[str, ...]) -> None:
    """Look at a model's folder; of a hub id only that it can be one.

    Raises:
        PersonalizeError: there is no such folder, or it is another model's.
    """
    folder = Path(where).expanduser()
    if not folder.is_dir():
        if not is_hub_id(where):
            raise PersonalizeError(f"{option} {where} is no folder, and no hub id (owner/name).")
        return
    config = folder / "config.json"
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise PersonalizeError(f"{option} {where} is no model's folder: config.json is missing or damaged.") from None
    if found not in types:
        raise PersonalizeError(f"{option} {where} holds a model of type {found}, but must be {' or '.join(types)}.")
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise PersonalizeError(f"{option} {where} has no weights (.safetensors or .bin).")


def check_torch_fidelity() -> None:
    """It is needed for Inception only.

    Raises:
        PersonalizeError: it is not installed.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise PersonalizeError("--features inception needs the package torch-fidelity: pip install torch-fidelity.")


def _load(kind: Any, where: str, option: str) -> Any:
    """A model of transformers with all of its weights but for a pooler, on DEVICE."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(where).expanduser()
    source = {"local_files_only": True} if folder.is_dir() else {}
    try:
        model, report = kind.from_pretrained(str(folder) if source else where, output_loading_info=True, **source)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PersonalizeError(f"{option} {where} cannot be loaded: {reason}") from None
    missing = [name for name in sorted(report["missing_keys"]) if not name.startswith("pooler.")]
    types = ("clip",) if option == "--clip" else VIT_TYPES
    if missing or model.config.model_type not in types:
        lacks = f" without {missing[0]}" if missing else ""
        raise PersonalizeError(
            f"{option} {where} holds a model of type {model.config.model_type}{lacks}, but must be a whole one of type "
            f"{' or '.join(types)}."
        )
    return model.eval().float().to(DEVICE)


def _file(where: str, name: str) -> Path | None:
    """A file of a folder, or of a hub id that was loaded."""
    folder = Path(where).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(where, name)
    return Path(found) if isinstance(found, str) else None


def _side(said: Any, otherwise: int) -> int:
    """Pixels, which configurations write as a number, a shortest edge, or a height and a width."""
    if isinstance(said, dict):
        said = said.get("shortest_edge", said.get("height"))
    return said if isinstance(said, int) else otherwise


def _digest_of(where: str) -> Any:
    """Of a folder's files; of a hub id it and the revision that was loaded last."""
    folder = Path(where).expanduser()
    if folder.is_dir():
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        return {path.name: digest_of_path(path) for path in files}
    config = _file(where, "config.json")
    return [where, config.parent.name if config else ""]
