"""Attention that weighs tokens and records its inputs, in every form that a block may call it."""

import pytest
import torch
import torch.nn.functional as F

from cropr_kernels.importance import AttentionInputs, importance
from cropr_kernels.models.blocks import SizeWeightedAttention

FORMS = {
    "plain": {},
    "scale": {"scale": 1.0},
    "causal": {"is_causal": True},
    "shared keys": {"enable_gqa": True},
    "boolean mask": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril(2)},
    "bias": {"attn_mask": torch.linspace(-1, 1, 36).view(1, 1, 6, 6)},
}


def logits_of(q, k, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(6, 6, dtype=torch.bool).tril()
    if attn_mask is None:
        return logits
    if attn_mask.dtype == torch.bool:
        return logits.masked_fill(~attn_mask, float("-inf"))
    return logits + attn_mask


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def form(request):
    return request.param


@pytest.fixture
def heads(form):
    num_keys = 2 if form.get("enable_gqa") else 4
    q, k, v = (
        torch.randn(2, 4, 6, 8),
        torch.randn(2, num_keys, 6, 8),
        torch.randn(2, num_keys, 6, 8),
    )
    return q, k, v


def test_sizes_are_added_to_the_logits(form, heads):
    q, k, v = heads
    log_sizes = torch.rand(2, 6)
    with SizeWeightedAttention(log_sizes):
        got = F.scaled_dot_product_attention(q, k, v, **form)
    weights = (logits_of(q, k, **form) + log_sizes[:, None, None]).softmax(-1)
    torch.testing.assert_close(got, weights @ v.repeat_interleave(4 // v.shape[1], 1))


def test_images_in_one_row_attend_apart(form, heads):
    q, k, v = heads
    packed = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in heads)
    with SizeWeightedAttention(None, num_images=2):
        got = F.scaled_dot_product_attention(*packed, **form)
    expected = F.scaled_dot_product_attention(q, k, v, **form)
    assert torch.equal(got, expected.transpose(0, 1).flatten(1, 2).unsqueeze(0))


def test_importance_is_that_of_the_weights(form, heads):
    q, k, v = heads
    with AttentionInputs() as attention:
        F.scaled_dot_product_attention(q, k, v, **form)
    got = importance(attention.inputs[0], 1, class_token=False)
    weights = logits_of(q, k, **form).softmax(-1)[:, :, 1:].mean((1, 2))[:, 1:]
    torch.testing.assert_close(got, weights / weights.sum(1, keepdim=True))


def test_rows_that_attend_together_weigh_the_tokens_of_all():
    q = torch.randn(2, 4, 12, 8)  # two images of two windows of 6 tokens
    log_sizes = torch.rand(4, 6)
    with SizeWeightedAttention(log_sizes):
        got = F.scaled_dot_product_attention(q, q, q)
    weights = (logits_of(q, q) + log_sizes.view(2, 1, 1, 12)).softmax(-1)
    torch.testing.assert_close(got, weights @ q)


def test_attention_over_other_tokens_is_refused():
    q = torch.randn(2, 4, 7, 8)
    with (
        SizeWeightedAttention(torch.rand(2, 6)),
        pytest.raises(ValueError, match="attention over 7 keys cannot weigh 6 tokens"),
    ):
        F.scaled_dot_product_attention(q, q, q)
