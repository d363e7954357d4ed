"""Everything that can be wrong with a training is looked for before a model is loaded, and told at once."""

import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .base_model import family_of, is_hub_id, read_checkpoint
from .checkpoint import find_checkpoint, read_settings_of
from .dataset import captions_of
from .defaults import fill_defaults
from .methods import templates_of
from .options import DreamBooth, Lora, TextualInversion
from .settings import Settings
from .shared import (
    PersonalizeError,
    family_of_widths,
    list_pictures,
    read_header,
    read_picture,
    title_of,
)

PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "tensorboard": "tensorboard", "wandb": "wandb"}
METHOD_NAMES = {Lora: "lora", TextualInversion: "textual_inversion", DreamBooth: "dreambooth"}
ANYWAY = {  # settings that may differ when a run goes on: what it trains stays the same
    "resume_from_checkpoint",
    "validation_prompt",
    "num_validation_images",
    "validation_steps",
    "validation_data_dir",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "report_to",
    "cache_dir",
    "output_dir",
    "output_name",
    "save_precision",
    "save_as",
    "delta_megabytes",
    "gradient_checkpointing",
    "channels_last",
    "allow_tf32",
    "num_class_images",
}


@dataclass(frozen=True)
class Findings:
    """What was looked at."""

    family: str | None
    """The base's, or None for a hub id, which only loading tells."""
    pictures: int
    warnings: list[str]


def shared_settings(settings: Settings) -> dict:
    """Those that a run which goes on must share with the one before."""
    return {name: value for name, value in settings.flat().items() if name not in ANYWAY}


def preflight(settings: Settings, quiet: bool = False) -> Findings:
    """Look at options, base, pictures, captions, disk and output.

    Raises:
        PersonalizeError: a sentence for each problem, a line each.
    """
    problems: list[str] = []
    warnings: list[str] = []

    def told(check: Callable, *arguments):
        """The check's result; what it raises is a problem."""
        try:
            return check(*arguments)
        except PersonalizeError as error:
            problems.extend(str(error).splitlines())
            return None

    told(_options, settings)
    family = told(family_at, settings.base.pretrained_model_name_or_path)
    if family is not None:
        told(check_family, settings, family)
    counts = [0]
    for option, is_prior in (("instance_data_dir", False), ("class_data_dir", True), ("validation_data_dir", False)):
        folder = getattr(settings.data, option)
        if folder is None or (option == "class_data_dir" and not settings.data.with_prior_preservation):
            continue
        path = Path(folder).expanduser()
        if is_prior and (not path.is_dir() or not any(path.iterdir())):
            continue  # the base fills it
        found, wrong, odd = look_at_pictures(path, settings, is_prior, quiet)
        problems += wrong
        warnings += odd
        counts.append(found)
    told(
        _output,
        settings,
        None if family is None else fill_defaults(settings, METHOD_NAMES[type(settings.method)], family),
    )
    if problems:
        raise PersonalizeError("\n".join(problems))
    return Findings(family, counts[1], warnings)


def _options(settings: Settings) -> None:
    problems = []
    needed = {
        "pretrained_model_name_or_path": (settings.base.pretrained_model_name_or_path, "the base model"),
        "instance_data_dir": (settings.data.instance_data_dir, "the folder with your pictures"),
        "output_dir": (settings.output.output_dir, "the folder for the result"),
    }
    problems += [f"--{name} is missing: {what}." for name, (value, what) in needed.items() if not value]
    if settings.data.with_prior_preservation and not settings.data.class_data_dir:
        problems.append(
            "--with_prior_preservation needs --class_data_dir: a folder for pictures of the class; what is missing in it "
            "is drawn by the base."
        )
    for value in (settings.training.optimizer, settings.watching.report_to):
        if value in PACKAGES and importlib.util.find_spec(PACKAGES[value]) is None:
            problems.append(f"{value} needs the package {PACKAGES[value]}: pip install {PACKAGES[value]}.")
    if settings.training.optimizer == "adamw8bit" and not torch.cuda.is_available():
        problems.append("adamw8bit runs on an accelerator only, and there is none here: use --optimizer adamw.")
    training = settings.training
    if training.fused_backward:
        if training.gradient_accumulation_steps > 1:
            problems.append("--fused_backward keeps no gradients to accumulate: use --gradient_accumulation_steps 1.")
        if training.mixed_precision == "fp16":
            problems.append("--fused_backward does not work with --mixed_precision fp16: use bf16 or no.")
        if training.optimizer == "prodigy":
            problems.append("--fused_backward does not work with prodigy, which looks at all gradients at once.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            problems.append("--fused_backward works in one process only.")
    name = settings.output.output_name or settings.data.trigger
    if not name.strip() or any(letter in name for letter in '/\\:*?"<>|\0') or name.startswith("."):
        problems.append(f"{name!r} is no file name: set --output_name.")
    if isinstance(settings.method, TextualInversion) and re.search(r"[\s():,]", name):
        problems.append(f"{name!r} cannot be called in ComfyUI's prompts, which take one word: set --output_name.")
    if not settings.data.trigger.strip():
        problems.append("--trigger is empty: use a word that the model does not know, such as ohwx.")
    if problems:
        raise PersonalizeError("\n".join(problems))


def check_family(settings: Settings, family: str) -> None:
    """Raises PersonalizeError where the settings are for base models of another family."""
    wanted = settings.base.base_family
    if wanted is not None and wanted != family:
        name = Path(settings.base.pretrained_model_name_or_path or "").name
        raise PersonalizeError(
            f"These settings are for {title_of(wanted)} (base_family), but {name} is {title_of(family)}: use a "
            f"configuration for {title_of(family)}, or a {title_of(wanted)} model."
        )


def family_at(where: str | None) -> str | None:
    """The family of the base, from headers only; None for a hub id.

    Raises:
        PersonalizeError: there is no base, or none of a family that is supported.
    """
    if not where:
        return None
    path = Path(where).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            return family_of(read_checkpoint(path), path.name)
        header, _, _ = read_header(path)
        return family_of(
            {name: torch.empty(entry["shape"], device="meta") for name, entry in header.items()}, path.name
        )
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
        return family_of_widths(config["block_out_channels"][0], config["cross_attention_dim"])
    except (OSError, ValueError, KeyError):
        raise PersonalizeError(
            f"The folder {path} is no base model in diffusers' layout: unet/config.json is missing."
        ) from None


def look_at_pictures(folder: Path, settings: Settings, is_prior: bool, quiet: bool) -> tuple[int, list[str], list[str]]:
    """Read every picture and caption of a folder: how many are good, what is wrong, and what is odd."""
    data, wrong, odd = settings.data, [], []
    templates = (data.class_prompt,) if is_prior else templates_of(settings)
    try:
        paths = list_pictures(folder)
    except PersonalizeError as error:
        return 0, [str(error)], []
    good, without = 0, []
    for path in _bar(paths, f"Looking at {folder.name}", quiet):
        try:
            texts = captions_of(path, templates, data.trigger, data.class_name)
            read_picture(path)
        except PersonalizeError as error:
            wrong.append(str(error))
            continue
        good += 1
        if not is_prior and not any(data.trigger in text for text in texts):
            without.append(path.name)
    if without:
        some = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        odd.append(
            f"{len(without)} of {len(paths)} captions do not have the trigger {data.trigger!r} ({some}): it will not call "
            "what is learned from them."
        )
    return good, wrong, odd


def _bar(paths: Iterable[Path], text: str, quiet: bool) -> Iterable[Path]:
    return tqdm(paths, desc=text, unit=" pictures", disable=quiet, leave=False)


def _output(settings: Settings, filled: Settings | None) -> None:
    if not settings.output.output_dir:
        return
    folder, problems = settings.folder, []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PersonalizeError(
            f"The output folder {folder} cannot be written to ({error.strerror or error})."
        ) from None
    needed, free = _bytes_needed(settings), shutil.disk_usage(folder).free
    if free < needed:
        problems.append(
            f"The disk of {folder} has {free / 1e9:.1f} GB free, but checkpoints and the result need about "
            f"{needed / 1e9:.1f} GB."
        )
    checkpoint = find_checkpoint(folder / "checkpoints", settings.watching.resume_from_checkpoint)
    if checkpoint is not None and filled is not None:
        problems += changed_settings(filled, checkpoint)
    if problems:
        raise PersonalizeError("\n".join(problems))


def changed_settings(settings: Settings, checkpoint: Path) -> list[str]:
    """A sentence where a training would go on with settings (nothing open) other than it had.

    Whoever names the checkpoint wants that.
    """
    if settings.watching.resume_from_checkpoint != "latest":
        return []
    step, before = read_settings_of(checkpoint)
    changed = [
        f"{name} was {before[name]!r}, is {value!r}"
        for name, value in shared_settings(settings).items()
        if name in before and before[name] != value
    ]
    if not changed:
        return []
    return [
        f"{settings.folder} has a training of {step} steps with other settings ({'; '.join(changed)}): use the same, "
        f"another --output_dir, --resume_from_checkpoint {checkpoint.name} to go on with the new ones from there, or "
        "--resume_from_checkpoint none to start anew."
    ]


def _bytes_needed(settings: Settings) -> int:
    """About how much is written: the result and the checkpoints, which hold weights and two moments in fp32."""
    path = Path(settings.base.pretrained_model_name_or_path or "").expanduser()
    size = os.path.getsize(path) if path.is_file() else 0
    if type(settings.method).__name__ != "DreamBooth":
        return 100_000_000 + size // 20
    moments = {"adamw8bit": 1, "adafactor": 0}.get(settings.training.optimizer, 2)
    weights = 2 * size  # a file in half precision as fp32
    return 100_000_000 + size + weights * (1 + moments) * (settings.watching.checkpoints_total_limit + 1)
