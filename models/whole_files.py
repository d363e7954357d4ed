"""Files that are there whole or not at all, whatever stops the one who writes them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A block that writes a file, or a folder of files, under another name beside it; at its end it takes its place.

    What was there before stays until then, and stays if the block fails, which leaves nothing behind. The folder around
    it is made if needed.

    Raises:
        OSError: the disk is full, or takes no file there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove(part)
    try:
        yield part
        for file in part.iterdir() if part.is_dir() else (part,):
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        if part.is_dir():
            _remove(path)
        part.replace(path)
    finally:
        _remove(part)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole.

    Raises:
        OSError: the disk is full, or takes no file there.
    """
    with whole(path) as part:
        part.write_bytes(content)


def sweep(folder: Path) -> None:
    """Delete what killed processes left half written in a folder to which no other one writes now."""
    for part in folder.glob(".*.part"):
        _remove(part)


def _remove(path: Path) -> None:
    """Whatever it is, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
