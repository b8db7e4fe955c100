"""cropr::attend_segments, against dense attention image by image in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import INTERPRETED, MATRIX_DTYPES, same_bits, slow_interpreted
from torch.utils.flop_counter import FlopCounterMode

ops = torch.ops.cropr
pytestmark = pytest.mark.kernels
without_triton = pytest.mark.skipif(INTERPRETED, reason="runs no Triton kernel")

# (tokens of each image, H, C)
SHAPES = [
    ((1,), 1, 1),
    ((5, 1, 9), 2, 16),
    ((0, 17, 0, 0, 3, 0), 1, 8),
    ((65, 64), 2, 64),
    ((130, 33), 1, 80),
    ((), 2, 16),
    ((0, 0), 2, 16),
    ((20, 7), 1, 33),
    ((9, 21), 1, 256),
]
COUNTS = (17, 1, 0, 66)


def make(shape, dtype=torch.float32, device="cpu"):
    """Return q, k, v as views of one projection (T, 3, H, C), starts and log sizes."""
    counts, heads, width = shape
    starts = torch.tensor([0, *itertools.accumulate(counts)], device=device)
    qkv = torch.randn(sum(counts), 3, heads, width, device=device).to(dtype)
    return (*qkv.unbind(1), starts), 3 * torch.rand(sum(counts), device=device)


def dense(q, k, v, starts, log_sizes=None, scale=None):
    """Attend image by image with PyTorch, in the dtype of the inputs."""
    heads = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    parts = [heads[0][:, :, :0]]
    for begin, end in itertools.pairwise(starts.tolist()):
        if begin < end:
            image = [x[:, :, begin:end] for x in heads]
            mask = None if log_sizes is None else log_sizes[begin:end].to(q.dtype)[None, None, None]
            parts.append(F.scaled_dot_product_attention(*image, attn_mask=mask, scale=scale))
    return torch.cat(parts, 2)[0].transpose(0, 1)


def exact(q, k, v, *args):
    return dense(q.double(), k.double(), v.double(), *args)


def longest_of(shape):
    return max(shape[0], default=0)


@pytest.mark.parametrize("has_sizes", [False, True])
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_at_most_twice_as_wrong_as_dense_attention(backend, shape, dtype, has_sizes):
    args, log_sizes = make(shape, dtype, backend.device)
    log_sizes = log_sizes if has_sizes else None
    got = backend.attend_segments(*args, longest_of(shape), log_sizes)
    assert got.dtype == dtype and got.shape == args[0].shape and got.is_contiguous()
    true, plain = exact(*args, log_sizes), dense(*args, log_sizes)
    if true.numel() == 0:
        return
    error, plain_error = ((value.double() - true).abs().max().item() for value in (got, plain))
    rounding = torch.finfo(dtype).eps * true.abs().max().item()
    assert error <= 2 * plain_error + (64 if dtype == torch.float64 else 2) * rounding


def test_the_scale_may_be_given(backend):
    args, log_sizes = make((COUNTS, 1, 24), device=backend.device)
    for scale in (0.7, 0.0, -0.3):
        got = backend.attend_segments(*args, max(COUNTS), log_sizes, scale)
        torch.testing.assert_close(got, exact(*args, log_sizes, scale).float())


def test_a_token_of_size_s_weighs_as_much_as_s_equal_tokens(kernels):
    (q, k, v, starts), _ = make(((9, 5), 2, 16), device=kernels.device)
    sizes = torch.tensor([1, 2, 1, 4, 1, 1, 3, 1, 1, 2, 1, 1, 5, 1], device=kernels.device)
    got = kernels.attend_segments(q, k, v, starts, 9, sizes.float().log())
    many = [x.repeat_interleave(sizes, 0) for x in (q, k, v)]
    ends = sizes.cumsum(0)
    bounds = torch.stack([ends[0] * 0, ends[8], ends[13]])
    torch.testing.assert_close(
        got.repeat_interleave(sizes, 0), kernels.attend_segments(*many, bounds, int(ends[13]))
    )


def test_large_logits_and_sizes_do_not_overflow(backend):
    (q, k, v, starts), _ = make((COUNTS, 2, 16), device=backend.device)
    log_sizes = torch.linspace(-3e4, 3e4, len(q), device=backend.device)
    got = backend.attend_segments(100 * q, k, v, starts, max(COUNTS), log_sizes)
    torch.testing.assert_close(got, exact(100 * q, k, v, starts, log_sizes).float())


@pytest.mark.filterwarnings("ignore:All-NaN")  # of the interpreter
def test_a_nan_stays_in_its_image(backend):
    args, log_sizes = make(((6, 40, 33), 1, 16), device=backend.device)
    expected = backend.attend_segments(*args, 40, log_sizes)
    for i in range(3):
        bad = [x.clone() for x in args[:3]]
        bad[i][6:46] = float("nan")
        got = backend.attend_segments(*bad, args[3], 40, log_sizes)
        assert same_bits(got[:6], expected[:6]) and same_bits(got[46:], expected[46:])
        assert got[6:46].isnan().all()


def test_an_image_alone_and_in_a_batch_gives_the_same_bits(kernels):
    (q, k, v, starts), log_sizes = make(((20, 70, 33), 2, 16), device=kernels.device)
    together = kernels.attend_segments(q, k, v, starts, 70, log_sizes)
    for begin, end in itertools.pairwise(starts.tolist()):
        image = [x[begin:end] for x in (q, k, v)]
        bounds = torch.tensor([0, end - begin], device=kernels.device)
        alone = kernels.attend_segments(*image, bounds, end - begin, log_sizes[begin:end])
        assert same_bits(alone, together[begin:end])


def test_every_layout_gives_the_same_values(kernels):
    (q, k, v, starts), log_sizes = make((COUNTS, 2, 16), device=kernels.device)
    longest = max(COUNTS)
    expected = kernels.attend_segments(q, k, v, starts, longest, log_sizes)
    layouts = {
        "contiguous": [x.contiguous() for x in (q, k, v)],
        "heads first": [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)],
        "channels first": [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)],
        "mixed": [q.contiguous(), k, v.transpose(0, 1).contiguous().transpose(0, 1)],
    }
    for name, heads in layouts.items():
        got = kernels.attend_segments(*heads, starts, longest, log_sizes)
        torch.testing.assert_close(got, expected, msg=name)
    twice = torch.stack([log_sizes, log_sizes], 1)[:, 0]
    every_other = torch.stack([starts, starts], 1)[:, 0]
    got = kernels.attend_segments(q, k, v, every_other, longest, twice)
    assert same_bits(got, expected)


def test_one_key_for_all_heads_may_be_expanded(kernels):
    (q, k, v, starts), _ = make((COUNTS, 3, 16), device=kernels.device)
    k, v = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
    torch.testing.assert_close(
        kernels.attend_segments(q, k, v, starts, max(COUNTS)), exact(q, k, v, starts).float()
    )


def test_longest_may_be_more_than_every_image_has(kernels):
    args, log_sizes = make((COUNTS, 2, 16), device=kernels.device)
    expected = kernels.attend_segments(*args, max(COUNTS), log_sizes)
    assert same_bits(kernels.attend_segments(*args, sum(COUNTS), log_sizes), expected)


@slow_interpreted
def test_every_run_gives_the_same_bits(kernels):
    args, log_sizes = make((COUNTS, 2, 40), device=kernels.device)
    first = kernels.attend_segments(*args, max(COUNTS), log_sizes)
    for _ in range(2 if kernels.interpreted else 20):
        assert same_bits(first, kernels.attend_segments(*args, max(COUNTS), log_sizes))


@without_triton
def test_the_number_of_threads_does_not_change_the_bits():
    args, log_sizes = make(((130, 1, 0, 97), 3, 40))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(ops.attend_segments(*args, 130, log_sizes))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_does_not_change_the_result(kernels, dtype):
    args, log_sizes = make((COUNTS, 2, 16), dtype, kernels.device)
    expected = kernels.attend_segments(*args, max(COUNTS), log_sizes)
    with torch.autocast(kernels.device, dtype=torch.bfloat16):
        assert same_bits(kernels.attend_segments(*args, max(COUNTS), log_sizes), expected)


def test_rows_after_the_last_image_are_not_read_on_cuda(kernels):
    """A caller may round the number of rows up, so that recorded launches fit more batches."""
    if kernels.name in ("cpp", "compiled"):
        pytest.skip("the C++ kernel raises")
    (q, k, v, starts), log_sizes = make(((9, 5, 3), 2, 16), device=kernels.device)
    expected = kernels.attend_segments(q[:14], k[:14], v[:14], starts[:3], 9, log_sizes[:14])
    for x in (q, k, v, log_sizes):
        x[14:] = float("nan")
    got = kernels.attend_segments(q, k, v, starts[:3], 17, log_sizes)
    assert same_bits(got[:14], expected)


def test_starts_out_of_range_read_and_write_nothing_on_cuda(kernels):
    if kernels.name in ("cpp", "compiled"):
        pytest.skip("the C++ kernel raises")
    (q, k, v, starts), _ = make(((9, 5), 2, 16), device=kernels.device)
    wrong = torch.tensor([-20, 9, 1 << 40], device=kernels.device)
    got = kernels.attend_segments(q, k, v, wrong, 14)
    torch.testing.assert_close(got, exact(q, k, v, starts).float())


@without_triton
@pytest.mark.parametrize(
    ("starts", "longest", "message"),
    [
        ([1, 9], 9, r"starts must ascend from 0 to T = 9, got 1 at 0"),
        ([0, 5, 4, 9], 9, r"starts must ascend from 0 to T = 9, got 4 at 2"),
        ([0, 10], 9, r"starts must ascend from 0 to T = 9, got 10 at 1"),
        ([0, 5], 9, r"starts must end with T = 9, got 5"),
        ([0], 9, r"starts must end with T = 9, got 0"),
        ([0, 3, 9], 5, r"longest must be at least 6, the tokens of image 1, got 5"),
    ],
)
def test_starts_are_checked_on_a_cpu(starts, longest, message):
    (q, k, v, _), _ = make(((9,), 2, 8))
    with pytest.raises(RuntimeError, match=f"attend_segments: {message}"):
        ops.attend_segments(q, k, v, torch.tensor(starts), longest)


def test_without_a_start_it_raises(kernels):
    (q, k, v, starts), _ = make(((), 2, 8), device=kernels.device)
    with pytest.raises(RuntimeError, match=r"starts must hold at least 0, got shape \(0,\)"):
        kernels.attend_segments(q, k, v, starts[:0], 0)


@without_triton
def test_flops_are_exact_where_starts_can_be_read_and_those_of_the_longest_elsewhere():
    args, log_sizes = make(((3, 5), 2, 8))
    with FlopCounterMode(display=False) as counter:
        ops.attend_segments(*args, 6, log_sizes)
    assert counter.get_total_flops() == 4 * (9 + 25) * 2 * 8
    with FlopCounterMode(display=False) as counter:
        ops.attend_segments(*(x.to("meta") for x in args), 6, log_sizes.to("meta"))
    assert counter.get_total_flops() == 4 * 8 * 6 * 2 * 8


@without_triton
def test_it_compiles_to_one_graph_without_recompiling():
    torch._dynamo.reset()

    def step(q, k, v, starts, log_sizes):
        return 2 * ops.attend_segments(q, k, v, starts, q.shape[0], log_sizes)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")

    def compare(*counts):
        args, log_sizes = make((counts, 2, 16))
        assert torch.equal(step(*args, log_sizes), compiled(*args, log_sizes))

    compare(20, 11, 6, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        compare(3, 31, 17)
        compare(5, 44, 40, 7)
