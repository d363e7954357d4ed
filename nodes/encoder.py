"""CLIP_VISION: encode framed pictures once, and remember them by content."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ..models.errors import PersonalizeError
from ..models.references import ENCODER_ADVICE

BATCH = 8
REMEMBERED = 128
"""Pictures remembered per encoder: a ViT-H picture takes 1.3 MB."""

Features = tuple[Tensor, Tensor]
"""Pooled embedding [D] and penultimate hidden states [T, H] of one picture."""

_remembered: WeakKeyDictionary[object, OrderedDict[bytes, Features]] = WeakKeyDictionary()


def input_size(clip_vision) -> int:
    """Side of the encoder's input in pixels. Raises PersonalizeError where it is not a CLIP vision encoder."""
    if clip_vision is None:
        raise PersonalizeError(
            f"The image encoder is empty: ComfyUI did not recognise its file; {ENCODER_ADVICE} in models/clip_vision."
        )
    return int(clip_vision.image_size)


@torch.no_grad()
def encode(clip_vision, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Encode framed pictures, each [S, S, 3] of the encoder's size: pooled [n, D] and patches [n, T, H].

    Pictures encoded before are not encoded again. Shows progress and can be cancelled between batches.
    """
    memory = _remembered.setdefault(clip_vision, OrderedDict())
    digests = [hashlib.blake2b(picture.numpy().tobytes(), digest_size=16).digest() for picture in pictures]
    found = {digest: memory[digest] for digest in digests if digest in memory}
    missing = {digest: picture for digest, picture in zip(digests, pictures, strict=True) if digest not in found}
    progress = comfy.utils.ProgressBar(len(missing) or 1)
    new = list(missing.items())
    for start in range(0, len(new), BATCH):
        comfy.model_management.throw_exception_if_processing_interrupted()
        chunk = new[start : start + BATCH]
        output = clip_vision.encode_image(torch.stack([picture for _, picture in chunk]))
        pooled, patches = output["image_embeds"].float().cpu(), output["penultimate_hidden_states"].float().cpu()
        found |= {digest: (pooled[i], patches[i]) for i, (digest, _) in enumerate(chunk)}
        progress.update(len(chunk))
    for digest in digests:
        memory[digest] = found[digest]
        memory.move_to_end(digest)
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)
    return torch.stack([found[d][0] for d in digests]), torch.stack([found[d][1] for d in digests])


@torch.no_grad()
def encode_zero(clip_vision) -> Tensor:
    """Penultimate hidden states of an all-zero input, [T, H]: "no picture" as Plus adapters were trained.

    Zero is meant after the encoder's normalisation, which `encode_image` would apply, so the model is called itself.
    """
    memory = _remembered.setdefault(clip_vision, OrderedDict())
    if b"zero" not in memory:
        comfy.model_management.load_model_gpu(clip_vision.patcher)
        side = input_size(clip_vision)
        zeros = torch.zeros(1, 3, side, side, device=clip_vision.load_device)
        output = clip_vision.model(pixel_values=zeros, intermediate_output=-2)
        memory[b"zero"] = (torch.empty(0), output[1][0].float().cpu())
    memory.move_to_end(b"zero")
    return memory[b"zero"][1]
