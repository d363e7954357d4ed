"""A whole base model as one file, where it did not come as one."""

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from .base_model import BaseModel
from .shared import PREFIXES, text_tensors, tiny_vae_tensors, vae_tensors


def whole_checkpoint(base: BaseModel) -> dict[str, Tensor]:
    """UNet, text encoders and VAE under their single-file names."""
    state, names = base.pipeline.unet.state_dict(), base.unet_names()
    tensors = {names[name]: value for name, value in state.items()}
    for (prefix, open_clip), encoder in zip(PREFIXES[base.layout], base.text_encoders, strict=True):
        tensors |= text_tensors(encoder.state_dict(), prefix, open_clip)
    vae = base.pipeline.vae
    if isinstance(vae, AutoencoderTiny):
        one, zero = torch.ones(()), torch.zeros(())
        tensors |= tiny_vae_tensors(vae.state_dict())
        tensors |= {"first_stage_model.vae_scale": one, "first_stage_model.vae_shift": zero}
    else:
        tensors |= vae_tensors(vae.state_dict())
    if base.v_prediction and base.family != "sd2":  # SD2.x's loaders tell it from the weights
        tensors["v_pred"] = torch.zeros(0)
    if base.pipeline.scheduler.config.get("rescale_betas_zero_snr"):
        tensors["ztsnr"] = torch.zeros(0)
    return tensors
