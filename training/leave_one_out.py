"""Leave-one-out: one picture of an identity is predicted, from its own caption and from the identity's other pictures.

Of a set {(x_i, τ_i)} the target x_j is every picture in turn, so j is uniform; its references are a random number m of
the others, 1 to n - 1, in random order, never x_j itself:

    loss = ‖ε - ε_θ(c_τ, G(Γ(x_i) of the references), t, α_t z_j + σ_t ε)‖²
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from .adapter_module import TrainableAdapter
from .dataset import Example
from .denoising import generator_of
from .distillation import Distillation
from .image_encoder import Features, View

REFERENCES = 1  # which of a picture's generators in a step: `denoising.draw` has the one without a number


@dataclass(frozen=True)
class Dropout:
    """Shares of steps without the text, without the references, without both: for guidance."""

    text: float
    references: float
    both: float


@dataclass(frozen=True)
class Told:
    """What the network is told about one picture in one step."""

    references: tuple[View, ...]
    """None where they are left out."""
    text: bool
    """Whether it gets the caption."""


def draw_references(
    others: Sequence[Path],
    target: Path,
    most: int | None,
    dropout: Dropout,
    generator: torch.Generator,
    crops: int = 0,
) -> Told:
    """References of a target, and what is left out.

    Args:
        others: all pictures of the identity; the target among them is passed over.
        target: x_j.
        most: references at most; None for all others.
        dropout: how often what is left out.
        generator: of this picture in this step.
        crops: squares of every reference, each of which, as the whole, is as likely to be seen.

    Raises:
        ValueError: there is no other picture.
    """
    left = [path for path in others if path != target]
    if not left:
        raise ValueError(f"{target} is the only picture of its identity")
    fate = float(torch.rand((), generator=generator))
    limit = len(left) if most is None else min(most, len(left))
    count = int(torch.randint(1, limit + 1, (), generator=generator))
    order = torch.randperm(len(left), generator=generator)[:count].tolist()
    no_text = fate < dropout.text + dropout.both
    no_references = dropout.text <= fate < dropout.text + dropout.both + dropout.references
    seen = torch.randint(0, crops + 1, (count,), generator=generator).tolist() if crops else [0] * count
    views = tuple(View(left[i], crop) for i, crop in zip(order, seen, strict=True))
    return Told(() if no_references else views, not no_text)


class LeaveOneOut:
    """Tells the network about references in every step of a training."""

    def __init__(
        self,
        adapter: TrainableAdapter,
        unet: UNet2DConditionModel,
        features: Features,
        sets: Mapping[Path, Sequence[Path]],
        most: int | None,
        dropout: Dropout,
        early: tuple[int, int],
        seed: int,
        material: Mapping[str, str],
        lesson: Distillation | None = None,
        beside: float = 0.0,
    ):
        """Args:
        adapter: which trains, on its device.
        unet: on its device.
        features: of all pictures.
        sets: the pictures of each identity by its folder, held-out identities included.
        most: references at most.
        dropout: how often what is left out.
        early: batches in which the projection learns another adapter's tokens, and batches after those in which the
            held-out picture's features are predicted rather than its noise.
        seed: of the run.
        material: digests of what the training depends on beside base and pictures, by what it is.
        lesson: for the first batches.
        beside: weight of the warm-up's loss in later batches.
        """
        self.adapter, self.unet, self.features, self.sets = adapter, unet, features, sets
        self.most, self.dropout, self.early, self.seed = most, dropout, early, seed
        self.material, self.lesson, self.beside = dict(material), lesson, beside

    def told(self, example: Example, number: int, place: int) -> Told:
        """About the picture at a place of batch `number`."""
        generator = generator_of(self.seed, number, place, REFERENCES)
        dropout = self.dropout if number >= 0 else Dropout(0, 0, 0)  # below 0 it is measured
        return self._draw(example, dropout, generator)

    def _draw(self, example: Example, dropout: Dropout, generator: torch.Generator) -> Told:
        others = self.sets[example.path.parent]
        return draw_references(others, example.path, self.most, dropout, generator, self.features.crops)

    def tell(self, examples: Sequence[Example], number: int, places: Sequence[int]) -> list[bool]:
        """Give the UNet the references of a batch; returns of each picture whether it gets its caption."""
        told = [self.told(example, number, place) for example, place in zip(examples, places, strict=True)]
        tokens, bias = self.adapter.condition(
            [self._set(one.references) for one in told], self._on(self.features.empty)
        )
        self.adapter.attach(self.unet, tokens, bias)
        return [one.text for one in told]

    def early_loss(self, examples: Sequence[Example], number: int, places: Sequence[int]) -> Tensor | None:
        """Of the first batches, which need no UNet; None past those."""
        distil, warm = self.early
        if self.lesson is not None and 0 <= number < distil:
            return self.lesson.loss([example.path for example in examples])
        if self.adapter.aggregator is not None and 0 <= number - distil < warm:
            return self.warm_up(examples, number, places)
        return None

    def loss_beside(self, examples: Sequence[Example], number: int, places: Sequence[int]) -> Tensor | None:
        """What is added to the noise's loss, if anything: the self-attention's alone, the projection has no part in it."""
        if self.beside == 0 or self.adapter.aggregator is None:
            return None
        return self.beside * self.warm_up(examples, number, places)

    def warm_up(self, examples: Sequence[Example], number: int, places: Sequence[int]) -> Tensor:
        """‖G(references) - mean features of the identity's other pictures‖² / their variance.

        The others are the held-out picture and whatever is not among the references; of what they show through a square
        alone, the whole is another picture. It brings the aggregator near the best guess at what the identity is like:
        the mean has less of what is a single picture's than the held-out one alone. What is left out for guidance plays
        no part.
        """
        generators = [generator_of(self.seed, number, place, REFERENCES) for place in places]
        sets, targets = [], []
        for example, generator in zip(examples, generators, strict=True):
            told = self._draw(example, Dropout(0, 0, 0), generator)
            sets.append(self._set(told.references))
            others = [path for path in self.sets[example.path.parent] if View(path) not in told.references]
            targets.append(self._on(torch.stack([self.features[path] for path in others])).mean(0))
        wanted = torch.stack(targets)
        if self.adapter.stage == "tokens":
            with torch.no_grad():
                wanted = self.adapter.tokens(wanted)
                sizes = [len(one) for one in sets if one is not None]
                sets = list(self.adapter.tokens(torch.cat([one for one in sets if one is not None])).split(sizes))
        guess = self.adapter.aggregated([one for one in sets if one is not None])
        return (guess - wanted).square().mean() / wanted.var().clamp(min=1e-6)

    @contextmanager
    def showing(self, references: Sequence[Path]) -> Iterator[None]:
        """For a guided batch, [without, with]: the network is told of these references until the end of the block."""
        before = dict(self.unet.attn_processors)
        with torch.no_grad():
            tokens, bias = self.adapter.condition([None, self._set(references)], self._on(self.features.empty))
            self.adapter.attach(self.unet, tokens, bias)
        try:
            yield
        finally:
            self.unet.set_attn_processor(before)

    def frame(self, references: Sequence[Path], resolution: int) -> tuple[int, int]:
        """A square."""
        return resolution, resolution

    def said(self, references: Sequence[Path], prompt: str) -> str:
        """References call, not words."""
        return prompt

    def _set(self, references: Sequence[Path | View]) -> Tensor | None:
        if not references:
            return None
        return self._on(torch.stack([self.features[path] for path in references]))

    def _on(self, features: Tensor) -> Tensor:
        return features.to(next(self.adapter.parameters()).device, torch.float32)
