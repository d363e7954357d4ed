"""Attend-and-Excite while ComfyUI samples: the sampler's own latent is moved before its steps.

A SAMPLER_SAMPLE wrapper puts itself before the model that the sampler calls. Before a step it moves x, in place, so that
the sampler goes on from it. The maps come from a run of the UNet for the marked conditioning alone, with everything that
is on the model (LoRA, IP-Adapter, ControlNet, areas), and only as far as the last layer that is looked at.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.attend_and_excite import (
    Excitement,
    Words,
    cross_attention_maps,
    excite,
    mean_map,
    step_size,
)
from ..models.blocks import Layer
from ..models.errors import PersonalizeError
from .attention_capture import LOOK, looking, unet_parts
from .sampler_trial import Before, calls_of_steps

KEY = "personalize_attend_and_excite"


class _Enough(Exception):  # noqa: N818 - nothing is wrong
    """All maps are there."""


@dataclass(frozen=True)
class Excitation:
    """What one node asks for."""

    mark: str
    """Of the conditioning whose words are excited."""
    words: Words
    settings: Excitement
    layers: tuple[Layer, ...]
    """Whose maps are looked at, in the order they run."""
    low_memory: bool

    def apply_to(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of the model that is sampled so.

        Raises:
            PersonalizeError: it is already.
        """
        if model.get_wrappers(WrappersMP.SAMPLER_SAMPLE, KEY):
            raise PersonalizeError("This MODEL comes from Attend-and-Excite already: write all words into one node.")
        patched = model.clone()
        patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self.around_sampler)
        return patched

    def around_sampler(self, executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
        """Sample with the latent moved before the steps.

        Raises:
            PersonalizeError: the conditioning is not the sampler's, or the sampler cannot be moved.
        """
        sampler, conds = executor.class_obj, self._marked(guider)
        if not conds:
            raise PersonalizeError(
                "The sampler does not get the conditioning of Attend-and-Excite: connect it to the sampler's positive input."
            )
        if not hasattr(sampler, "sampler_function"):
            raise PersonalizeError(f"Attend-and-Excite does not work with the sampler {type(sampler).__name__}.")
        function, total = sampler.sampler_function, len(sigmas) - 1
        steps = [i for i in range(total) if self.settings.acts_at(i)]

        def moved(model, x, sigmas, *rest, extra_args, **options):
            extra = {name: value for name, value in options.items() if name not in ("callback", "disable")}
            calls = calls_of_steps(function, model, sigmas, extra_args, extra, steps)
            return function(_Moving(model, self, calls, total), x, sigmas, *rest, extra_args=extra_args, **options)

        sampler.sampler_function = moved
        try:
            return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
        finally:
            sampler.sampler_function = function

    def _marked(self, guider: Any) -> list[dict[str, Any]]:
        return [cond for conds in guider.conds.values() for cond in conds or () if cond.get(KEY) == self.mark]

    def move(
        self, model: Any, x: Tensor, sigma: Tensor, step: int, total: int, given: Mapping[str, Any]
    ) -> Tensor | None:
        """x [B, C, H, W] of a step, moved; None where it stays.

        Args:
            model: what the sampler calls, with the guider in `inner_model`.
            x: the sampler's latent.
            sigma: [B].
            step: of so many.
            total: steps.
            given: model_options and denoise_mask.
        """
        guider = model.inner_model
        cond = next(
            (c for c in self._marked(guider) if comfy.samplers.get_area_and_mult(c, x, sigma) is not None), None
        )
        if cond is None:  # at other steps than these
            return None
        unet = guider.inner_model.diffusion_model
        with torch.inference_mode(False), torch.no_grad(), _differentiable(unet), self._saving(unet):
            scale = float(
                (sigma[0].float() ** 2 + 1) ** 0.5
            )  # x = z scale, where z is the variance-preserving process's
            latent = x.clone()
            look = _Look(self, model, cond, latent, sigma.clone(), scale, given)
            z = latent / scale
            alpha = step_size(step, total, self.settings.scale)
            done = excite(z, step, alpha, look.maps_of, [self.words] * len(x), self.settings)
            return None if torch.equal(done.latent, z) else done.latent * scale

    @contextmanager
    def _saving(self, unet: nn.Module) -> Iterator[None]:
        """With low memory, blocks without a layer that is looked at are computed once more for the gradient."""
        own = {(layer.block, layer.id) for layer in self.layers}
        saved = [
            module
            for name, number, module in unet_parts(unet)
            if isinstance(module, ResBlock) or (hasattr(module, "transformer_blocks") and (name, number) not in own)
        ]
        try:
            for module in saved if self.low_memory else []:
                module.forward = _again(module.forward)
            yield
        finally:
            for module in saved:
                module.__dict__.pop("forward", None)


def _again(forward: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        # The options say where in the UNet it is, and go on to say the next place.
        own = [dict(one) if isinstance(one, dict) else one for one in args]
        named = {name: dict(one) if isinstance(one, dict) else one for name, one in kwargs.items()}
        return checkpoint(partial(forward, **named), *own, use_reentrant=False)

    return run


class _Moving(Before):
    """Moves the sampler's latent before the calls that are steps."""

    def __init__(self, model: Any, excitation: Excitation, calls: Mapping[int, int], total: int):
        super().__init__(model)
        self.excitation, self.calls, self.total, self.count = excitation, calls, total, 0

    def __call__(self, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        step = self.calls.get(self.count)
        self.count += 1
        if step is not None:
            moved = self.excitation.move(self.before_model, x, sigma, step, self.total, kwargs)
            if moved is not None:
                x.copy_(moved)
        return self.before_model(x, sigma, *args, **kwargs)


class _Look:
    """The maps of one step."""

    def __init__(
        self,
        excitation: Excitation,
        model: Any,
        cond: dict[str, Any],
        latent: Tensor,
        sigma: Tensor,
        scale: float,
        given: Mapping[str, Any],
    ):
        self.excitation, self.model = excitation, model
        self.latent, self.sigma, self.scale = latent, sigma, scale
        mask: Tensor | None = given.get("denoise_mask")
        self.mask = None if mask is None else mask.clone()
        self.options = create_model_options_clone(given.get("model_options", {}))
        self.options.pop("multigpu_clones", None)
        own = self.options.setdefault("transformer_options", {})
        self.replaced = own.get("patches_replace", {})
        own["patches_replace"] = looking(own, excitation.layers, self._keep)
        own[LOOK] = True
        own["optimized_attention_override"] = lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)
        if "control" in cond:
            cond = {**cond, "control": _Unwatched(cond["control"], self.replaced)}
        self.cond = cond
        self.maps: dict[Layer, tuple[Tensor, tuple[int, int]]] = {}

    def maps_of(self, z: Tensor, pictures: Sequence[int]) -> Tensor:
        """A [n, h, w, T] of some pictures' z [n, C, H, W]; the whole batch runs, as what is on the model may be a batch."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        model, chosen = self.model.inner_model.inner_model, list(pictures)
        x = z * self.scale
        if len(chosen) < len(self.latent):
            x = self.latent.index_copy(0, torch.tensor(chosen, device=x.device), x)
        if self.mask is not None:
            # As KSamplerX0Inpaint shows it to the model: what stays is the picture's, with the step's noise.
            sigma = self.sigma.reshape([-1] + [1] * (x.ndim - 1))
            noise, latent = self.model.noise.clone(), self.model.latent_image.clone()
            kept = model.scale_latent_inpaint(x=x, sigma=sigma, noise=noise, latent_image=latent)
            x = x * self.mask + kept * (1 - self.mask)
        self.maps.clear()
        with suppress(_Enough):
            comfy.samplers.calc_cond_batch(model, [[self.cond]], x, self.sigma, self.options)
        (size,) = {size for _, size in self.maps.values()}
        found = mean_map([maps[chosen] for maps, _ in self.maps.values()], *size)
        self.maps.clear()
        return found

    def _keep(self, layer: Layer, q: Tensor, k: Tensor, options: Mapping[str, Any]) -> None:
        maps = cross_attention_maps(q, k, options["n_heads"])
        rows, columns = options["activations_shape"][-2:]
        self.maps[layer] = maps, (rows, columns)
        if layer == self.excitation.layers[-1]:
            raise _Enough


class _Unwatched:
    """A ControlNet without gradients: its hint is a given, not what is moved."""

    def __init__(self, control: Any, replaced: Mapping[str, Any]):
        self.control, self.replaced = control, replaced

    def __getattr__(self, name: str) -> Any:
        return getattr(self.control, name)

    def get_control(
        self, x: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int, options: dict[str, Any]
    ) -> Any:
        own = {**options, "patches_replace": self.replaced}
        with torch.no_grad():
            out = self.control.get_control(x.detach(), t, {**cond, "transformer_options": own}, batched_number, own)
        return {
            place: [None if one is None else one.as_subclass(_Added) for one in parts]
            for place, parts in (out or {}).items()
        }


class _Added(Tensor):
    """What the host adds in place, to a tensor that the gradient needs as it was: it is added out of place."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        own = Tensor.add if func is Tensor.add_ else func
        with torch._C.DisableTorchFunctionSubclass():
            return own(*args, **(kwargs or {}))


@contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """A block in which autograd takes the weights: those that were loaded in inference mode are seen through others."""
    owners = [
        (own, name, value)
        for own in module.modules()
        for name, value in (*own._parameters.items(), *own._buffers.items())
        if value is not None and value.is_inference()
    ]
    try:
        for own, name, value in owners:
            seen: Tensor = torch.empty(0, dtype=value.dtype, device=value.device)
            seen.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())
            if name in own._parameters:
                own._parameters[name] = nn.Parameter(seen, requires_grad=False)
            else:
                own._buffers[name] = seen
        yield
    finally:
        for own, name, value in owners:
            kept: dict[str, Any] = own._parameters if name in own._parameters else own._buffers
            kept[name] = value
