"""Attend-and-Excite and Composable Diffusion under a real server, sampler by sampler, as a user queues them.

Four pictures at once, 96 x 64 pixels, a prompt of 150 tokens. What the table says is what happens.
"""

import pytest
from pack.training.demo.server import WorkflowError

SAMPLERS = {  # whether Attend-and-Excite works with it, or what is said; Composable Diffusion works with all
    "euler": None,
    "euler_ancestral": None,
    "dpmpp_2m": None,
    "dpmpp_2m_sde": None,
    "ddim": None,
    "lcm": None,
    "uni_pc": "Attend-and-Excite does not work with the sampler uni_pc, which keeps a copy of the latent",
}
LONG = "a cat and a dog on the beach, " + "smiling, facing left, in sunshine, " * 17
METHODS = ("plain", "excited", "composed")


def graph(method, sampler, seed):
    """The three differ in what guides alone."""
    nodes = {
        "base": ("CheckpointLoaderSimple", {"ckpt_name": "pocket_portraits.safetensors"}),
        "empty": ("CLIPTextEncode", {"clip": ["base", 1], "text": ""}),
        "told": ("CLIPTextEncode", {"clip": ["base", 1], "text": LONG}),
        "excited": (
            "PersonalizeAttendAndExcite",
            {
                "model": ["base", 0], "clip": ["base", 1], "prompt": LONG, "words": "cat, dog", "steps": 2,
                "thresholds": "0:0.3", "scale": 20.0, "refinements": 2, "resolution": "auto", "low_memory": False,
            },
        ),
        "plain_guider": ("CFGGuider", {"model": ["base", 0], "positive": ["told", 0], "negative": ["empty", 0], "cfg": 4.0}),
        "excited_guider": (
            "CFGGuider",
            {"model": ["excited", 0], "positive": ["excited", 1], "negative": ["empty", 0], "cfg": 4.0},
        ),
        "composed_guider": (
            "PersonalizeComposePrompt",
            {
                "model": ["base", 0], "clip": ["base", 1], "text": f"{LONG} AND a dog :0.8 AND NOT a robot",
                "negative": ["empty", 0], "cfg": 4.0,
            },
        ),
        "noise": ("RandomNoise", {"noise_seed": seed}),
        "sampler": ("KSamplerSelect", {"sampler_name": sampler}),
        "sigmas": ("BasicScheduler", {"model": ["base", 0], "scheduler": "normal", "steps": 3, "denoise": 1.0}),
        "latent": ("EmptyLatentImage", {"width": 96, "height": 64, "batch_size": 4}),
        "drawn": (
            "SamplerCustomAdvanced",
            {
                "noise": ["noise", 0], "guider": [f"{method}_guider", 0], "sampler": ["sampler", 0],
                "sigmas": ["sigmas", 0], "latent_image": ["latent", 0],
            },
        ),
        "decoded": ("VAEDecode", {"samples": ["drawn", 0], "vae": ["base", 2]}),
        "kept": ("PreviewImage", {"images": ["decoded", 0]}),
    }  # fmt: skip
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def drawn(server, method, sampler, seed=1):
    shown = server.run(graph(method, sampler, seed))["kept"]["images"]
    return [server.picture(one) for one in shown]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_works_or_is_refused_with_the_reason(server, sampler):
    refused, pictures = SAMPLERS[sampler], {}
    for method in METHODS:
        if method == "excited" and refused:
            with pytest.raises(WorkflowError, match=refused):
                drawn(server, method, sampler)
            continue
        pictures[method] = drawn(server, method, sampler)
        assert len(set(pictures[method])) == 4
        drawn(server, method, sampler, seed=2)  # else the server would not draw it again
        assert drawn(server, method, sampler) == pictures[method], "queued again it is the same picture"
    drawn(server, "plain", sampler, seed=2)
    assert drawn(server, "plain", sampler) == pictures["plain"], "nothing is left on the model"
    everything = [picture for four in pictures.values() for picture in four]
    assert len(set(everything)) == len(everything)
