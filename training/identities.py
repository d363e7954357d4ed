"""Sets of pictures of one identity each: a folder for each, as LFW has them (`name/name_0001.jpg`), or plain folders."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .dataset import Example, Sizes, find_examples
from .encoding import digest_of_path
from .methods import templates_of
from .options import Data, IPAdapter
from .settings import Settings
from .shared import SUFFIXES, PersonalizeError, picture_paths, plural

LEAST = 2
"""Pictures of an identity: one to predict, and one to predict it from."""
NAMED, VALIDATED, SHOWN = 3, 2, 4
"""Names in a message; pictures of each held-out identity for the validation loss; references in a row of samples."""
HELD_OUT, AT_MOST = 10, 4  # one identity in ten is held out where nobody says how many, up to four

Held = dict[Path, tuple[Path, ...]]
"""Pictures of held-out identities, by their folders."""


@dataclass(frozen=True)
class Identities:
    """What a folder of identities holds."""

    sets: dict[Path, tuple[Path, ...]]
    """Pictures of each identity that has two or more, by its folder."""
    single: tuple[Path, ...]
    """Folders of a single picture, which can be predicted from nothing."""
    misplaced: tuple[Path, ...]
    """Pictures beside the identities' folders, or in folders within them: it is not known whose they are."""
    copies: tuple[Path, ...] = ()
    """Pictures with the same bytes as another one of their identity, which would be predicted from itself."""

    def warnings(self, folder: Path) -> list[str]:
        """A sentence for what is left out."""
        sentences = []
        if self.single:
            sentences.append(
                f"{len(self.single)} of the identities in {folder} have a single picture ({_some(self.single)}) and are left "
                "out: leave-one-out needs two."
            )
        if self.misplaced:
            sentences.append(
                f"{plural(len(self.misplaced), 'picture is', 'pictures are')} in no identity's folder "
                f"({_some(self.misplaced, folder)}) and {_are(self.misplaced)} left "
                f"out: put each into {folder.name}/NAME/."
            )
        if self.copies:
            sentences.append(
                f"{plural(len(self.copies), 'picture is a copy of another', 'pictures are copies of others')} of the "
                f"same identity ({_some(self.copies, folder)}) and {_are(self.copies)} "
                "left out: a picture would be predicted from itself."
            )
        return sentences


def find_identities(folder: Path) -> Identities:
    """Every folder with pictures in a folder.

    Raises:
        PersonalizeError: the folder does not exist, or no identity in it has two pictures.
    """
    if not folder.is_dir():
        raise PersonalizeError(f"{folder} is no folder." if folder.exists() else f"The folder {folder} does not exist.")
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    misplaced = list(picture_paths(folder))
    sets, single, copies = dict[Path, tuple[Path, ...]](), list[Path](), list[Path]()
    for one in inside:
        pictures, same = _apart(picture_paths(one))
        copies += same
        misplaced += sorted(
            path for path in one.rglob("*") if path.parent != one and path.suffix.lower() in SUFFIXES and path.is_file()
        )
        if len(pictures) >= LEAST:
            sets[one] = tuple(pictures)
        elif pictures:
            single.append(one)
    if not sets:
        if misplaced:
            raise PersonalizeError(
                f"The pictures in {folder} ({_some(misplaced, folder)}) are in no identity's folder: put those of each "
                f"identity into a folder of its own, {folder.name}/NAME/."
            )
        why = f"each of {len(single)} has a single picture" if single else "there are no folders with pictures"
        raise PersonalizeError(
            f"The folder {folder} has no identity to learn from ({why}): every identity needs a folder of its own with two "
            "pictures or more."
        )
    return Identities(sets, tuple(single), tuple(misplaced), tuple(copies))


def _apart(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The first of all pictures with the same bytes, and the others; what cannot be read is like nothing."""
    kept, copies = dict[Hashable, Path](), list[Path]()
    sizes = {path: path.stat().st_size for path in paths if path.is_file()}
    alike = Counter(sizes.values())
    for path in paths:
        try:
            mark: Hashable = digest_of_path(path) if alike[sizes.get(path, -1)] > 1 else path
        except OSError:
            mark = path
        if kept.setdefault(mark, path) is not path:
            copies.append(path)
    return list(kept.values()), copies


def same_bytes(paths: Sequence[Path], others: Sequence[Path]) -> list[Path]:
    """Those that have the bytes of one of the others; only files of the same size are read."""
    sizes = {path: path.stat().st_size for path in {*paths, *others}}
    shared = {sizes[path] for path in paths} & {sizes[path] for path in others}
    digests = {digest_of_path(path) for path in others if sizes[path] in shared}
    return [path for path in paths if sizes[path] in shared and digest_of_path(path) in digests]


def first_of(sets: dict[Path, tuple[Path, ...]], count: int | None) -> list[Path]:
    """The identities of a folder of their own to validate on: so many, or four at most for None; fewer if there are fewer."""
    return sorted(sets)[: AT_MOST if count is None else count]


def hold_out(sets: dict[Path, tuple[Path, ...]], count: int | None, seed: int) -> tuple[list[Path], list[Path]]:
    """The identities to train on, and those to validate on, which the seed chooses.

    Args:
        sets: by folder.
        count: how many to hold out; None for one in ten, four at most.
        seed: of the choice.

    Raises:
        PersonalizeError: none would be left to train on.
    """
    folders = sorted(sets)
    wanted = min(len(folders) // HELD_OUT, AT_MOST) if count is None else count
    if wanted >= len(folders):
        raise PersonalizeError(
            f"--validation_identities {wanted} leaves none of the {plural(len(folders), 'identity', 'identities')} "
            f"to train on: hold out fewer."
        )
    order = np.random.default_rng([seed, 2]).permutation(len(folders))
    held = {folders[i] for i in order[:wanted]}
    return [one for one in folders if one not in held], sorted(held)


def find_sets(
    settings: Settings, sizes: Sizes
) -> tuple[list[Example], list[Example], dict[Path, tuple[Path, ...]], Held]:
    """Everything that leave-one-out trains on.

    Args:
        settings: with nothing open.
        sizes: pictures are brought to.

    Returns:
        The pictures to predict; those of held-out identities to measure the loss on; the pictures of all identities, by
        their folders; and references of the held-out identities to draw samples from.

    Raises:
        PersonalizeError: there are none.
    """
    data, options = settings.data, settings.method
    assert isinstance(options, IPAdapter)
    sets = find_identities(Path(data.instance_data_dir or "").expanduser()).sets
    if data.validation_data_dir:
        others = find_identities(Path(data.validation_data_dir).expanduser()).sets
        own, held = sorted(sets), first_of(others, options.validation_identities)
        sets = sets | {folder: others[folder] for folder in held}
    else:
        own, held = hold_out(sets, options.validation_identities, settings.training.seed)
    templates, plain = templates_of(settings), replace(data, repeats=1, random_flip=False)

    def examples_of(folder: Path, data: Data) -> list[Example]:
        return [one for one in find_examples(folder, data, sizes, templates) if one.path in sets[folder]]

    examples = [example for folder in own for example in examples_of(folder, data)]
    kept_out = [example for folder in held for example in examples_of(folder, plain)[:VALIDATED]]
    most = min(SHOWN, options.max_references or SHOWN)
    return examples, kept_out, sets, {folder: sets[folder][:most] for folder in held}


def _some(paths: Sequence[Path], folder: Path | None = None) -> str:
    names = [path.name if folder is None else str(path.relative_to(folder)) for path in paths[:NAMED]]
    return ", ".join(names) + (", ..." if len(paths) > NAMED else "")


def _are(paths: Sequence[Path]) -> str:
    return "is" if len(paths) == 1 else "are"
