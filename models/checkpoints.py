"""Single-file checkpoints with some tensors replaced: everything else stays byte for byte as it was.

A safetensors file is a header (eight bytes of length, then JSON) and the tensors' bytes one after another, so that a
trained model is written by copying the user's file and putting the trained tensors, in the file's own precision, in
the places of the old ones. VAE, extra keys (`v_pred`, `ztsnr`) and their order are kept, and memory holds one tensor.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .errors import PersonalizeError
from .weight_files import unreadable
from .whole_files import whole

CHUNK = 1 << 24
LONGEST = 100_000_000
"""Bytes of a header, as safetensors has it."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def read_header(path: Path) -> tuple[dict[str, dict], dict[str, str], int]:
    """What a safetensors file holds: `{name: {"dtype", "shape", "data_offsets"}}`, metadata, and where the data begins.

    Raises:
        PersonalizeError: the file is missing, damaged or cut short, or is a folder.
    """
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= LONGEST else None
    except OSError as error:
        raise unreadable(path, error.strerror or error) from None
    except (struct.error, ValueError):
        header = None
    if not isinstance(header, dict):
        raise unreadable(path, "its header cannot be read")
    metadata = header.pop("__metadata__", {})
    return header, metadata, 8 + length


def overwrite_tensors(source: Path, target: Path, trained: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `target` as `source` with the tensors of `trained` in place of its own, whole.

    Args:
        source: a .safetensors file; its metadata is kept where `metadata` does not say otherwise.
        target: may not be `source`.
        trained: by the file's names, of the file's shapes.
        metadata: to add.

    Raises:
        PersonalizeError: a tensor is not in the file, or has another shape there.
    """
    if target.exists() and target.samefile(source):
        raise PersonalizeError(f"{target} is the base model itself: write to another file.")
    header, old, start = read_header(source)
    for name, value in trained.items():
        if name not in header:
            raise PersonalizeError(f"{source.name} has no {name}: it is not the base that was trained.")
        if list(value.shape) != header[name]["shape"]:
            raise PersonalizeError(
                f"{name} is {tuple(value.shape)} after training, but {tuple(header[name]['shape'])} in {source.name}."
            )
    text = json.dumps({"__metadata__": {**old, **metadata}, **header}, separators=(",", ":"), ensure_ascii=False)
    encoded = text.encode()
    encoded += b" " * (-len(encoded) % 8)
    places = sorted((header[name]["data_offsets"][0], name) for name in trained)
    with whole(target) as part, open(source, "rb") as old_file, open(part, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        old_file.seek(start)
        done = 0
        for begin, name in places:
            _copy(old_file, file, begin - done)
            data = _bytes(trained[name], header[name]["dtype"])
            file.write(data)
            old_file.seek(len(data), os.SEEK_CUR)
            done = begin + len(data)
        _copy(old_file, file, None)


def check_tensors(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Read a written file back.

    Args:
        path: a .safetensors file.
        expected: what must be in it, but for the file's precision.

    Raises:
        PersonalizeError: a tensor is missing or another.
    """
    header, _, start = read_header(path)
    with open(path, "rb") as file:  # mapped, the whole file would count as memory
        for name, value in expected.items():
            begin, end = header[name]["data_offsets"] if name in header else (0, 0)
            file.seek(start + begin)
            if name not in header or file.read(end - begin) != _bytes(value, header[name]["dtype"]):
                raise PersonalizeError(f"{name} in {path} is not what was trained: the disk is faulty or full.")


def _copy(source: IO[bytes], target: IO[bytes], count: int | None) -> None:
    """`count` bytes, or all that are left."""
    while count is None or count > 0:
        part = source.read(CHUNK if count is None else min(CHUNK, count))
        if not part:
            return
        target.write(part)
        count = None if count is None else count - len(part)


def _bytes(value: Tensor, dtype: str) -> bytes:
    return value.detach().to("cpu", DTYPES[dtype]).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
