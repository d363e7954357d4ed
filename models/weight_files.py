"""Reading and writing weight files: safetensors, and the pickles of published adapters (tensors only)."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import PersonalizeError
from .whole_files import whole

VISION_CONFIG = "personalize.clip_vision_config"
"""Metadata key of an image encoder's file: its configuration as transformers writes it, in JSON."""


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file.

    Raises:
        PersonalizeError: the file is missing, damaged or cut short, or is a folder.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, why: object) -> PersonalizeError:
    """What is said of a .safetensors file that cannot be read: it is missing, a folder, or damaged."""
    if path.is_dir():
        return PersonalizeError(f"{path} is a folder: name the file in it.")
    if not path.exists():
        return PersonalizeError(f"{path.name} is not in {path.parent}.")
    return PersonalizeError(
        f"{path.name} in {path.parent} is damaged or cut short ({path.stat().st_size} bytes; {why}): download it again."
    )


def read_weights(path: Path) -> dict[str, Any]:
    """Tensors of a .safetensors file (flat) or of a pickle (.bin, .pt, .pth, .ckpt; as nested as it was saved).

    Pickles are read with `weights_only`: a file that holds anything but tensors is refused, not executed.

    Raises:
        PersonalizeError: the file is missing, damaged, cut short, or not tensors only.
    """
    if path.suffix.lower() in (".safetensors", ".sft"):
        return read_safetensors(path)[0]
    if not path.is_file():
        raise PersonalizeError(f"{path.name} is not in {path.parent}.")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged pickle can fail in any way, and torch's own words advise to load it unsafely
        raise PersonalizeError(
            f"{path.name} in {path.parent} ({path.stat().st_size} bytes) is damaged, cut short, or holds Python code, "
            "which was not run: download it again, if possible as .safetensors."
        ) from None
    if not isinstance(weights, dict):
        raise PersonalizeError(f"{path.name} in {path.parent} holds a {type(weights).__name__}, not named tensors.")
    return weights


def check_finite(tensors: Mapping[str, Any], name: str) -> None:
    """Raises PersonalizeError where a tensor of the file `name` has a number that is not finite."""
    for key, value in tensors.items():
        wide = isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize > 1
        if wide and not value.isfinite().all():
            raise PersonalizeError(
                f"{key} in {name} has numbers that are not finite: its training diverged, train it again."
            )


def _sort_metadata(file: BinaryIO) -> None:
    """safetensors writes the metadata in an order that changes from process to process."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def _usual_mode() -> int:
    """Of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file whole. The folder is made if needed.

    Raises:
        OSError: the disk is full, or takes no file there.
    """
    with whole(path) as part:
        try:
            save_file({key: value.contiguous() for key, value in tensors.items()}, part, dict(metadata))
        except SafetensorError as error:  # which is no OSError
            raise OSError(str(error)) from None
        part.chmod(_usual_mode())  # safetensors lets only its owner read it
        with part.open("rb+") as file:
            _sort_metadata(file)
