"""Converting Custom Diffusion: whatever program wrote it, read into differences and words, and written for any other."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base_model import BaseModel
from .look import name_problems
from .methods import shapes_of
from .shared import (
    CALL,
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
    read_about,
    read_concepts,
    read_header,
    read_weights,
    read_word,
    same_model,
    title_of,
    whole,
    word_tensors,
    write_safetensors,
)

if TYPE_CHECKING:
    from .convert import Convert

DIFFUSERS_NAME = "pytorch_custom_diffusion_weights.bin"
SMALL = 1_000_000
"""Bytes of a word's file at most."""


@dataclass(frozen=True)
class Read:
    """What a file and the files of its words hold."""

    about: About
    changes: dict[str, Tensor]
    """W - W0 by diffusers' parameter name."""
    words: dict[str, list[Tensor]]
    """Vectors [n, width] for each text encoder, by the word's name."""


def word_vectors(path: Path) -> dict[str, Tensor]:
    """The tensors [n, width] of a word's file of any program.

    Raises:
        PersonalizeError: there are none.
    """
    weights = read_weights(path)
    found = {str(k): v for k, v in weights.get("string_to_param", weights).items() if isinstance(v, Tensor)}
    found = {key: torch.atleast_2d(value.float()) for key, value in found.items() if value.ndim in (1, 2)}
    if not found:
        raise PersonalizeError(f"{path.name} is no learned word: it has no [vectors, width] tensor.")
    return found


def read_any_concepts(path: Path, base: BaseModel, given: Sequence[Path]) -> Read:
    """Custom Diffusion in any of its formats.

    Args:
        path: the file.
        base: that it was trained on.
        given: the words' files; by default those that lie beside.

    Raises:
        PersonalizeError: it does not fit the base, or a word is missing.
    """
    state, weights = base.pipeline.unet.state_dict(), read_weights(path)
    widths = [encoder.get_input_embeddings().embedding_dim for encoder in base.text_encoders]
    found = read_about(read_header(path)[1], path.name) if path.suffix == ".safetensors" else None
    about = found or About("custom_diffusion", base.family, base.name, base_fingerprint=base.fingerprint())

    def fitting(one: Path, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [v.float() for v in read_word(tensors, widths, one.name, title_of(base.family))]

    words: dict[str, list[Tensor]] = {}
    if about.base_fingerprint and not same_model(about.base_fingerprint, base.fingerprint()):
        print(f"{path.name} was trained on {about.base_name}, {base.name} is another checkpoint.", file=sys.stderr)
    if format_of(weights) is None:
        names = {f"{file_name(UNET, key.rpartition('.')[0])}.{key.rpartition('.')[2]}": key for key in state}
        layers = host_layers(shapes_of(base.pipeline.unet), [])
        changes = {names[key]: value for key, value in concept_changes(weights, layers, path.name).items()}
        called = [call.word for call in calls_of(about.trigger) if call.word]
        for word, one in _files_of(path, called, given).items():
            words[word] = fitting(one, word_vectors(one))
        return Read(about, changes, words)
    read = read_concepts(weights, state, base.unet_names(), path.name)
    for word, vectors in read.words.items():
        words[word.strip("<>")] = fitting(path, {"word": vectors})
    for one in given or ([] if words else _words_beside(path)):
        for key, value in word_vectors(one).items():
            words[(key if key.startswith("<") else one.stem).strip("<>")] = fitting(one, {"word": value})
    if wrong := [word for word in words if name_problems(word, called=True)]:
        raise PersonalizeError(f"A word of {path.name} is called {wrong[0]!r}, which no file can be: rename it there.")
    if not words:
        print(
            f"No learned word lies beside {path}, so that nothing calls what it learned: give its --word.",
            file=sys.stderr,
        )
    return Read(about, read.changes, words)


def _files_of(path: Path, called: Sequence[str], given: Sequence[Path]) -> dict[str, Path]:
    """The file of each word that calls a file of ours: beside it, or as given.

    Raises:
        PersonalizeError: a word has no file, or a file is of another word.
    """
    if not given:
        return {word: word_of(path, word) for word in called}
    files = {_word_in(one): one for one in given}
    if files.keys() != set(called):
        raise PersonalizeError(
            f"{path.name} is called by {', '.join(called) or 'no learned word'}, but --word names {', '.join(files)}: give the "
            "file of each of its words."
        )
    return {word: files[word] for word in called}


def word_of(path: Path, word: str) -> Path:
    """The file of a word that calls a file of ours: beside it, or in ComfyUI's folders, where they lie apart."""
    name = f"{word}.safetensors"
    beside, apart = path.with_name(name), path.parent.parent / "embeddings" / name
    return apart if path.parent.name == "loras" and apart.is_file() and not beside.is_file() else beside


def _word_in(path: Path) -> str:
    """What a word's file calls itself, whatever it was renamed to."""
    about = read_about(read_header(path)[1], path.name) if path.suffix == ".safetensors" else None
    return about.trigger.removeprefix(CALL) if about and about.trigger.startswith(CALL) else path.stem


def _words_beside(path: Path) -> list[Path]:
    """Files whose tensors are all called <...>."""
    found = []
    for one in sorted(path.parent.iterdir()):
        if one.suffix in (".bin", ".safetensors") and one != path and one.stat().st_size < SMALL:
            try:
                keys = read_header(one)[0] if one.suffix == ".safetensors" else read_weights(one)
            except PersonalizeError:  # what another program left there
                continue
            if keys and all(str(key).startswith("<") for key in keys):
                found.append(one)
    return found


def written_concepts(
    read: Read, options: "Convert", folder: Path, name: str, base: BaseModel, dtype: torch.dtype
) -> list[Path]:
    """The files in the new format.

    Raises:
        PersonalizeError: it cannot hold them, or one of them is there already.
    """
    if options.to == "personalize":
        return _ours(read, options, folder, name, dtype)
    if base.layout == "sdxl":
        raise PersonalizeError(f"--to {options.to} is for SD1.5 and SD2: its format has one text encoder's words.")
    state = base.pipeline.unet.state_dict()
    first = {f"<{word}>": vectors[0].to(dtype) for word, vectors in read.words.items()}
    if options.to == "adobe":
        return [_pickle_new(folder / f"{name}.bin", _cast(adobe_weights(read.changes, state, first), dtype))]
    targets = {word: folder / f"{word.strip('<>')}.safetensors" for word in first}
    check_new([folder / DIFFUSERS_NAME, *targets.values()])
    paths = [_pickle_new(folder / DIFFUSERS_NAME, _cast(diffusers_weights(read.changes, state), dtype))]
    for word, vectors in first.items():
        paths.append(write_new(targets[word], {word: vectors if len(vectors) > 1 else vectors[0]}, {}))
    return paths


def _ours(read: Read, options: "Convert", folder: Path, name: str, dtype: torch.dtype) -> list[Path]:
    about, stems = read.about, {word: word for word in read.words}
    if not about.trigger:  # what the words of another program are called says nothing of this file
        stems = {word: word if word.startswith(f"{name}_") else f"{name}_{word}" for word in read.words}
        classes = _classes(options.class_name, list(read.words))
        calls = [f"{CALL}{stem} {one}".strip() for stem, one in zip(stems.values(), classes, strict=True)]
        about = replace(about, trigger=", ".join(calls), class_name=", ".join(filter(None, classes)))
        print(f"Prompts call it by {about.trigger or 'nothing'}.")
    targets = [folder / f"{stem}.safetensors" for stem in (name, *stems.values())]
    check_new(targets)
    tensors = {key: value.to(dtype) for key, value in concept_tensors(read.changes, options.compression).items()}
    write_new(targets[0], tensors, about.as_metadata())
    for target, (word, vectors) in zip(targets[1:], read.words.items(), strict=True):
        own = replace(about, method="textual_inversion", trigger=f"{CALL}{stems[word]}")
        write_new(target, word_tensors([one.to(dtype) for one in vectors]), own.as_metadata())
    return targets


def _classes(given: str | None, words: Sequence[str]) -> list[str]:
    """Each word's class, of "dog, woman" in the words' order, or of "zxcv:dog, ohwx:woman" in any.

    Raises:
        PersonalizeError: there are more or fewer, or of other words.
    """
    if not given:
        return [""] * len(words)
    parts = [one.strip() for one in given.split(",")]
    named = {word.strip(): name.strip() for word, colon, name in (one.partition(":") for one in parts) if colon}
    if len(parts) == len(words) and named.keys() == set(words):
        return [named[word] for word in words]
    if len(parts) == len(words) and not named:
        return parts
    raise PersonalizeError(
        f"--class_name is {given!r}, but the words are {', '.join(words)}: name a class for each, in this order or as "
        "WORD:CLASS, with commas between."
    )


def check_new(paths: Sequence[Path]) -> None:
    """Raises PersonalizeError where a file is there already, or two would be one."""
    if twice := [path for i, path in enumerate(paths) if path in paths[:i]]:
        raise PersonalizeError(f"Two words would both be {twice[0].name}: name another --output_name.")
    if there := [path for path in paths if path.exists()]:
        raise PersonalizeError(f"{there[0]} is there already: name another --output_dir or --output_name.")


def write_new(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Raises PersonalizeError where the file is there already."""
    check_new([path])
    write_safetensors(path, tensors, metadata)
    return path


def _cast(weights: Any, dtype: torch.dtype) -> Any:
    if isinstance(weights, Mapping):
        return {key: _cast(value, dtype) for key, value in weights.items()}
    return weights.to(dtype).contiguous()


def _pickle_new(path: Path, weights: Mapping[str, Any]) -> Path:
    """Whole.

    Raises:
        PersonalizeError: the file is there already.
        OSError: it cannot be written.
    """
    check_new([path])
    try:
        with whole(path) as part, part.open("wb") as file:
            torch.save(dict(weights), file)
    except RuntimeError as error:  # torch's word for a disk that is full
        raise OSError(None, str(error), str(path)) from None
    return path
