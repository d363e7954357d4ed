"""Where the pocket model trains, and where networks measure: on the GPU where there is one."""

import numpy as np
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensor_of(array: np.ndarray) -> Tensor:
    """An array as a tensor on torch's default device, which is DEVICE while a part trains."""
    return torch.from_numpy(array).to(torch.get_default_device())
