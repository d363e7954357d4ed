"""A few pictures of one subject with captions beside them, as a user brings photographs: to try personalisation on."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..shared import PersonalizeError, picture_paths
from .attributes import ATTRIBUTES, Logo, sample_identity, sample_scene
from .captions import article, learning_caption
from .data import identity
from .draw import draw

SUBJECTS = 4  # a seed of its own: these identities are in no other set


def write_photos(
    folder: Path, number: int, count: int, style: str | None = None, logo: Logo | None = None
) -> list[Path]:
    """Write `count` pictures, 01.png with 01.txt (for the trainers, with {trigger} and {class}) and so on.

    Args:
        folder: made if needed.
        number: which identity; with `logo` or `style` a different one in every picture, as the mark or the style is
            what they have in common.
        count: how many pictures.
        style: one of STYLES or NEW_STYLES.
        logo: a mark, with the place it is at.

    Returns:
        The pictures.

    Raises:
        PersonalizeError: the folder holds other pictures or captions.
    """
    drawn = {}
    for i in range(count):
        rng = np.random.default_rng([SUBJECTS, number, i])
        who = identity(SUBJECTS, number) if style is None and logo is None else sample_identity(rng)
        fixed: dict = {"style": style or "flat", "logo": logo}
        if logo is not None:
            place = {"mug": ("mug", "portrait"), "shirt": ("none", "half-length"), "wall": ("none", "portrait")}
            fixed["obstacle"], fixed["framing"] = place[logo.place]
        scene = sample_scene(rng, (who,), **fixed)
        drawn[folder / f"{i + 1:02}.png"] = draw(scene), learning_caption(scene, rng, style)
    folder.mkdir(parents=True, exist_ok=True)
    for path in picture_paths(folder):
        if path not in drawn or not _shows(path, drawn[path][0]):
            raise PersonalizeError(f"{folder} holds another picture, {path.name}: name another folder, or empty it.")
    captions = {path.with_suffix(".txt"): words + "\n" for path, (_, words) in drawn.items()}
    for path, words in captions.items():
        if path.exists() and path.read_text(errors="replace") != words:
            raise PersonalizeError(f"{folder} holds another caption, {path.name}: name another folder, or empty it.")
    for path, (picture, _) in drawn.items():
        picture.save(path)
    for path, words in captions.items():
        path.write_text(words)
    return list(drawn)


def write_identities(
    folder: Path,
    first: int,
    identities: int,
    count: int,
    crop: tuple[float, float] | None = None,
    whole: float = 0.0,
) -> list[Path]:
    """Write `count` pictures of each of so many subjects, a folder each, as LFW has them: `cat_0007/cat_0007_0001.png`.

    Beside each is a caption that says what varies and the kind, of a cut picture that it is a detail of the kind: most of
    what varies is not in it. In each folder is `attributes.json`, what the identity is.
    A picture hides what pictures hide: a hat hides the hair, a close-up the clothes; styles vary too.

    Args:
        folder: made if needed; whole folders of identities in it are left as they are.
        first: the number of the first subject.
        identities: how many.
        count: pictures of each.
        crop: least and greatest side, as shares of the picture's, of the random square of each picture that is kept, as
            snapshots have subjects cut off and off centre; None for whole portraits.
        whole: chance of each picture to stay whole all the same.

    Returns:
        The identities' folders.

    Raises:
        OSError: they cannot be written.
    """
    folders = []
    for number in tqdm(range(first, first + identities), desc="Drawing", unit=" identities"):
        who = identity(SUBJECTS, number)
        name = f"{who.kind}_{number:04}"
        own = folder / name
        folders.append(own)
        if (own / ATTRIBUTES).exists():  # it is written last
            continue
        own.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            rng = np.random.default_rng([SUBJECTS, number, i, 1])
            scene = sample_scene(rng, (who,), logo=None)
            path = own / f"{name}_{i + 1:04}.png"
            picture = draw(scene)
            words = learning_caption(scene, rng, None).replace("{trigger} {class}", who.kind)
            cutting = np.random.default_rng([SUBJECTS, number, i, 3])
            if crop is not None and cutting.random() >= whole:
                picture, words = _cut(picture, crop, cutting), f"a detail of {article(who.kind)}"
            picture.save(path)
            path.with_suffix(".txt").write_text(words + "\n")
        known = {attribute: value for attribute, value in asdict(who).items() if value is not None}
        (own / ATTRIBUTES).write_text(json.dumps(known))
    return folders


def _cut(picture: Image.Image, sides: tuple[float, float], rng: np.random.Generator) -> Image.Image:
    """A random square of a square picture, brought to its size."""
    whole = picture.width
    side = round(whole * rng.uniform(*sides))
    left, top = (int(x) for x in rng.integers(0, whole - side + 1, 2))
    return picture.crop((left, top, left + side, top + side)).resize((whole, whole), Image.Resampling.BICUBIC)


def _shows(path: Path, picture: Image.Image) -> bool:
    """Whether a file is this very picture."""
    try:
        return np.array_equal(np.asarray(Image.open(path)), np.asarray(picture))
    except OSError:
        return False
