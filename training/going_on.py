"""Whether a training may go on from a checkpoint: only as it began."""

import os
from collections.abc import Mapping
from pathlib import Path

from .checkpoint import read_settings_of
from .concepts import concepts_of
from .options import CustomDiffusion
from .settings import Settings
from .shared import plural

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
    "pretrained_model_name_or_path",  # where they lie; what they are is compared by digests
    "instance_data_dir",
    "class_data_dir",
    "vae_path",
    "ip_adapter",
    "distil_from",
    "concept",
    "compression",
    "image_encoder",
}
SHAPING = {  # settings that other weights come from, which a checkpoint has not
    "method",
    "rank",
    "text_encoder_rank",
    "block_ranks",
    "lora_layers",
    "use_dora",
    "num_vectors",
    "train_text_encoder",
    "use_ema",
    "adapter_kind",
    "resampler_depth",
    "aggregation",
    "aggregation_stage",
    "train_adapter",
    "aggregator_width",
    "aggregator_heads",
    "aggregator_depth",
    "train_layers",
    "triggers",
}


def shared_settings(settings: Settings) -> dict:
    """Those that a run which goes on must share with the one before."""
    kept = {name: value for name, value in settings.flat().items() if name not in ANYWAY}
    if isinstance(settings.method, CustomDiffusion) and settings.method.concept:
        kept["triggers"] = ", ".join(concept.trigger for concept in concepts_of(settings))
    return kept | {"num_processes": processes(), "method": settings.method.name}


def processes() -> int:
    """How many train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
    began = f"{settings.folder} has a training of {plural(step, 'step')} that began otherwise ({'; '.join(changed)}): use the same, "
    if any(before.get(name) != value for name, value in shared_settings(settings).items() if name in SHAPING):
        return [f"{began}another --output_dir, or --resume_from_checkpoint none to start anew."]
    return [
        f"{began}another --output_dir, --resume_from_checkpoint {checkpoint.name} to go on with the new ones from there, "
        "or --resume_from_checkpoint none to start anew."
    ]
