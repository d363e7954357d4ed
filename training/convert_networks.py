"""Converting what changes whole networks: LoRA by diffusers' own readers, DreamBooth by its difference from the base."""

from pathlib import Path

import torch
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from .base_model import BaseModel, load_base
from .convert_concepts import check_new
from .dreambooth import difference, host_changes, trained_tensors
from .lora import tensors_of
from .methods import shapes_of, text_modules
from .shared import (
    UNET,
    UNET_PREFIX,
    About,
    PersonalizeError,
    check_lora,
    delta_tensors,
    host_layers,
    overwrite_tensors,
    read_about,
    read_header,
    read_safetensors,
    same_model,
    text_prefixes,
    title_of,
    write_safetensors,
)

ADAPTER = "converted"


def convert_lora(path: Path, folder: Path, name: str, to: str, base: BaseModel, dtype: torch.dtype) -> Path:
    """A LoRA of any trainer that diffusers reads, in kohya's naming or in diffusers'.

    Raises:
        PersonalizeError: diffusers cannot read it on this base, or not whole, or the target is the file itself.
    """
    if path.suffix == ".safetensors" and any("dora_scale" in key for key in read_header(path)[0]):
        raise PersonalizeError(f"{path.name} is a DoRA, whose lengths diffusers does not read: it stays as it is.")
    shapes = shapes_of(base.pipeline.unet), [shapes_of(encoder) for encoder in base.text_encoders]
    try:
        base.pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=ADAPTER)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise PersonalizeError(f"{path.name} is no LoRA that diffusers reads on {base.name}: {_line(error)}") from None
    texts = [(n, encoder) for n, encoder in text_modules(base) if hasattr(encoder, "peft_config")]
    target = folder / f"{name}.safetensors"
    check_new([target])
    metadata = read_header(path)[1] if path.suffix == ".safetensors" else {}
    if to == "personalize":
        prefixes = text_prefixes(len(base.text_encoders))
        own = [(prefixes[0 if n == "text_encoder" else 1], encoder) for n, encoder in texts]
        tensors = tensors_of([(UNET, base.pipeline.unet), *own], ADAPTER)
        write_safetensors(target, {k: v.detach().cpu().to(dtype) for k, v in tensors.items()}, metadata)
        check_lora(read_safetensors(target)[0], host_layers(*shapes), target.name)
        return target
    networks = [("unet", base.pipeline.unet), *texts]
    tensors = {f"{part}.{key}": value for part, network in networks for key, value in _scaled(network).items()}
    write_safetensors(target, {k: v.detach().cpu().to(dtype) for k, v in tensors.items()}, {"format": "pt"})
    return target


def _scaled(network) -> dict[str, Tensor]:
    """peft's tensors with alpha / rank in B: diffusers' files have no alpha."""
    layers, out = dict(network.named_modules()), {}
    for key, value in get_peft_model_state_dict(network, adapter_name=ADAPTER).items():
        layer, found, _ = key.partition(".lora_B.")
        out[key] = value * layers[layer].scaling[ADAPTER] if found else value
    return out


def convert_dreambooth(path: Path, folder: Path, name: str, to: str, base: BaseModel) -> Path:
    """A whole checkpoint as its difference from the base, or the reverse.

    Raises:
        PersonalizeError: the two do not fit.
    """
    header, metadata = read_header(path)[:2] if path.suffix == ".safetensors" else ({}, {})
    whole = path.suffix != ".safetensors" or any(key.startswith(UNET_PREFIX) for key in header)
    if whole == (to == "checkpoint"):
        raise PersonalizeError(f"{path.name} is a {'checkpoint' if whole else 'delta'} already.")
    about = read_about(metadata, path.name) or About("dreambooth", base.family, base.name)
    if about.base_fingerprint and not same_model(about.base_fingerprint, base.fingerprint()):
        raise PersonalizeError(
            f"{path.name} was trained on {about.base_name}, and {base.name} is another: give its own base."
        )
    target = folder / f"{name.removesuffix('.delta')}{'.delta' if whole else ''}.safetensors"
    check_new([target])
    networks = [("unet", base.pipeline.unet), *text_modules(base)]
    if whole:
        trained = load_base(str(path), torch.float32)
        if trained.family != base.family:
            raise PersonalizeError(
                f"{path.name} is {title_of(trained.family)}, but {base.name} is {title_of(base.family)}: give its own base."
            )
        after = dict([("unet", trained.pipeline.unet), *text_modules(trained)])
        changes = {n: difference(after[n].state_dict(), net.state_dict()) for n, net in networks}
        write_safetensors(target, delta_tensors(host_changes(base, changes)), about.as_metadata())
        return target
    if base.file is None or base.file.suffix != ".safetensors":
        raise PersonalizeError(
            "--to checkpoint needs the base as a .safetensors file, in which the trained weights go."
        )
    tensors = read_safetensors(path)[0]
    places = host_changes(base, {n: {k: (n, k) for k in net.state_dict()} for n, net in networks})  # type: ignore[misc]
    states = {n: net.state_dict() for n, net in networks}
    left = set(tensors)
    for host, (network, key) in places.items():
        module, _, kind = host.rpartition(".")
        change = _change(tensors, module, kind, left)
        if change is not None:
            states[network][key].add_(change.reshape(states[network][key].shape))
    if left:
        raise PersonalizeError(f"{sorted(left)[0]} in {path.name} has no place in {base.name}: give its own base.")
    overwrite_tensors(base.file, target, trained_tensors(base, text_modules(base)), metadata)
    return target


def _change(tensors: dict[str, Tensor], module: str, kind: str, left: set[str]) -> Tensor | None:
    """What a delta adds to a parameter; its names are taken from those that are left."""
    if kind == "bias":
        names = [f"{module}.diff_b"]
    elif f"{module}.diff" in tensors:
        names = [f"{module}.diff"]
    else:
        names = [f"{module}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha")]
    if names[0] not in tensors:
        return None
    left -= set(names)
    if len(names) == 1:
        return tensors[names[0]].float()
    up, down = tensors[names[0]].float().flatten(1), tensors[names[1]].float().flatten(1)
    return up @ down * (float(tensors[names[2]]) / len(down))


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
