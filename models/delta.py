"""A fine-tuned model as its difference from the base: W = W_base + s (W_trained - W_base), with a strength s.

Names are those of ComfyUI's own parameters, so that its stock LoraLoader takes the file too: `<module>.diff`, `.diff_b`,
and where the difference of a matrix is cut to its largest singular values (Eckart and Young 1936), `.lora_up.weight`,
`.lora_down.weight`, `.alpha`.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .errors import PersonalizeError
from .text_keys import with_text_model
from .unet_keys import UNET_PREFIX

TEXT_MODELS = {"sd": ("clip_l",), "sd2": ("clip_h",), "sdxl": ("clip_l", "clip_g")}
"""ComfyUI's names of each layout's text encoders."""
BYTES = 2  # half precision
CHANGES = (".diff", ".diff_b", ".lora_up.weight")
"""Endings of names in a file, one for each changed parameter; a whole checkpoint has none of them."""
PARTS = (*CHANGES, ".lora_down.weight", ".alpha")
"""Of the names in a file, after the module's."""
TINY = 1e-6
"""Of a matrix's largest squared singular value: what is below is lost in rounding."""


def host_unet_names(names: Mapping[str, str]) -> dict[str, str]:
    """ComfyUI's name of each of a UNet's parameters, from its single-file name (`models.unet_keys`)."""
    return {name: f"diffusion_model.{single.removeprefix(UNET_PREFIX)}" for name, single in names.items()}


def host_text_tensors(state: Mapping[str, Tensor], text_model: str) -> dict[str, Tensor]:
    """A text encoder's tensors, by transformers' names, under ComfyUI's names."""
    return {f"text_encoders.{text_model}.transformer.{name}": v for name, v in with_text_model(state).items()}


def delta_tensors(changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole difference in half precision; parameters that did not change are left out.

    Args:
        changes: W_trained - W_base by ComfyUI's parameter name.
    """
    tensors = {}
    for name, change in changes.items():
        if bool(change.any()):
            module, _, kind = name.rpartition(".")
            tensors[f"{module}.diff" if kind == "weight" else f"{module}.diff_b"] = change.half()
    return tensors


def check_budget(shapes: Iterable[torch.Size], budget: int) -> None:
    """Whether a difference can be cut to a size.

    Args:
        shapes: of all parameters that changed; those of one dimension are never cut.
        budget: bytes of all tensors together.

    Raises:
        PersonalizeError: its vectors alone are larger.
    """
    least = sum(shape.numel() for shape in shapes if len(shape) < 2) * BYTES
    if least > budget:
        raise PersonalizeError(
            f"The difference cannot be cut to {budget / 1e6:g} MB: its biases and norms, which are kept whole, need at "
            f"least {math.ceil(least / 1e4) / 100:g} MB."
        )


def truncated_delta_tensors(
    changes: Mapping[str, Tensor], budget: int, progress: Callable[[Iterable[str]], Iterable[str]] = iter
) -> tuple[dict[str, Tensor], float]:
    """The difference cut to a size: of all matrices together, the singular values that explain most for their cost.

    A matrix is written whole where that explains more for its cost. If the whole difference fits, it is written as
    `delta_tensors` does.

    Args:
        changes: W_trained - W_base by ComfyUI's parameter name.
        budget: bytes of all tensors together. Vectors are always kept whole.
        progress: wraps the names while they are decomposed.

    Returns:
        The tensors, and the share of the difference's squared length that is left, 0..1.

    Raises:
        PersonalizeError: the vectors alone are larger.
    """
    changes = {name: change for name, change in changes.items() if bool(change.any())}
    check_budget((change.shape for change in changes.values()), budget)
    left = budget // BYTES
    if sum(change.numel() for change in changes.values()) <= left:
        return delta_tensors(changes), 1.0
    lengths = {name: float(change.double().square().sum()) for name, change in changes.items()}
    matrices = {name: change.float().flatten(1) for name, change in changes.items() if change.ndim >= 2}
    left -= sum(change.numel() for name, change in changes.items() if name not in matrices)
    # squared length explained for each value stored, where, and if by all of it
    steps: list[tuple[float, str, bool]] = []
    for name in progress(matrices):
        steps += _steps(name, matrices[name], left)
    ranks, whole = dict.fromkeys(matrices, 0), set()
    for _, name, all_of_it in sorted(steps, reverse=True):
        cost = sum(matrices[name].shape)
        if all_of_it:
            cost = matrices[name].numel() - ranks[name] * cost
        if name in whole or cost > left:
            continue
        left -= cost
        if all_of_it:
            whole.add(name)
        else:
            ranks[name] += 1
    tensors = delta_tensors({name: change for name, change in changes.items() if name in whole or name not in matrices})
    kept = sum(length for name, length in lengths.items() if name in whole or name not in matrices)
    for name, rank in ranks.items():
        if rank == 0 or name in whole:
            continue
        up, down = _factors(matrices[name], rank)
        module, shape = name.removesuffix(".weight"), changes[name].shape
        ones = [1] * (len(shape) - 2)
        tensors[f"{module}.lora_up.weight"] = up.reshape(shape[0], rank, *ones).half().contiguous()
        tensors[f"{module}.lora_down.weight"] = down.reshape(rank, *shape[1:]).half().contiguous()
        tensors[f"{module}.alpha"] = torch.tensor(float(rank))
        kept += float((up.square().sum(0) * down.square().sum(1)).sum())
    return tensors, kept / sum(lengths.values())


def _steps(name: str, matrix: Tensor, left: int) -> list[tuple[float, str, bool]]:
    """What can be written of a matrix: its singular values one by one, and after the best number of them all the rest.

    Args:
        left: how many values may be stored; singular values that would never be paid are left out.
    """
    cost, whole = sum(matrix.shape), matrix.numel()
    explained = torch.linalg.eigvalsh(_gram(matrix)).flip(0).clamp_min(0)
    most = min((whole - 1) // cost, left // cost, int((explained > TINY * explained[0]).sum()))
    rest = explained.sum() - torch.cat([torch.zeros(1), explained[:most].cumsum(0)])
    jump = min(r / (whole - rank * cost) for rank, r in enumerate(rest.tolist()))
    return [(value / cost, name, False) for value in explained[:most].tolist()] + [(jump, name, True)]


def _gram(matrix: Tensor) -> Tensor:
    """The smaller of M M^T and M^T M, whose eigenvalues are M's squared singular values."""
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The closest product of two matrices [rows, rank] and [rank, columns], whose columns and rows are as long."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    vectors = torch.linalg.eigh(_gram(matrix))[1][:, -rank:]
    others = vectors.T @ wide
    scale = others.norm(dim=1).sqrt()
    up, down = vectors * scale, others / scale[:, None]
    return (up, down) if wide.shape == matrix.shape else (down.T, up.T)


def check_delta(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    """Check that every tensor of a difference is one that ComfyUI takes, and fits.

    Args:
        tensors: of the file.
        shapes: of the base's parameters by ComfyUI's names.
        name: the file's.

    Returns:
        The number of parameters that it changes.

    Raises:
        PersonalizeError: a tensor that would not be loaded, or of another shape.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part = next((part for part in PARTS if key.endswith(part)), "")
        parts.setdefault(key.removesuffix(part), {})[part] = value
    changed: dict[str, tuple[int, ...]] = {}
    for module, own in parts.items():
        if ".diff_b" in own:
            changed[f"{module}.bias"] = tuple(own[".diff_b"].shape)
        if ".diff" in own:
            changed[f"{module}.weight"] = tuple(own[".diff"].shape)
        elif own.keys() >= {".lora_up.weight", ".lora_down.weight", ".alpha"}:
            changed[f"{module}.weight"] = (len(own[".lora_up.weight"]), *own[".lora_down.weight"].shape[1:])
        elif own.keys() != {".diff_b"}:
            changed[module] = ()
    for parameter, shape in changed.items():
        if tuple(shapes.get(parameter, ())) != shape or not shape:
            raise PersonalizeError(f"{parameter} in {name} has no place in the base model: ComfyUI would not load it.")
    return len(changed)
