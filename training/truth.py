"""What is known of pocket portraits, from files beside them, counted against what the judge reads.

`attributes.json` in an identity's real folder says who it is: {"kind": "dog", "fur": "brown", "eyes": "green", ...}.
`NAME.json` beside a generated picture says what its prompt asked for: {"pose": "left", "background": "beach", ...}.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .picture_sets import PictureSet
from .pocket.attributes import ATTRIBUTES, VALUES, Identity, Scene, Subject
from .shared import PersonalizeError

NAMES = tuple(VALUES)  # in the judge's order
OWNED = tuple(f.name for f in fields(Identity))
VARYING = tuple(name for name in NAMES if name not in OWNED)
Counts = dict[str, Tensor]
"""By attribute [n]: 1 where it was read as it should be, 0 where not, NaN where there is nothing to read."""


def attributes_of(real: PictureSet) -> dict[str, dict[str, str]]:
    """Of each identity of which it is known.

    Raises:
        PersonalizeError: naming every file that says something else.
    """
    files = {name: paths[0].parent / ATTRIBUTES for name, paths in real.identities.items()}
    return _read_all({name: file for name, file in files.items() if file.is_file()}, OWNED)


def wishes_of(generated: PictureSet) -> list[dict[str, str]]:
    """Of each picture, what its prompt asked for and the judge can see; empty where nothing says so.

    Raises:
        PersonalizeError: naming every file that is not understood.
    """
    files = {str(path): path.with_suffix(".json") for path in generated.paths}
    said = _read_all({name: file for name, file in files.items() if file.is_file()}, VARYING, strict=False)
    return [said.get(str(path), {}) for path in generated.paths]


def _read_all(files: Mapping[str, Path], known: Sequence[str], strict: bool = True) -> dict[str, dict[str, str]]:
    said, problems = {}, []
    for name, file in files.items():
        try:
            said[name] = _read(file, known, strict)
        except PersonalizeError as error:
            problems.append(str(error))
    if problems:
        raise PersonalizeError("\n".join(problems))
    return said


def _read(file: Path, known: Sequence[str], strict: bool) -> dict[str, str]:
    """What a file says of known names; of others too there may be something, unless strict."""
    where = f"{file.name} in {file.parent}"
    try:
        said: Any = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise PersonalizeError(f"{where} cannot be read as JSON ({error}).") from None
    if not isinstance(said, dict):
        raise PersonalizeError(f'{where} is no JSON object, such as {{"{known[0]}": "{VALUES[known[0]][0]}"}}.')
    said = {name: value for name, value in said.items() if value is not None and (strict or name in known)}
    for name, value in said.items():
        if name not in known:
            raise PersonalizeError(f"{where} has {name!r}, but the judge knows {', '.join(known)}.")
        if value not in VALUES[name]:
            raise PersonalizeError(f"{where} has {name} {value!r}, but it must be one of {', '.join(VALUES[name])}.")
    return said


def count_following(seen: Tensor, wishes: Sequence[Mapping[str, str]]) -> Counts:
    """What prompts asked for and pictures show.

    Args:
        seen: [n, 26] int64, the judge's reading of each of NAMES.
        wishes: of each picture.
    """
    return _count(seen, wishes)


def count_attributes(
    seen: Tensor, whose: Sequence[str], known: Mapping[str, Mapping[str, str]], wishes: Sequence[Mapping[str, str]]
) -> Counts:
    """Attributes of the identity that the picture shows, of those that it can show.

    A hat hides the hair and is not always worn, sunglasses and sleep hide the eyes, a close-up the clothes: what a
    prompt asked for or, where it is silent, what the judge sees decides.

    Args:
        seen, wishes: as in `count_following`.
        whose: of each picture the identity.
        known: attributes by identity.
    """
    visible = []
    for numbers, who, wish in zip(seen.tolist(), whose, wishes, strict=True):
        shown = {name: VALUES[name][number] for name, number in zip(NAMES, numbers, strict=True)} | dict(wish)
        own: dict[str, Any] = dict.fromkeys(OWNED) | dict(known.get(who, {}))
        subject = Subject(Identity(**own), shown["pose"], shown["expression"], shown["hat_worn"] == "yes")
        scene = Scene((subject,), shown["background"], framing=shown["framing"], obstacle=shown["obstacle"])
        visible.append({name: value for name, value in scene.subject_values()[0].items() if name in OWNED})
    return _count(seen, visible)


def _count(seen: Tensor, wanted: Sequence[Mapping[str, str]]) -> Counts:
    counts: Counts = {}
    for column, name in enumerate(NAMES):
        named = torch.tensor([VALUES[name].index(said[name]) if name in said else -1 for said in wanted])
        if bool((named >= 0).any()):
            right = (seen[:, column] == named).double()
            counts[name] = torch.where(named >= 0, right, torch.nan)
    return counts
