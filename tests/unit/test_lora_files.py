"""LoRA files: names, scales and checks."""

import pytest
import torch
from pack.models.errors import PersonalizeError
from pack.models.lora import UNET, check_lora, file_name, host_layers, lora_tensors, text_prefixes

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"


def state(rank=2, rows=6, columns=5):
    generator = torch.Generator().manual_seed(0)
    return {
        f"{MODULE}.lora_A.weight": torch.randn(rank, columns, generator=generator),
        f"{MODULE}.lora_B.weight": torch.randn(rows, rank, generator=generator),
    }


def test_names_are_kohyas():
    assert file_name(UNET, MODULE) == NAME
    assert file_name("lora_te", "encoder.layers.0.mlp.fc1") == "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert file_name("lora_te2", "text_model.encoder.layers.0.mlp.fc1").startswith("lora_te2_text_model_encoder")
    assert text_prefixes(1) == ("lora_te",)
    assert text_prefixes(2) == ("lora_te1", "lora_te2")


def test_alpha_is_always_written():
    tensors = lora_tensors(UNET, state(), {MODULE: 3.0}, {})
    assert set(tensors) == {f"{NAME}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert tensors[f"{NAME}.alpha"] == 3


def test_dora_gives_the_same_weight_where_rows_are_divided_by_their_length_in_the_base():
    base, peft, alpha = torch.randn(6, 5), state(), 4.0
    change = alpha / 2 * peft[f"{MODULE}.lora_B.weight"] @ peft[f"{MODULE}.lora_A.weight"]
    lengths = torch.rand(6) + 0.5
    wanted = lengths[:, None] * (base + change) / (base + change).norm(dim=1, keepdim=True)
    peft[f"{MODULE}.lora_magnitude_vector"] = lengths
    tensors = lora_tensors(UNET, peft, {MODULE: alpha}, {f"{MODULE}.weight": base})
    in_comfyui = (base + change) * tensors[f"{NAME}.dora_scale"] / base.norm(dim=1, keepdim=True)
    torch.testing.assert_close(in_comfyui, wanted)


def layers():
    text = {
        "text_model.encoder.layers.0.mlp.fc1.weight": (8, 4),
        "text_model.encoder.layers.0.layer_norm1.weight": (4,),
        "text_model.embeddings.token_embedding.weight": (9, 4),
    }
    return host_layers({f"{MODULE}.weight": (6, 5), f"{MODULE}.bias": (6,), "conv_in.weight": (6, 4, 3, 3)}, [text])


def test_the_layers_that_the_host_knows():
    assert layers() == {
        NAME: (6, 5),
        "lora_unet_conv_in": (6, 4, 3, 3),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": (8, 4),
    }


def test_what_the_host_would_not_load_is_refused():
    good = lora_tensors(UNET, state(), {MODULE: 3.0}, {})
    assert check_lora(good, layers(), "a.safetensors") == 1
    unknown = {key.replace("to_out_0", "to_x"): value for key, value in good.items()}
    with pytest.raises(PersonalizeError, match=r"attn1_to_x\.alpha in a\.safetensors has no place in the base"):
        check_lora(dict(reversed(unknown.items())), layers(), "a.safetensors")
    with pytest.raises(PersonalizeError, match=r"has no alpha: ComfyUI would not load it rightly"):
        check_lora({key: value for key, value in good.items() if "alpha" not in key}, layers(), "a")
    with pytest.raises(PersonalizeError, match=r"is \(7, 2\) x \(2, 5\), but the base model's layer is \(6, 5\)"):
        check_lora(lora_tensors(UNET, state(rows=7), {MODULE: 3.0}, {}), layers(), "a")


def test_convolutions():
    peft = {"conv_in.lora_A.weight": torch.randn(2, 4, 3, 3), "conv_in.lora_B.weight": torch.randn(6, 2, 1, 1)}
    assert check_lora(lora_tensors(UNET, peft, {"conv_in": 2.0}, {}), layers(), "a") == 1
