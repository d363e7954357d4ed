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


def controlled(host, loaded, conditioning, strength=1.0):
    """A conditioning with a ControlNet of random weights for the pocket model."""
    import comfy.cldm.cldm
    import comfy.controlnet

    with torch.random.fork_rng():
        torch.manual_seed(4)
        own = {key: value for key, value in loaded[0].model.model_config.unet_config.items() if key != "out_channels"}
        network = comfy.cldm.cldm.ControlNet(**own, hint_channels=3)
        with torch.no_grad():
            for weight in network.parameters():
                torch.nn.init.normal_(weight, std=0.05)
    control = comfy.controlnet.ControlNet(network.eval(), load_device=torch.device("cpu"))
    hint = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(6))
    positive, _ = host.nodes.ControlNetApplyAdvanced().apply_controlnet(conditioning, [], control, hint, strength, 0, 1)
    return positive
