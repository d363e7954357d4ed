"""The shipped pocket model, ready to use and to measure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPVisionModelWithProjection

from ..base_model import load_pipeline
from ..generate import noise_seed
from ..image_encoder import load_image_encoder
from ..shared import POCKET, read_safetensors
from .encoders import prepare
from .files import CHECKPOINT, IMAGE_ENCODER, JUDGE
from .judge import Judge

STEPS, GUIDANCE, SIZE, BATCH = 20, 4.0, 64, 50
"""Of the sampling by Euler's method; pixels of the height; pictures at once."""


@dataclass
class Pocket:
    """The pipeline, the image encoder with the text's projection into its space, and the judge."""

    pipeline: StableDiffusionPipeline
    encoder: CLIPVisionModelWithProjection
    text_projection: Tensor
    judge: Judge

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], width: int = SIZE, seed: int = 0) -> np.ndarray:
        """[n, 64, width, 3] uint8 pictures, one a prompt, by Euler's method; each from its own noise."""
        channels = self.pipeline.unet.config["in_channels"]
        generators = [torch.Generator().manual_seed(noise_seed(seed, i)) for i in range(len(prompts))]
        noise = torch.stack([torch.randn(channels, SIZE // 8, width // 8, generator=g) for g in generators])
        pictures = []
        for start in tqdm(range(0, len(prompts), BATCH), desc="Sampling", unit=f" x {BATCH}"):
            output = self.pipeline(
                list(prompts[start : start + BATCH]),
                latents=noise[start : start + BATCH],
                width=width,
                height=SIZE,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                output_type="np",
            )
            pictures.append((output.images * 255).round().astype(np.uint8))
        return np.concatenate(pictures)

    @torch.no_grad()
    def embed(self, pictures: np.ndarray) -> Tensor:
        """[n, 96] image embeddings."""
        parts = [self.encoder(prepare(pictures[i : i + 100])).image_embeds for i in range(0, len(pictures), 100)]
        return torch.cat(parts)

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """[n, 96] text embeddings."""
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        ids = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return encoder(ids).pooler_output @ self.text_projection.T


def load_judge(path: Path = POCKET / JUDGE) -> Judge:
    """The judge."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in read_safetensors(path)[0].items()})
    return judge.eval()


def load_pocket(folder: Path = POCKET) -> Pocket:
    """Everything in the folder of weights."""
    pipeline = load_pipeline(folder / CHECKPOINT)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    state, _ = read_safetensors(folder / CHECKPOINT)
    projection = state["cond_stage_model.transformer.text_projection.weight"].float()
    return Pocket(pipeline, load_image_encoder(folder / IMAGE_ENCODER), projection, load_judge(folder / JUDGE))
