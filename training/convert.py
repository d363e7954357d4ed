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

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base_model import load_base
from .convert_concepts import read_any_concepts, word_vectors, write_new, written_concepts
from .convert_networks import convert_dreambooth, convert_lora
from .look import check_writable, name_problems
from .methods import PRECISIONS
from .options import option
from .settings import exit_status, make_groups, read_values
from .shared import (
    CHANGES,
    UNET_PREFIX,
    PersonalizeError,
    format_of,
    nest,
    read_about,
    read_header,
    read_ip_adapter,
    read_safetensors,
    read_weights,
    word_tensors,
)

TARGETS = {
    "custom_diffusion": ("personalize", "diffusers", "adobe"),
    "lora": ("personalize", "diffusers"),
    "dreambooth": ("checkpoint", "delta"),
    "textual_inversion": ("personalize", "diffusers"),
    "ip_adapter": ("personalize",),
}
WORD_KEYS = ("emb_params", "clip_l", "clip_g", "t5xxl")
"""What programs call the tensors of a learned word where they do not call them by its name."""
NEED_BASE = ("custom_diffusion", "lora", "dreambooth")


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
    class_name: str | None = option(
        None,
        "Custom Diffusion of other programs: what it is, which follows its word in prompts; of several words each one's, with "
        "commas, in the order of their files or as WORD:CLASS",
    )
    compression: float | None = option(
        None,
        "Custom Diffusion, to personalize: keep the singular values that make up this share of their sum",
        above=0,
        below=1,
    )
    output_dir: str | None = option(None, "folder for the result")
    output_name: str | None = option(None, "its name without ending; the file's by default")
    save_precision: str | None = option(
        None,
        "of the result; fp16, but whole matrices of Custom Diffusion in fp32, as what was learned is small beside them",
        ("fp16", "bf16", "fp32"),
    )


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
    name, whole = options.output_name or path.stem, options.to in ("diffusers", "adobe") and kind == "custom_diffusion"
    if problems := name_problems(name, called=kind in ("custom_diffusion", "textual_inversion")):
        raise PersonalizeError("\n".join(problems))
    check_writable(folder, "--output_dir")
    for given, use in (("compression", "personalize"), ("word", "")):
        if getattr(options, given) and (kind != "custom_diffusion" or (use and options.to != use)):
            print(f"--{given} has no effect on a {kind} that becomes {options.to}.", file=sys.stderr)
    if options.save_precision and kind == "dreambooth":
        print("--save_precision has no effect: a checkpoint has its base's, a difference is in fp16.", file=sys.stderr)
    dtype = PRECISIONS[options.save_precision or ("fp32" if whole else "fp16")]
    if kind == "textual_inversion":
        return [_word(path, folder, name, options.to or "", dtype)]
    if kind == "ip_adapter":
        return [_adapter(path, folder, name, dtype)]
    base = load_base(options.pretrained_model_name_or_path or "", torch.float32)
    if kind == "custom_diffusion":
        read = read_any_concepts(path, base, [Path(one).expanduser() for one in options.word])
        return written_concepts(read, options, folder, name, base, dtype)
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
    if any(str(key).startswith(UNET_PREFIX) for key in inner) or any(
        key.startswith(("diffusion_model.", "text_encoders.")) and key.endswith(CHANGES) for key in keys
    ):
        return "dreambooth"
    named = [str(key) for key, value in weights.items() if isinstance(value, Tensor)]
    if named and all(key.startswith("<") or key in WORD_KEYS for key in named):  # a word's name may have _lora_ in it
        return "textual_inversion"
    if any(re.search(r"\.lora[._]|_lora[._]", key) for key in keys):
        return "lora"
    if "string_to_param" in weights or 1 <= len(named) <= 2:
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
    vectors = {key: value.to(dtype) for key, value in word_vectors(path).items()}
    if len(vectors) == 1:
        own = next(iter(vectors.values()))
        vectors = {f"<{name}>": own} if to == "diffusers" else word_tensors([own])
    return write_new(folder / f"{name}.safetensors", vectors, _metadata(path))


def _adapter(path: Path, folder: Path, name: str, dtype: torch.dtype) -> Path:
    parts = read_ip_adapter(path)
    flat = {f"{part}.{key}": value for part, own in parts.items() for key, value in own.items()}
    tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in flat.items()}
    return write_new(folder / f"{name}.safetensors", tensors, _metadata(path))


def _metadata(path: Path) -> dict[str, str]:
    return read_safetensors(path)[1] if path.suffix == ".safetensors" else {}


if __name__ == "__main__":
    sys.exit(main())
