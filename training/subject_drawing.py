"""Pictures by Subject-Diffusion, headless: prompts with subjects from their crops, each in its box."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPVisionModelWithProjection

from .base_model import BaseModel
from .encoding import read_text
from .following import forwarding
from .generate import SOLVERS, Job, Sampling, denoised, noise_of, save_drawn
from .shared import BOXES, CLS, IMAGE_SCALE, check_subjects, fused_prompt, three_way
from .subject_diffusion import placeholder_of
from .subject_features import encode_subjects, look_of
from .subject_network import Placeholders, SubjectNetwork, load_subject_file
from .watch import decode, resting, solving


@dataclass(frozen=True)
class Placed:
    """A subject of a picture to draw."""

    crop: Path
    """The subject alone."""
    word: str
    box: tuple[float, float, float, float]
    """Left, top, right, bottom, as shares."""


@dataclass(frozen=True)
class SubjectJob:
    """One picture to draw."""

    path: Path
    prompt: str
    seed: int
    subjects: tuple[Placed, ...]
    wishes: Mapping[str, Any] = field(default_factory=dict)


class SubjectArtist:
    """A base with a file of Subject-Diffusion."""

    def __init__(self, base: BaseModel, path: Path, encoder: CLIPVisionModelWithProjection):
        """Args:
        base: on its device; it is changed.
        path: of the file.
        encoder: that it was trained with, on its device.

        Raises:
            PersonalizeError: the file is none, or does not fit.
        """
        unet, (text,) = base.pipeline.unet, base.text_encoders
        config = encoder.config
        tokens = (config.image_size // config.patch_size) ** 2
        self.base, self.encoder = base, encoder
        self.network = SubjectNetwork(unet, config.projection_dim, config.hidden_size, tokens).to(unet.device)
        self.file = load_subject_file(path, self.network, base)
        self.network.requires_grad_(False)
        self.network.attach(unet)
        self.placeholders = Placeholders(text, placeholder_of(base))
        self.seen: dict[Path, tuple[Tensor, Tensor]] = {}

    def draw(
        self,
        accelerator: Accelerator,
        jobs: Sequence[SubjectJob],
        sampling: Sampling,
        title: str,
        image_scale: float = IMAGE_SCALE,
    ) -> int:
        """Draw what is missing of the jobs; returns how many this process drew.

        Raises:
            PersonalizeError: of `check_subjects`.
        """
        for job in jobs:
            check_subjects(job.prompt, [(one.word, one.box) for one in job.subjects], self.file.most, "The file")
        missing = [job for job in jobs if not job.path.exists()]
        accelerator.wait_for_everyone()
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        bar = tqdm(total=len(mine), desc=title, unit=" pictures", disable=not accelerator.is_main_process, leave=False)
        with resting(self.base), bar:
            for start in range(0, len(mine), sampling.batch):
                some = mine[start : start + sampling.batch]
                for job, picture in zip(some, self._draw(some, sampling, image_scale), strict=True):
                    save_drawn(Job(job.path, job.prompt, job.seed, wishes=job.wishes), picture)
                bar.update(len(some))
        accelerator.wait_for_everyone()
        return len(mine)

    def _features(self, one: Placed) -> tuple[Tensor, Tensor]:
        if one.crop not in self.seen:
            look = look_of(one.crop, 0, None, np.random.default_rng(0), self.encoder.config.image_size)
            pooled, patches = encode_subjects(self.encoder, look[None])
            self.seen[one.crop] = pooled[0], patches[0]
        return self.seen[one.crop]

    @torch.no_grad()
    def _draw(self, jobs: Sequence[SubjectJob], sampling: Sampling, image_scale: float) -> list[Image.Image]:
        pipeline, n = self.base.pipeline, len(jobs)
        device, dtype = pipeline.unet.device, pipeline.unet.dtype
        height, width, step = sampling.resolution, sampling.width or sampling.resolution, pipeline.vae_scale_factor
        noise = noise_of(pipeline, [job.seed for job in jobs], sampling)
        features = [[self._features(one) for one in job.subjects] for job in jobs]
        boxes, without = [torch.tensor([one.box for one in job.subjects]) for job in jobs], self.file.without
        objects, masks = self.network.shown(
            features, boxes, self.file.most, (height, width), step, placed=BOXES not in without
        )
        self.placeholders.vectors = None if CLS in without else self.network.vectors(features)
        texts = [fused_prompt(job.prompt, [one.word for one in job.subjects]) for job in jobs]
        positive = read_text(self.base, texts).to(device, dtype)
        nothing = read_text(self.base, [""] * n).to(device, dtype)
        told = self._three_ways(objects, masks, nothing.states, positive.states, image_scale, sampling.guidance)
        try:
            with solving(pipeline, SOLVERS[sampling.solver]), told:
                latents = denoised(pipeline, noise, positive, nothing, sampling)
        finally:
            self.network.seen = self.network.conv_in.mask = self.placeholders.vectors = None
        return [picture for row in latents.split(1) for picture in decode(pipeline.vae, row)]

    @contextmanager
    def _three_ways(
        self, objects: Tensor, masks: Tensor, nothing: Tensor, text: Tensor, image_scale: float, text_scale: float
    ) -> Iterator[None]:
        """A block in which the UNet predicts all three, and passes on what guides like them.

        Its caller's guidance, e_0 + s (e - e_0), then is e_0 + s_i (e_img - e_0) + s_t (e_txt - e_img).
        """
        unet, network, n = self.base.pipeline.unet, self.network, len(objects)
        forward = unet.forward
        network.seen = torch.cat([torch.zeros_like(objects), objects, objects])
        network.conv_in.mask = torch.cat([torch.zeros_like(masks), masks, masks])
        states = torch.cat([nothing, nothing, text])

        def predict(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **kwargs) -> tuple[Tensor]:
            out = forward(
                sample[:n].repeat(3, 1, 1, 1),
                timestep,
                encoder_hidden_states=states,
                **{**kwargs, "return_dict": False},
            )[0]
            none, image, both = out.chunk(3)
            done = three_way(none, image, both, image_scale, text_scale)
            if len(sample) == n:
                return (done,)
            return (torch.cat([none, none + (done - none) / text_scale]),)

        with forwarding(unet, predict):
            yield
