"""Merge concepts that Custom Diffusion learned apart, in closed form and without training.

    python -m training.merge_concepts --pretrained_model_name_or_path MODEL --file dog.safetensors \\
        --file mug.safetensors --output_dir FOLDER

On each concept's words the merged keys and values are those of its own file; on everyday captions they are as near to the
base's as that lets them be (Kumari et al. 2023, eq. 4). The words' files are looked for beside each file, and stay as they
are: in ComfyUI the merged file goes into models/loras, the words into models/embeddings.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .base_model import BaseModel, load_base
from .encoding import read_text
from .methods import PRECISIONS
from .options import option
from .preflight import check_writable
from .settings import exit_status, make_groups, read_values
from .shared import (
    EVERYDAY,
    UNET,
    About,
    PersonalizeError,
    calls_of,
    concept_changes,
    file_name,
    file_tensors,
    host_layers,
    merge_changes,
    prompts_of,
    read_about,
    read_captions,
    read_safetensors,
    read_word,
    title_of,
    unique_rows,
    write_safetensors,
)
from .textual_inversion import add_words

CALL = "embedding:"


@dataclass
class MergeConcepts:
    """Merging"""

    pretrained_model_name_or_path: str | None = option(
        None, "the base model of all files: a file, a diffusers folder, or a hub id"
    )
    file: list[str] = option(  # noqa: RUF009 - a list of its own for each
        [], "what Custom Diffusion wrote for models/loras; may be given several times"
    )
    captions: str | None = option(
        None, "a file with everyday captions, one in each line, on which the model shall stay as it is; ours by default"
    )
    output_dir: str | None = option(None, "folder for the result")
    output_name: str = option("merged", "its name without ending")
    save_precision: str = option("fp16", "of the result", ("fp16", "bf16", "fp32"))


@dataclass(frozen=True)
class Part:
    """A file with its concepts."""

    path: Path
    about: About
    calls: list[str]
    """How each concept is called, as "embedding:dog_ohwx dog"."""
    changes: Mapping[str, Tensor]

    def word_file(self, call: str) -> Path:
        """Of the word in a call."""
        return self.path.with_name(f"{call.removeprefix(CALL).split()[0]}.safetensors")


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
    problems = [
        f"--{name} is missing: {what}."
        for name, what in (
            ("pretrained_model_name_or_path", "the base model"),
            ("file", "what Custom Diffusion wrote, once for each file"),
            ("output_dir", "the folder for the result"),
        )
        if not getattr(options, name)
    ]
    if problems:
        raise PersonalizeError("\n".join(problems))
    folder = Path(options.output_dir or "").expanduser()
    check_writable(folder, "--output_dir")
    captions = read_captions(EVERYDAY if options.captions is None else Path(options.captions).expanduser())
    base = load_base(options.pretrained_model_name_or_path or "", torch.float32)
    unet = base.pipeline.unet
    layers = host_layers({name: tuple(value.shape) for name, value in unet.state_dict().items()}, [])
    parts = [_read(Path(one).expanduser(), base, layers) for one in options.file]
    weights = {f"{file_name(UNET, n.removesuffix('.weight'))}.weight": value for n, value in unet.state_dict().items()}
    everyday, words = features(base, captions, parts)
    concepts = {f"{part.path.name} ({i})": part.changes for i, part in enumerate(parts, 1)}
    merged = merge_changes(
        lambda layer: weights[layer],
        concepts,
        everyday,
        words,
        lambda names: tqdm(names, desc="Merging", unit=" layers"),
    )
    dtype, path = PRECISIONS[options.save_precision], folder / f"{options.output_name}.safetensors"
    calls = dict.fromkeys(call for part in parts for call in part.calls)
    classes = dict.fromkeys(name for part in parts for name in part.about.class_name.split(", "))
    about = replace(
        parts[0].about,
        trigger=", ".join(calls),
        class_name=", ".join(classes),
        settings={"merged": [part.path.name for part in parts], "missed": merged.missed},
        extra={},
    )
    tensors = {name: change.to(dtype) for name, change in file_tensors(merged.changes).items()}
    write_safetensors(path, tensors, about.as_metadata())
    print(f"{path} ({path.stat().st_size / 1e6:.2f} MB), called by {', '.join(calls)}")
    print(f"On the concepts' words the merged keys and values miss their own by {merged.missed:.1e} at most.")
    return path


def _read(path: Path, base: BaseModel, layers: Mapping[str, tuple[int, ...]]) -> Part:
    tensors, metadata = read_safetensors(path)
    about = read_about(metadata, path.name)
    if about is None or about.method != "custom_diffusion":
        what = f"a {about.method}" if about else "of another program"
        raise PersonalizeError(f"{path.name} is {what}: --file is what Custom Diffusion wrote for models/loras.")
    if about.base_family != base.family:
        raise PersonalizeError(
            f"{path.name} was trained on {title_of(about.base_family)} ({about.base_name}), but {base.name} is "
            f"{title_of(base.family)}: merge it on its own base."
        )
    return Part(path, about, calls_of(about.trigger), concept_changes(tensors, layers, path.name))


@torch.no_grad()
def features(base: BaseModel, captions: Sequence[str], parts: Sequence[Part]) -> tuple[Tensor, list[Tensor]]:
    """What the UNet reads of everyday captions, [R, width], and of the words of each file, [S, width].

    Raises:
        PersonalizeError: the file of a word is missing, or for another base.
    """
    calls = list(dict.fromkeys(call for part in parts for call in part.calls))
    paths = {call: next(part.word_file(call) for part in parts if call in part.calls) for call in calls}
    widths = [encoder.get_input_embeddings().embedding_dim for encoder in base.text_encoders]
    vectors = {
        call: read_word(read_safetensors(path)[0], widths, path.name, title_of(base.family))
        for call, path in paths.items()
    }
    tokens = {call: [f"<word-{i}-{k}>" for k in range(len(vectors[call][0]))] for i, call in enumerate(calls)}
    rows = iter(range(len(base.text_encoders)))
    add_words(
        base,
        [token for own in tokens.values() for token in own],
        lambda _tokenizer, table: _rows(vectors, next(rows)).to(table.weight),
    )

    def read(texts: Sequence[str]) -> Tensor:
        tokenizer = base.pipeline.tokenizer
        ids = tokenizer(list(texts), padding="max_length", truncation=True, max_length=77).input_ids
        ends = [one.index(tokenizer.eos_token_id) for one in ids]
        return unique_rows(torch.cat([read_text(base, [text]).states for text in texts]), ends)

    def spoken(call: str) -> str:
        word, _, rest = call.partition(" ")
        return f"{''.join(tokens[call])} {rest}".strip() if word.startswith(CALL) else call

    own = [read([text for call in part.calls for text in prompts_of(spoken(call))]) for part in parts]
    return read(captions), own


def _rows(vectors: Mapping[str, Sequence[Tensor]], encoder: int) -> Tensor:
    return torch.cat([own[encoder] for own in vectors.values()])


if __name__ == "__main__":
    sys.exit(main())
