"""What our guiders share with the host's: its model call, and its functions before and after guidance."""

from collections.abc import Sequence
from typing import Any

import comfy.samplers
from torch import Tensor


class Guider(comfy.samplers.CFGGuider):
    """The host's guider, whose `predict_noise` is taken apart for other equations of guidance."""

    def predictions(
        self, conds: Sequence[Any], x: Tensor, timestep: Tensor, options: dict[str, Any]
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Denoised [B, C, H, W] of each conditioning, by one call, through the pre-CFG functions; and what all functions get.

        Args:
            conds: the conditional one first, the unconditional one second, as these functions expect them.
            x: the latent, [B, C, H, W].
            timestep: sigma, [B].
            options: of the model.
        """
        common = {"input": x, "sigma": timestep, "model": self.inner_model, "model_options": options}
        if "sampler_calc_cond_batch_function" in options:
            out = options["sampler_calc_cond_batch_function"]({"conds": conds, **common})
        else:
            out = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        for function in options.get("sampler_pre_cfg_function", []):
            out = function({"conds": conds, "conds_out": out, "cond_scale": self.cfg, "timestep": timestep, **common})
        return out, common

    def finished(self, done: Tensor, conds: Sequence[Any], told: dict[str, Any]) -> Tensor:
        """A guided prediction through the post-CFG functions; `told` is what they get besides."""
        for function in told["model_options"].get("sampler_post_cfg_function", []):
            done = function({"denoised": done, "cond": conds[0], "uncond": conds[1], **told})
        return done
