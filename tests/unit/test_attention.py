"""Decoupled cross-attention against the equation written out."""

import pytest
import torch
from pack.models.attention import decoupled_attention, image_attention


def plain(query, key, value, heads, bias=None):
    """softmax(Q K^T / sqrt(d) + bias) V, head by head, picture by picture."""
    d = query.shape[-1] // heads
    out = []
    for h in range(heads):
        q, k, v = (x[..., h * d : (h + 1) * d] for x in (query, key, value))
        logits = q @ k.transpose(-1, -2) / d**0.5
        out.append(torch.softmax(logits if bias is None else logits + bias, -1) @ v)
    return torch.cat(out, -1)


def tensors(batch=4, groups=2, n=6, t=5, c=16):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(*s, generator=g) for s in ((batch, n, c), (groups, t, c), (groups, t, c)))


def test_groups_share_their_tokens():
    query, key, value = tensors()
    out = image_attention(query, key, value, heads=4)
    for picture in range(4):
        group = picture // 2
        torch.testing.assert_close(
            out[picture], plain(query[picture], key[group], value[group], 4), rtol=1e-5, atol=1e-6
        )


def test_decoupled_attention_is_the_equation():
    query, key, value = tensors()
    text = torch.randn(4, 6, 16)
    mask = torch.rand(4, 6, 1)
    out = decoupled_attention(text, query, key, value, heads=4, weight=-0.5, mask=mask)
    expected = text - 0.5 * mask * image_attention(query, key, value, 4)
    torch.testing.assert_close(out, expected)


def test_weight_two_equals_the_token_twice():
    query, key, value = tensors(groups=1)
    bias = torch.tensor([[2.0, 1, 1, 1, 1]]).log()
    weighted = image_attention(query, key, value, 4, bias)
    doubled = image_attention(query, torch.cat((key[:, :1], key), 1), torch.cat((value[:, :1], value), 1), 4)
    torch.testing.assert_close(weighted, doubled, rtol=1e-5, atol=1e-6)


def test_minus_infinity_hides_padding():
    query, key, value = tensors(groups=1)
    bias = torch.tensor([[0.0, 0, 0, float("-inf"), float("-inf")]])
    torch.testing.assert_close(
        image_attention(query, key, value, 4, bias), image_attention(query, key[:, :3], value[:, :3], 4)
    )


def test_a_batch_that_does_not_divide_is_an_error():
    query, key, value = tensors(batch=3)
    with pytest.raises(ValueError, match="3 does not divide into 2"):
        image_attention(query, key, value, 4)
