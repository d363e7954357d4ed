"""Whether a base model, and another VAE, can be trained with the options that were given: from headers only."""

import json
import re
from pathlib import Path

import torch

from .base_model import OFFLINE, PIPELINES, family_of, is_hub_id, read_checkpoint, text_layers_of, unet_blocks_of
from .options import Lora
from .settings import Settings
from .shared import PersonalizeError, family_of_widths, read_header, title_of, unreadable

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def family_at(where: str | None, vae: str | None = None) -> str | None:
    """The family of the base, from headers only; None for a hub id.

    Args:
        where: the base.
        vae: another VAE, if any, so that the base needs none.

    Raises:
        PersonalizeError: there is no base, none of a family that is supported, or a part of it is missing.
    """
    if not where:
        return None
    path = Path(where).expanduser()
    if path.is_file():
        if path.suffix not in WEIGHTS and path.suffix.lower() in WEIGHTS:
            raise PersonalizeError(f"{path.name} must end in {path.suffix.lower()}, in small letters: rename it.")
        if path.suffix != ".safetensors":
            tensors = read_checkpoint(path)
        else:
            tensors = {n: torch.empty(entry["shape"], device="meta") for n, entry in _names(path).items()}
        family = family_of(tensors, path.name)
        if not any(name.startswith(("cond_stage_model.", "conditioner.")) for name in tensors):
            raise PersonalizeError(f"{path.name} has no text encoder: take a whole checkpoint.")
        if vae is None and not any(name.startswith("first_stage_model.") for name in tensors):
            raise PersonalizeError(f"{path.name} has no VAE: give one with --vae_path, or take a whole checkpoint.")
        return family
    if path.is_dir():
        return _family_of_folder(path)
    if not is_hub_id(where):
        raise PersonalizeError(
            f"The base model {where} does not exist: it is no file, no folder, and no hub id (owner/name)."
        )
    return None


def _family_of_folder(path: Path) -> str:
    try:
        config = json.loads((path / "unet" / "config.json").read_text())
        channels = config["in_channels"]
        family = family_of_widths(config["block_out_channels"][0], config["cross_attention_dim"])
    except (OSError, ValueError, LookupError, TypeError):
        raise PersonalizeError(
            f"The folder {path} is no base model in diffusers' layout: unet/config.json is missing or another model's."
        ) from None
    if channels in (8, 9):
        raise PersonalizeError(
            f"{path} takes {channels} channels (an inpainting or editing model): use a plain text-to-image model."
        )
    try:
        kind = json.loads((path / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, LookupError, TypeError):
        raise PersonalizeError(
            f"The folder {path} is no base model in diffusers' layout: model_index.json is missing or says nothing."
        ) from None
    if kind not in [pipeline.__name__ for pipeline in PIPELINES]:
        raise PersonalizeError(f"{path} is a {kind}; SD1.5, SD2.x and SDXL models are supported.")
    return family


def check_family(settings: Settings, family: str) -> None:
    """Raises PersonalizeError where the settings are for base models of another family."""
    wanted = settings.base.base_family
    if wanted is not None and wanted != family:
        name = Path(settings.base.pretrained_model_name_or_path or "").name
        raise PersonalizeError(
            f"These settings are for {title_of(wanted)} (base_family), but {name} is {title_of(family)}: use a "
            f"configuration for {title_of(family)}, or a checkpoint of {title_of(wanted)}."
        )


def check_size(resolution: int, step: int, base: str) -> None:
    """Raises PersonalizeError where a base, by its name, takes no pictures of this many pixels."""
    if resolution % step:
        raise PersonalizeError(f"--resolution {resolution} is no multiple of {step}, which {base} needs.")


def check_layers(settings: Settings, family: str) -> None:
    """Raises PersonalizeError where an option names a layer or block that bases of the family do not have."""
    if family not in OFFLINE:
        return
    problems, most = [], text_layers_of(family)
    if settings.base.clip_skip > most:
        problems.append(f"--clip_skip {settings.base.clip_skip}: {title_of(family)}'s text encoder has {most} layers.")
    if isinstance(settings.method, Lora):
        blocks = unet_blocks_of(family)
        ranks = dict(text.partition("=")[::2] for text in settings.method.block_ranks)
        problems += [
            f"--block_ranks: {title_of(family)} has no {block}, but {', '.join(blocks)}."
            for block in ranks
            if block not in blocks and re.match(r"(down_blocks|up_blocks)\.\d+$", block)
        ]
        if all(ranks.get(block) == "0" for block in blocks):
            problems.append("--block_ranks leaves every block out: nothing would train.")
    if problems:
        raise PersonalizeError("\n".join(problems))


def check_vae(where: str | None) -> None:
    """Raises PersonalizeError where --vae_path is no VAE that can be loaded."""
    if where is None:
        return
    path = Path(where).expanduser()
    if not path.exists():
        raise PersonalizeError(f"The VAE {where} does not exist: --vae_path takes a file or a folder.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise PersonalizeError(f"The folder {where} is no VAE in diffusers' layout: it has no config.json.")
    if path.suffix == ".safetensors" and not any(name.endswith("decoder.conv_in.weight") for name in _names(path)):
        raise PersonalizeError(
            f"{path.name} is no VAE that is supported: it has no decoder.conv_in (a TAESD has none)."
        )
    if path.is_file() and path.suffix not in WEIGHTS:
        raise PersonalizeError(f"{path.name} is no VAE: --vae_path takes a folder or a file in {', '.join(WEIGHTS)}.")


def _names(path: Path) -> dict[str, dict]:
    """What a safetensors file holds.

    Raises:
        PersonalizeError: it is none, or cut short.
    """
    header, _, start = read_header(path)
    ends = [entry["data_offsets"][1] for entry in header.values()]
    if path.stat().st_size < start + max(ends, default=0):
        raise unreadable(path, "tensors are missing at its end")
    return header
