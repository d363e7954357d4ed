"""One step's noise and loss by numbers."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from pack.training.denoising import Weighting, draw, generator_of, timestep_weights, training_losses
from pack.training.encoding import Latent, TextStates


def latents(count):
    return [Latent(torch.zeros(4, 6, 5), None, None)] * count


def test_noise_offset_shifts_each_picture_and_channel():
    plain = draw(latents(200), range(200), 3, 0, 1000, Weighting()).noise
    shifted = draw(latents(200), range(200), 3, 0, 1000, Weighting(noise_offset=0.1)).noise
    shift = (shifted - plain).mean((2, 3), keepdim=True)
    torch.testing.assert_close(shifted, plain + shift, rtol=0, atol=1e-6)  # the same for all pixels
    assert float(shift.std()) == pytest.approx(0.1, rel=0.1)
    assert float(shift.mean()) == pytest.approx(0, abs=0.015)
    # the documented drawing: of each picture, after its timestep and its noise
    for place in (0, 7):
        generator = generator_of(3, 0, place)
        torch.randint(1000, (), generator=generator)
        torch.randn(4, 6, 5, generator=generator)
        torch.testing.assert_close(shift[place], 0.1 * torch.randn(4, 1, 1, generator=generator), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("strategy", "part"), [("earlier", slice(250)), ("later", slice(750, None))])
def test_a_part_of_the_schedule_is_drawn_more_often(strategy, part):
    often = timestep_weights(1000, strategy, 0.25, 3.0)
    known = torch.ones(1000)
    known[part] = 3
    torch.testing.assert_close(often, known / 1500)
    drawn = draw(latents(4000), range(4000), 3, 0, 1000, Weighting(timesteps=often)).timesteps
    assert drawn.dtype == torch.int64
    assert float(torch.isin(drawn, torch.arange(1000)[part]).float().mean()) == pytest.approx(0.5, abs=0.025)


class Twice(torch.nn.Module):
    """A network that says twice what it sees."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    dtype = torch.float32

    def forward(self, noisy, _timesteps, _text):
        return SimpleNamespace(sample=self.scale * noisy)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero", [False, True], ids=["plain", "zero terminal SNR"])
def test_min_snr_weighs_the_loss(kind, zero):
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=kind,
        rescale_betas_zero_snr=zero,
    )
    drawn = draw(latents(4), range(4), 0, 0, 1000, Weighting())
    drawn.timesteps[:] = torch.tensor([0, 300, 700, 999])
    text = TextStates(torch.zeros(4, 77, 8), None)
    plain, weighted = (
        training_losses(Twice(), scheduler, drawn, text, None, 8, Weighting(snr_gamma=gamma)).tolist()
        for gamma in (None, 5.0)
    )
    assert (scheduler.alphas_cumprod[-1] == 0) == zero
    for before, after, t in zip(plain, weighted, (0, 300, 700, 999), strict=True):
        signal = scheduler.alphas_cumprod[t].double().item()  # its variance; that of the noise is the rest
        snr = signal / (1 - signal)
        limit = 1.0 if snr == 0 else min(snr, 5.0) / snr  # 0 / 0 for nothing but noise
        weight = min(snr, 5.0) / (snr + 1) if kind == "v_prediction" else limit
        assert after == pytest.approx(before * weight, rel=1e-4)
