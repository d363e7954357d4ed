"""What a result says of itself: ours, and the keys that other tools read (`modelspec.*`, `ss_*`)."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .base_model import BaseModel
from .concepts import concepts_of
from .dataset import Example
from .defaults import UNCALLED
from .encoding import digest_of_path
from .settings import Settings
from .shared import About, folder_of, read_about, read_header

PLACES = ("instance_data_dir", "class_data_dir", "validation_data_dir", "cache_dir", "output_dir", "vae_path")
"""Options that say where things lie on the user's disk, which is nobody else's business."""
OTHER_FILES = ("ip_adapter", "distil_from", "image_encoder", "subject_diffusion")
"""Options that name a file which others may have too: its name is kept, without the folder."""
ARCHITECTURES = {
    "sd15": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
    "pocket": "pocket-portraits",
}
KINDS = {
    "lora": "/lora",
    "textual_inversion": "/textual-inversion",
    "dreambooth": "",
    "custom_diffusion": "/custom-diffusion",
    "ip_adapter": "/ip-adapter",
    "subject_diffusion": "/subject-diffusion",
}
VERSIONS = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}


def about(
    base: BaseModel, settings: Settings, method: str, examples: Sequence[Example], digest: str, mark: str
) -> About:
    """The metadata of a training's result.

    Args:
        base: what was trained.
        settings: with nothing open.
        method: its name.
        examples: the subject's.
        digest: of the base's file.
        mark: the base's fingerprint, taken before it was trained.
    """
    flat = settings.flat()
    kept = {k: v for k, v in flat.items() if k not in PLACES and v is not None and v != []}
    kept["pretrained_model_name_or_path"] = base.name
    kept |= {name: Path(kept[name]).name for name in OTHER_FILES if name in kept}
    if "concept" in kept:
        kept["concept"] = [f"{one.trigger}:{one.class_name}" for one in concepts_of(settings)]
    trigger = "" if method in UNCALLED else settings.data.trigger
    if method == "textual_inversion":
        trigger = f"embedding:{settings.output.output_name}"
    return About(
        method=method,
        base_family=base.family,
        base_name=base.name,
        base_hash=digest,
        base_fingerprint=mark,
        trigger=trigger,
        class_name=settings.data.class_name,
        settings=kept,
        extra=_for_others(base, settings, method, examples, trigger),
    )


def _for_others(
    base: BaseModel, settings: Settings, method: str, examples: Sequence[Example], trigger: str
) -> dict[str, str]:
    training, data = settings.training, settings.data
    words = Counter(caption for example in examples for caption in example.captions)
    architecture = ARCHITECTURES.get(base.family, base.family)
    if base.family == "sd2" and base.v_prediction:
        architecture = "stable-diffusion-v2-768-v"
    keys = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture + KINDS[method],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": settings.output.output_name or trigger,
        "modelspec.resolution": f"{data.resolution}x{data.resolution}",
        "modelspec.prediction_type": "v" if base.v_prediction else "epsilon",
        "modelspec.trigger_phrase": trigger,
        "ss_output_name": settings.output.output_name or "",
        "ss_sd_model_name": base.name,
        "ss_base_model_version": VERSIONS.get(base.family, base.family),
        "ss_v2": str(base.family == "sd2"),
        "ss_learning_rate": str(training.learning_rate),
        "ss_max_train_steps": str(training.max_train_steps),
        "ss_batch_size_per_device": str(training.train_batch_size),
        "ss_num_train_images": str(len({e.path for e in examples}) if method == "custom_diffusion" else len(examples)),
        "ss_resolution": f"({data.resolution}, {data.resolution})",
        "ss_clip_skip": str(settings.base.clip_skip),
        "ss_seed": str(training.seed),
        "ss_optimizer": training.optimizer,
        "ss_tag_frequency": json.dumps({data.class_name: dict(sorted(words.items()))}),
    }
    if method in UNCALLED:  # nothing calls it, and the captions of thousands of pictures are nobody else's business
        del keys["modelspec.trigger_phrase"], keys["ss_tag_frequency"]
    if method == "lora":
        options = settings.method
        alpha = options.lora_alpha if options.lora_alpha is not None else options.rank
        keys |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(options.rank),
            "ss_network_alpha": str(alpha),
            "ss_network_args": json.dumps({"dora_wd": True} if options.use_dora else {}),
        }
    return keys


def told(path: Path) -> str:
    """A line for a result: its size, where ComfyUI finds it, and what prompts call it by."""
    about = read_about(read_header(path)[1], path.name) if path.suffix == ".safetensors" else None
    line = f"{path} ({path.stat().st_size / 1e6:.2f} MB)"
    if about is None:
        return line
    place = f"{line}, for models/{folder_of(about.method, '.delta.' in path.name)} of ComfyUI"
    return f"{place}; prompts call it by: {about.call}" if about.call else place


def digest_of_file(base: BaseModel) -> str:
    """SHA-256 of the base's file; empty where it was none."""
    return "" if base.file is None else digest_of_path(base.file)
