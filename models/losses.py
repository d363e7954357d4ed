"""The denoising loss of latent diffusion, its weightings, and prior preservation.

Notation: z latents, ε noise, z_t = α_t z + σ_t ε, SNR(t) = α_t² / σ_t²; the network predicts ε, or v = α_t ε - σ_t z.
"""

import torch
from torch import Tensor


def min_snr_weights(snr: Tensor, gamma: float, v_prediction: bool) -> Tensor:
    """Weights [n] of min-SNR-γ (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    min(SNR, γ) on the error of z: min(SNR, γ) / SNR on that of ε, min(SNR, γ) / (SNR + 1) on that of v. Where SNR = 0
    (zero terminal SNR) the weight is the limit, which for ε is 1.
    """
    if v_prediction:
        return snr.clamp(max=gamma) / (snr + 1)
    return torch.where(snr > gamma, gamma / snr, torch.ones_like(snr))


def denoising_losses(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each picture, [n].

    Args:
        prediction, target: [n, C, H, W].
        mask: [n, 1, H, W], 0..1: where the error counts, and how much; the mean is over what counts.
    """
    error = (prediction.float() - target.float()).square()
    if mask is None:
        return error.mean((1, 2, 3))
    return (error * mask).sum((1, 2, 3)) / (mask.sum((1, 2, 3)) * error.shape[1]).clamp(min=1e-6)


def prior_preservation_loss(losses: Tensor, is_prior: Tensor, weight: float) -> Tensor:
    """DreamBooth's loss (Ruiz et al. 2023, eq. 2): mean over the subject's pictures + λ mean over the class's.

    Args:
        losses: [n], one a picture.
        is_prior: [n] bool, whether the picture is one of the class.
        weight: λ.
    """
    prior = is_prior.to(losses.dtype)
    own = 1 - prior
    # Sums rather than boolean indexing, so that an accelerator need not wait for the counts.
    return (losses * own).sum() / own.sum().clamp(min=1) + weight * (losses * prior).sum() / prior.sum().clamp(min=1)


def offset_noise(noise: Tensor, per_channel: Tensor, strength: float) -> Tensor:
    """Noise with a random shift of each channel, so that very dark and bright pictures can be learned.

    Source: Guttenberg 2023, "Diffusion with offset noise". `noise` is [n, C, H, W], `per_channel` [n, C, 1, 1] normal.
    """
    return noise + strength * per_channel
