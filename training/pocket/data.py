"""The generator as numbered pictures: scene i of a seed is always the same, and a cache on disk feeds the training.

Four consecutive scenes show the same first subject, so that sets of pictures of one identity are at hand.
"""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

from .attributes import Identity, Scene, sample_identity, sample_scene
from .draw import draw

PER_IDENTITY = 4
PAIRS = 0.3
TRAIN, VALIDATION = 1, 2  # seeds: no picture or identity of one is in the other, but by chance
SINGLE, PAIR = (64, 64), (96, 64)  # width, height


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


class Pictures:
    """Drawn scenes 0 to count - 1 of a seed, cached under `folder`.

    `single` is [n, 64, 64, 3] and `pair` [m, 64, 96, 3], uint8; `single_index` and `pair_index` say which scenes.
    """

    def __init__(self, folder: Path, seed: int, count: int):
        self.seed, self.count = seed, count
        is_pair = np.array([np.random.default_rng([seed, 1, i]).random() < PAIRS for i in range(count)])
        self.single_index, self.pair_index = np.flatnonzero(~is_pair), np.flatnonzero(is_pair)
        folder.mkdir(parents=True, exist_ok=True)
        self.single = _cached(folder / f"single-{seed}-{count}.npy", seed, self.single_index, SINGLE)
        self.pair = _cached(folder / f"pair-{seed}-{count}.npy", seed, self.pair_index, PAIR)
        first = np.flatnonzero(np.diff(self.single_index // PER_IDENTITY, prepend=-1))
        pictures = np.diff(first, append=len(self.single_index))
        self._first, self._pictures = first[pictures > 1], pictures[pictures > 1]

    def twins(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rows of `single`, twice [count]: two different pictures of each of `count` different identities."""
        who = rng.choice(len(self._first), size=count, replace=False)
        pictures = self._pictures[who]
        a = rng.integers(pictures)
        b = (a + 1 + rng.integers(pictures - 1)) % pictures
        return self._first[who] + a, self._first[who] + b


def _draw_some(job: tuple[int, list[int]]) -> np.ndarray:
    seed, indices = job
    return np.stack([pixels(seed, i) for i in indices])


def _cached(path: Path, seed: int, indices: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if not path.exists():
        partial = path.with_suffix(".partial.npy")
        store = open_memmap(partial, "w+", np.uint8, (len(indices), size[1], size[0], 3))
        jobs = [(seed, indices[i : i + 256].tolist()) for i in range(0, len(indices), 256)]
        with ProcessPoolExecutor() as pool, tqdm(total=len(indices), desc=f"Drawing {path.name}", unit=" pic") as bar:
            done = 0
            for batch in pool.map(_draw_some, jobs):
                store[done : done + len(batch)] = batch
                done += len(batch)
                bar.update(len(batch))
        store.flush()
        del store
        partial.replace(path)
    return np.load(path, mmap_mode="r")
