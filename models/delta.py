"""A fine-tuned model as its difference from the base: W = W_base + s (W_trained - W_base), with a strength s.

Names are those of ComfyUI's own parameters, so that its stock LoraLoader takes the file too: `<module>.diff`, `.diff_b`,
and where the difference of a matrix is cut to its largest singular values (Eckart and Young 1936), `.lora_up.weight`,
`.lora_down.weight`, `.alpha`.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .text_keys import with_text_model

TEXT_MODELS = {"sd": ("clip_l",), "sd2": ("clip_h",), "sdxl": ("clip_l", "clip_g")}
"""ComfyUI's names of each layout's text encoders."""
BYTES = 2  # half precision


def host_unet_names(names: Mapping[str, str]) -> dict[str, str]:
    """ComfyUI's name of each of a UNet's parameters, from its single-file name (`models.unet_keys`)."""
    return {name: f"diffusion_model.{single.removeprefix('model.diffusion_model.')}" for name, single in names.items()}


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


def truncated_delta_tensors(
    changes: Mapping[str, Tensor],
    budget: int,
    max_rank: int = 128,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> tuple[dict[str, Tensor], float]:
    """The difference cut to a size: of all matrices together, the singular values that explain most for their cost.

    Args:
        changes: W_trained - W_base by ComfyUI's parameter name.
        budget: bytes of all tensors together. Vectors are always kept whole.
        max_rank: singular values looked at in a matrix.
        progress: wraps the names while they are decomposed.

    Returns:
        The tensors, and the share of the difference's squared length that is left, 0..1.
    """
    vectors = {name: change for name, change in changes.items() if change.ndim < 2 and bool(change.any())}
    matrices = {name: change for name, change in changes.items() if change.ndim >= 2 and bool(change.any())}
    tensors = delta_tensors(vectors)
    left = budget - sum(value.numel() * BYTES for value in tensors.values())
    whole = sum(float(change.double().square().sum()) for change in changes.values())
    kept = sum(float(change.double().square().sum()) for change in vectors.values())
    parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    gains: list[tuple[float, str]] = []  # squared length explained for each byte, and where
    for name in progress(matrices):
        matrix = matrices[name].float().flatten(1)
        rank = min(max_rank, *matrix.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank, niter=4)
        parts[name] = u, s, v
        gains += [(value**2 / sum(matrix.shape), name) for value in s.tolist()]
    ranks = dict.fromkeys(matrices, 0)
    for _, name in sorted(gains, reverse=True):
        rows, columns = matrices[name].flatten(1).shape
        cost = (rows + columns) * BYTES
        if cost <= left and ranks[name] < parts[name][1].numel():
            ranks[name] += 1
            left -= cost
    for name, rank in ranks.items():
        if rank == 0:
            continue
        u, s, v = (part[..., :rank] for part in parts[name])
        module, shape = name.removesuffix(".weight"), matrices[name].shape
        up, down = u * s.sqrt(), (v * s.sqrt()).T
        ones = [1] * (len(shape) - 2)
        tensors[f"{module}.lora_up.weight"] = up.reshape(shape[0], rank, *ones).half().contiguous()
        tensors[f"{module}.lora_down.weight"] = down.reshape(rank, *shape[1:]).half().contiguous()
        tensors[f"{module}.alpha"] = torch.tensor(float(rank))
        kept += float(s.double().square().sum())
    return tensors, kept / whole if whole else 1.0
