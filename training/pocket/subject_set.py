"""A data set for Subject-Diffusion, with true boxes and masks: one subject or two, anywhere in a picture of 96 x 64.

A crop is of another drawing of the same subject, so that who it is is learned, not the pose that it happens to have.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..subject_data import METADATA, crop_of, read_subjects, write_picture
from .attributes import Identity, Scene, sample_scene
from .captions import learning_caption
from .data import identity
from .draw import draw
from .photos import SUBJECTS

PAIRS = 0.5
ALONE, LEFT, RIGHT = (0.25, 0.75), (0.24, 0.34), (0.66, 0.76)
"""Where the middle of a subject may be: of one, and of two the one on the left and the one on the right."""
SEEN = 128
"""Of 255: from here a pixel is the subject's."""


def subject_scene(number: int) -> Scene:
    """Scene `number`: of two subjects of different kinds, either may be on the left."""
    rng = np.random.default_rng([SUBJECTS, number, 5])
    who = [identity(SUBJECTS, number)]
    if rng.random() < PAIRS:
        other = identity(SUBJECTS, 10_000_000 + number)
        who += [other] * (other.kind != who[0].kind)
    if len(who) == 1:
        places: tuple[float, ...] = (float(rng.uniform(*ALONE)),)
    else:
        places = tuple(float(rng.uniform(*part)) for part in (LEFT, RIGHT))[:: 1 if rng.random() < 0.5 else -1]
    fixed: dict = {"size": (96, 64), "logo": None, "obstacle": "none", "style": "flat", "framing": "portrait"}
    return sample_scene(rng, tuple(who), places=places, **fixed)


def subject_caption(scene: Scene, number: int) -> str:
    """What varies in scene `number`, and of each subject its kind; not what it looks like."""
    text = learning_caption(scene, np.random.default_rng([SUBJECTS, number, 6]), None)
    for subject in scene.subjects:
        text = text.replace("{trigger} {class}", subject.identity.kind, 1)
    return text


def write_subjects(folder: Path, first: int, count: int) -> int:
    """Add scenes `first` to `first + count - 1` that are not there yet; returns how many pictures the data set has.

    Raises:
        PersonalizeError: the folder holds a data set that is damaged.
        OSError: it cannot be written.
    """
    there = {one.path.stem for one in read_subjects(folder)} if (folder / METADATA).is_file() else set()
    for number in tqdm(range(first, first + count), desc="Drawing", unit=" pictures"):
        name = f"{number:07}"
        if name in there:
            continue
        scene, masks = subject_scene(number), list[Image.Image]()
        picture = draw(scene, masks)
        text = subject_caption(scene, number)
        found = [
            (subject.identity.kind, 1.0, np.asarray(mask) >= SEEN)
            for subject, mask in zip(scene.subjects, masks, strict=True)
        ]
        crops = [reference(subject.identity, number + i * 10_000_000) for i, subject in enumerate(scene.subjects)]
        write_picture(folder, name, picture, text, found, crops)
        there.add(name)
    return len(there)


def reference(who: Identity, number: int) -> Image.Image:
    """Drawing `number` of somebody alone, cut out."""
    rng, masks = np.random.default_rng([SUBJECTS, number, 7]), list[Image.Image]()
    fixed: dict = {"logo": None, "obstacle": "none", "style": "flat", "framing": "portrait"}
    picture = draw(sample_scene(rng, (who,), **fixed), masks)
    return crop_of(picture, np.asarray(masks[0]) >= SEEN)
