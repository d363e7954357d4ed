"""Everything that can be wrong with a training is looked for before a model is loaded, and told at once."""

import importlib.util
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .base_model import OFFLINE, family_of, is_hub_id, read_checkpoint, size_step_of
from .checkpoint import find_checkpoint, read_settings_of
from .dataset import captions_of
from .defaults import fill_defaults
from .lora import unet_config
from .methods import templates_of
from .options import Lora, TextualInversion
from .settings import Settings
from .shared import (
    PersonalizeError,
    family_of_widths,
    list_pictures,
    picture_paths,
    read_header,
    read_picture,
    title_of,
)

PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "tensorboard": "tensorboard", "wandb": "wandb"}
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
    kept = {name: value for name, value in settings.flat().items() if name not in ANYWAY}
    return kept | {"num_processes": processes()}


def processes() -> int:
    """How many train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
    family = told(family_at, settings.base.pretrained_model_name_or_path, settings.base.vae_path)
    filled = settings
    if family is not None:
        told(check_family, settings, family)
        filled = fill_defaults(settings, family)
        if family in OFFLINE:
            told(check_size, filled.resolution, size_step_of(family), title_of(family))
    told(_vae, settings.base.vae_path)
    counts = [0]
    for option, is_prior in (("instance_data_dir", False), ("class_data_dir", True), ("validation_data_dir", False)):
        folder = getattr(settings.data, option)
        if folder is None or (is_prior and not settings.data.with_prior_preservation):
            continue
        path = Path(folder).expanduser()
        if is_prior and not told(_class_folder, path):
            continue  # the base fills it
        found, wrong, odd = look_at_pictures(path, settings, is_prior, quiet)
        problems += wrong
        warnings += odd
        counts.append(found)
    told(_output, filled, family is not None, counts[1])
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
        if processes() > 1:
            problems.append("--fused_backward works in one process only.")
    name = settings.output.output_name or settings.data.trigger
    if not name.strip() or any(letter in name for letter in '/\\:*?"<>|\0') or name.startswith("."):
        problems.append(f"{name!r} is no file name: set --output_name.")
    if isinstance(settings.method, TextualInversion) and re.search(r"[\s():,]", name):
        problems.append(f"{name!r} cannot be called in ComfyUI's prompts, which take one word: set --output_name.")
    if isinstance(settings.method, Lora):
        try:
            unet_config(settings.method)
        except PersonalizeError as error:
            problems.append(str(error))
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


def check_size(resolution: int, step: int, base: str) -> None:
    """Raises PersonalizeError where a base, by its name, takes no pictures of this many pixels."""
    if resolution % step:
        raise PersonalizeError(f"--resolution {resolution} is no multiple of {step}, which {base} needs.")


def _vae(where: str | None) -> None:
    if where is not None and not Path(where).expanduser().exists():
        raise PersonalizeError(f"The VAE {where} does not exist: --vae_path takes a file or a folder.")


def _class_folder(path: Path) -> bool:
    """Whether it has pictures; it can be written to, in any case.

    Raises:
        PersonalizeError: it cannot.
    """
    check_writable(path, "--class_data_dir")
    return bool(picture_paths(path))


def check_writable(folder: Path, option: str) -> None:
    """Make the folder if needed.

    Raises:
        PersonalizeError: it takes no file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PersonalizeError(
            f"The folder {folder} ({option}) cannot be written to ({error.strerror or error})."
        ) from None


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
        if path.suffix != ".safetensors":
            tensors = read_checkpoint(path)
        else:
            header, _, _ = read_header(path)
            tensors = {name: torch.empty(entry["shape"], device="meta") for name, entry in header.items()}
        family = family_of(tensors, path.name)
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
    except (OSError, ValueError, KeyError):
        raise PersonalizeError(
            f"The folder {path} is no base model in diffusers' layout: unet/config.json is missing."
        ) from None
    if channels in (8, 9):
        raise PersonalizeError(
            f"{path} takes {channels} channels (an inpainting or editing model): use a plain text-to-image model."
        )
    return family


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


def _output(settings: Settings, whole: bool, pictures: int) -> None:
    """Args:
    settings: with nothing open, if `whole`.
    whole: whether the base's family is known.
    pictures: of the subject.
    """
    if not settings.output.output_dir:
        return
    folder, problems = settings.folder, []
    check_writable(folder, "--output_dir")
    for option in ("instance_data_dir", "class_data_dir", "validation_data_dir"):
        path = getattr(settings.data, option)
        if path is not None and Path(path).expanduser().resolve() == folder.resolve():
            problems.append(f"--output_dir and --{option} are the same folder: what is written would be trained on.")
    base = Path(settings.base.pretrained_model_name_or_path or "").expanduser()
    result = folder / f"{settings.output.output_name or settings.data.trigger}.safetensors"
    if base.is_file() and result.exists() and result.samefile(base):
        problems.append(f"The result would overwrite the base model {base}: set --output_name.")
    needed, free = _bytes_needed(settings, pictures), shutil.disk_usage(folder).free
    if free < needed:
        problems.append(
            f"The disk of {folder} has {free / 1e9:.1f} GB free, but checkpoints and the result need about "
            f"{needed / 1e9:.1f} GB."
        )
    checkpoint = find_checkpoint(folder / "checkpoints", settings.watching.resume_from_checkpoint)
    if checkpoint is not None and whole:
        problems += changed_settings(settings, checkpoint)
    if problems:
        raise PersonalizeError("\n".join(problems))


def changed_settings(settings: Settings, checkpoint: Path, material: Mapping[str, str] | None = None) -> list[str]:
    """A sentence where a training would go on otherwise than it began.

    Whoever names the checkpoint wants that.

    Args:
        settings: with nothing open.
        checkpoint: to go on from.
        material: digests of what is trained, and on what; None if not known yet.
    """
    if settings.watching.resume_from_checkpoint != "latest":
        return []
    step, before = read_settings_of(checkpoint)
    changed = [
        f"{name} was {before[name]!r}, is {value!r}"
        for name, value in shared_settings(settings).items()
        if name in before and before[name] != value
    ]
    changed += [f"other {name}" for name, digest in (material or {}).items() if before.get(name) != digest]
    if not changed:
        return []
    return [
        f"{settings.folder} has a training of {step} steps that began otherwise ({'; '.join(changed)}): use the same, "
        f"another --output_dir, --resume_from_checkpoint {checkpoint.name} to go on with the new ones from there, or "
        "--resume_from_checkpoint none to start anew."
    ]


def _bytes_needed(settings: Settings, pictures: int) -> int:
    """About how much is written: the result, the checkpoints with weights, moments and average in fp32, the caches."""
    path = Path(settings.base.pretrained_model_name_or_path or "").expanduser()
    files = [path] if path.is_file() else list(path.rglob("*.safetensors")) if path.is_dir() else []
    size = sum(file.stat().st_size for file in files)
    data, training, watching = settings.data, settings.training, settings.watching
    drawn = data.num_class_images if data.with_prior_preservation else 0
    latents = (pictures + drawn) * settings.resolution**2 * 2  # with a deviation and mirrored; of pictures a bit less
    if settings.method.name != "dreambooth":
        return 100_000_000 + latents + size // 20
    copies = 1 + {"adamw8bit": 1, "adafactor": 0}.get(training.optimizer, 2) + training.use_ema
    checkpoints = watching.checkpoints_total_limit + 1  # the oldest goes when the newest is there
    if training.max_train_steps is not None:
        checkpoints = min(checkpoints, math.ceil(training.max_train_steps / watching.checkpointing_steps))
    return 100_000_000 + latents + size + sum(map(_bytes_in_fp32, files)) * copies * checkpoints


def _bytes_in_fp32(file: Path) -> int:
    """Of a file's weights; of one whose header says nothing, as if they were in half precision."""
    try:
        return 4 * sum(math.prod(entry["shape"]) for entry in read_header(file)[0].values())
    except PersonalizeError:
        return 2 * file.stat().st_size
