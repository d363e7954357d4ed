"""Bring a trained file into the format of another program, or any program's into ours.

    python -m training.convert --file delta.bin --to personalize --pretrained_model_name_or_path MODEL --output_dir FOLDER

What the file is, is told from its tensors:

    Custom Diffusion   personalize (ComfyUI's stock loader takes it), diffusers, adobe       needs the base
    LoRA               personalize (kohya's naming, of ComfyUI and most tools), diffusers    needs the base
    DreamBooth         checkpoint, delta                                                     needs the base
    Textual Inversion  personalize, diffusers
    IP-Adapter         personalize (.safetensors in the official layout)

Custom Diffusion's words are looked for beside the file, or given with --word. diffusers and Adobe read their Custom
Diffusion from pickles only, so these are written as .bin; nothing else is.
"""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base_model import BaseModel, load_base
from .convert_networks import convert_dreambooth, convert_lora
from .methods import PRECISIONS
from .options import option
from .preflight import check_writable
from .settings import exit_status, make_groups, read_values
from .shared import (
    UNET,
    About,
    PersonalizeError,
    adobe_weights,
    calls_of,
    concept_changes,
    concept_tensors,
    diffusers_weights,
    file_name,
    format_of,
    host_layers,
    nest,
    read_about,
    read_concepts,
    read_header,
    read_ip_adapter,
    read_safetensors,
    read_weights,
    word_tensors,
    write_safetensors,
)

TARGETS = {
    "custom_diffusion": ("personalize", "diffusers", "adobe"),
    "lora": ("personalize", "diffusers"),
    "dreambooth": ("checkpoint", "delta"),
    "textual_inversion": ("personalize", "diffusers"),
    "ip_adapter": ("personalize",),
}
NEED_BASE = ("custom_diffusion", "lora", "dreambooth")
DIFFUSERS_NAME = "pytorch_custom_diffusion_weights.bin"


@dataclass
class Convert:
    """Converting"""

    file: str | None = option(None, "the file to convert")
    to: str | None = option(
        None, "its new format", tuple(dict.fromkeys(target for own in TARGETS.values() for target in own))
    )
    pretrained_model_name_or_path: str | None = option(
        None, "the base model it was trained on: a file, a diffusers folder, or a hub id"
    )
    word: list[str] = option(  # noqa: RUF009 - a list of its own for each
        [], "Custom Diffusion: the file of a word, where it does not lie beside; may be given several times"
    )
    compression: float | None = option(
        None,
        "Custom Diffusion, to personalize: keep the singular values that make up this share of their sum",
        above=0,
        below=1,
    )
    output_dir: str | None = option(None, "folder for the result")
    output_name: str | None = option(None, "its name without ending; the file's by default")
    save_precision: str = option("fp16", "of the result", ("fp16", "bf16", "fp32"))


def main(arguments: list[str] | None = None) -> int:
    """What `python -m training.convert` does; returns the exit status."""

    def work() -> None:
        given, values = read_values((Convert,), "python -m training.convert", __doc__ or "", arguments)
        for path in convert(*make_groups((Convert,), {**values, **given})):
            print(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")

    return exit_status(work)


def convert(options: Convert) -> list[Path]:
    """Write the file in its new format; returns what was written.

    Raises:
        PersonalizeError: an option is missing, the file is of no known kind, or has no such format.
        OSError: a file cannot be written.
    """
    needed = {"file": "the file to convert", "to": "its new format", "output_dir": "the folder for the result"}
    problems = [f"--{name} is missing: {what}." for name, what in needed.items() if not getattr(options, name)]
    if problems:
        raise PersonalizeError("\n".join(problems))
    path, folder = Path(options.file or "").expanduser(), Path(options.output_dir or "").expanduser()
    kind = kind_of(path)
    if options.to not in TARGETS[kind]:
        raise PersonalizeError(
            f"{path.name} is a {kind}, which --to {options.to} is not for: {', '.join(TARGETS[kind])}."
        )
    if kind in NEED_BASE and not options.pretrained_model_name_or_path:
        raise PersonalizeError(f"--pretrained_model_name_or_path is missing: the base that {path.name} was trained on.")
    check_writable(folder, "--output_dir")
    name, dtype = options.output_name or path.stem, PRECISIONS[options.save_precision]
    if kind == "textual_inversion":
        return [_word(path, folder, name, options.to or "", dtype)]
    if kind == "ip_adapter":
        return [_adapter(path, folder, name, dtype)]
    base = load_base(options.pretrained_model_name_or_path or "", torch.float32)
    if kind == "custom_diffusion":
        return _concepts(options, path, folder, name, base)
    if kind == "lora":
        return [convert_lora(path, folder, name, options.to or "", base, dtype)]
    return [convert_dreambooth(path, folder, name, options.to or "", base)]


def kind_of(path: Path) -> str:
    """The method of a file of any program, from its tensors' names.

    Raises:
        PersonalizeError: it is missing, damaged, or of no known kind.
    """
    weights = _names(path)
    keys = [str(key) for key in weights]
    about = read_about(read_header(path)[1], path.name) if path.suffix == ".safetensors" else None
    if format_of(weights) or (about is not None and about.method == "custom_diffusion"):
        return "custom_diffusion"
    if "image_proj" in nest({key: value for key, value in weights.items() if isinstance(key, str)}):
        return "ip_adapter"
    inner = weights.get("state_dict", weights)
    if any(str(key).startswith("model.diffusion_model.") for key in inner) or any(
        key.startswith(("diffusion_model.", "text_encoders.")) and key.endswith((".diff", ".diff_b", ".lora_up.weight"))
        for key in keys
    ):
        return "dreambooth"
    if any(re.search(r"\.lora[._]|_lora[._]", key) for key in keys):
        return "lora"
    if "string_to_param" in weights or 1 <= len(keys) <= 2:
        return "textual_inversion"
    raise PersonalizeError(
        f"{path.name} is of no kind that is known: its tensors are called {', '.join(keys[:3])}, ..."
    )


def _names(path: Path) -> Mapping[str, Any]:
    """A file's tensors, of a .safetensors file without their values."""
    if path.suffix.lower() in (".safetensors", ".sft"):
        return {key: torch.empty(entry["shape"], device="meta") for key, entry in read_header(path)[0].items()}
    return read_weights(path)


def _word(path: Path, folder: Path, name: str, to: str, dtype: torch.dtype) -> Path:
    vectors = {key: value.to(dtype) for key, value in _vectors(path).items()}
    if to == "diffusers" and len(vectors) == 1:
        vectors = {f"<{name}>": next(iter(vectors.values()))}
    elif len(vectors) == 1:
        vectors = word_tensors([next(iter(vectors.values()))])
    return _written(folder / f"{name}.safetensors", vectors, path, {})


def _vectors(path: Path) -> dict[str, Tensor]:
    """The tensors [n, width] of a word's file.

    Raises:
        PersonalizeError: there are none.
    """
    weights = read_weights(path)
    found = {str(k): v for k, v in weights.get("string_to_param", weights).items() if isinstance(v, Tensor)}
    found = {key: torch.atleast_2d(value.float()) for key, value in found.items() if value.ndim in (1, 2)}
    if not found:
        raise PersonalizeError(f"{path.name} is no learned word: it has no [vectors, width] tensor.")
    return found


def _adapter(path: Path, folder: Path, name: str, dtype: torch.dtype) -> Path:
    parts = read_ip_adapter(path)
    flat = {f"{part}.{key}": value for part, own in parts.items() for key, value in own.items()}
    tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in flat.items()}
    return _written(folder / f"{name}.safetensors", tensors, path, {})


def _written(target: Path, tensors: Mapping[str, Tensor], source: Path, metadata: Mapping[str, str]) -> Path:
    """Raises PersonalizeError where that would be the source itself."""
    if target.exists() and target.samefile(source):
        raise PersonalizeError(f"{target} is the file to convert: name another --output_dir or --output_name.")
    own = read_safetensors(source)[1] if source.suffix == ".safetensors" and not metadata else dict(metadata)
    write_safetensors(target, tensors, own)
    return target


def _concepts(options: Convert, path: Path, folder: Path, name: str, base: BaseModel) -> list[Path]:
    """Custom Diffusion in any of its formats."""
    state, weights, dtype = base.pipeline.unet.state_dict(), read_weights(path), PRECISIONS[options.save_precision]
    about, given = _about(path, base), [Path(one).expanduser() for one in options.word]
    if format_of(weights):
        read = read_concepts(weights, state, base.unet_names(), path.name)
        changes, words = read.changes, dict(read.words)
        beside = [one for one in sorted(path.parent.glob("<*>.*")) if one.suffix in (".bin", ".safetensors")]
        for one in given or beside:
            for key, value in _vectors(one).items():
                words[key if key.startswith("<") else f"<{one.stem.strip('<>')}>"] = value
        two = {word: [vectors] for word, vectors in words.items()}
    else:
        names = {f"{file_name(UNET, key.rpartition('.')[0])}.{key.rpartition('.')[2]}": key for key in state}
        layers = host_layers({key: tuple(value.shape) for key, value in state.items()}, [])
        changes = {names[key]: value for key, value in concept_changes(weights, layers, path.name).items()}
        called = [call.removeprefix("embedding:").split()[0] for call in calls_of(about.trigger)]
        files = given or [path.with_name(f"{word}.safetensors") for word in called]
        two = {f"<{one.stem}>": list(_vectors(one).values()) for one in files}
    if options.to == "personalize":
        return _ours(options, path, folder, name, about, changes, two)
    if base.layout == "sdxl":
        raise PersonalizeError(f"--to {options.to} is for SD1.5 and SD2: its format has one text encoder's words.")
    first = {word: vectors[0].to(dtype) for word, vectors in two.items()}
    if options.to == "adobe":
        return [_pickled(folder / f"{name}.bin", _cast(adobe_weights(changes, state, first), dtype))]
    paths = [_pickled(folder / DIFFUSERS_NAME, _cast(diffusers_weights(changes, state), dtype))]
    for word, vectors in first.items():
        paths.append(folder / f"{word}.safetensors")
        write_safetensors(paths[-1], {word: vectors if len(vectors) > 1 else vectors[0]}, {})
    return paths


def _about(path: Path, base: BaseModel) -> About:
    found = read_about(read_header(path)[1], path.name) if path.suffix == ".safetensors" else None
    return found or About("custom_diffusion", base.family, base.name, base_fingerprint=base.fingerprint())


def _ours(
    options: Convert,
    path: Path,
    folder: Path,
    name: str,
    about: About,
    changes: Mapping[str, Tensor],
    words: Mapping[str, list[Tensor]],
) -> list[Path]:
    dtype = PRECISIONS[options.save_precision]
    tensors = {key: value.to(dtype) for key, value in concept_tensors(changes, options.compression).items()}
    stems = {word: word.strip("<>") for word in words}
    if not about.trigger:  # what the words of another program are called says nothing of this file
        stems = {word: f"{name}_{stem}" for word, stem in stems.items()}
        about = replace(about, trigger=", ".join(f"embedding:{stem}" for stem in stems.values()))
    paths = [_written(folder / f"{name}.safetensors", tensors, path, about.as_metadata())]
    for word, vectors in words.items():
        paths.append(folder / f"{stems[word]}.safetensors")
        own = replace(about, method="textual_inversion", trigger=f"embedding:{stems[word]}")
        write_safetensors(paths[-1], word_tensors([one.to(dtype) for one in vectors]), own.as_metadata())
    return paths


def _cast(weights: Any, dtype: torch.dtype) -> Any:
    if isinstance(weights, Mapping):
        return {key: _cast(value, dtype) for key, value in weights.items()}
    return weights.to(dtype).contiguous()


def _pickled(path: Path, weights: Mapping[str, Any]) -> Path:
    """Atomic."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(weights), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


if __name__ == "__main__":
    sys.exit(main())
