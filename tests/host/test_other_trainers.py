"""LoRAs as other trainers write them, through our loader and the stock one."""

import logging
import re

import pytest
import torch
from inprocess import node, patched
from safetensors.torch import save_file

LAYER = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k"


def layer_of(trainer, out, into):
    """One layer's tensors as other trainers write them."""
    r = torch.randn
    return {
        "kohya": {f"{LAYER}.lora_down.weight": r(4, into), f"{LAYER}.lora_up.weight": r(out, 4), f"{LAYER}.alpha": 2.0},
        "diffusers": {
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": r(4, into),
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.up.weight": r(out, 4),
        },
        "peft": {
            "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.lora_A.weight": r(4, into),
            "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.lora_B.weight": r(out, 4),
        },
        "loha": {
            f"{LAYER}.hada_w1_a": r(out, 4),
            f"{LAYER}.hada_w1_b": r(4, into),
            f"{LAYER}.hada_w2_a": r(out, 4),
            f"{LAYER}.hada_w2_b": r(4, into),
            f"{LAYER}.alpha": 2.0,
        },
        "lokr": {f"{LAYER}.lokr_w1": r(4, 4), f"{LAYER}.lokr_w2": r(out // 4, into // 4), f"{LAYER}.alpha": 2.0},
        "glora": {
            f"{LAYER}.a1.weight": r(into, 4),
            f"{LAYER}.a2.weight": r(4, into),
            f"{LAYER}.b1.weight": r(out, 4),
            f"{LAYER}.b2.weight": r(4, into),
        },
        "oft": {f"{LAYER}.oft_blocks": 0.1 * r(8, out // 8, out // 8), f"{LAYER}.alpha": 1.0},
        "full": {f"{LAYER}.diff": r(out, into)},
    }[trainer]


@pytest.mark.parametrize("trainer", ["kohya", "diffusers", "peft", "loha", "lokr", "glora", "oft", "full"])
def test_loras_of_other_trainers(host, loaded, trainer, caplog):
    loras = host.base / "models" / "loras"
    loras.mkdir(exist_ok=True)

    def write(name, *sizes, **more):
        tensors = {key: torch.as_tensor(value) for key, value in layer_of(trainer, *sizes).items()}
        save_file(tensors | more, loras / f"{name}.safetensors")

    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    write("theirs", 96, 64)
    stock = host.nodes.LoraLoader().load_lora(loaded[0], loaded[1], "theirs.safetensors", 1.0, 1.0)[0]
    with caplog.at_level(logging.INFO):
        ours, clip, trigger = node(host, "LoadLoRA")(loaded[0], "theirs.safetensors", 1.0, 1.0, loaded[1])
    assert not caplog.records
    assert (list(ours.patches), clip.patcher.patches, trigger) == ([key], {}, "")
    assert torch.equal(patched(ours, key), patched(stock, key))
    assert not torch.equal(patched(ours, key), patched(loaded[0], key))
    write("more", 96, 64, strange=torch.ones(1))
    with caplog.at_level(logging.INFO):
        node(host, "LoadLoRA")(loaded[0], "more.safetensors", 1.0, 1.0, loaded[1])
    assert re.search(r"more\.safetensors: 1 of \d tensors are not for this model .* such as strange\.", caplog.text)
    write("large", 320, 768)
    with pytest.raises(ValueError, match=r"is \(96, 64\) in this model, but .* in large\.safetensors: it was made"):
        node(host, "LoadLoRA")(loaded[0], "large.safetensors", 1.0, 1.0)
