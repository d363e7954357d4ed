"""Narrow UNets with the full SD1.5 and SDXL block layouts: the same random weights in diffusers and in ComfyUI."""

import torch
from diffusers import UNet2DConditionModel
from structural.adapters import random_adapter
from structural.checkpoints import SD15_LAYOUT, SDXL_LAYOUT, UNET

SD15 = {
    "family": "SD15",
    "cross": 768,
    "layers": 16,
    "widths": [32, 32, 64, 64, 128, 128] + [128] * 3 + [64] * 3 + [32] * 3 + [128],
    "config": UNET | SD15_LAYOUT | {"model_channels": 32, "context_dim": 768},
    "diffusers": {
        "block_out_channels": (32, 64, 128, 128),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
}
SDXL = {
    "family": "SDXL",
    "cross": 2048,
    "layers": 70,
    "widths": [128] * 4 + [256] * 20 + [256] * 30 + [128] * 6 + [256] * 10,
    "config": UNET | SDXL_LAYOUT | {"model_channels": 64, "context_dim": 2048},
    "diffusers": {
        "block_out_channels": (64, 128, 256),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
ENCODERS = {"base": 1024, "plus": 1280, "full-face": 1280}


def diffusers_unet(layout) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**layout["diffusers"]).eval().requires_grad_(False)


def comfy_model(layout, unet: UNet2DConditionModel):
    """A MODEL with the weights of the diffusers UNet."""
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils

    config = getattr(comfy.supported_models, layout["family"])(dict(layout["config"]))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    state = {names[key]: value.clone() for key, value in unet.state_dict().items()}
    model.diffusion_model.load_state_dict(state)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)


def adapter(layout, kind: str, seed: int = 0):
    return random_adapter(kind, ENCODERS[kind], layout["cross"], layout["widths"], seed)


def references(module, n: int, seed: int = 0, weights=None):
    """n random references of a ViT-H, 17 patch tokens instead of 257."""
    generator = torch.Generator().manual_seed(seed)
    return module.References(
        pooled=torch.randn(n, 1024, generator=generator),
        patches=torch.randn(n, 17, 1280, generator=generator),
        zero_patches=torch.randn(17, 1280, generator=generator),
        weights=torch.ones(n) if weights is None else torch.tensor(weights),
        names=tuple(f"image{i}" for i in range(n)),
    )


def conditionings(layout):
    """Positive and negative conditionings as CLIPTextEncode gives them."""
    generator = torch.Generator().manual_seed(0)

    def one():
        text = torch.randn(1, 77, layout["cross"], generator=generator)
        size = {"width": 1024, "height": 1024, "target_width": 1024, "target_height": 1024}
        return [[text, {"pooled_output": torch.randn(1, 1280, generator=generator), **size}]]

    return one(), one()


def evaluate(model, positive, negative, x: torch.Tensor, timestep: int):
    """One guided UNet evaluation on the sampler's own path: eps of both sides, [2][B, 4, H, W]."""
    import comfy.samplers

    sigma = model.model.model_sampling.sigma(torch.tensor([float(timestep)]))
    seen = {}

    def record(wrapped, noise, sigmas, extra_args, **_):
        guider = wrapped.inner_model
        conds = [guider.conds["positive"], guider.conds["negative"]]
        denoised = comfy.samplers.calc_cond_batch(
            guider.inner_model, conds, x, sigma.expand(x.shape[0]), extra_args["model_options"]
        )
        seen["eps"] = [(x - one) / sigma for one in denoised]
        return noise

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    with torch.inference_mode():
        sigmas = torch.stack([sigma[0], torch.tensor(0.0)])
        guider.sample(torch.zeros_like(x), torch.zeros_like(x), comfy.samplers.KSAMPLER(record), sigmas, seed=0)
    return seen["eps"]


def evaluate_diffusers(layout, unet, model, conditioning, x, timestep, image_embeds=None):
    """The same evaluation in diffusers: eps, [B, 4, H, W]."""
    sigma = model.model.model_sampling.sigma(torch.tensor([float(timestep)]))
    text, extra = conditioning[0]
    added = {} if image_embeds is None else {"image_embeds": [image_embeds]}
    if layout["family"] == "SDXL":
        added |= {"text_embeds": extra["pooled_output"], "time_ids": torch.tensor([[1024, 1024, 0, 0, 1024, 1024.0]])}
    with torch.no_grad():
        return unet(x / (sigma**2 + 1).sqrt(), timestep, text, added_cond_kwargs=added).sample
