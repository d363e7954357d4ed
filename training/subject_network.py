"""What Subject-Diffusion adds to a diffusers UNet and to its text encoder, with the equations of models/."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .adapter_module import cross_layers
from .attend_and_excite import levels_of
from .base_model import BaseModel
from .shared import (
    GatedAdapter,
    ImageMLP,
    ObjectTokens,
    PersonalizeError,
    SubjectTensors,
    cross_attention_maps,
    inside_boxes,
    location_mask,
    map_size,
    read_subject_diffusion,
    replace_embeddings,
    slots,
)

FINEST = 32
"""Attention control acts on maps of at most so many cells a side: 32, 16 and 8 of Stable Diffusion's at 512 pixels."""


class LocatedConvolution(nn.Module):
    """The UNet's first convolution with one channel more, for the location mask; its weights start at zero."""

    def __init__(self, before: nn.Conv2d):
        super().__init__()
        weight = before.weight.detach().float()
        self.weight = nn.Parameter(torch.cat([weight, torch.zeros_like(weight[:, :1])], 1))
        self.bias = nn.Parameter(torch.zeros_like(weight[:, 0, 0, 0]))
        if before.bias is not None:
            self.bias.data.copy_(before.bias.detach())
        self.stride, self.padding = before.stride, before.padding
        self.mask: Tensor | None = None
        """[B, 1, h, w]; None is zero everywhere: no location."""

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, width, h, w]."""
        dtype, channels = latents.dtype, latents.shape[1]
        weight = self.weight.to(dtype)
        own, location = weight[:, :channels], weight[:, channels:]
        out = F.conv2d(latents, own, self.bias.to(dtype), self.stride, self.padding)
        if self.mask is None:
            return out
        mask = F.interpolate(self.mask.to(latents), latents.shape[2:], mode="nearest")
        return out + F.conv2d(mask, location, None, self.stride, self.padding)


def load_subject_file(path: Path, network: "SubjectNetwork", base: BaseModel) -> SubjectTensors:
    """A file's weights into the parts, the UNet and the text encoder; returns the file.

    Raises:
        PersonalizeError: it is no Subject-Diffusion, or not for this base and image encoder.
    """
    tensors = read_subject_diffusion(path)
    try:
        network.load_state_dict(tensors.parts)
        base.pipeline.unet.load_state_dict(tensors.unet, strict=False)
        base.text_encoders[0].load_state_dict(tensors.text, strict=False)
        table = base.text_encoders[0].get_input_embeddings().weight
        table.data.copy_(tensors.words.in_table(table.data))
    except (RuntimeError, IndexError) as error:
        raise PersonalizeError(f"{path.name} does not fit {base.name} and the image encoder: {error}") from None
    return tensors


class _Given(nn.Module):
    """diffusers makes the objects of boxes here; ours are made before."""

    def forward(self, objs: Tensor) -> Tensor:
        return objs


class SubjectNetwork(nn.Module):
    """The parts that train beside the UNet's own: adapters, first convolution, object tokens, and the CLS feature's MLP."""

    def __init__(self, unet: UNet2DConditionModel, pooled: int, patch: int, tokens: int):
        """Args:
        unet: of the base, unchanged until `attach`.
        pooled: width of the image encoder's CLS feature.
        patch: width of its patch tokens.
        tokens: of a picture.
        """
        super().__init__()
        blocks = blocks_of(unet)
        width = blocks[0].attn2.to_k.in_features
        self.adapters = nn.ModuleList(
            GatedAdapter(block.attn1.to_q.in_features, width, block.attn1.heads) for block in blocks
        )
        self.conv_in = LocatedConvolution(unet.conv_in)
        self.objects = ObjectTokens(patch, tokens, width)
        self.word = ImageMLP(pooled, width, width)
        self.seen: Tensor | None = None
        """Object tokens of a batch, [B, K, width]; None: the adapters do nothing."""

    def attach(self, unet: UNet2DConditionModel) -> ExitStack:
        """Put the parts into the UNet: from now on it attends to what `seen` and `conv_in.mask` hold, whatever wraps it.

        Returns:
            What takes them out again when it is closed.

        Raises:
            ValueError: the UNet has such parts already.
        """
        if hasattr(unet, "position_net"):
            raise ValueError("this UNet attends to objects already: take the parts out that it has")
        back = ExitStack()
        back.callback(setattr, unet, "conv_in", unet.conv_in)
        unet.conv_in = self.conv_in
        back.callback(delattr, unet, "position_net")
        unet.position_net = _Given()
        for block, adapter in zip(blocks_of(unet), self.adapters, strict=True):
            back.callback(delattr, block, "fuser")
            block.fuser = adapter
        back.callback(unet.register_forward_pre_hook(self._tell, with_kwargs=True).remove)
        return back

    def _tell(self, _unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Of what is seen, as diffusers' pipeline of GLIGEN tells the UNet."""
        if self.seen is None:
            return None
        given = dict(kwargs.get("cross_attention_kwargs") or {})
        return args, {**kwargs, "cross_attention_kwargs": {**given, "gligen": {"objs": self.seen}}}

    def shown(
        self,
        features: Sequence[Sequence[tuple[Tensor, Tensor]]],
        boxes: Sequence[Tensor],
        most: int,
        size: Sequence[int],
        scale: int,
        placed: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """A batch's subjects as `seen` and `conv_in.mask` hold them: [B, most T, width] and [B, 1, h, w].

        Args:
            features: of each picture's subjects, at least one: CLS feature [D] and patch tokens [T, H].
            boxes: of each picture's subjects [n, 4], shares.
            most: subjects of a picture; where there are fewer stands what was learned.
            size: height and width of the pictures, pixels.
            scale: pixels of a latent.
            placed: whether the tokens carry the boxes.
        """
        device, latent = self.conv_in.weight.device, [side // scale for side in size]
        given = [
            slots(torch.stack([tokens for _, tokens in own]), box if placed else torch.zeros_like(box), most)
            for own, box in zip(features, boxes, strict=True)
        ]
        masks = [location_mask(inside_boxes(own, size[0], size[1]), latent[0], latent[1]) for own in boxes]
        return self.objects(*(torch.stack(part).to(device) for part in zip(*given, strict=True))), torch.stack(
            masks
        ).to(device)

    def vectors(self, features: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Tensor | None:
        """What stands for the placeholders of texts, [n, width], of their subjects' features; nothing if there are none."""
        pooled = [one for own in features for one, _ in own]
        return self.word(torch.stack(pooled).to(self.conv_in.weight.device)) if pooled else None


def blocks_of(unet: UNet2DConditionModel) -> list[BasicTransformerBlock]:
    """The transformer blocks, in the order of adapter files."""
    return [unet.get_submodule(name.removesuffix(".attn2.processor")) for name in cross_layers(unet)]


class Placeholders:
    """Exchanges the placeholders' embeddings in a text encoder, in the order in which texts have them."""

    def __init__(self, encoder: nn.Module, token: int):
        """Args:
        encoder: a CLIPTextModel.
        token: the placeholder's number.
        """
        self.token = token
        self.vectors: Tensor | None = None
        """[n, width], of the next texts."""
        encoder.get_input_embeddings().register_forward_hook(self._exchange)  # type: ignore[operator]

    def _exchange(self, _module: nn.Module, given: tuple[Tensor, ...], embeddings: Tensor) -> Tensor:
        there = given[0] == self.token
        if self.vectors is None or not bool(there.any()):
            return embeddings
        return replace_embeddings(embeddings, there, self.vectors)


class _Watched:
    """An attention processor that keeps its maps, with their gradients."""

    def __init__(self, before: Callable, maps: list[Tensor], size: Callable[[], tuple[int, int]]):
        self.before, self.maps, self.size = before, maps, size

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args, **kwargs
    ) -> Tensor:
        if encoder_hidden_states is None:
            raise ValueError("the maps are those of cross-attention, which needs text features")
        maps = cross_attention_maps(attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.heads)
        self.maps.append(maps.unflatten(2, self.size()))
        return self.before(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


class AttentionWatch:
    """The cross-attention maps of a UNet's next runs, [B, heads, h, w, T] of each layer that is not too fine."""

    def __init__(self, unet: UNet2DConditionModel):
        self.maps: list[Tensor] = []
        self.shape = (1, 1)
        """Of the latent."""
        levels = levels_of(unet)
        self.layers: dict[str, int] = levels
        before = dict(unet.attn_processors)
        self.processors = {
            name: _Watched(before[name], self.maps, partial(self._size, level)) for name, level in levels.items()
        }
        self.before = before

    def _size(self, level: int) -> tuple[int, int]:
        return map_size(*self.shape, level)

    def on(self, unet: UNet2DConditionModel, shape: Sequence[int]) -> None:
        """Keep the maps of the runs from now on, on latents of a height and width."""
        self.maps.clear()
        self.shape = (shape[0], shape[1])
        chosen = {
            name: self.processors[name] for name, level in self.layers.items() if max(self._size(level)) <= FINEST
        }
        unet.set_attn_processor(self.before | chosen)

    def off(self, unet: UNet2DConditionModel) -> None:
        """As before."""
        self.maps.clear()
        unet.set_attn_processor(dict(self.before))  # which is emptied
