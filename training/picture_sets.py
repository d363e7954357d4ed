"""Folders of pictures to be measured: of one subject, or with a folder for each identity."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .dataset import captions_of
from .shared import PersonalizeError, call_of, list_pictures, picture_paths

SEEDED = re.compile(r"(.*)-s(\d+)")


@dataclass(frozen=True)
class PictureSet:
    """The pictures of one method, or the real ones."""

    name: str
    """What it is called in tables."""
    folder: Path
    identities: dict[str, tuple[Path, ...]]
    """The pictures of each, by its folder's name; of a folder without folders all, by the empty name."""

    @property
    def flat(self) -> bool:
        """Whether all pictures are taken as one subject's."""
        return "" in self.identities

    @property
    def paths(self) -> list[Path]:
        """All pictures, one identity after the other."""
        return [path for paths in self.identities.values() for path in paths]

    @property
    def whose(self) -> list[str]:
        """Of each picture the identity."""
        return [name for name, paths in self.identities.items() for _ in paths]

    @property
    def groups(self) -> tuple[str, ...]:
        """What an interval draws again: identities, or of one subject its pictures."""
        return tuple(path.name for path in self.paths) if self.flat else tuple(self.identities)

    def group_numbers(self) -> Tensor:
        """[n] int64, which of `groups` each picture is of."""
        return torch.arange(len(self.paths)) if self.flat else numbered(self.whose, self.groups)

    def by_seed(self) -> dict[int, dict[tuple[str, str], int]]:
        """The places of the pictures of each seed, by identity and prompt, from names as ours: `PROMPT-s3.png`.

        Empty where a picture has no such name.
        """
        found: dict[int, dict[tuple[str, str], int]] = {}
        for place, (whose, path) in enumerate(zip(self.whose, self.paths, strict=True)):
            if (name := SEEDED.fullmatch(path.stem)) is None:
                return {}
            found.setdefault(int(name[2]), {})[whose, name[1]] = place
        return found


def show_the_same(seeds: Mapping[int, Mapping[tuple[str, str], int]]) -> bool:
    """Whether each of `PictureSet.by_seed` has the same prompts of the same identities."""
    return len({frozenset(places) for places in seeds.values()}) == 1


def numbered(names: Sequence[str], among: Sequence[str]) -> Tensor:
    """[n] int64, the place of each name among others."""
    places = {name: i for i, name in enumerate(among)}
    return torch.tensor([places[name] for name in names])


def find_set(folder: Path, name: str) -> PictureSet:
    """The pictures of a folder, or of the folders in it.

    Raises:
        PersonalizeError: no such folder, no pictures, both kinds, or a folder inside that has none.
    """
    if not folder.is_dir():
        raise PersonalizeError(f"{folder} is no folder." if folder.exists() else f"The folder {folder} does not exist.")
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith((".", "__"))]
    full = [path for path in inside if picture_paths(path)]
    if not full:
        return PictureSet(name, folder, {"": tuple(list_pictures(folder))})
    if picture_paths(folder):
        raise PersonalizeError(
            f"The folder {folder} has pictures itself ({picture_paths(folder)[0].name}) and folders with pictures "
            f"({full[0].name}): put them all into a folder for each identity, or all into one."
        )
    if empty := [path.name for path in inside if path not in full]:
        raise PersonalizeError(
            f"In {folder} the folders {', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''} have no pictures: fill or "
            "delete them."
        )
    return PictureSet(name, folder, {path.name: tuple(list_pictures(path)) for path in full})


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: the end of its path, as long as is needed to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0)):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def check_identities(generated: PictureSet, real: PictureSet) -> None:
    """Every generated picture has real ones to be compared to.

    Raises:
        PersonalizeError: it has not.
    """
    if generated.folder.resolve() == real.folder.resolve():
        raise PersonalizeError(f"{real.folder} is given as generated and as real: every distance would be zero.")
    if generated.flat != real.flat:
        one, other = (real, generated) if generated.flat else (generated, real)
        raise PersonalizeError(
            f"{one.folder} has a folder for each identity, but {other.folder} has none: use folders of the same names in "
            "both, or in neither."
        )
    if unknown := [name for name in generated.identities if name not in real.identities]:
        raise PersonalizeError(
            f"{generated.folder} has pictures of {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}, of whom "
            f"{real.folder} has no folder: add real pictures, or delete the generated ones."
        )


def prompts_of(pictures: PictureSet, trigger: str | None) -> list[str]:
    """What each picture was asked for, from NAME.txt beside it, empty where that is missing; without the trigger.

    Raises:
        PersonalizeError: naming every text that cannot be read.
    """
    prompts, problems = [], []
    for path in pictures.paths:
        try:
            texts = captions_of(path, (), trigger or "", "")
        except PersonalizeError as error:
            problems.append(str(error))
            continue
        text = texts[0] if texts else ""
        prompts.append(" ".join(call_of(trigger).sub("", text).split()) if trigger else text)
    if problems:
        raise PersonalizeError("\n".join(problems))
    return prompts
