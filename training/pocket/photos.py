"""A few pictures of one subject with captions beside them, as a user brings photographs: to try personalisation on."""

from pathlib import Path

import numpy as np

from .attributes import Logo, sample_identity, sample_scene
from .captions import learning_caption
from .data import identity
from .draw import draw

SUBJECTS = 4  # a seed of its own: these identities are in no training set


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
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(count):
        rng = np.random.default_rng([SUBJECTS, number, i])
        who = identity(SUBJECTS, number) if style is None and logo is None else sample_identity(rng)
        fixed: dict = {"style": style or "flat", "logo": logo}
        if logo is not None:
            place = {"mug": ("mug", "portrait"), "shirt": ("none", "half-length"), "wall": ("none", "portrait")}
            fixed["obstacle"], fixed["framing"] = place[logo.place]
        scene = sample_scene(rng, (who,), **fixed)
        path = folder / f"{i + 1:02}.png"
        draw(scene).save(path)
        path.with_suffix(".txt").write_text(learning_caption(scene, rng, style) + "\n")
        paths.append(path)
    return paths
