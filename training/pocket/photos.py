"""A few pictures of one subject with captions beside them, as a user brings photographs: to try personalisation on."""

from pathlib import Path

import numpy as np
from PIL import Image

from ..shared import PersonalizeError, picture_paths
from .attributes import Logo, sample_identity, sample_scene
from .captions import learning_caption
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


def _shows(path: Path, picture: Image.Image) -> bool:
    """Whether a file is this very picture."""
    try:
        return np.array_equal(np.asarray(Image.open(path)), np.asarray(picture))
    except OSError:
        return False
