"""Subject-Diffusion (Ma et al. 2023, arXiv:2307.11410): subjects from a picture and a box each, without training for them.

- Location control: the UNet gets one more channel, M = prod_k M_k, 0 inside the subjects' boxes and 1 outside.
- Dense image control: an adapter between self- and cross-attention of every block (GLIGEN's gated self-attention, Li et
  al. 2023, arXiv:2301.07093) attends to the subjects' patch tokens, which carry their boxes:
      o = MLP([patch tokens, Fourier(box)]),  x <- x + tanh(a) SA([x, W o])_x,  x <- x + tanh(b) FF(x)
- Fusion text encoder: the prompt ends with "the dog is sks", and the embedding of sks is MLP(image's CLS feature).
- Attention control: the maps of the subject's words are drawn to where it is (`localisation_loss`).
- Three-way guidance: e_0 + s_i (e_img - e_0) + s_t (e_txt - e_img).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .errors import PersonalizeError, plural
from .metadata import About, read_about
from .weight_files import check_finite, read_safetensors
from .words import call_of, words_in

PLACEHOLDER = "sks"
LOCATION, BOXES, ADAPTER, CONTROL, CLS = "location control", "boxes", "adapter", "attention control", "CLS feature"
PARTS = (LOCATION, BOXES, ADAPTER, CONTROL, CLS)
"""That a training can leave out."""
FREQUENCIES, TEMPERATURE = 8, 100.0
BALANCED, L1 = "balanced", "l1"
"""The attention control of the authors' code, and of their paper."""
ROUNDED = 1e-6
"""That a sum of shares may be off."""
LITTLE = 1e-5
"""Keeps an empty mask from a division by zero, as in the authors' code."""


def fused_prompt(prompt: str, entities: Sequence[str]) -> str:
    """`a dog on grass`, [`dog`] -> `a dog on grass, the dog is sks`: a placeholder for each subject, in their order."""
    return prompt.strip() + "".join(f", the {entity} is {PLACEHOLDER}" for entity in entities)


def check_subjects(prompt: str, placed: Sequence[tuple[str, Sequence[float]]], most: int, name: str) -> None:
    """What is asked of a prompt with subjects.

    Args:
        prompt: as the user wrote it.
        placed: of each subject its word, and its box: left, top, right, bottom, as shares of the picture's sides.
        most: subjects that the file was trained for.
        name: the file's.

    Raises:
        PersonalizeError: there is no subject, or more than the file knows; a word is not in the prompt, or the placeholder is;
            a box is empty or reaches out of the picture.
    """
    if not placed:
        raise PersonalizeError("There are no subjects: give at least one.")
    if len(placed) > most:
        raise PersonalizeError(f"{name} knows {plural(most, 'subject')} in a picture, but there are {len(placed)}.")
    words = words_in(prompt)
    plain = " ".join(words).lower()
    for word, box in placed:
        check_box(word, box)
        if not call_of(word.lower()).search(plain):
            raise PersonalizeError(
                f'The word "{word}" of a subject is not in the prompt; its words are: {", ".join(words)}.'
            )
    if call_of(PLACEHOLDER).search(prompt.lower()):
        raise PersonalizeError(
            f'The prompt has "{PLACEHOLDER}" in it, which stands for the subjects: use another word.'
        )


def check_box(word: str, box: Sequence[float]) -> None:
    """Raises PersonalizeError where a subject's box is empty or reaches out of the picture."""
    left, top, right, bottom = box
    if not (left < right and top < bottom):
        raise PersonalizeError(f'The box of "{word}" is empty: give it a width and a height above 0.')
    if min(left, top) < -ROUNDED or max(right, bottom) > 1 + ROUNDED:
        raise PersonalizeError(
            f'The box of "{word}" reaches out of the picture (left {left:g}, top {top:g}, right {right:g}, bottom '
            f"{bottom:g}): all must be from 0 to 1."
        )


def replace_embeddings(embeddings: Tensor, there: Tensor, vectors: Tensor) -> Tensor:
    """Token embeddings with the placeholders' exchanged, before the positions are added.

    Args:
        embeddings: [B, T, C].
        there: [B, T], true at the placeholders.
        vectors: [n, C], one for each placeholder, text by text.

    Raises:
        ValueError: there are not as many as placeholders.
    """
    if int(there.sum()) != len(vectors):
        raise ValueError(f"{int(there.sum())} placeholders, but {len(vectors)} vectors")
    return embeddings.masked_scatter(there[..., None], vectors.to(embeddings.dtype))


def box_features(boxes: Tensor) -> Tensor:
    """Fourier features of boxes: [..., 4] (left, top, right, bottom, as shares of the picture's sides) -> [..., 64].

    sin(f x) and cos(f x) of the four, for f = 100^(k / 8), k = 0 to 7 (GLIGEN).
    """
    steps = torch.arange(FREQUENCIES, device=boxes.device, dtype=boxes.dtype) / FREQUENCIES
    angles = boxes[..., None, :] * (TEMPERATURE**steps)[:, None]
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


def inside_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """[n, 4], as shares -> [n, height, width]: 1 in the pixels of each box, 0 elsewhere."""
    left, top, right, bottom = (boxes * boxes.new_tensor([width, height, width, height])).round().unbind(-1)
    x, y = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    across = (x >= left[:, None]) & (x < right[:, None])
    down = (y >= top[:, None]) & (y < bottom[:, None])
    return (down[:, :, None] & across[:, None, :]).float()


def location_mask(inside: Tensor, height: int, width: int) -> Tensor:
    """M of the subjects' masks [n, H, W], 1 where a subject is -> [1, height, width], 0 there, in a latent's size.

    As the authors' code resizes: the nearest pixel.
    """
    outside = (1 - inside).prod(0)
    return F.interpolate(outside[None, None], (height, width), mode="nearest")[0]


def slots(patches: Tensor, boxes: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """A picture's subjects [n, T, H] and [n, 4] among `most` places: both with zeros for the missing ones, and [most],
    false there."""
    lack = most - len(boxes)
    return F.pad(patches, (0, 0, 0, 0, 0, lack)), F.pad(boxes, (0, 0, 0, lack)), torch.arange(most) < len(boxes)


class ImageMLP(nn.Module):
    """LayerNorm, Linear, GELU, Linear: of features the UNet's or the text encoder's vectors."""

    def __init__(self, width: int, inner: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, out)

    def forward(self, features: Tensor) -> Tensor:
        """[..., width] -> [..., out]."""
        return self.fc2(F.gelu(self.fc1(self.norm(features))))


class ObjectTokens(nn.Module):
    """The subjects as tokens: patch tokens with their boxes, and what was learned in place of a missing subject."""

    def __init__(self, width: int, tokens: int, out: int):
        """Args:
        width: of the patch tokens.
        tokens: of each picture.
        out: width of what the adapters take.
        """
        super().__init__()
        position = 8 * FREQUENCIES
        self.mlp = ImageMLP(width + position, out, out)
        self.null_features = nn.Parameter(torch.zeros(tokens, width))
        self.null_position = nn.Parameter(torch.zeros(tokens, position))

    def forward(self, patches: Tensor, boxes: Tensor, there: Tensor) -> Tensor:
        """[B, n, T, width], [B, n, 4], [B, n] (false: no subject) -> [B, n T, out]."""
        places = repeat(box_features(boxes), "b n f -> b n t f", t=patches.shape[2])
        here = there[:, :, None, None]
        features = torch.where(here, patches, self.null_features.to(patches.dtype))
        position = torch.where(here, places.to(patches.dtype), self.null_position.to(patches.dtype))
        return rearrange(self.mlp(torch.cat([features, position], -1)), "b n t c -> b (n t) c")


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, seen: Tensor, places: int) -> Tensor:
        """What the first so many of [B, N, C] see of all: the others ask nothing."""
        asking = self.to_q(seen[:, :places]), self.to_k(seen), self.to_v(seen)
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=self.heads) for x in asking)
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class _GEGLU(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.proj(x).chunk(2, -1)
        return hidden * F.gelu(gate)


class _FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(_GEGLU(width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GatedAdapter(nn.Module):
    """GLIGEN's gated self-attention; both gates start at zero, so that the UNet starts as it was.

    Parameters are named as diffusers names them (GatedSelfAttentionDense).
    """

    def __init__(self, width: int, object_width: int, heads: int):
        """Args:
        width: C, of the UNet's features here.
        object_width: of the object tokens.
        heads: attention heads, of C / heads each.
        """
        super().__init__()
        self.linear = nn.Linear(object_width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.ff = _SelfAttention(width, heads), _FeedForward(width)
        self.alpha_attn, self.alpha_dense = (nn.Parameter(torch.zeros(())) for _ in range(2))

    def forward(self, x: Tensor, objects: Tensor) -> Tensor:
        """x [B, N, C], objects [B, K, object_width] -> [B, N, C]."""
        seen = self.norm1(torch.cat([x, self.linear(objects)], 1))
        x = x + self.alpha_attn.tanh() * self.attn(seen, x.shape[1])
        return x + self.alpha_dense.tanh() * self.ff(self.norm2(x))


def localisation_loss(maps: Tensor, masks: Tensor, words: Tensor, there: Tensor, kind: str = BALANCED) -> Tensor:
    """Attention control of one layer: the maps of each subject's words belong where it is.

    balanced: the mean of the map off the mask less the mean on it; l1: |A - M|, the mean over all places.

    Args:
        maps: softmax of a cross-attention layer, [B, heads, h, w, T].
        masks: [B, n, H, W], 1 where the subject is.
        words: the place of each subject's word in the text, [B, n]; of one that is not there any.
        there: [B, n].
        kind: BALANCED or L1.

    Returns:
        The mean over pictures and heads of the mean over their subjects.
    """
    heads, height, width = maps.shape[1:4]
    small = F.interpolate(masks.float(), (height, width), mode="bilinear", antialias=True).flatten(2)
    m = small[:, None].to(maps.dtype)
    index = repeat(words, "b n -> b h p n", h=heads, p=height * width)
    a = rearrange(maps.flatten(2, 3).gather(3, index), "b h p n -> b h n p")
    if kind == BALANCED:
        off, on = ((a * part).sum(-1) / (part.sum(-1) + LITTLE) for part in (1 - m, m))
        loss = off - on
    else:
        loss = (a - m).abs().mean(-1)
    here = there[:, None].to(maps.dtype)
    return ((loss * here).sum(-1) / (here.sum(-1) + LITTLE)).mean()


TEXT_SCALE, IMAGE_SCALE = 7.5, 1.5
"""s_t, of Stable Diffusion, and s_i, of the authors' code."""


def three_way(nothing: Tensor, image: Tensor, text: Tensor, image_scale: float, text_scale: float) -> Tensor:
    """e_0 + s_i (e_img - e_0) + s_t (e_txt - e_img): of no condition, of the subjects, and of them and the prompt."""
    return nothing + image_scale * (image - nothing) + text_scale * (text - image)


@dataclass(frozen=True)
class ChangedRows:
    """What differs in a table [T, C]: most words' embeddings never come up in a training."""

    index: Tensor
    """[n], the numbers of the rows."""
    weight: Tensor
    """[n, C], the rows."""

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> "ChangedRows":
        """Rows of `after` that are not those of `before`."""
        index = (before != after).any(1).nonzero()[:, 0]
        return cls(index, after[index])

    def in_table(self, table: Tensor) -> Tensor:
        """A copy of the table with these rows.

        Raises:
            IndexError, RuntimeError: it has not such rows.
        """
        return table.index_copy(0, self.index.to(table.device), self.weight.to(table))


@dataclass(frozen=True)
class SubjectTensors:
    """A file's tensors: the added parts, W_k and W_v of the UNet by diffusers' names, the text encoder by transformers' but
    for its table of words, and what changed there."""

    parts: Mapping[str, Tensor]
    unet: Mapping[str, Tensor]
    text: Mapping[str, Tensor]
    words: ChangedRows
    about: About | None

    @property
    def most(self) -> int:
        """Subjects of a picture; where there are fewer stands what was learned for a missing one."""
        return int(self._settings.get("max_subjects", 2))

    @property
    def without(self) -> Sequence[str]:
        """Of PARTS, what it was trained without: then nothing is to be told of it."""
        return self._settings.get("without", ())

    @property
    def _settings(self) -> Mapping[str, Any]:
        return self.about.settings if self.about else {}


WORDS = "token_embedding.weight"
"""How the name of a text encoder's table of words ends."""


def read_subject_diffusion(path: Path) -> SubjectTensors:
    """A file of Subject-Diffusion: `parts.*`, `unet.*`, `text.*` and `words.*`.

    Raises:
        PersonalizeError: it cannot be read, or is something else.
    """
    tensors, metadata = read_safetensors(path)
    found = {
        part: {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
        for part in ("parts", "unet", "text", "words")
    }
    needed = {"conv_in.weight", "objects.mlp.fc1.weight", "objects.null_features", "word.fc1.weight"}
    whole = needed <= found["parts"].keys() and found["unet"] and found["text"]
    if not whole or found["words"].keys() != {"index", "weight"}:
        raise PersonalizeError(
            f"{path.name} is no file of Subject-Diffusion: train one with training.subject_diffusion."
        )
    check_finite(tensors, path.name)
    about = read_about(metadata, path.name)
    return SubjectTensors(found["parts"], found["unet"], found["text"], ChangedRows(**found["words"]), about)


class SubjectParts(nn.Module):
    """The added parts of a file, ready to run: adapters in the order of adapter files, and what makes the subjects' tokens."""

    def __init__(self, parts: Mapping[str, Tensor]):
        """Args:
        parts: of SubjectTensors; heads are the UNet's, which sets them.
        """
        super().__init__()
        count = 1 + max(int(name.split(".")[1]) for name in parts if name.startswith("adapters."))
        tokens, patch = parts["objects.null_features"].shape
        with torch.device("meta"):
            shapes = [parts[f"adapters.{i}.linear.weight"].shape for i in range(count)]
            self.adapters = nn.ModuleList(GatedAdapter(width, outer, 1) for width, outer in shapes)
            self.objects = ObjectTokens(patch, tokens, parts["objects.mlp.fc2.weight"].shape[0])
            inner, pooled = parts["word.fc1.weight"].shape
            self.word = ImageMLP(pooled, inner, parts["word.fc2.weight"].shape[0])
        whole = parts["conv_in.weight"]
        self.location = nn.Parameter(whole[:, -1:].float())
        """[width, 1, 3, 3], of the UNet's first convolution."""
        own = {name: value.float() for name, value in parts.items() if not name.startswith("conv_in.")}
        self.load_state_dict(own | {"location": self.location}, assign=True)
        self.requires_grad_(False)

    def adapt(self, number: int, x: Tensor, objects: Tensor, heads: int) -> Tensor:
        """Adapter `number` of a UNet's block of so many heads: x [B, N, C], objects [B or 1, K, width] -> [B, N, C]."""
        adapter = self.adapters[number]
        assert isinstance(adapter, GatedAdapter)
        adapter.attn.heads = heads
        dtype = adapter.linear.weight.dtype
        return adapter(x.to(dtype), objects.to(dtype).expand(len(x), -1, -1)).to(x)

    def located(self, mask: Tensor) -> Tensor:
        """What the first convolution adds where M is [B, 1, h, w]: [B, width, h, w]."""
        return F.conv2d(mask, self.location.to(mask), padding=1)
