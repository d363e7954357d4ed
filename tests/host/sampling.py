"""Pictures by ComfyUI's own sampler."""

import torch

PROMPT = "a smiling woman with red hair, on a blue background"


def encode(host, clip, text):
    return host.nodes.CLIPTextEncode().encode(clip, text)[0]


def sample(
    host, loaded, noise, steps=20, cfg=4.0, sampler="euler", scheduler="ddim_uniform", prompt=PROMPT, model=None
):
    import comfy.sample

    positive, negative = encode(host, loaded[1], prompt), encode(host, loaded[1], "")
    empty = torch.zeros_like(noise)
    arguments = (model or loaded[0], noise, steps, cfg, sampler, scheduler, positive, negative, empty)
    with torch.inference_mode():
        return comfy.sample.sample(*arguments, seed=0)


def pixels(loaded, latent):
    with torch.inference_mode():
        return loaded[2].decode(latent).float().clone()
