"""The demo without ComfyUI: diffusers, with random weights of a small SD1.5 shape and the pack's own equations."""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ..diffusers_attention import apply_image_prompts
from ..shared import CLIP_MEAN, IPAdapter, References, Resampler, frame_picture, list_pictures, read_picture

STEPS, GUIDANCE, WEIGHT, LATENT = 20, 7.0, 0.8, 64
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def in_diffusers(photos: Path) -> list[tuple[str, Image.Image]]:
    """One picture for each aggregation, from the same noise, labelled."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128), cross_attention_dim=64, attention_head_dim=8
    ).eval()
    vae, adapter, references = AutoencoderTiny().eval(), random_adapter(unet), encode(photos)
    text = torch.randn(2, 77, 64)  # [negative, positive]: there are no words without trained weights
    noise = torch.randn(1, 4, LATENT, LATENT)
    results = []
    for aggregation in ("average", "max", "concatenate"):
        prompts = [adapter.empty_prompt(references), adapter.image_prompt(references, aggregation)]
        before = apply_image_prompts(unet, prompts, WEIGHT)
        latent = sample(unet, noise, text, aggregation)
        unet.set_attn_processor(before)
        with torch.no_grad():
            pixels = vae.decode(latent).sample[0].permute(1, 2, 0)
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())  # random weights fill no particular range
        picture = Image.fromarray((pixels * 255).round().byte().numpy())
        results.append((f"{aggregation}, weight {WEIGHT:g}", picture))
    return results


@torch.no_grad()
def encode(photos: Path) -> References:
    """References from a small CLIP vision encoder."""
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, projection_dim=48
    )
    encoder = CLIPVisionModelWithProjection(config).eval()
    paths = list_pictures(photos)
    framed = torch.stack([frame_picture(read_picture(path), "crop", config.image_size) for path in paths])
    inputs = ((framed - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(0, 3, 1, 2)
    output = encoder(inputs, output_hidden_states=True)
    zero = encoder(torch.zeros_like(inputs[:1]), output_hidden_states=True).hidden_states[-2][0]
    names = tuple(path.name for path in paths)
    return References(output.image_embeds, output.hidden_states[-2], zero, torch.ones(len(names)), names)


def random_adapter(unet: UNet2DConditionModel) -> IPAdapter:
    """A Plus adapter for this UNet."""
    image_proj = Resampler(width=64, dim=64, cross_width=64, tokens=16, depth=4, inner=64, ff_inner=256)
    torch.nn.init.normal_(image_proj.latents, std=0.1)
    layers: dict[str, Tensor] = {}
    for i, module in enumerate(module for name, module in unet.named_modules() if name.endswith("attn2")):
        for part in ("k", "v"):
            layers[f"{2 * i + 1}.to_{part}_ip.weight"] = torch.randn_like(getattr(module, f"to_{part}").weight) / 8
    return IPAdapter.from_state({"image_proj": image_proj.state_dict(), "ip_adapter": layers})


@torch.no_grad()
def sample(unet: UNet2DConditionModel, latent: Tensor, text: Tensor, what: str) -> Tensor:
    """Classifier-free guidance with DDIM: [1, 4, h, w] noise to latent."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    for timestep in tqdm(scheduler.timesteps, desc=f"Sampling, {what}", unit=" steps"):
        negative, positive = unet(latent.expand(2, -1, -1, -1), timestep, text).sample
        guided = negative + GUIDANCE * (positive - negative)
        latent = scheduler.step(guided[None], timestep, latent).prev_sample
    return latent
