"""The optimisers to choose from."""

from typing import Any

import torch

from .settings import Settings


def make_optimizer(groups: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    """AdamW, its 8-bit form, Adafactor (Shazeer and Stern 2018, at a given rate), Prodigy, or Muon (Jordan et al. 2024, of
    matrices and convolutions; vectors, and groups that are `words`, whose rows are independent, by its AdamW).

    Args:
        groups: as torch has them; `max_norms` has a length for each of the `params`, which no row exceeds after a step.
        settings: of the run.
    """
    longest = {
        p: norm for group in groups for p, norm in zip(group["params"], group.get("max_norms", ()), strict=False)
    }
    optimizer = _plain([{k: v for k, v in group.items() if k != "max_norms"} for group in groups], settings)

    @torch.no_grad()
    def shorten(stepped: torch.optim.Optimizer, *_: Any) -> None:
        for parameter in (p for group in stepped.param_groups for p in group["params"] if p in longest):
            parameter.renorm_(2, 0, longest[parameter])

    if longest:
        optimizer.register_step_post_hook(shorten)
    return optimizer


def _plain(groups: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    training = settings.training
    common: dict[str, Any] = {
        "betas": (training.adam_beta1, training.adam_beta2),
        "weight_decay": training.adam_weight_decay,
    }
    if training.optimizer == "prodigy":
        from prodigyopt import Prodigy

        groups = [{**group, "lr": 1.0} for group in groups]  # it finds the rate
        return Prodigy(groups, lr=1.0, eps=training.adam_epsilon, use_bias_correction=True, **common)
    if training.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, eps=training.adam_epsilon, **common)
    if training.optimizer == "muon":
        from timm.optim import Muon

        groups = [{**group, "use_fallback": group.get("words", False)} for group in groups]
        return Muon(groups, lr=settings.rate, nesterov=True, **common)
    if training.optimizer == "adafactor":
        from transformers import Adafactor

        return Adafactor(
            groups,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
            weight_decay=training.adam_weight_decay,
        )
    return torch.optim.AdamW(groups, eps=training.adam_epsilon, fused=True, **common)
