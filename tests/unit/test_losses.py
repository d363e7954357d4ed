"""The weightings of the denoising loss, against their papers' formulas computed by hand."""

import pytest
import torch
from pack.models.losses import min_snr_weights, offset_noise


@pytest.mark.parametrize(
    ("v_prediction", "expected"),
    [(False, [1, 1, 5 / 10, 5 / 100]), (True, [0.25 / 1.25, 5 / 6, 5 / 11, 5 / 101])],
    ids=["epsilon", "v"],
)
def test_min_snr_weights_are_the_papers(v_prediction, expected):
    weights = min_snr_weights(torch.tensor([0.25, 5.0, 10.0, 100.0]), 5.0, v_prediction)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(("v_prediction", "expected"), [(False, 1.0), (True, 0.0)], ids=["epsilon", "v"])
def test_min_snr_weights_of_pure_noise_are_the_limit(v_prediction, expected):
    snr = torch.tensor([0.0, 1e-12])
    torch.testing.assert_close(min_snr_weights(snr, 5.0, v_prediction), torch.full((2,), expected), rtol=0, atol=1e-11)


def test_offset_noise_shifts_channels_as_a_whole():
    noise, shift = torch.zeros(2, 3, 4, 5), torch.arange(1.0, 7.0).reshape(2, 3, 1, 1)
    shifted = offset_noise(noise, shift, 0.1)
    expected = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    torch.testing.assert_close(shifted.mean((2, 3)), torch.tensor(expected))
    assert torch.equal(shifted.amax((2, 3)), shifted.amin((2, 3)))
