"""What a build of a data set has decided, and what is known of pictures that are not decided; a killed one goes on from it.

    FOLDER/settings.json    what it was begun with
    FOLDER/metadata.jsonl   the pictures that are kept, as training.subject_data has them
    FOLDER/dropped.jsonl    a line for each picture that is dropped, or is kept without some of its boxes:
                            {"file_name": "a.jpg", "reason": "few boxes", "text": "a dog and a cat", "boxes":
                             [{"entity": "dog", "box": [left, top, right, bottom], "score": 0.7, "reason": "area"}, ...]}
                            boxes are in pixels of the data set's picture; of a picture that is kept, the reason is empty
    FOLDER/captions.jsonl, boxes.jsonl    what BLIP-2 and Grounding DINO said, a line for each batch; deleted at the end

Lines are added whole. One that a kill or a full disk cut off is removed when the next run begins.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .shared import PersonalizeError, sweep, write_whole
from .subject_data import METADATA, Detection, read_subjects

SETTINGS, DROPPED, CAPTIONS, BOXES = "settings.json", "dropped.jsonl", "captions.jsonl", "boxes.jsonl"


@dataclass(frozen=True)
class DroppedBox:
    """A box that is not kept."""

    found: Detection
    reason: str


class Progress:
    """Of one build; pictures go by their names without ending."""

    def __init__(self, folder: Path):
        """Args:
        folder: of the data set, which may have none yet.

        Raises:
            PersonalizeError: something in it is damaged.
        """
        self.folder = folder
        cut_off(folder / METADATA)
        there = (folder / METADATA).is_file() and (folder / METADATA).stat().st_size > 0
        self.kept = {one.path.stem for one in read_subjects(folder)} if there else set[str]()
        """Pictures of the data set."""
        lines = _read_lines(folder / DROPPED, {"file_name", "reason", "boxes"})
        true = [line for line in lines if line["reason"] or Path(line["file_name"]).stem in self.kept]
        if len(true) < len(lines):  # killed before the picture was written
            write_whole(folder / DROPPED, "".join(map(_line, true)).encode())
        self.lines = {Path(line["file_name"]).stem: line for line in true}
        """Of DROPPED."""
        self.captions: dict[str, str] = _merged(_read_lines(folder / CAPTIONS))
        said = _merged(_read_lines(folder / BOXES))
        self.boxes = {name: [Detection(x[0], tuple(x[1]), x[2]) for x in boxes] for name, boxes in said.items()}
        """In the order in which they were found."""

    def is_decided(self, name: str) -> bool:
        """Whether a picture is kept or dropped."""
        return name in self.kept or bool(self.lines.get(name, {}).get("reason"))

    def drop(self, dropped: Iterable[tuple[Path, str, str, Sequence[DroppedBox]]]) -> None:
        """Pictures, each with the reason (none if only some of its boxes are dropped), its caption, and those boxes."""
        lines: list[dict[str, Any]] = [
            {
                "file_name": path.name,
                "reason": reason,
                "text": text,
                "boxes": [
                    {
                        "entity": box.found.label,
                        "box": [round(x, 1) for x in box.found.box],
                        "score": round(box.found.score, 4),
                        "reason": box.reason,
                    }
                    for box in boxes
                ],
            }
            for path, reason, text, boxes in dropped
        ]
        self._add(DROPPED, lines)
        self.lines |= {Path(line["file_name"]).stem: line for line in lines}

    def add_captions(self, captions: Mapping[str, str]) -> None:
        """Of a batch."""
        self._add(CAPTIONS, [dict(captions)])
        self.captions |= captions

    def add_boxes(self, boxes: Mapping[str, list[Detection]]) -> None:
        """Of a batch."""
        self._add(BOXES, [{name: [[x.label, x.box, x.score] for x in found] for name, found in boxes.items()}])
        self.boxes |= boxes

    def _add(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """All in one piece."""
        if lines:
            with (self.folder / name).open("ab") as file:
                file.write("".join(map(_line, lines)).encode())

    def end(self) -> None:
        """Everything is decided."""
        for name in (CAPTIONS, BOXES):
            (self.folder / name).unlink(missing_ok=True)
        sweep(self.folder)


def check_begun(folder: Path) -> None:
    """Raises PersonalizeError where a folder holds what no build has begun."""
    there = [name for name in (METADATA, DROPPED, "pictures", "masks", "crops") if (folder / name).exists()]
    if there and not (folder / SETTINGS).is_file():
        raise PersonalizeError(
            f"The folder {folder} has {there[0]}, and this command did not write it: use another --output_dir."
        )


def cut_off(path: Path) -> None:
    """Remove what follows the last end of a line, if the file is there."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _read_lines(path: Path, keys: Set[str] = frozenset()) -> list[dict[str, Any]]:
    """No lines if there is no such file; each has at least these keys."""
    cut_off(path)
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else (), 1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            found.append({})
        if not found[-1] or keys - set(found[-1]):
            raise PersonalizeError(f"Line {number} of {path} is damaged: use another --output_dir.")
    return found


def _merged(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for line in lines for name, value in line.items()}
