"""The demo without ComfyUI: the pocket model through diffusers, with the pack's own equations."""

from pathlib import Path

import torch
from PIL import Image

from ..base_model import load_image_encoder, load_pipeline
from ..diffusers_attention import apply_image_prompts
from ..pocket.files import ADAPTER, CHECKPOINT, IMAGE_ENCODER
from ..shared import (
    CLIP_MEAN,
    CLIP_STD,
    POCKET,
    IPAdapter,
    References,
    frame_picture,
    list_pictures,
    read_ip_adapter,
    read_picture,
)

STEPS, GUIDANCE, WEIGHT, SIZE, ENLARGED = 20, 4.0, 0.8, 64, 256


def in_diffusers(photos: Path, prompt: str) -> list[tuple[str, Image.Image]]:
    """A picture of the prompt for each aggregation of the photographs, from the same noise, labelled."""
    pipeline = load_pipeline(POCKET / CHECKPOINT)
    pipeline.set_progress_bar_config(desc="Sampling")
    adapter = IPAdapter.from_state(read_ip_adapter(POCKET / ADAPTER))
    references = encode(photos)
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


@torch.no_grad()
def encode(photos: Path) -> References:
    """References from the pocket model's image encoder."""
    encoder = load_image_encoder(POCKET / IMAGE_ENCODER)
    paths = list_pictures(photos)
    framed = torch.stack([frame_picture(read_picture(path), "crop", encoder.config.image_size) for path in paths])
    inputs = ((framed - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(0, 3, 1, 2)
    output = encoder(inputs, output_hidden_states=True)
    zero = encoder(torch.zeros_like(inputs[:1]), output_hidden_states=True).hidden_states[-2][0]
    names = tuple(path.name for path in paths)
    return References(output.image_embeds, output.hidden_states[-2], zero, torch.ones(len(names)), names)
