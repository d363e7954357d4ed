"""Custom Diffusion's files, and the gradient that it holds back."""

import pytest
import torch
from pack.models.concept_files import adobe_weights
from pack.models.custom_diffusion import (
    ALL,
    KEYS_AND_VALUES,
    concept_changes,
    concept_tensors,
    hold_first,
    is_trained,
    leading_rank,
)
from pack.models.errors import PersonalizeError

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
LAYERS = {f"lora_unet_{LAYER}_{part}".replace(".", "_"): (6, 8) for part in ("to_k", "to_v", "to_out.0")}


def test_the_token_that_begins_a_text_gets_no_gradient():
    states = torch.randn(2, 5, 3, requires_grad=True)
    out = hold_first(states)
    assert torch.equal(out, states)
    out.square().sum().backward()
    assert torch.equal(states.grad[:, 0], torch.zeros(2, 3))
    torch.testing.assert_close(states.grad[:, 1:], 2 * states.detach()[:, 1:])


def test_what_trains():
    assert is_trained(f"{LAYER}.to_k", KEYS_AND_VALUES)
    assert not is_trained(f"{LAYER}.to_q", KEYS_AND_VALUES)
    assert is_trained(f"{LAYER}.to_out.0", ALL)
    assert not is_trained(f"{LAYER}.to_out", ALL)
    assert not is_trained(LAYER.replace("attn2", "attn1") + ".to_k", ALL)


def test_a_file_is_read_as_it_was_written():
    changes = {f"{LAYER}.{part}.weight": torch.randn(6, 8) for part in ("to_k", "to_v", "to_out.0")}
    changes[f"{LAYER}.to_out.0.bias"] = torch.randn(6)
    names = {name: "lora_unet_" + name.rpartition(".")[0].replace(".", "_") for name in changes}
    found = concept_changes(concept_tensors(changes), LAYERS, "mine")
    assert {f"{names[name]}.{name.rpartition('.')[2]}": value for name, value in changes.items()}.keys() == found.keys()
    for name, value in changes.items():
        assert torch.equal(found[f"{names[name]}.{name.rpartition('.')[2]}"], value)
    # all of the singular values but rounding
    whole = concept_changes(concept_tensors(changes, 1.0), LAYERS, "mine")
    for name, value in changes.items():
        torch.testing.assert_close(whole[f"{names[name]}.{name.rpartition('.')[2]}"], value, rtol=1e-4, atol=1e-4)


def test_how_many_singular_values_are_kept():
    values = torch.tensor([5.0, 3.0, 1.0, 1.0])
    assert [leading_rank(values, share) for share in (0.1, 0.5, 0.79, 0.8, 0.9, 1.0)] == [1, 1, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"lora_unet_other.diff": torch.ones(6, 8)}, "lora_unet_other.diff in mine has no place in the base model"),
        ({f"{next(iter(LAYERS))}.hada_w1_a": torch.ones(6, 8)}, "it is no Custom Diffusion for it"),
        ({f"{next(iter(LAYERS))}.lora_up.weight": torch.ones(6, 1)}, r"is not whole: it has lora_up\.weight only"),
        ({f"{next(iter(LAYERS))}.diff": torch.ones(6, 9)}, r"is \(6, 9\), but the base model's layer is \(6, 8\)"),
    ],
)
def test_files_that_do_not_fit_are_told(tensors, sentence):
    with pytest.raises(PersonalizeError, match=sentence):
        concept_changes(tensors, LAYERS, "mine")


def test_adobes_format_has_one_vector_a_word():
    words = {"<cat>": torch.zeros(1, 4), "<dog>": torch.zeros(2, 4)}
    with pytest.raises(PersonalizeError, match=r"^<dog> has 2 vectors, but Adobe's format holds one a word\.$"):
        adobe_weights({}, {}, words)
