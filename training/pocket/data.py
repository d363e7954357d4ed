"""The generator as numbered pictures: scene i of a seed is always the same, and a cache on disk feeds the training.

Four consecutive scenes show the same first subject, so that sets of pictures of one identity are at hand.
"""

import hashlib
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.lib.format import open_memmap
from tqdm import tqdm

from .attributes import Identity, Scene, sample_identity, sample_scene
from .captions import caption
from .draw import draw

PER_IDENTITY = 4
PAIRS = 0.3
TRAIN, VALIDATION = 1, 2  # seeds: no picture or identity of one is in the other, but by chance


def identity(seed: int, number: int) -> Identity:
    """Identity `number` of a seed."""
    return sample_identity(np.random.default_rng([seed, 0, number]))


def scene(seed: int, index: int, pairs: float = PAIRS) -> Scene:
    """Scene `index` of a seed: its first subject is identity index // 4."""
    rng = np.random.default_rng([seed, 1, index])
    who: tuple[Identity, ...] = (identity(seed, index // PER_IDENTITY),)
    if rng.random() < pairs:
        who = (*who, sample_identity(rng))
    return sample_scene(rng, who)


def pixels(seed: int, index: int) -> np.ndarray:
    """[height, width, 3] uint8 picture of scene `index`."""
    return np.asarray(draw(scene(seed, index)))


def faces(seed: int, index: int) -> np.ndarray:
    """[height / 8, width / 8] uint8, 1 where another expression would change the picture of scene `index`."""
    shown = scene(seed, index)
    sleeping, surprised, smiling = (
        np.asarray(draw(replace(shown, subjects=tuple(replace(s, expression=e) for s in shown.subjects)))).astype(int)
        for e in ("sleeping", "surprised", "smiling")
    )
    change = np.maximum(abs(sleeping - surprised), abs(sleeping - smiling)).max(2)
    height, width = change.shape
    return (change.reshape(height // 8, 8, width // 8, 8).mean((1, 3)) > 4).astype(np.uint8)


@cache
def generator_version() -> str:
    """Eight digits that change when pictures, what they show, or captions do: told from 200 scenes."""
    digest = hashlib.sha256()
    for index in range(200):
        shown = scene(0, index)
        words = caption(shown, np.random.default_rng(index))
        digest.update(np.asarray(draw(shown)).tobytes())
        digest.update(repr((shown.subject_values(), shown.values(), words)).encode())
    return digest.hexdigest()[:8]


def cache_folder(folder: Path) -> Path:
    """Where a folder of trainings keeps what this version of the generator has made."""
    return folder / "pictures" / generator_version()


def make_once(path: Path, make: Callable[[Path], None]) -> None:
    """Have `make` write a file that is not there: under another name until it is whole, and by one process only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            partial_file = path.with_suffix(f".partial{path.suffix}")
            make(partial_file)
            partial_file.replace(path)


class Pictures:
    """Drawn scenes 0 to count - 1 of a seed, cached for the trainings of `folder`.

    `single` is [n, 64, 64, 3] and `pair` [m, 64, 96, 3], uint8; `single_index` and `pair_index` say which scenes.
    """

    def __init__(self, folder: Path, seed: int, count: int):
        self.seed, self.count = seed, count
        is_pair = np.array([np.random.default_rng([seed, 1, i]).random() < PAIRS for i in range(count)])
        self.single_index, self.pair_index = np.flatnonzero(~is_pair), np.flatnonzero(is_pair)
        self._folder = cache_folder(folder)
        self.single, self.pair = self._drawn(pixels, "")
        first = np.flatnonzero(np.diff(self.single_index // PER_IDENTITY, prepend=-1))
        pictures = np.diff(first, append=len(self.single_index))
        self._first, self._pictures = first[pictures > 1], pictures[pictures > 1]

    def faces(self) -> tuple[np.ndarray, np.ndarray]:
        """`faces` of `single` and of `pair`: [n, 8, 8] and [m, 8, 12]."""
        return self._drawn(faces, "faces-")

    def _drawn(self, draw_one: Callable[[int, int], np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
        single, pair = (
            _cached(self._folder / f"{name}{kind}-{self.seed}-{self.count}.npy", partial(draw_one, self.seed), index)
            for kind, index in (("single", self.single_index), ("pair", self.pair_index))
        )
        return single, pair

    def twins(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rows of `single`, twice [count]: two different pictures of each of `count` different identities."""
        who = rng.choice(len(self._first), size=count, replace=False)
        pictures = self._pictures[who]
        a = rng.integers(pictures)
        b = (a + 1 + rng.integers(pictures - 1)) % pictures
        return self._first[who] + a, self._first[who] + b


def _end_with_parent() -> None:
    """In a worker: one whose training was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _draw_some(job: tuple[Callable[[int], np.ndarray], list[int]]) -> np.ndarray:
    draw_one, indices = job
    return np.stack([draw_one(i) for i in indices])


def _cached(path: Path, draw_one: Callable[[int], np.ndarray], indices: np.ndarray) -> np.ndarray:
    def make(file: Path) -> None:
        jobs = [(draw_one, indices[i : i + 256].tolist()) for i in range(0, len(indices), 256)]
        store = open_memmap(file, "w+", np.uint8, (len(indices), *draw_one(int(indices[0])).shape))
        done = 0
        with (
            ProcessPoolExecutor(initializer=_end_with_parent) as pool,
            tqdm(total=len(indices), desc=f"Drawing {path.name}", unit=" pic") as bar,
        ):
            for batch in pool.map(_draw_some, jobs):
                store[done : done + len(batch)] = batch
                done += len(batch)
                bar.update(len(batch))
        store.flush()

    make_once(path, make)
    return np.load(path, mmap_mode="r")
