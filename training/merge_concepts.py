"""Merge concepts that Custom Diffusion learned apart, in closed form and without training.

    python -m training.merge_concepts --pretrained_model_name_or_path MODEL --file dog.safetensors \\
        --file mug.safetensors --output_dir FOLDER

On each concept's words the merged keys and values are those of its own file; on everyday captions they are as near to the
base's as that lets them be (Kumari et al. 2023, eq. 4). The words' files are looked for beside each file, or where ComfyUI
has them, in embeddings beside loras, and stay as they are: the merged file goes into models/loras.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .base_model import BaseModel, load_base
from .convert_concepts import check_new, word_of
from .encoding import read_text
from .look import check_writable, name_problems
from .methods import PRECISIONS, shapes_of
from .options import option
from .settings import exit_status, make_groups, read_values
from .shared import (
    CALL,
    EVERYDAY,
    FRAMES,
    UNET,
    About,
    Call,
    PersonalizeError,
    calls_of,
    check_parts,
    concept_changes,
    file_name,
    host_layers,
    merge_changes,
    prompts_of,
    read_about,
    read_captions,
    read_safetensors,
    read_word,
    same_model,
    title_of,
    title_of_method,
    unique_rows,
    write_safetensors,
)
from .textual_inversion import add_words


@dataclass
class MergeConcepts:
    """Merging"""

    pretrained_model_name_or_path: str | None = option(
        None, "the base model of all files: a file, a diffusers folder, or a hub id"
    )
    file: list[str] = option(  # noqa: RUF009 - a list of its own for each
        [], "what Custom Diffusion wrote for models/loras; given once for each file"
    )
    captions: str | None = option(
        None, "a file with everyday captions, one in each line, on which the model shall stay as it is; ours by default"
    )
    output_dir: str | None = option(None, "folder for the result")
    output_name: str = option("merged", "its name without ending")
    save_precision: str = option(
        "fp32", "of the result; half precision misses what each file gives by some percent", ("fp16", "bf16", "fp32")
    )


@dataclass(frozen=True)
class Part:
    """A file with its concepts."""

    path: Path
    about: About
    calls: list[Call]
    tensors: Mapping[str, Tensor]

    def word_file(self, call: Call) -> Path:
        """Of the word in a call."""
        return word_of(self.path, call.word)


def main(arguments: list[str] | None = None) -> int:
    """What `python -m training.merge_concepts` does; returns the exit status."""

    def work() -> None:
        given, values = read_values((MergeConcepts,), "python -m training.merge_concepts", __doc__ or "", arguments)
        merge(*make_groups((MergeConcepts,), {**values, **given}))

    return exit_status(work)


def merge(options: MergeConcepts) -> Path:
    """Write the merged file; returns its path.

    Raises:
        PersonalizeError: an option is missing, or a file is none of Custom Diffusion's, or for another base.
        OSError: a file cannot be written.
    """
    needed = {
        "pretrained_model_name_or_path": "the base model",
        "file": "what Custom Diffusion wrote, once for each file",
        "output_dir": "the folder for the result",
    }
    if problems := [f"--{name} is missing: {what}." for name, what in needed.items() if not getattr(options, name)]:
        raise PersonalizeError("\n".join(problems))
    if problems := name_problems(options.output_name, called=False):
        raise PersonalizeError("\n".join(problems))
    folder = Path(options.output_dir or "").expanduser()
    target = folder / f"{options.output_name}.safetensors"
    check_new([target])
    captions = read_captions(EVERYDAY if options.captions is None else Path(options.captions).expanduser())
    parts = [_read(Path(one).expanduser()) for one in options.file]
    skips = {int(part.about.settings.get("clip_skip", 1)) for part in parts}
    if len(skips) > 1:
        raise PersonalizeError(
            f"The files were trained with --clip_skip {sorted(skips)}: all must read the same layer."
        )
    words = {call.text: part.word_file(call) for part in parts for call in part.calls if call.word}
    for path in words.values():
        read_safetensors(path)  # before the base loads
    check_writable(folder, "--output_dir")
    base = load_base(options.pretrained_model_name_or_path or "", torch.float32)
    state = base.pipeline.unet.state_dict()
    layers = host_layers(shapes_of(base.pipeline.unet), [])
    for part in parts:
        _check_base(part, base)
    concepts = {
        f"{part.path.name} ({i})": concept_changes(part.tensors, layers, part.path.name)
        for i, part in enumerate(parts, 1)
    }
    check_parts(concepts, [[call.text for call in part.calls] for part in parts])
    weights = {f"{file_name(UNET, n.removesuffix('.weight'))}.weight": value for n, value in state.items()}
    (skip,) = skips
    everyday, own = features(base, captions, [part.calls for part in parts], words, skip)
    merged = merge_changes(
        lambda layer: weights[layer],
        list(concepts.values()),
        everyday,
        own,
        PRECISIONS[options.save_precision],
        lambda names: tqdm(names, desc="Merging", unit=" layers"),
    )
    calls = [call.text for part in parts for call in part.calls]
    about = replace(
        parts[0].about,
        trigger=", ".join(calls),
        class_name=", ".join(dict.fromkeys(name for part in parts for name in part.about.class_name.split(", "))),
        settings={"merged": [part.path.name for part in parts], "missed": merged.missed, "clip_skip": skip},
        extra={},
    )
    tensors = {f"{name.removesuffix('.weight')}.diff": change for name, change in merged.changes.items()}
    write_safetensors(target, tensors, about.as_metadata())
    print(f"{target} ({target.stat().st_size / 1e6:.2f} MB), called by {', '.join(calls)}\n{merged.report}.")
    return target


def _read(path: Path) -> Part:
    tensors, metadata = read_safetensors(path)
    about = read_about(metadata, path.name)
    if about is None or about.method != "custom_diffusion":
        what = f"of {title_of_method(about.method)}" if about else "of another program"
        raise PersonalizeError(f"{path.name} is {what}: --file is what Custom Diffusion wrote for models/loras.")
    return Part(path, about, calls_of(about.trigger), tensors)


def _check_base(part: Part, base: BaseModel) -> None:
    """Raises PersonalizeError where a file is for another family; another model of the family is told."""
    name, about = part.path.name, part.about
    if about.base_family != base.family:
        raise PersonalizeError(
            f"{name} was trained on {title_of(about.base_family)} ({about.base_name}), but {base.name} is "
            f"{title_of(base.family)}: merge it on its own base."
        )
    if about.base_fingerprint and not same_model(about.base_fingerprint, base.fingerprint()):
        print(
            f"{name} was trained on {about.base_name}; on another checkpoint it may act differently.", file=sys.stderr
        )


@torch.no_grad()
def features(
    base: BaseModel,
    captions: Sequence[str],
    calls: Sequence[Sequence[Call]],
    words: Mapping[str, Path],
    clip_skip: int,
) -> tuple[Tensor, list[Tensor]]:
    """What the UNet reads of everyday captions, [R, width], and of the words of each file, [S, width].

    Args:
        base: whose tokenizers and text encoders get the words.
        captions: everyday ones.
        calls: of each file's concepts.
        words: the file of the learned word in a call.
        clip_skip: which layer the text is taken from.

    Raises:
        PersonalizeError: the file of a word is for another base.
    """
    widths = [encoder.get_input_embeddings().embedding_dim for encoder in base.text_encoders]
    title = title_of(base.family)
    vectors = {call: read_word(read_safetensors(path)[0], widths, path.name, title) for call, path in words.items()}
    tokens = {call: [f"<word-{i}-{k}>" for k in range(len(vectors[call][0]))] for i, call in enumerate(words)}
    rows = iter([torch.cat(parts) for parts in zip(*vectors.values(), strict=True)])
    if tokens:
        added = [token for own in tokens.values() for token in own]
        add_words(base, added, lambda _, table: next(rows).to(table.weight))
    tokenizer = base.pipeline.tokenizer

    def ends(texts: Sequence[str]) -> list[int]:
        ids = tokenizer(list(texts), padding="max_length", truncation=True, max_length=77).input_ids
        return [one.index(tokenizer.eos_token_id) for one in ids]

    def read(texts: Sequence[str], starts: Sequence[int] | None = None) -> Tensor:
        states = torch.cat([read_text(base, [text], clip_skip).states for text in texts])
        return unique_rows(states, ends(texts), starts)

    def spoken(call: Call) -> str:
        return call.text.replace(f"{CALL}{call.word}", "".join(tokens[call.text])) if call.word else call.text

    starts = ends(FRAMES)
    return read(captions), [
        read([text for call in own for text in prompts_of(spoken(call))], starts * len(own)) for own in calls
    ]


if __name__ == "__main__":
    sys.exit(main())
