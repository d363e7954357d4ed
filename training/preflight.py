"""Everything that can be wrong with a training is looked for before a model is loaded, and told at once."""

import importlib.util
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch

from .adapter_checks import bytes_of_adapter, check_adapter
from .base_checks import check_family, check_layers, check_size, check_vae, family_at
from .base_model import OFFLINE, size_step_of
from .checkpoint import find_checkpoint
from .concepts import Concept, check_places, check_start, concepts_of
from .custom_diffusion import word_names
from .defaults import UNCALLED, default_name, fill_defaults
from .going_on import changed_settings, processes
from .ip_adapter import trains_adapter
from .look import (
    check_writable,
    has_class_pictures,
    look_at_concepts,
    look_at_identities,
    look_at_origin,
    look_at_pictures,
    look_at_validation,
    name_problems,
    tell,
)
from .lora import unet_config
from .options import CustomDiffusion, Data, DreamBooth, IPAdapter, Lora, SubjectDiffusion, TextualInversion, Training
from .settings import Settings
from .shared import (
    SELF_ATTENTION,
    TRIGGER,
    PersonalizeError,
    plural,
    read_about,
    read_header,
    title_of,
)
from .subject_checks import check_subject_options, look_at_subjects

WRITTEN_AND_READ = (  # folders that must be two; class pictures are drawn into theirs
    ("output_dir", "instance_data_dir"),
    ("output_dir", "class_data_dir"),
    ("output_dir", "validation_data_dir"),
    ("instance_data_dir", "class_data_dir"),
)
PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "muon": "timm"}
PACKAGES |= {name: name for name in ("tensorboard", "wandb")}


@dataclass(frozen=True)
class Findings:
    """What was looked at."""

    family: str | None
    """The base's, or None for a hub id, which only loading tells."""
    pictures: int
    warnings: list[str]


def preflight(settings: Settings, quiet: bool = False) -> Findings:
    """Look at options, base, pictures, captions, disk and output.

    Raises:
        PersonalizeError: a sentence for each problem, a line each.
    """
    problems: list[str] = []
    warnings: list[str] = []
    told = partial(tell, problems)
    told(_options, settings)
    concepts = told(concepts_of, settings)
    family = told(family_at, settings.base.pretrained_model_name_or_path, settings.base.vae_path)
    filled = settings
    if family is not None and concepts is not None:
        told(check_family, settings, family)
        filled = fill_defaults(settings, family)
        if family in OFFLINE:
            told(check_size, filled.resolution, size_step_of(family), title_of(family))
        told(check_layers, settings, family)
    if filled.training.max_train_steps is not None:
        told(check_steps, filled, filled.training.max_train_steps)
    told(_kept_out, settings, concepts or [])
    told(check_vae, settings.base.vae_path)
    if isinstance(settings.method, IPAdapter):
        warnings += told(check_adapter, settings.method, family) or []
    if isinstance(settings.method, SubjectDiffusion):
        told(check_subject_options, settings.method, family)
    counts: dict[str, int] = {}
    for option, is_prior in (("instance_data_dir", False), ("class_data_dir", True), ("validation_data_dir", False)):
        folder = getattr(settings.data, option)
        if folder is None or (is_prior and not settings.data.with_prior_preservation):
            continue
        if isinstance(settings.method, CustomDiffusion) and option != "validation_data_dir":
            continue  # below
        path = Path(folder).expanduser()
        if isinstance(settings.method, IPAdapter | SubjectDiffusion):
            look = look_at_identities if isinstance(settings.method, IPAdapter) else look_at_subjects
            found, wrong, odd = look(path, settings, quiet)
            problems += wrong
            warnings += odd
            counts[option] = found
            continue
        if is_prior and not told(has_class_pictures, path):
            continue  # the base fills it
        found, wrong, odd = look_at_pictures(path, settings, is_prior, quiet)
        problems += wrong
        warnings += odd
        counts[option] = found
    if isinstance(filled.method, CustomDiffusion):
        problems += check_start(filled.method, concepts or [])
        found, wrong, odd = look_at_concepts(concepts or [], settings, quiet)
        problems += wrong
        warnings += odd
        paired = (filled.method.cut_mix or 0) * (len(concepts or []) > 1)
        counts["instance_data_dir"] = found * (max(1, filled.method.size_variants or 0) + paired)
    pictures = counts.get("instance_data_dir", 0)
    told(_output, filled, family is not None and concepts is not None, pictures, concepts or [])
    if problems:
        raise PersonalizeError("\n".join(problems))
    warnings += look_at_origin(concepts or [], family if settings.method.name not in UNCALLED else None)
    warnings += look_at_validation(concepts or [], settings) + _without_effect(settings)
    return Findings(family, pictures, warnings)


def _options(settings: Settings) -> None:
    problems = []
    needed = {
        "pretrained_model_name_or_path": (settings.base.pretrained_model_name_or_path, "the base model"),
        "instance_data_dir": (settings.data.instance_data_dir, "the folder with your pictures"),
        "output_dir": (settings.output.output_dir, "the folder for the result"),
    }
    if isinstance(settings.method, CustomDiffusion) and settings.method.concept:
        del needed["instance_data_dir"]
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
    if training.max_train_steps is not None and training.num_train_epochs is not None:
        problems.append("--max_train_steps and --num_train_epochs say the same thing: give one of them.")
    method = settings.method
    if isinstance(method, DreamBooth) and method.delta_megabytes is not None and method.save_as == "full":
        problems.append("--delta_megabytes cuts a difference: use it with --save_as delta or both.")
    for option, value in settings.flat().items():
        if isinstance(value, str) and value.encode(errors="replace").decode() != value:
            problems.append(f"--{option} {value!r} is not UTF-8: rename it.")
    name = settings.output.output_name or default_name(settings)
    problems += name_problems(name, called=isinstance(settings.method, TextualInversion | CustomDiffusion))
    if isinstance(settings.method, Lora):
        try:
            unet_config(settings.method)
        except PersonalizeError as error:
            problems.append(str(error))
    if not settings.data.trigger.strip() and method.name not in UNCALLED:
        problems.append(f"--trigger is empty: use a word that the model does not know, such as {TRIGGER}.")
    if problems:
        raise PersonalizeError("\n".join(problems))


def check_steps(settings: Settings, steps: int) -> None:
    """Raises PersonalizeError where what comes first takes more steps than there are in all."""
    method, warming, problems = settings.method, settings.training.lr_warmup_steps, []
    if warming > steps:
        problems.append(
            f"--lr_warmup_steps {warming} are more than the {plural(steps, 'step')} of the training: the learning "
            f"rate would never be "
            "reached; use fewer."
        )
    if isinstance(method, IPAdapter):
        first = method.distil_steps + method.warmup_steps * (method.aggregation == SELF_ATTENTION)
        if first > steps:
            problems.append(
                f"--distil_steps {method.distil_steps} and --warmup_steps {method.warmup_steps} are more than the "
                f"{plural(steps, 'step')} of the training: it would end before they do; use fewer."
            )
    if problems:
        raise PersonalizeError("\n".join(problems))


def _kept_out(settings: Settings, concepts: Sequence[Concept]) -> None:
    place = settings.data.validation_data_dir
    if place and _real(place) in [_real(one.folder) for one in concepts if one.folder]:
        trained = "--concept" if getattr(settings.method, "concept", None) else "--instance_data_dir"
        raise PersonalizeError(
            f"{trained} and --validation_data_dir are the same folder: the validation loss would be of pictures that are "
            "trained on; name another folder, or none."
        )


def _idle(settings: Settings) -> list[str]:
    """Options that do nothing without another one."""
    data, training, method = settings.data, settings.training, settings.method
    base = Path(settings.base.pretrained_model_name_or_path or "").expanduser()
    needs: dict[str, tuple[bool, tuple[str, ...]]] = {
        "with_prior_preservation": (
            data.with_prior_preservation,
            ("class_data_dir", "class_prompt", "num_class_images", "prior_loss_weight"),
        ),
        "pretrained_model_name_or_path OWNER/NAME": (not base.exists(), ("revision",)),
        "pretrained_model_name_or_path of a folder": (not base.is_file(), ("variant",)),
        "validation_prompt": (bool(settings.watching.validation_prompt), ("num_validation_images",)),
        "use_ema": (training.use_ema, ("ema_decay",)),
        "lr_scheduler cosine_with_restarts": (
            training.lr_scheduler == "cosine_with_restarts",
            ("lr_num_cycles",),
        ),
        "lr_scheduler polynomial": (training.lr_scheduler == "polynomial", ("lr_power",)),
        "optimizer adamw, adamw8bit or prodigy": (
            training.optimizer != "adafactor",
            ("adam_beta1", "adam_beta2", "adam_epsilon"),
        ),
    }
    if isinstance(method, IPAdapter):
        needs |= {
            "aggregation self-attention": (
                method.aggregation == SELF_ATTENTION,
                ("warmup_steps", "warmup_loss_weight"),
            ),
            "reference_crops": (method.reference_crops > 0, ("smallest_crop", "largest_crop")),
            "train_adapter": (trains_adapter(method), ("reference_dropout", "both_dropout")),
        }
    values = settings.flat()
    plain = {f.name: f.default for group in settings.groups for f in fields(group)}
    return [
        f"--{name} has no effect without --{needed}."
        for needed, (there, names) in needs.items()
        for name in names
        if not there and values[name] != plain[name]
    ]


def _without_effect(settings: Settings) -> list[str]:
    """What was asked for and does nothing."""
    training, method = settings.training, settings.method
    text = [name for name in ("text_encoder_lr", "text_encoder_rank") if settings.flat().get(name) is not None]
    if isinstance(method, TextualInversion):
        text += ["train_text_encoder"] * (training.train_text_encoder is not None)
        why = "Textual Inversion trains the word's vectors only, at --learning_rate"
    elif isinstance(method, CustomDiffusion):
        text = ["train_text_encoder"] * (training.train_text_encoder is not None)
        plain = (Data.trigger, Data.class_name)
        if method.concept and (settings.data.trigger, settings.data.class_name) != plain:
            text += ["trigger and --class_name beside --concept"]
        why = "Custom Diffusion trains the concepts' words only, at --text_encoder_lr"
    elif isinstance(method, IPAdapter):
        text += ["train_text_encoder"] * bool(training.train_text_encoder)
        text += ["with_prior_preservation"] * settings.data.with_prior_preservation
        text += ["caption_dropout"] * (settings.data.caption_dropout > 0)
        text += ["trigger"] * (settings.data.trigger != Data.trigger)
        why = "an IP-Adapter trains beside a base that does not change, has dropouts of its own, and no word calls it"
    elif isinstance(method, SubjectDiffusion):
        text += ["trigger"] * (settings.data.trigger != Data.trigger)
        text += ["train_text_encoder"] * (training.train_text_encoder is False)
        text += ["with_prior_preservation"] * settings.data.with_prior_preservation
        text += ["caption_dropout"] * (settings.data.caption_dropout > 0)
        text += [name for name in ("random_flip", "masked_loss") if getattr(settings.data, name)]
        why = "Subject-Diffusion mirrors nothing, trains the text encoder at --learning_rate, has dropouts of its own, and no word calls it"
    else:
        off = training.train_text_encoder is False or (isinstance(method, Lora) and not training.train_text_encoder)
        text, why = text * off, "the text encoder does not train without --train_text_encoder"
    odd = [f"--{name} has no effect: {why}." for name in text] + _idle(settings)
    if isinstance(method, IPAdapter) and settings.data.validation_data_dir and method.validation_identities == 0:
        odd.append("--validation_data_dir has no effect: --validation_identities 0 takes none of it.")
    if training.fused_backward and training.max_grad_norm not in (0.0, Training.max_grad_norm):
        odd.append("--max_grad_norm has no effect with --fused_backward, which never sees all gradients.")
    if training.optimizer == "prodigy" and training.learning_rate is not None:
        odd.append("--learning_rate scales what prodigy finds by itself: 1, or leave it out.")
    return odd


def _output(settings: Settings, whole: bool, pictures: int, concepts: Sequence[Concept]) -> None:
    """Args:
    settings: with nothing open, if `whole`.
    whole: whether the base's family is known.
    pictures: of the subject.
    concepts: of Custom Diffusion.
    """
    if not settings.output.output_dir:
        return
    folder, problems = settings.folder, []
    check_writable(folder, "--output_dir")
    places = settings.flat() | ({} if settings.data.with_prior_preservation else {"class_data_dir": None})
    if isinstance(settings.method, CustomDiffusion):
        problems += check_places(concepts, settings.output.output_dir)
    for one, two in WRITTEN_AND_READ:
        if places[one] and places[two] and _real(places[one]) == _real(places[two]):
            problems.append(f"--{one} and --{two} are the same folder: what is written would be trained on.")
    if settings.data.cache_dir:
        check_writable(Path(settings.data.cache_dir).expanduser(), "--cache_dir")
    base = Path(settings.base.pretrained_model_name_or_path or "").expanduser()
    for result in _results(settings, concepts):
        if base.is_file() and result.exists() and result.samefile(base):
            problems.append(f"The result would overwrite the base model {base}: set --output_name.")
        elif result.exists() and not _is_ours(result):
            problems.append(f"{result} is there already, and this trainer did not write it: set --output_name.")
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


def _real(path: str) -> Path:
    return Path(path).expanduser().resolve()


def _results(settings: Settings, concepts: Sequence[Concept]) -> list[Path]:
    """The files that will be written."""
    name, kind = settings.output.output_name or default_name(settings), getattr(settings.method, "save_as", "full")
    if isinstance(settings.method, CustomDiffusion):
        return [settings.folder / f"{one}.safetensors" for one in (name, *word_names(name, concepts))]
    endings = {"full": [""], "delta": [".delta"], "both": ["", ".delta"]}[kind]
    return [settings.folder / f"{name}{ending}.safetensors" for ending in endings]


def _is_ours(path: Path) -> bool:
    try:
        return read_about(read_header(path)[1], path.name) is not None
    except PersonalizeError:
        return False


def _bytes_needed(settings: Settings, pictures: int) -> int:
    """About how much is written: the result, the checkpoints with weights, moments and average in fp32, the caches."""
    path = Path(settings.base.pretrained_model_name_or_path or "").expanduser()
    files = [path] if path.is_file() else list(path.rglob("*.safetensors")) if path.is_dir() else []
    size = sum(file.stat().st_size for file in files)
    data, training, watching = settings.data, settings.training, settings.watching
    drawn = data.num_class_images if data.with_prior_preservation else 0
    latents = (pictures + drawn) * settings.resolution**2 * 2  # with a deviation and mirrored; of pictures a bit less
    if isinstance(settings.method, IPAdapter):
        return (
            100_000_000 + latents + bytes_of_adapter(settings.method, size) * 4 * (watching.checkpoints_total_limit + 1)
        )
    if isinstance(settings.method, CustomDiffusion):
        return (
            100_000_000 + latents + 4 * sum(map(_cross_attention, files)) * 4 * (watching.checkpoints_total_limit + 1)
        )
    if isinstance(
        settings.method, SubjectDiffusion
    ):  # adapters, keys and values, a text encoder: about the base's half
        return 100_000_000 + latents + size * 4 * (watching.checkpoints_total_limit + 1)
    if settings.method.name != "dreambooth":
        return 100_000_000 + latents + size // 20
    copies = 1 + {"adamw8bit": 1, "adafactor": 0}.get(training.optimizer, 2) + training.use_ema
    checkpoints = watching.checkpoints_total_limit + 1  # the oldest goes when the newest is there
    if training.max_train_steps is not None:
        checkpoints = min(checkpoints, math.ceil(training.max_train_steps / watching.checkpointing_steps))
    return 100_000_000 + latents + size + sum(map(_bytes_in_fp32, files)) * copies * checkpoints


def _cross_attention(file: Path) -> int:
    """How many weights of keys and values a base's file has."""
    try:
        header = read_header(file)[0]
    except PersonalizeError:
        return file.stat().st_size // 40
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if re.search(r"attn2\.to_[kv]\.", name))


def _bytes_in_fp32(file: Path) -> int:
    """Of a file's weights; of one whose header says nothing, as if they were in half precision."""
    try:
        return 4 * sum(math.prod(entry["shape"]) for entry in read_header(file)[0].values())
    except PersonalizeError:
        return 2 * file.stat().st_size
