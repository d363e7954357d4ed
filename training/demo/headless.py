"""The demo without ComfyUI: the pocket model through diffusers, with the pack's own equations."""

from pathlib import Path

import torch
from PIL import Image

from ..base_model import load_pipeline
from ..diffusers_attention import apply_image_prompts
from ..image_encoder import encode_references, load_image_encoder
from ..pocket.files import ADAPTER, CHECKPOINT, IMAGE_ENCODER
from ..shared import POCKET, IPAdapter, list_pictures, read_ip_adapter

STEPS, GUIDANCE, WEIGHT, SIZE, ENLARGED = 20, 4.0, 0.8, 64, 256


def in_diffusers(photos: Path, prompt: str) -> list[tuple[str, Image.Image]]:
    """A picture of the prompt for each aggregation of the photographs, from the same noise, labelled."""
    pipeline = load_pipeline(POCKET / CHECKPOINT)
    pipeline.set_progress_bar_config(desc="Sampling")
    adapter = IPAdapter.from_state(read_ip_adapter(POCKET / ADAPTER))
    references = encode_references(load_image_encoder(POCKET / IMAGE_ENCODER), list_pictures(photos))
    results = []
    for aggregation in ("average", "max", "concatenate"):
        prompts = [adapter.empty_prompt(references), adapter.image_prompt(references, aggregation)]
        before = apply_image_prompts(pipeline.unet, prompts, WEIGHT)
        picture = pipeline(
            prompt,
            width=SIZE,
            height=SIZE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(42),
        ).images[0]
        pipeline.unet.set_attn_processor(before)
        results.append(
            (f"{aggregation}, weight {WEIGHT:g}", picture.resize((ENLARGED, ENLARGED), Image.Resampling.BICUBIC))
        )
    return results
