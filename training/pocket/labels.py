"""What scenes show and what captions say, as numbers for training and counting: -1 is hidden, absent or unsaid."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .attributes import SCENE_VALUES, SUBJECT_VALUES, Scene
from .captions import Caption
from .data import cache_folder, make_once, scene

SUBJECT_NAMES, SCENE_NAMES = tuple(SUBJECT_VALUES), tuple(SCENE_VALUES)
SUBJECT_SIZES = tuple(len(values) for values in SUBJECT_VALUES.values())
SCENE_SIZES = tuple(len(values) for values in SCENE_VALUES.values())


def _numbers(said: dict[str, str], table: dict[str, tuple[str, ...]]) -> list[int]:
    return [values.index(said[name]) if name in said else -1 for name, values in table.items()]


def subject_labels(said: dict[str, str]) -> list[int]:
    """[21] numbers of a subject's values, in the order of SUBJECT_NAMES."""
    return _numbers(said, SUBJECT_VALUES)


def scene_labels(said: dict[str, str]) -> list[int]:
    """[5] numbers of a scene's values, in the order of SCENE_NAMES."""
    return _numbers(said, SCENE_VALUES)


def shown(picture: Scene) -> tuple[list[list[int]], list[int]]:
    """Labels of what the picture shows: of each subject, and of the scene."""
    return [subject_labels(values) for values in picture.subject_values()], scene_labels(picture.values())


def said(words: Caption) -> tuple[list[list[int]], list[int]]:
    """Labels of what the caption names: of each subject, and of the scene."""
    return [subject_labels(subject) for subject in words.subjects], scene_labels(words.scene)


def cached_labels(folder: Path, seed: int, indices: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """([n, subjects, 21], [n, 5]) int8 labels of what the scenes show; `indices` all single or all pairs."""

    def make(file: Path) -> None:
        subjects, scenes = _stack(shown(scene(seed, int(i))) for i in indices)
        np.savez(file, subjects=subjects, scenes=scenes)

    path = cache_folder(folder) / f"labels-{name}.npz"
    make_once(path, make)
    stored = np.load(path)
    return stored["subjects"], stored["scenes"]


def _stack(labels: Iterable[tuple[list[list[int]], list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    subjects, scenes = zip(*labels, strict=True)
    return np.array(subjects, dtype=np.int8), np.array(scenes, dtype=np.int8)
