"""A trained file on a base model that draws without ComfyUI: LoRA, Textual Inversion, or Custom Diffusion with its words."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .base_model import BaseModel
from .convert import kind_of
from .convert_concepts import read_any_concepts, word_of, word_vectors
from .shared import CALL, PersonalizeError, calls_of, read_about, read_header, read_word, title_of
from .textual_inversion import find_the_end

FILES = ("custom_diffusion", "textual_inversion", "lora")
"""Methods of such files, in the order in which several are put on: a LoRA renames the layers that the first changes."""

KINDS = {
    "custom_diffusion": "a Custom Diffusion",
    "lora": "a LoRA",
    "dreambooth": "a checkpoint or DreamBooth's difference from one",
    "textual_inversion": "a learned word",
    "ip_adapter": "an IP-Adapter",
}
"""What people call each kind of `kind_of`."""


def check_file(method: str, path: Path) -> None:
    """Before a model loads.

    Args:
        method: of FILES.
        path: of the file.

    Raises:
        PersonalizeError: it is missing, damaged, of another method or of no known kind; or the file of one of its words is missing.
    """
    if not path.is_file():
        raise PersonalizeError(f"--{method} {path} does not exist.")
    if (kind := kind_of(path)) != method:
        raise PersonalizeError(f"--{method} {path} is {KINDS[kind]}: give what python -m training.{method} wrote.")
    if method != "custom_diffusion":
        return
    about = read_about(read_header(path)[1], path.name) if path.suffix == ".safetensors" else None
    called = [word_of(path, call.word) for call in calls_of(about.trigger if about else "") if call.word]
    if missing := [one.name for one in called if not one.is_file()]:
        raise PersonalizeError(f"The learned word {missing[0]} does not lie beside {path}: put it there.")


def put_on(base: BaseModel, method: str, path: Path, word: str) -> None:
    """Change a base model's networks in place as a trained file says.

    Args:
        base: on any device.
        method: of FILES.
        path: of the file. The words of Custom Diffusion lie beside it.
        word: what prompts call the learned word by, "ohwx" say. The concepts of Custom Diffusion are called by
            "embedding:NAME", too, as in ComfyUI; if it has several, `word` is the trigger of one.

    Raises:
        PersonalizeError: the file does not fit the base, or prompts cannot call its word so.
    """
    if method == "lora":
        _put_lora(base, path)
    elif method == "textual_inversion":
        widths = [encoder.get_input_embeddings().embedding_dim for encoder in base.text_encoders]
        _teach(base, word, read_word(word_vectors(path), widths, path.name, title_of(base.family)))
    elif method == "custom_diffusion":
        _put_concepts(base, path, word)
    else:
        raise ValueError(f"{method} is none of {', '.join(FILES)}")


def _put_lora(base: BaseModel, path: Path) -> None:
    refusal = (
        f"{path.name} does not fit {base.name} ({title_of(base.family)}): give a LoRA that was trained on this base, or "
        "the base that it was trained on."
    )
    before, log = base.pipeline.get_list_adapters(), logging.getLogger("diffusers.loaders.peft")
    log.addFilter(_no_error)
    try:
        base.pipeline.load_lora_weights(str(path))
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, KeyError) as error:  # as diffusers and peft see it: of sizes, names, layers
        raise PersonalizeError(refusal) from error
    finally:
        log.removeFilter(_no_error)
    if base.pipeline.get_list_adapters() == before:  # no layer by any of its names, of which diffusers only warns
        raise PersonalizeError(refusal)


def _no_error(record: logging.LogRecord) -> bool:
    """Whether diffusers may log it: before it raises, it logs a line for each layer of another size."""
    return record.levelno < logging.ERROR


def _put_concepts(base: BaseModel, path: Path, word: str) -> None:
    read = read_any_concepts(path, base, [])
    called = [name for name in read.words if len(read.words) == 1 or name.endswith(f"_{word}")]
    if read.words and not called:
        raise PersonalizeError(
            f"{path.name} has the concepts {', '.join(read.words)}, of which none ends with {word!r}: let --word be the "
            "trigger of one."
        )
    state = base.pipeline.unet.state_dict()
    for name, change in read.changes.items():
        state[name].copy_(state[name].float() + change.to(state[name].device))
    for name, vectors in read.words.items():
        _teach(base, f"{CALL}{name}", vectors)
        if name in called[:1]:
            _teach(base, word, vectors)


def _teach(base: BaseModel, word: str, vectors: Sequence[Tensor]) -> None:
    """A word to each text encoder, by vectors [n, width] of its own."""
    for tokenizer, encoder, own in zip(base.tokenizers, base.text_encoders, vectors, strict=True):
        tokens = [word, *(f"{word}_{i}" for i in range(1, len(own)))]  # as diffusers calls them
        if known := [token for token in tokens if token in tokenizer.get_vocab()]:
            raise PersonalizeError(f"{base.name} knows the word {known[0]!r} already: let --word be another.")
        base.pipeline.load_textual_inversion(
            own.to(encoder.device), token=word, tokenizer=tokenizer, text_encoder=encoder
        )
        find_the_end(encoder, tokenizer.eos_token_id)
