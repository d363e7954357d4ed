"""Whole SD1.5 and SDXL models, narrow and of random weights, as diffusers folders; pictures of 64 px suffice for them."""

import narrow
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from pack.training.base_model import CONFIGS
from structural.full_models import assemble
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

WIDTH = 32  # of a text encoder
UNETS = {
    "sd15": narrow.SD15["diffusers"]
    | {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": WIDTH, "norm_num_groups": 8},
    "sdxl": narrow.SDXL["diffusers"]
    | {
        "block_out_channels": (32, 64, 64),
        "attention_head_dim": (1, 2, 2),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 2 * WIDTH,
        "norm_num_groups": 8,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    },
}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "projection_dim": WIDTH,
}


def narrow_folder(family, folder):
    """Write a base model of the family's layout ("sd15" or "sdxl"), schedule and tokenizers; returns the folder."""
    torch.manual_seed(0)
    networks = [UNet2DConditionModel(**UNETS[family]), narrow_vae(), CLIPTextModel(_text(family, "text_encoder"))]
    if family == "sdxl":
        networks.append(CLIPTextModelWithProjection(_text(family, "text_encoder_2")))
    assemble(family, *networks).save_pretrained(folder)
    return folder


def narrow_vae(levels=3):
    """Of 2^(levels - 1) pixels a latent."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=2,
        norm_num_groups=4,
        scaling_factor=0.5,
    )


def _text(family, name):
    return CLIPTextConfig.from_pretrained(CONFIGS / family / name, **TEXT)
