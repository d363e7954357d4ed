"""At which of a sampler's model calls its latent can be moved, so that it goes on from there.

Samplers differ in what they do with the latent that they give to the model: most go on from that very tensor, others keep
a copy. It is tried out, with a model that always predicts the same.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..models.errors import PersonalizeError

_POST_CFG = "sampler_post_cfg_function"


def name_of(function: Callable) -> str:
    """A sampler's name, as users choose it."""
    own = getattr(function, "__name__", type(function).__name__).removeprefix("sample_").removesuffix("_function")
    names = {name.replace("_", ""): name for name in comfy.samplers.SAMPLER_NAMES}
    return names.get(own.replace("_", ""), own)


class Before:
    """Stands before the model that a sampler calls."""

    def __init__(self, model: Any):
        self.before_model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.before_model, name)


class _Constant(Before):
    """Predicts nothing but zeros, and may move the latent at one call."""

    def __init__(self, model: Any, functions: int, at: int | None = None, by: Tensor | float = 1.0):
        super().__init__(model)
        self.functions, self.at, self.by = functions, at, by
        self.sigmas: list[float] = []
        self.latents: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, denoise_mask=None, model_options=None, seed=None) -> Tensor:
        if len(self.latents) == self.at:
            x += self.by
        self.sigmas.append(float(sigma.flatten()[0]))
        self.latents.append(x.clone())
        done = torch.zeros_like(x)
        # What a sampler hooks into guidance, to get the negative prompt's prediction, is not in the given options.
        for function in (model_options or {}).get(_POST_CFG, [])[self.functions :]:
            done = function(
                {"denoised": done, "cond_denoised": done, "uncond_denoised": done, "sigma": sigma, "input": x}
            )
        return done


def calls_of_steps(
    function: Callable,
    model: Any,
    sigmas: Tensor,
    extra_args: Mapping[str, Any],
    extra_options: Mapping[str, Any],
    steps: Collection[int],
) -> dict[int, int]:
    """The model call before which each of some steps' latents can be moved: step by call.

    Args:
        function: the sampler's.
        model: that it calls.
        sigmas: [steps + 1].
        extra_args: the sampler's.
        extra_options: of the function.
        steps: that are wanted; those that are not among the sampler's are passed over.

    Raises:
        PersonalizeError: the sampler has no such call for a step.
    """
    short = sigmas.detach().clone()
    if float(short[-1]) == 0 and len(short) > 1:
        short[-1] = short[-2] / 2  # at 0 the latent would be the prediction, whatever it was before
    options = extra_args.get("model_options", {})

    def run(start: Tensor, at: int | None = None, by: Tensor | float = 1.0) -> tuple[_Constant, Tensor]:
        own = dict(extra_args) | {"model_options": dict(options), "denoise_mask": None}
        tried = _Constant(model, len(options.get(_POST_CFG, [])), at, by)
        with torch.random.fork_rng(devices=[]):
            end = function(tried, start.clone(), short, extra_args=own, callback=None, disable=True, **extra_options)
        return tried, end

    start = torch.ones(1, 1, 2, 2, device=sigmas.device) * short[0]
    plain, end = run(start)
    other, _ = run(start + 1)
    # Some go on from the prediction alone (lcm): then all that counts is what the model sees.
    forgets = len(plain.latents) > 1 and torch.equal(plain.latents[1], other.latents[1])
    # The first latent that is moved must be the same as one that came so; a copy that is moved is not (uni_pc).
    first, _ = run(start, 0, other.latents[0] - plain.latents[0])
    copies = any(not torch.allclose(a, b, 1e-3) for a, b in zip(first.latents, other.latents, strict=False))
    calls = dict[int, int]()
    for step in sorted(set(steps) & set(range(len(sigmas) - 1))):
        # A corrector may see a latent at the next step's sigma before that step does: the last is the step's own.
        found = [k for k, sigma in enumerate(plain.sigmas) if abs(sigma - float(sigmas[step])) <= 1e-5 * sigma]
        kept = None
        for k in [] if copies else reversed(found):
            tried, moved = run(start, k)
            later = zip(plain.latents[k + 1 :], tried.latents[k + 1 :], strict=False)
            if forgets or not torch.equal(moved, end) or any(not torch.equal(a, b) for a, b in later):
                kept = k
                break
        if kept is None:
            why = "keeps a copy of the latent that it goes on from" if found else "chooses steps of its own"
            raise PersonalizeError(
                f"Attend-and-Excite does not work with the sampler {name_of(function)}, which {why}: choose euler, "
                "dpmpp_2m or another one."
            )
        calls[kept] = step
    return calls
