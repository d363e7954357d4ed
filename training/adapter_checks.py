"""Whether an adapter, an image encoder and a base go together: from headers, and of a self-attention from its weights."""

from pathlib import Path

import torch

from .adapter_module import AGGREGATOR_HEADS, stage_of
from .image_encoder import widths_of_encoder
from .look import tell
from .options import IPAdapter as Options
from .shared import (
    FAMILIES,
    SELF_ATTENTION,
    AdapterTensors,
    IPAdapter,
    PersonalizeError,
    Variant,
    nest,
    read_header,
    read_ip_adapter,
    title_of,
)

FRESH_SHARE = 0.1
"""About how large a fresh adapter is, by the size of its base's file."""


def check_adapter(options: Options, family: str | None) -> list[str]:
    """A sentence for what is odd.

    Args:
        options: as the user gave them.
        family: of the base; None for a hub id.

    Raises:
        PersonalizeError: the adapter to start from, the image encoder or the options of what is new are wrong.
    """
    problems, odd, trained = [], [], None
    try:
        check_files(options.ip_adapter, options.image_encoder, family)
        if options.ip_adapter is not None:
            trained = with_self_attention(Path(options.ip_adapter).expanduser())
    except PersonalizeError as error:
        problems += str(error).splitlines()
    problems += _of_new(options) + _of_teacher(options, family) + _of_self_attention(options, trained)
    names = ["aggregator_width", "aggregator_heads", "aggregator_depth", "aggregator_lr"]
    names += ["aggregation_stage"] * (options.aggregation == "concatenate")
    if options.aggregation != SELF_ATTENTION and (given := _given(options, *names)):
        odd.append(f"With --aggregation {options.aggregation} there is no effect of {given}.")
    if options.aggregation == SELF_ATTENTION and options.max_references == 1:
        odd.append(
            "--max_references 1 shows the self-attention one reference in every step, so that it learns nothing of how "
            "several go together: use 2 or more, or --aggregation average for an ordinary adapter."
        )
    if trained is not None and options.aggregation != SELF_ATTENTION:
        odd.append(
            f"--aggregation {options.aggregation} leaves the self-attention that {trained.name} has out of the result."
        )
    dropped = options.text_dropout + options.reference_dropout + options.both_dropout
    if dropped >= 1:
        problems.append(
            f"--text_dropout, --reference_dropout and --both_dropout are {dropped:g} together: less than 1."
        )
    if not options.smallest_crop <= options.largest_crop <= 1:
        problems.append(
            f"--smallest_crop {options.smallest_crop:g} and --largest_crop {options.largest_crop:g} are not the smaller "
            "first, and at most 1."
        )
    if options.ip_adapter is None and options.train_adapter is False:
        problems.append("--no-train_adapter needs --ip_adapter: a new adapter would stay as untrained as it is.")
    elif options.aggregation != SELF_ATTENTION and options.train_adapter is False:
        problems.append(f"--no-train_adapter with --aggregation {options.aggregation} leaves nothing to train.")
    if problems:
        raise PersonalizeError("\n".join(problems))
    return odd


def with_self_attention(path: Path) -> IPAdapter | None:
    """The adapter of a file, if the file has a self-attention."""
    if path.suffix == ".safetensors" and not any(name.startswith("aggregator.") for name in read_header(path)[0]):
        return None
    adapter = IPAdapter.from_state(read_ip_adapter(path))
    return None if adapter.trained is None else adapter


def _of_new(options: Options) -> list[str]:
    given = _given(options, "adapter_kind", "resampler_depth")
    if options.ip_adapter is not None and given:
        return [
            f"{given} would describe a new adapter, but --ip_adapter names one that is made: give one or the other."
        ]
    if options.resampler_depth is not None and options.adapter_kind != "plus":
        return ["--resampler_depth is for --adapter_kind plus: give both or neither."]
    return []


def _of_self_attention(options: Options, started: IPAdapter | None) -> list[str]:
    """Args:
    options: as the user gave them.
    started: the adapter to start from, if it has a self-attention.
    """
    if options.aggregation != SELF_ATTENTION:
        return []
    if started is not None and started.trained is not None:
        found = started.trained[1]
        own = {
            "aggregation_stage": stage_of(started),
            "aggregator_width": found.proj_in.out_features,
            "aggregator_heads": found.head_count,
            "aggregator_depth": len(found.blocks),
        }
        wrong = [f"--{name} {value}" for name, value in own.items() if getattr(options, name) not in (None, value)]
        return [
            f"{started.name} has a self-attention with {', '.join(wrong)}, which you want otherwise: leave the options out "
            "or start from an adapter without one."
        ] * bool(wrong)
    width, heads = options.aggregator_width, options.aggregator_heads or AGGREGATOR_HEADS
    if width is not None and width % heads:
        return [f"--aggregator_width {width} does not divide into --aggregator_heads {heads}."]
    return []


def _given(options: Options, *names: str) -> str:
    return " and ".join(f"--{name}" for name in names if getattr(options, name) is not None)


def _of_teacher(options: Options, family: str | None) -> list[str]:
    if options.distil_from is None:
        return ["--distil_steps needs --distil_from: a trained base adapter."] if options.distil_steps else []
    if options.ip_adapter is not None:
        return ["--distil_from is for a new adapter: give it or --ip_adapter."]
    if options.adapter_kind != "plus" or not options.distil_steps:
        return ["--distil_from needs --adapter_kind plus and --distil_steps."]
    try:
        check_files(options.distil_from, options.image_encoder, family)
    except PersonalizeError as error:
        return [line for line in str(error).splitlines() if not line.startswith("--image_encoder")]
    path = Path(options.distil_from).expanduser()
    kind = IPAdapter.from_state(read_ip_adapter(path)).variant.kind
    return [] if kind == "base" else [f"--distil_from {path.name} is {kind}: it must be a base adapter."]


def check_files(adapter: str | None, encoder: str | None, family: str | None) -> None:
    """Raises PersonalizeError where an adapter and an image encoder are not what they must be, or do not go together.

    Args:
        adapter: a file, or None for one that is still to be made.
        encoder: a file, folder or hub id.
        family: of the base; None for a hub id.
    """
    problems: list[str] = []
    widths = tell(problems, widths_of_encoder, encoder)
    if adapter is not None:
        try:
            problems += _of_adapter(Path(adapter).expanduser(), Path(encoder or "").name, family, widths)
        except PersonalizeError as error:
            problems.append(str(error))
    if problems:
        raise PersonalizeError("\n".join(problems))


def _of_adapter(path: Path, encoder: str, family: str | None, widths: tuple[int, int] | None) -> list[str]:
    if path.suffix == ".safetensors" and path.is_file():
        shapes = {name: torch.empty(entry["shape"], device="meta") for name, entry in read_header(path)[0].items()}
        state = AdapterTensors(
            nest({name: value for name, value in shapes.items() if not name.startswith("aggregator.")})
        )
        state.name = f"{path.name} in {path.parent}"
    else:
        state = read_ip_adapter(path)
    variant, problems = IPAdapter.from_state(state).variant, []
    wanted = {name: context for (_, context), name in FAMILIES.items()}.get(family or "")
    if wanted is not None and variant.cross_width != wanted:
        problems.append(
            f"{path.name} is made for {variant.base_model}, but the base is {title_of(family or '')}: use an adapter made for "
            "it, or train one from scratch without --ip_adapter."
        )
    if widths is not None:
        tell(problems, check_width, path.name, variant, widths[0 if variant.pooled else 1], encoder)
    return problems


def check_width(adapter: str, variant: Variant, width: int, encoder: str) -> None:
    """Raises PersonalizeError where an image encoder's features have another width than the adapter takes."""
    if width != variant.encoder_width:
        raise PersonalizeError(
            f"{adapter} ({variant}) takes image features of width {variant.encoder_width}, but those of {encoder} have "
            f"width {width}: use {variant.encoder}."
        )


def bytes_of_adapter(options: Options, base: int) -> int:
    """About how large it is in fp32: the file's weights, or a share of a base of so many bytes."""
    path = Path(options.ip_adapter or "").expanduser()
    return 2 * path.stat().st_size if path.is_file() else int(base * FRESH_SHARE)
