"""A whole base model as one file, where it did not come as one."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn

from .base_model import BaseModel
from .shared import PREFIXES, single_file_names, text_tensors, tiny_vae_tensors, vae_tensors


def network_tensors(unet: UNet2DConditionModel, texts: Sequence[nn.Module], layout: str) -> dict[str, Tensor]:
    """A UNet's and some text encoders' weights under their single-file names.

    Args:
        unet: of diffusers.
        texts: the layout's first text encoders, as many as are wanted.
        layout: of models.text_keys.PREFIXES.
    """
    state = unet.state_dict()
    names = single_file_names(list(state), unet.config["layers_per_block"])
    tensors = {names[name]: value for name, value in state.items()}
    for (prefix, open_clip), encoder in zip(PREFIXES[layout], texts, strict=False):
        tensors |= text_tensors(encoder.state_dict(), prefix, open_clip)
    return tensors


def checkpoint_tensors(
    unet: UNet2DConditionModel,
    texts: Sequence[nn.Module],
    vae: AutoencoderKL | AutoencoderTiny,
    layout: str,
    v_prediction: bool,
) -> dict[str, Tensor]:
    """UNet, text encoders and VAE under their single-file names.

    Args:
        unet, texts, layout: as in `network_tensors`; all text encoders.
        vae: of diffusers.
        v_prediction: whether the file is to say that the UNet predicts v.
    """
    tensors = network_tensors(unet, texts, layout)
    if isinstance(vae, AutoencoderTiny):
        one, zero = torch.ones(()), torch.zeros(())
        tensors |= tiny_vae_tensors(vae.state_dict())
        tensors |= {"first_stage_model.vae_scale": one, "first_stage_model.vae_shift": zero}
    else:
        tensors |= vae_tensors(vae.state_dict())
    if v_prediction:
        tensors["v_pred"] = torch.zeros(0)
    return tensors


def whole_checkpoint(base: BaseModel) -> dict[str, Tensor]:
    """A base model's tensors as a single file has them."""
    pipeline = base.pipeline
    told = base.v_prediction and base.family != "sd2"  # SD2.x's loaders tell it from the weights
    tensors = checkpoint_tensors(pipeline.unet, base.text_encoders, pipeline.vae, base.layout, told)
    if pipeline.scheduler.config.get("rescale_betas_zero_snr"):
        tensors["ztsnr"] = torch.zeros(0)
    return tensors
