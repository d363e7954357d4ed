"""A new projection learns the tokens of an adapter that is trained already, before it learns from pictures.

It needs no UNet, so that thousands of steps take minutes: a Plus projection, which sees all patches of a picture, first
gives the tokens that a base adapter gives of the pooled embedding, for whose W'_k and W'_v they are made. From there it
learns what the pooled embedding does not hold.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .adapter_module import TrainableAdapter
from .image_encoder import Features
from .shared import IPAdapter


class Distillation:
    """The loss of the first steps of a training."""

    def __init__(self, teacher: IPAdapter, seen: Features, student: TrainableAdapter, features: Features):
        """Args:
        teacher: for the same base; the student has as many tokens or a multiple.
        seen: what the teacher takes of each picture.
        student: whose projection trains.
        features: what it takes.
        """
        self.teacher, self.seen, self.student, self.features = teacher, seen, student, features

    def loss(self, pictures: Sequence[Path]) -> Tensor:
        """‖student's tokens - teacher's‖² / their variance; each of the teacher's tokens is to be given several times,
        which attention cannot tell from once."""
        device = next(self.student.parameters()).device
        own = self.student.tokens(torch.stack([self.features[path] for path in pictures]).to(device, torch.float32))
        theirs = self.teacher.tokens(torch.stack([self.seen[path] for path in pictures]), device)
        theirs = theirs.repeat_interleave(own.shape[1] // theirs.shape[1], dim=1)
        return (own - theirs).square().mean() / theirs.var().clamp(min=1e-6)
