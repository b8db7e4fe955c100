"""cropr::attend and its gradient, against float64."""

import pytest
import torch
from helpers.cases import DTYPES, odd_layouts, slow_interpreted, tokens

from cropr_kernels.ops import reference

pytestmark = pytest.mark.kernels

# (B, M, N, D)
SHAPES = [
    (2, 1, 17, 33),
    (1, 1, 1, 1),
    (3, 1, 50, 64),
    (2, 5, 17, 40),
    (1, 70, 66, 96),
    (2, 2, 1, 8),
    (0, 3, 4, 8),
]
WIDE = [(1, 1, 197, 1536), (1, 65, 40, 1536), (2, 1, 600, 24)]


def make(shape, dtype, device):
    batch, count, n, dim = shape
    x = tokens(batch, n, dim, dtype, device)
    queries = torch.randn(count, dim, device=device).to(dtype)
    grad = torch.randn(batch, count, dim, device=device).to(dtype)
    return x, queries, grad, dim**-0.5


def exact(x, queries, grad, scale):
    queries = queries.detach().double().requires_grad_()
    out = reference.attend(x.double(), queries, scale)
    out.backward(grad.double())
    return out.detach(), queries.grad


def pytorch(x, queries, grad, scale):
    """Return PyTorch's own attention and gradient, in the dtype of the inputs."""
    queries = queries.detach().requires_grad_()
    out = torch.softmax(scale * (queries @ x.transpose(1, 2)), -1) @ x
    out.backward(grad)
    return out.detach(), queries.grad


def skip_if_uninterpretable(backend, dtype, shape):
    if backend.interpreted and dtype == torch.bfloat16 and shape[1] > 1:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + WIDE)
def test_attend_is_at_most_twice_as_wrong_as_pytorch(backend, shape, dtype):
    skip_if_uninterpretable(backend, dtype, shape)
    x, queries, grad, scale = make(shape, dtype, backend.device)
    out, dq = backend.attend(x, queries, scale), backend.attend_backward(grad, x, queries, scale)
    assert out.dtype == dtype and out.shape == grad.shape and dq.dtype == queries.dtype
    for got, plain, true in zip(
        (out, dq), pytorch(x, queries, grad, scale), exact(x, queries, grad, scale)
    ):
        if true.numel() == 0:
            continue
        error, plain_error = ((value.double() - true).abs().max().item() for value in (got, plain))
        rounding = torch.finfo(dtype).eps * true.abs().max().item()
        # The oracle is float64 too
        assert error <= 2 * plain_error + (64 if dtype == torch.float64 else 1) * rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attend_scores_are_those_of_prune(backend, shape, dtype):
    skip_if_uninterpretable(backend, dtype, shape)
    x, queries, _, scale = make(shape, dtype, backend.device)
    for factor in (scale, -scale, 0.0):
        out, raw = backend.attend_scores(x, queries, factor)
        assert torch.equal(out, backend.attend(x, queries, factor))
        assert raw.dtype == torch.float32 and raw.shape == x.shape[:2]
        torch.testing.assert_close(raw, backend.scores(x, queries), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_query_attends_in_every_dtype(kernels, dtype):
    x, queries, grad, scale = make((2, 1, 11, 24), dtype, kernels.device)
    got = kernels.attend(x, queries, scale), kernels.attend_backward(grad, x, queries, scale)
    for value, true in zip(got, exact(x, queries, grad, scale)):
        torch.testing.assert_close(value, true.to(dtype))


def test_huge_logits_do_not_overflow(backend):
    x = 100 * tokens(1, 20, 64, torch.float32, backend.device)
    queries = torch.randn(3, 64, device=backend.device)
    queries[0] = x[0, 0]  # the highest logit is the first
    for q in (queries, queries[:1]):
        torch.testing.assert_close(
            backend.attend(x, q, 1.0), reference.attend(x.double(), q, 1.0).float()
        )


def test_attend_takes_float32_queries_over_half_precision_tokens(backend):
    for dtype in (torch.bfloat16, torch.float16):
        for count in (1, 4):
            skip_if_uninterpretable(
                backend, dtype, (1, 1 if backend.interpreted and count == 1 else count)
            )
            x, queries, grad, scale = make((2, count, 30, 48), dtype, backend.device)
            out = backend.attend(x, queries.float(), scale)
            dq = backend.attend_backward(grad, x, queries.float(), scale)
            assert out.dtype == dtype and dq.dtype == torch.float32
            true_out, true_dq = exact(x, queries, grad, scale)
            torch.testing.assert_close(out.double(), true_out, rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(dq.double(), true_dq, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("count", [1, 3])
def test_every_layout_gives_the_same_values(kernels, count):
    x, queries, grad, scale = make((2, count, 21, 34), torch.float32, kernels.device)
    expected = kernels.attend(x, queries, scale), kernels.attend_backward(grad, x, queries, scale)
    for name, view in odd_layouts(x).items():
        got = (
            kernels.attend(view, queries, scale),
            kernels.attend_backward(grad, view, queries, scale),
        )
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, msg=name)
    strided = kernels.attend(x, queries.t().contiguous().t(), scale)
    torch.testing.assert_close(strided, expected[0])


@slow_interpreted
@pytest.mark.parametrize("count", [1, 3])
def test_every_run_gives_the_same_bits(kernels, count):
    x, queries, grad, scale = make((4, count, 150, 40), torch.float32, kernels.device)
    first = kernels.attend(x, queries, scale), kernels.attend_backward(grad, x, queries, scale)
    for _ in range(2 if kernels.interpreted else 20):
        assert torch.equal(first[0], kernels.attend(x, queries, scale))
        assert torch.equal(first[1], kernels.attend_backward(grad, x, queries, scale))


def test_small_scratch_gives_the_same_result(kernels, monkeypatch):
    """Images go through the scratch buffer a few at a time; the result does not depend on their
    number."""
    if kernels.name == "cpp":
        pytest.skip("the C++ kernel always takes one image at a time")
    from cropr_kernels.ops.triton import attend as module

    x, queries, grad, scale = make((3, 4, 20, 32), torch.float32, kernels.device)
    full = kernels.attend(x, queries, scale), kernels.attend_backward(grad, x, queries, scale)
    monkeypatch.setattr(module, "_SCRATCH_BYTES", 1)
    parts = kernels.attend(x, queries, scale), kernels.attend_backward(grad, x, queries, scale)
    for a, b in zip(parts, full):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 5])
def test_autocast_does_not_change_the_result(kernels, count, dtype):
    """Regression: matrix products on autocast's list came back in 16 bits, and were read as 32."""
    skip_if_uninterpretable(kernels, dtype, (2, count))
    x, queries, grad, scale = make((2, count, 17, 40), dtype, kernels.device)

    def results():
        outputs = [*kernels.attend_scores(x, queries, scale), kernels.attend(x, queries, scale)]
        return [*outputs, kernels.attend_backward(grad, x, queries, scale)]

    expected = results()
    with torch.autocast(kernels.device, dtype=torch.bfloat16):
        assert all(map(torch.equal, results(), expected))
