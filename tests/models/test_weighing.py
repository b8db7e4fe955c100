"""Attention that weighs tokens and records its inputs, in every form that a block may call it."""

import pytest
import torch
import torch.nn.functional as F

from cropr_kernels.importance import AttentionInputs, importance
from cropr_kernels.models.blocks import Segments, SizeWeightedAttention, proportional_attention

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


@pytest.mark.parametrize("masked", [False, True])
def test_sizes_are_added_to_the_padding_of_multihead_attention(masked):
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True).train()
    x = torch.randn(2, 6, 16)
    log_sizes = torch.rand(2, 6)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[:, 4:] = masked
    with SizeWeightedAttention(log_sizes):
        got, _ = attention(x, x, x, key_padding_mask=padding if masked else None)
    expected, _ = attention(x, x, x, key_padding_mask=log_sizes.masked_fill(padding, float("-inf")))
    torch.testing.assert_close(got, expected)


def test_images_in_one_row_attend_apart(form, heads):
    q, k, v = heads
    packed = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in heads)
    with SizeWeightedAttention(None, num_images=2):
        got = F.scaled_dot_product_attention(*packed, **form)
    expected = F.scaled_dot_product_attention(q, k, v, **form)
    assert torch.equal(got, expected.transpose(0, 1).flatten(1, 2).unsqueeze(0))


COUNTS = (6, 1, 9)


@pytest.fixture
def segments():
    return Segments(torch.tensor([0, 6, 7, 16]), 9)


def apart(heads, log_sizes=None, scale=None):
    """Attend image by image."""
    parts = [x.split(COUNTS, 2) for x in heads]
    sizes = [None] * 3 if log_sizes is None else log_sizes.split(COUNTS, 1)
    return torch.cat(
        [
            proportional_attention(*image, log_sizes=part, scale=scale)
            for *image, part in zip(*parts, sizes)
        ],
        2,
    )


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("has_sizes", [False, True])
def test_images_of_different_counts_in_one_row_attend_apart(segments, has_sizes, scale):
    heads = torch.randn(3, 1, 4, 16, 8).unbind()
    log_sizes = torch.rand(1, 16) if has_sizes else None
    calls = []
    with torch.no_grad(), SizeWeightedAttention(log_sizes, calls, segments=segments):
        got = F.scaled_dot_product_attention(*heads, scale=scale)
    torch.testing.assert_close(got, apart(heads, log_sizes, scale))
    assert calls == [True]


def test_images_of_different_counts_attend_under_autocast(segments):
    q, k, v = torch.randn(3, 1, 4, 16, 8).unbind()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with SizeWeightedAttention(None, segments=segments):
            got = F.scaled_dot_product_attention(q, k, v.bfloat16())
        torch.testing.assert_close(got, apart((q, k, v)), rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_a_block_of_another_library_attends_within_images(segments):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0).eval()
    x, log_sizes = torch.randn(1, 16, 192), torch.rand(1, 16)
    with SizeWeightedAttention(log_sizes, segments=segments):
        got = model.blocks[0](x)
    for image, sizes, part in zip(*(y.split(COUNTS, 1) for y in (x, log_sizes, got))):
        with SizeWeightedAttention(sizes):
            torch.testing.assert_close(part, model.blocks[0](image))


def refused_calls():
    q = torch.randn(1, 4, 16, 8)
    mask = torch.ones(16, 16, dtype=torch.bool)
    multihead = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    reason = "takes no mask, dropout, causal order or shared keys"
    attend = F.scaled_dot_product_attention
    return {
        "mask": (lambda: attend(q, q, q, mask), reason),
        "causal": (lambda: attend(q, q, q, is_causal=True), reason),
        "shared keys": (lambda: attend(q, q[:, :2], q[:, :2], enable_gqa=True), reason),
        "dropout": (lambda: attend(q, q, q, dropout_p=0.1), reason),
        "multihead": (lambda: multihead(q[0], q[0], q[0]), "got multi_head_attention_forward"),
        "softmax": (lambda: (q @ q.transpose(2, 3)).softmax(-1) @ q, "got softmax"),
    }


@pytest.mark.parametrize(("call", "message"), refused_calls().values(), ids=refused_calls())
def test_attention_that_cannot_pack_images_is_refused(segments, call, message):
    with (
        torch.no_grad(),
        SizeWeightedAttention(None, segments=segments),
        pytest.raises(ValueError, match=f"cropr: .*images of different counts .*{message}"),
    ):
        call()


def test_other_numbers_of_keys_than_the_images_have_are_refused(segments):
    q = torch.randn(1, 4, 15, 8)
    with torch.no_grad(), SizeWeightedAttention(None, segments=segments):
        with pytest.raises(RuntimeError, match="starts must ascend from 0 to T = 15"):
            F.scaled_dot_product_attention(q, q, q)
        with pytest.raises(RuntimeError, match=r"q must have shape \(T, H, C\)"):
            F.scaled_dot_product_attention(*[q.expand(2, -1, -1, -1)] * 3)


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
