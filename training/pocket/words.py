"""Captions as tokens: several of every scene, made once and kept beside the pictures."""

from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..clip_tokenizer import LENGTH, clip_tokenizer
from .captions import Caption, caption
from .data import cache_folder, make_once, scene
from .device import tensor_of
from .labels import SCENE_SIZES, SUBJECT_SIZES, said

VARIANTS = 6
END = 49407
UNKNOWN_WORDS = 0.1  # texts with a word that the generator never uses, so that such a word does little harm
LABELS = 2 * len(SUBJECT_SIZES) + len(SCENE_SIZES)


_tokenizer = cache(clip_tokenizer)


def tokenize(texts: list[str]) -> Tensor:
    """[n, 77] token ids."""
    tokens = _tokenizer()(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return tokens.input_ids.to(torch.get_default_device())


def said_labels(words: Caption) -> list[int]:
    """[47] labels of what a caption says: the first subject, the second, the scene."""
    subjects, around = said(words)
    subjects += [[-1] * len(SUBJECT_SIZES)] * (2 - len(subjects))
    return [*subjects[0], *subjects[1], *around]


class Captions:
    """Of scenes 0 to count - 1, `VARIANTS` captions each, cached for the trainings of `folder`.

    `ids` is [count, 6, 77] uint16, `said` [count, 6, 47] int8.
    """

    def __init__(self, folder: Path, seed: int, count: int):
        def make(file: Path) -> None:
            jobs = [(seed, start, min(start + 500, count)) for start in range(0, count, 500)]
            with ProcessPoolExecutor() as pool:
                parts = list(tqdm(pool.map(_speak, jobs), desc="Captions", total=len(jobs), unit=" x 500"))
            ids, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
            np.savez(file, ids=ids, said=labels)

        path = cache_folder(folder) / f"captions-{seed}-{count}.npz"
        make_once(path, make)
        stored = np.load(path)
        self.ids, self.said = stored["ids"], stored["said"]

    def some(self, indices: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """One caption of each scene: [n, 77] ids, [n, 47] labels."""
        which = rng.integers(VARIANTS, size=len(indices))
        ids, labels = self.ids[indices, which], self.said[indices, which]
        return tensor_of(ids.astype(np.int64)), tensor_of(labels.astype(np.int64))


def _speak(job: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    seed, start, stop = job
    texts, labels = [], []
    for i in range(start, stop):
        picture, rng = scene(seed, i), np.random.default_rng([seed, 2, i])
        for _ in range(VARIANTS):
            words = caption(picture, rng)
            texts.append(words.text)
            labels.append(said_labels(words))
    ids = tokenize(texts).cpu().numpy().astype(np.uint16).reshape(stop - start, VARIANTS, LENGTH)
    return ids, np.array(labels, dtype=np.int8).reshape(stop - start, VARIANTS, LABELS)


def add_unknown_words(ids: Tensor, rng: np.random.Generator) -> Tensor:
    """In some rows a token that means nothing, somewhere among the words."""
    ids = ids.clone()
    for i in np.flatnonzero(rng.random(len(ids)) < UNKNOWN_WORDS):
        end = int((ids[i] == END).nonzero()[0])
        if end + 1 < LENGTH:
            place = int(rng.integers(1, end + 1))
            ids[i, place + 1 :] = ids[i, place:-1].clone()
            ids[i, place] = int(rng.integers(512, 49406))
    return ids
