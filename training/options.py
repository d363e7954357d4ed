"""The options of the trainers: one field each, from the command line or a TOML file, checked before anything loads.

A field's `help` is what `--help` prints. None means "what suits the base model and the method", and is filled in by
`training.defaults`; the effective values are saved beside the output as config.toml.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .shared import AGGREGATIONS, BALANCED, L1, PARTS, SELF_ATTENTION, TRIGGER

AGGREGATION_CHOICES = (SELF_ATTENTION, *AGGREGATIONS)


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    below: float | None = None,
    above: float | None = None,
    also: tuple[str, ...] = (),
    switches: Mapping[str, str] | None = None,
    most: float | None = None,
) -> Any:
    """A field with its help, the values that it may have, and what other trainers call it.

    Args:
        default: its value.
        help: for --help.
        choices, least, most, below, above: bounds of its value.
        also: other names.
        switches: names of options without a value, and which value each stands for.
    """
    bounds = {"choices": choices, "least": least, "most": most, "below": below, "above": above}
    metadata = {"help": help, **bounds, "also": also, "switches": switches or {}}
    return (
        field(default_factory=list, metadata=metadata) if default == [] else field(default=default, metadata=metadata)
    )


@dataclass
class Base:
    """Base model"""

    pretrained_model_name_or_path: str | None = option(
        None,
        "the model to start from: a .safetensors or .ckpt file, a diffusers folder, or a hub id (needs the network)",
    )
    base_family: str | None = option(
        None,
        "take base models of this family only, as a configuration that is for one does",
        ("sd15", "sd2", "sdxl", "pocket"),
    )
    vae_path: str | None = option(None, "another VAE: a diffusers folder or a .safetensors file of the same layout")
    revision: str | None = option(None, "of a hub id")
    variant: str | None = option(None, "of a hub id or folder, such as fp16")
    prediction_type: str = option("auto", "what the network predicts", ("auto", "epsilon", "v_prediction"))
    clip_skip: int = option(1, "take the text from this layer, counted from the last; 2 for many anime models", least=1)


@dataclass
class Data:
    """Pictures and captions"""

    instance_data_dir: str | None = option(
        None, "folder with pictures of your subject: five to twenty are enough", also=("train_data_dir",)
    )
    trigger: str = option(TRIGGER, "the word that will call your subject", also=("placeholder_token",))
    class_name: str = option("person", "what it is, as one noun: dog, backpack, woman, logo")
    instance_prompt: str | None = option(
        None,
        "caption of pictures that have no .txt beside them, {trigger} and {class} are put in; by default 'a photo of "
        "{trigger} {class}', and for Textual Inversion several",
    )
    resolution: int | None = option(
        None, "size of the pictures: they are brought to about as many pixels as a square of this side has", least=16
    )
    buckets: bool = option(True, "keep each picture's aspect (groups of like aspect) instead of cutting squares")
    repeats: int = option(1, "how often each picture counts in an epoch", least=1)
    random_flip: bool = option(False, "show mirrored pictures too; not for faces, text and logos")
    masked_loss: bool = option(False, "learn only where the mask is white: alpha, or NAME-masklabel.png beside NAME")
    shuffle_captions: bool | None = option(
        None,
        "say what is between the commas of a caption in several orders, so that its words are known in any place",
        also=("shuffle_caption",),
    )
    caption_dropout: float = option(
        0.0, "share of captions left out, so that the model stays good without", least=0, below=1
    )
    validation_data_dir: str | None = option(None, "folder with further pictures, on which only the loss is measured")
    with_prior_preservation: bool = option(False, "keep the class: learn from pictures of others of the class, too")
    class_data_dir: str | None = option(None, "folder with those; what is missing is drawn by the base into it")
    class_prompt: str = option("a {class}", "caption of those that have no .txt, and the prompt they are drawn by")
    num_class_images: int = option(100, "how many there shall be", least=1)
    prior_loss_weight: float = option(1.0, "λ, how much they count", least=0)
    cache_dir: str | None = option(None, "folder for encoded pictures and captions; by default in the output folder")


@dataclass
class Training:
    """Training"""

    max_train_steps: int | None = option(None, "steps of the optimiser", least=1)
    num_train_epochs: int | None = option(None, "instead of steps: how often to see every picture, on average", least=1)
    train_batch_size: int = option(1, "pictures a step, on each device", least=1)
    gradient_accumulation_steps: int = option(1, "batches before the optimiser steps", least=1)
    learning_rate: float | None = option(
        None, "of the UNet; of the words in Textual Inversion; of the adapter", least=0
    )
    train_text_encoder: bool | None = option(None, "train the text encoder, too")
    text_encoder_lr: float | None = option(None, "its learning rate; in Custom Diffusion that of the words", least=0)
    lr_scheduler: str | None = option(
        None,
        "how the rate changes",
        ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    )
    lr_warmup_steps: int = option(0, "steps in which the rate rises from zero", least=0)
    lr_num_cycles: int = option(1, "restarts of cosine_with_restarts", least=1)
    lr_power: float = option(1.0, "of polynomial", least=0)
    optimizer: str = option(
        "adamw",
        "adafactor needs the least memory; adamw8bit needs the package bitsandbytes, prodigy (which finds its rate) the "
        "package prodigyopt; muon, for networks that start anew, the package timm",
        ("adamw", "adamw8bit", "adafactor", "prodigy", "muon"),
        switches={"use_8bit_adam": "adamw8bit"},
    )
    fused_backward: bool = option(
        False,
        "each weight steps as soon as its gradient is there, so that no gradients are kept: much less memory when a whole "
        "model trains; without accumulation and max_grad_norm",
    )
    adam_beta1: float = option(0.9, "of the optimiser", least=0, below=1)
    adam_beta2: float = option(0.999, "of the optimiser", least=0, below=1)
    adam_weight_decay: float = option(0.01, "of the optimiser", least=0)
    adam_epsilon: float = option(1e-8, "of the optimiser", least=0)
    max_grad_norm: float = option(1.0, "longer gradients are shortened to this; 0 leaves them", least=0)
    mixed_precision: str | None = option(None, "what the network computes in", ("no", "fp16", "bf16"))
    gradient_checkpointing: bool = option(False, "less memory, a third slower")
    snr_gamma: float | None = option(None, "min-SNR weighting of the loss; 5 learns faster, 0 is off", least=0)
    timestep_bias_strategy: str | None = option(
        None,
        "draw a part of the schedule more often: later is where the noise is strong and layout and identity are decided, "
        "earlier where details are",
        ("none", "earlier", "later"),
    )
    timestep_bias_portion: float = option(0.5, "the part, of the whole schedule", above=0, most=1)
    timestep_bias_multiplier: float = option(4.0, "how many times as often", above=0)
    noise_offset: float = option(0.0, "0.05 to 0.1 lets very dark and bright pictures be learned", least=0)
    use_ema: bool = option(False, "keep a running average of the weights and save that")
    ema_decay: float = option(0.9999, "of the average", least=0, below=1)
    channels_last: bool = option(False, "memory layout that is faster on many GPUs when the whole UNet trains")
    allow_tf32: bool = option(False, "faster matrix products on NVIDIA's GPUs from Ampere on")
    seed: int = option(0, "of everything random: the same seed gives the same file", least=0, below=2**32)


@dataclass
class Watching:
    """While it trains"""

    validation_prompt: list[str] = option(  # noqa: RUF009 - a list of its own for each
        [], "draw pictures of this while training; may be given several times, with {trigger} and {class}"
    )
    num_validation_images: int = option(4, "pictures of each prompt; 0 draws none", least=0)
    validation_steps: int = option(
        100, "steps between such pictures, and between measures of the validation loss", least=1
    )
    checkpointing_steps: int = option(100, "steps between checkpoints", least=1)
    checkpoints_total_limit: int = option(2, "older checkpoints are deleted", least=1)
    resume_from_checkpoint: str = option(
        "latest", "go on from the output folder's last checkpoint, or from the one named; none starts anew"
    )
    report_to: str = option("none", "tensorboard and wandb need their packages", ("none", "tensorboard", "wandb"))

    @property
    def drawn_prompts(self) -> list[str]:
        """Those of `validation_prompt`, unless no picture of them is asked for."""
        return self.validation_prompt if self.num_validation_images else []


@dataclass
class Output:
    """Output"""

    output_dir: str | None = option(None, "folder for the result, checkpoints, samples, the log and the configuration")
    output_name: str | None = option(
        None, "name of the result without ending; the trigger by default, of Custom Diffusion the classes"
    )
    save_precision: str = option(
        "fp16",
        "of the result; a difference is always in fp16, and a checkpoint made from a .safetensors file has that one's",
        ("fp16", "bf16", "fp32"),
    )


@dataclass
class Lora:
    """LoRA"""

    name: ClassVar[str] = "lora"
    rank: int = option(16, "width of the low-rank matrices: more holds more details, in a larger file", least=1)
    lora_alpha: float | None = option(
        None, "scale alpha / rank of the change; as large as the rank by default", above=0
    )
    lora_dropout: float = option(0.0, "share of the input left out at random", least=0, below=1)
    text_encoder_rank: int | None = option(None, "of the text encoder; as the UNet's by default", least=1)
    block_ranks: list[str] = option(  # noqa: RUF009 - a list of its own for each
        [], "ranks of single blocks, as up_blocks.1=32; 0 leaves a block out; may be given several times"
    )
    lora_layers: str = option(
        "attention",
        "which layers: attention; also the feed-forward; or also convolutions",
        ("attention", "linear", "all"),
    )
    use_dora: bool = option(False, "DoRA: learn the rows' lengths, too")


@dataclass
class TextualInversion:
    """Textual Inversion"""

    name: ClassVar[str] = "textual_inversion"
    num_vectors: int = option(
        4, "vectors of the word: more hold more, and take more of the prompt's 77", least=1, below=75
    )
    initializer_token: str | None = option(None, "words whose vectors it starts from; the class by default")
    learnable_property: str = option("object", "what is learned, which chooses the captions", ("object", "style"))


@dataclass
class DreamBooth:
    """DreamBooth"""

    name: ClassVar[str] = "dreambooth"
    save_as: str = option(
        "full", "a whole checkpoint, its difference from the base, or both", ("full", "delta", "both")
    )
    delta_megabytes: float | None = option(
        None, "cut the difference to this size (singular values; names take 0.1 MB more); whole by default", least=0
    )


@dataclass
class CustomDiffusion:
    """Custom Diffusion"""

    name: ClassVar[str] = "custom_diffusion"
    concept: list[str] = option(  # noqa: RUF009 - a list of its own for each
        [],
        "FOLDER:TRIGGER:CLASS, pictures, word and class of a concept, instead of --instance_data_dir, --trigger and "
        "--class_name; may be given several times, and all are learned together",
    )
    train_layers: str = option(
        "kv", "of every cross-attention: keys and values, or queries and outputs, too", ("kv", "all")
    )
    size_variants: int | None = option(
        None,
        "sizes at which each picture is shown: on an empty canvas as 'far away', cut as 'zoomed in', or as it is; 0 shows "
        "all as they are",
        least=0,
    )
    cut_mix: int | None = option(
        None,
        "of several concepts, how often each picture is shown beside one of another, with the captions of both; 0 shows "
        "each alone",
        least=0,
    )
    max_word_norm: float | None = option(
        None,
        "how long the concepts' learned vectors may get, in lengths of the vocabulary's: longer ones push other words aside "
        "(as in NeTI, Alaluf et al. 2023); 0 sets no limit",
        least=0,
    )
    initializer_token: str | None = option(
        None,
        "what the concepts' words start as, with commas between, a token each; rare ones by default: ktn, pll, ucd",
    )
    compression: float | None = option(
        None,
        "cut the result to the singular values that make up this share of their sum, such as 0.6",
        above=0,
        below=1,
    )


@dataclass
class IPAdapter:
    """IP-Adapter"""

    name: ClassVar[str] = "ip_adapter"
    image_encoder: str | None = option(
        None, "the CLIP image encoder: a file as in ComfyUI's models/clip_vision, a folder, or a hub id"
    )
    ip_adapter: str | None = option(
        None, "the adapter to start from, as in ComfyUI's models/ipadapter; none: from scratch"
    )
    adapter_kind: str | None = option(
        None, "from scratch: 4 tokens of a picture, or 16 of its patches; base by default", ("base", "plus")
    )
    resampler_depth: int | None = option(
        None, "layers of a new plus projection; 4 by default, which is all that diffusers loads", least=1
    )
    distil_from: str | None = option(
        None,
        "from scratch: a trained base adapter whose tokens the new projection learns first, and whose W'_k and W'_v",
    )
    distil_steps: int = option(0, "of the steps, so many first ones do that, which is fast", least=0)
    aggregation: str = option(SELF_ATTENTION, "how several references become one", AGGREGATION_CHOICES)
    aggregation_stage: str | None = option(
        None,
        "over the image encoder's features, or over the projected tokens; by default where the self-attention in the file "
        "of --ip_adapter stands, else features",
        ("features", "tokens"),
    )
    train_adapter: bool | None = option(
        None,
        "train the projection and W'_k, W'_v; by default unless self-attention is added to a published adapter",
    )
    aggregator_width: int | None = option(
        None, "of a new self-attention; the features' by default, 512 at most", least=1
    )
    aggregator_heads: int | None = option(None, "of a new self-attention; 8 by default", least=1)
    aggregator_depth: int | None = option(
        None, "of a new self-attention: blocks before the pooling; 2 by default", least=0
    )
    aggregator_lr: float | None = option(
        None,
        "learning rate of the self-attention; --learning_rate by default, which is better lower for what is trained"
        " already",
        above=0,
    )
    max_references: int | None = option(
        None, "references at most; 1 trains an ordinary adapter, by default all others of the identity", least=1
    )
    reference_crops: int = option(
        0,
        "random squares of every reference to show, too, so that a reference may be a detail or off centre; the pictures "
        "to predict stay whole",
        least=0,
    )
    smallest_crop: float = option(0.35, "of those squares: least side, as a share of the picture's", above=0, below=1)
    largest_crop: float = option(1.0, "of those squares: greatest side, as a share of the picture's", above=0)
    text_dropout: float = option(0.05, "share of steps without the caption", least=0, below=1)
    reference_dropout: float = option(
        0.05, "share of steps without the references, where the adapter trains", least=0, below=1
    )
    both_dropout: float = option(0.05, "share of steps without both, where the adapter trains", least=0, below=1)
    warmup_steps: int = option(
        0,
        "of the steps, so many next ones predict the features of the identity's other pictures, which is fast",
        least=0,
    )
    warmup_loss_weight: float = option(
        0.0,
        "weight of that prediction's loss beside the noise's in all later steps; for the self-attention alone",
        least=0,
    )
    validation_identities: int | None = option(
        None, "identities to hold out for the validation loss and samples; one in ten, four at most", least=0
    )


@dataclass
class SubjectDiffusion:
    """Subject-Diffusion"""

    name: ClassVar[str] = "subject_diffusion"
    image_encoder: str | None = option(
        None, "the CLIP image encoder: a file as in ComfyUI's models/clip_vision, a folder, or a hub id"
    )
    subject_diffusion: str | None = option(None, "a file of Subject-Diffusion to go on from")
    max_subjects: int = option(2, "subjects of a picture at most; the first of each in the data set", least=1)
    augmentations: int = option(
        4, "views of each subject: mirrored, turned, seen aslant, on another picture; 0 shows it plain", least=0
    )
    backgrounds: float = option(
        0.5, "share of these views that stand on another picture, not on white", least=0, most=1
    )
    localisation: str = option(
        BALANCED,
        "attention control: attention off the subject less that on it, or its distance from the mask",
        (BALANCED, L1),
    )
    localisation_weight: float = option(0.01, "of the attention control beside the noise's loss", least=0)
    text_dropout: float = option(0.05, "share of steps without the caption", least=0, below=1)
    subject_dropout: float = option(0.05, "share of steps without location and subjects", least=0, below=1)
    both_dropout: float = option(0.05, "share of steps without all of these", least=0, below=1)
    without: list[str] = option(  # noqa: RUF009 - a list of its own for each
        [],
        "leave a part out, to see what it is for; may be given several times",
        PARTS,
    )
