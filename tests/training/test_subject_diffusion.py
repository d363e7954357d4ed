"""The parts of Subject-Diffusion against diffusers and against their equations."""

import pytest
import torch
from diffusers.models.attention import GatedSelfAttentionDense
from diffusers.models.embeddings import get_fourier_embeds_from_boundingbox
from pack.models.subject_diffusion import (
    BALANCED,
    L1,
    GatedAdapter,
    ImageMLP,
    ObjectTokens,
    box_features,
    fused_prompt,
    inside_boxes,
    localisation_loss,
    location_mask,
    replace_embeddings,
    three_way,
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_adapter_is_diffusers_gated_self_attention():
    theirs = GatedSelfAttentionDense(32, 20, 4, 8).double()
    ours = GatedAdapter(32, 20, 4).double()
    x, objects = random(2, 15, 32), random(2, 7, 20, seed=1)
    for i, parameter in enumerate(theirs.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=i) * 0.3)
    ours.load_state_dict(theirs.state_dict())
    given = [tensor.clone().requires_grad_(True) for tensor in (x, objects)]
    expected = [tensor.clone().requires_grad_(True) for tensor in (x, objects)]
    out, reference = ours(*given), theirs(*expected)
    assert (reference - x).abs().max() > 0.1, "the gates are open"
    torch.testing.assert_close(out, reference, rtol=1e-6, atol=1e-9)
    out.square().sum().backward()
    reference.square().sum().backward()
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-9)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-8)


def test_a_new_adapter_changes_nothing():
    x = random(2, 15, 32).float()
    assert torch.equal(GatedAdapter(32, 20, 4)(x, random(2, 7, 20).float()), x)


def test_boxes_are_gligens_fourier_features():
    boxes = random(2, 3, 4).sigmoid()
    expected = get_fourier_embeds_from_boundingbox(8, boxes)  # its frequencies are in fp32
    torch.testing.assert_close(box_features(boxes), expected, rtol=0, atol=5e-6)
    assert box_features(boxes).shape == (2, 3, 64)


def test_where_there_is_no_subject_stands_what_was_learned():
    tokens = ObjectTokens(10, 5, 12).double()
    for i, parameter in enumerate(tokens.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=i))
    patches, boxes = random(2, 3, 5, 10), random(2, 3, 4, seed=1).sigmoid()
    there = torch.tensor([[True, False, True], [False, True, True]])
    out = tokens(patches, boxes, there).unflatten(1, (3, 5))
    assert out.shape == (2, 3, 5, 12)
    for b in range(2):
        for n in range(3):
            place = box_features(boxes[b, n]).expand(5, -1)
            parts = (patches[b, n], place) if there[b, n] else (tokens.null_features, tokens.null_position)
            torch.testing.assert_close(out[b, n], tokens.mlp(torch.cat(parts, -1)), rtol=1e-9, atol=1e-12)


def test_the_mlp():
    mlp = ImageMLP(6, 8, 4).double()
    x = random(3, 6)
    hidden = torch.nn.functional.layer_norm(x, (6,)) @ mlp.fc1.weight.T + mlp.fc1.bias
    torch.testing.assert_close(mlp(x), torch.nn.functional.gelu(hidden) @ mlp.fc2.weight.T + mlp.fc2.bias)


def test_placeholders_in_a_prompt_and_their_vectors():
    assert fused_prompt("a dog and a cat ", ["dog", "cat"]) == "a dog and a cat, the dog is sks, the cat is sks"
    assert fused_prompt("nobody", []) == "nobody"
    embeddings, vectors = random(2, 6, 4), random(3, 4, seed=1)
    there = torch.zeros(2, 6, dtype=torch.bool)
    there[0, 2] = there[0, 5] = there[1, 1] = True
    out = replace_embeddings(embeddings, there, vectors)
    assert torch.equal(out[~there], embeddings[~there])
    assert torch.equal(out[there], vectors)
    with pytest.raises(ValueError, match="3 placeholders, but 2 vectors"):
        replace_embeddings(embeddings, there, vectors[:2])


def test_masks_of_boxes():
    boxes = torch.tensor([[0.0, 0.25, 0.5, 1.0], [0.75, 0.0, 1.0, 0.5]])
    inside = inside_boxes(boxes, 8, 16)
    assert inside.sum((1, 2)).tolist() == [6 * 8, 4 * 4]
    assert inside[0, 2:, :8].all()
    mask = location_mask(inside, 4, 8)
    assert mask.shape == (1, 4, 8)
    assert (
        mask[0].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]] * 1 + [[0, 0, 0, 0, 1, 1, 0, 0]] + [[0, 0, 0, 0, 1, 1, 1, 1]] * 2
    )


@pytest.mark.parametrize("kind", [BALANCED, L1])
def test_localisation_is_the_equation(kind):
    maps = random(2, 3, 4, 6, 9).softmax(-1)
    masks = torch.zeros(2, 2, 16, 24, dtype=torch.float64)
    masks[:, 0, 4:12, 0:8], masks[:, 1, 0:16, 16:24] = 1, 1
    words, there = torch.tensor([[3, 5], [7, 0]]), torch.tensor([[True, True], [True, False]])
    small = masks[:, :, ::4, ::4]
    expected = []
    for b in range(2):
        for h in range(3):
            losses = []
            for n in range(2):
                if there[b, n]:
                    a, m = maps[b, h, :, :, words[b, n]], small[b, n]
                    off, on = (a * (1 - m)).sum() / (1 - m).sum(), (a * m).sum() / m.sum()
                    losses.append(off - on if kind == BALANCED else (a - m).abs().mean())
            expected.append(sum(losses) / len(losses))
    exact = localisation_loss(maps, small, words, there, kind)
    torch.testing.assert_close(exact, sum(expected) / len(expected), rtol=3e-5, atol=0)
    resized = torch.nn.functional.interpolate(masks.float(), (4, 6), mode="bilinear", antialias=True)
    assert torch.equal(
        localisation_loss(maps, masks, words, there, kind), localisation_loss(maps, resized, words, there, kind)
    )
    assert localisation_loss(maps, masks, words, torch.zeros_like(there), kind) == 0


def test_three_way_guidance():
    nothing, image, text = (random(1, 4, 2, 2, seed=i) for i in range(3))
    torch.testing.assert_close(three_way(nothing, image, image, 1, 5), image)
    torch.testing.assert_close(three_way(nothing, image, text, 1, 1), text)
    torch.testing.assert_close(
        three_way(nothing, image, text, 1.5, 7.5), nothing * -0.5 + image * (1.5 - 7.5) + text * 7.5
    )
