"""What suits a base model and a method, where the user did not say."""

from dataclasses import dataclass, fields, replace

import torch

from .concepts import concepts_of
from .options import CustomDiffusion
from .settings import Settings
from .shared import PersonalizeError, title_of


@dataclass(frozen=True)
class Suits:
    """Rates and steps that work for most subjects."""

    learning_rate: float
    text_encoder_lr: float
    max_train_steps: int
    train_text_encoder: bool
    timestep_bias_strategy: str = "none"
    lr_scheduler: str = "constant"
    shuffle_captions: bool = False


UNCALLED = ("ip_adapter", "subject_diffusion")
"""Methods that pictures call, not words."""
RESOLUTIONS = {"sd15": 512, "sd2": 768, "sdxl": 1024, "pocket": 64}
LARGE = {
    "lora": Suits(1e-4, 5e-5, 1000, False),
    "textual_inversion": Suits(5e-3, 0.0, 2000, False),
    "dreambooth": Suits(2e-6, 1e-6, 800, True),
    "custom_diffusion": Suits(1e-5, 1e-5, 250, False),
    "ip_adapter": Suits(1e-4, 0.0, 20_000, False),
    "subject_diffusion": Suits(3e-5, 3e-5, 300_000, True),
}
POCKET = {
    "lora": Suits(1e-3, 2e-4, 600, False),
    "textual_inversion": Suits(1e-2, 0.0, 600, False),
    "dreambooth": Suits(2e-4, 3e-4, 400, True),
    "custom_diffusion": Suits(1e-3, 1e-2, 1200, False, "later", "cosine"),
    "ip_adapter": Suits(1e-3, 0.0, 3000, False),
    "subject_diffusion": Suits(5e-4, 5e-4, 4000, True),
}
SIZE_VARIANTS, MANY = {"pocket": 0}, 12
"""The pocket model has never heard of "far away" or "zoomed in"."""
CUT_MIX = {"pocket": 1}
"""Custom Diffusion as published shows each concept alone."""
MAX_WORD_NORM = {"pocket": 1.0}
"""Of several concepts. As published, words have any length: at rates as the pocket model's, ten times the vocabulary's, which
holds more of a single concept but pushes the word of another aside."""
DEFAULTS = {"sd15": LARGE, "sd2": LARGE, "sdxl": LARGE, "pocket": POCKET}


def fill_defaults(settings: Settings, family: str) -> Settings:
    """The settings with nothing open.

    Args:
        settings: as the user gave them.
        family: of models.base_models; one that is not known is treated as SD1.5.
    """
    suits = DEFAULTS.get(family, LARGE)[settings.method.name]
    training, data, output, method = settings.training, settings.data, settings.output, settings.method
    name = default_name(settings)
    if isinstance(method, CustomDiffusion):
        if method.concept:  # {trigger} and {class} are the first's
            first = concepts_of(settings)[0]
            data = replace(data, trigger=first.trigger, class_name=first.class_name)
        if method.size_variants is None:
            method = replace(method, size_variants=SIZE_VARIANTS.get(family, MANY))
        if method.cut_mix is None:
            method = replace(method, cut_mix=CUT_MIX.get(family, 0))
        if method.max_word_norm is None:
            several = len(method.concept) > 1
            method = replace(method, max_word_norm=MAX_WORD_NORM.get(family, 0.0) if several else 0.0)
    steps = training.max_train_steps
    if steps is None and training.num_train_epochs is None:
        steps = suits.max_train_steps

    def given(value, default):
        return default if value is None else value

    return replace(
        settings,
        data=replace(
            data,
            resolution=given(data.resolution, RESOLUTIONS.get(family, 512)),
            shuffle_captions=given(data.shuffle_captions, suits.shuffle_captions),
            trigger="" if settings.method.name in UNCALLED else data.trigger,
        ),
        training=replace(
            training,
            max_train_steps=steps,
            learning_rate=given(training.learning_rate, suits.learning_rate),
            text_encoder_lr=given(training.text_encoder_lr, suits.text_encoder_lr),
            train_text_encoder=given(training.train_text_encoder, suits.train_text_encoder),
            lr_scheduler=given(training.lr_scheduler, suits.lr_scheduler),
            timestep_bias_strategy=given(training.timestep_bias_strategy, suits.timestep_bias_strategy),
            mixed_precision=given(training.mixed_precision, best_precision()),
            max_grad_norm=0.0 if training.fused_backward else training.max_grad_norm,
        ),
        output=replace(output, output_name=given(output.output_name, name)),
        method=method,
    )


def default_name(settings: Settings) -> str:
    """Of the result: what calls it; an IP-Adapter has no word for that, and Custom Diffusion has words of its own."""
    if settings.method.name in UNCALLED:
        return settings.method.name
    if settings.method.name != "custom_diffusion":
        return settings.data.trigger
    try:
        classes = dict.fromkeys(concept.class_name for concept in concepts_of(settings))
    except PersonalizeError:  # which the preflight tells
        return settings.method.name
    return "_".join("_".join(name.split()) for name in classes)


def hints(method: str) -> dict[str, str]:
    """For --help: what is filled in."""
    large, pocket = LARGE[method], POCKET[method]
    texts = {
        f.name: f"{_shown(getattr(large, f.name))}; pocket {_shown(getattr(pocket, f.name))}" for f in fields(Suits)
    }
    sizes = ", ".join(f"{size} for {title_of(family)}" for family, size in RESOLUTIONS.items())
    return texts | {
        "size_variants": f"{MANY}; pocket {SIZE_VARIANTS['pocket']}",
        "cut_mix": f"0; pocket {CUT_MIX['pocket']}",
        "max_word_norm": f"0; pocket {MAX_WORD_NORM['pocket']:g} for several concepts",
        "resolution": sizes,
        "mixed_precision": "no on CPUs, else bf16, or fp16 on old GPUs",
    }


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def best_precision() -> str:
    """bf16 on accelerators that compute in it, fp16 on older ones, none on the CPU."""
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
