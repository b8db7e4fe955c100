"""What the dispatcher promises: opcheck, fakes, gradients, compilation, FLOPs, autocast, and every refusal."""

import pytest
import torch
from helpers.cases import DTYPES, tokens
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

ops = torch.ops.cropr


def split_inputs(dtype=torch.float32, grad=False):
    x = tokens(2, 9, 6, dtype, "cpu").requires_grad_(grad)
    with torch.no_grad():
        kept, kept_idx, pruned, pruned_idx = ops.prune(x, torch.randn(6), 4, 1)
    return x, [kept.requires_grad_(grad), kept_idx, pruned.requires_grad_(grad), pruned_idx]


def samples(dtype=torch.float32, grad=False):
    """One legal call of every op."""
    x, parts = split_inputs(dtype, grad)
    query, queries = torch.randn(6, dtype=dtype), torch.randn(3, 6, dtype=dtype).requires_grad_(grad)
    return {
        "scores": (x, queries),
        "select": (torch.randn(2, 9, dtype=dtype).requires_grad_(grad), 4, 1, torch.rand(2, 9) > 0.5),
        "prune": (x, query, 4, 1),
        "split": (x, torch.randn(2, 9), 4, 1, torch.randint(-1, 2, (2, 9), dtype=torch.int8)),
        "gather": (x, parts[1]),
        "restore": tuple(parts),
        "attend": (x.detach(), queries, 0.4),
        "attend_scores": (x.detach(), queries, 0.4),
        "attend_backward": (torch.randn(2, 3, 6, dtype=dtype), x.detach(), queries.detach(), 0.4),
        "merge": (x, parts[1], parts[3], torch.tensor([[1.0, 3.0, 2.0]]).repeat(2, 3), 6, None, 1),
        **stream_samples(dtype),
    }


def stream_samples(dtype=torch.float32):
    """The engine's ops have no gradient: inference only."""
    x, idx = tokens(2, 9, 6, dtype, "cpu"), torch.tensor([[0, 2, 3, 5], [0, 1, 7, 8]])
    gamma, weight, bias = torch.randn(3, 6, dtype=dtype)
    update = torch.randn(2, 4, 6, dtype=dtype)
    return {
        "gather_norm": (x, idx, weight, bias, 1e-6),
        "add_": (x, idx, update, gamma),
        "add_norm_": (x, None, torch.randn(2, 9, 6, dtype=dtype), None, weight, None, 1e-6),
        "add_select_": (
            x, idx, update, gamma, torch.randn(6), 3, 1, torch.rand(2, 9) + 1, 2.0,
            torch.randint(-1, 2, (2, 9), dtype=torch.int8),
        ),
        "merge_": (
            x, idx, torch.tensor([[1, 8], [2, 3]]), torch.rand(2, 9) + 1, torch.arange(9).repeat(2, 1),
            5, 1,
        ),
        "rotate_": (torch.randn(2, 4, 3, 6, dtype=dtype), torch.randn(8, 12), idx, 1),
    }  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", samples())
def test_opcheck(name, grad):
    torch.library.opcheck(getattr(ops, name).default, samples(grad=grad)[name])


def test_opcheck_on_permuted_and_empty_inputs():
    x = torch.randn(6, 9, 2).permute(2, 1, 0).requires_grad_()
    torch.library.opcheck(ops.prune.default, (x, torch.randn(6), 4, 1))
    torch.library.opcheck(ops.prune.default, (torch.randn(0, 9, 6), torch.randn(6), 4, 1))
    torch.library.opcheck(ops.prune.default, (torch.randn(2, 9, 6), torch.randn(6), 9, 1))
    torch.library.opcheck(ops.prune.default, (x, torch.randn(6), 4, 1, torch.rand(9, 2).t() > 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", samples())
def test_fake_result_looks_like_the_real_one(name, dtype):
    args = samples(dtype)[name]
    real = getattr(ops, name)(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake_args = [mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        fake = getattr(ops, name)(*fake_args)
    assert (real is None) == (fake is None)
    pair = (real, fake) if isinstance(real, tuple) else ((real,), (fake,))
    if real is None:
        return
    for a, b in zip(*pair):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


# Gradients


def test_prune_passes_gradient_to_the_rows_only():
    x, query = tokens(2, 7, 5, torch.float64, "cpu").requires_grad_(), torch.randn(5, dtype=torch.float64)
    query.requires_grad_()
    kept, kept_idx, pruned, _pruned_idx = ops.prune(x, query, 3, 1)
    (kept.sum() + 2 * pruned.sum()).backward()
    expected = torch.full_like(x, 2.0).scatter(1, kept_idx.unsqueeze(-1).expand_as(kept), 1.0)
    assert torch.equal(x.grad, expected)
    assert query.grad is None
    assert not kept_idx.requires_grad


def test_outputs_without_gradient_do_not_ask_for_it():
    x, query = torch.randn(2, 7, 5), torch.randn(5, requires_grad=True)
    assert not ops.prune(x, query, 3)[0].requires_grad
    assert not ops.scores(x.requires_grad_(), query).requires_grad
    assert not ops.attend(x, query.detach().unsqueeze(0), 1.0).requires_grad


def test_attend_reads_tokens_as_detached():
    x, queries = torch.randn(2, 7, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    ops.attend(x, queries, 0.5).sum().backward()
    assert x.grad is None
    assert queries.grad.abs().sum() > 0


def test_gradients_match_finite_differences():
    x, parts = split_inputs(torch.float64, grad=True)
    query = torch.randn(6, dtype=torch.float64)
    priority = torch.randint(-1, 2, (2, 9), dtype=torch.int8)
    prune = lambda x: ops.prune(x, query, 4, 1, priority)[::2]  # noqa: E731
    restore = lambda kept, pruned: ops.restore(kept, parts[1], pruned, parts[3])  # noqa: E731
    gather = lambda x: ops.gather(x, torch.tensor([[1, 1], [0, 8]]))  # noqa: E731
    kept, pruned = parts[0].detach().requires_grad_(), parts[2].detach().requires_grad_()
    for check in (gradcheck, gradgradcheck):
        assert check(prune, (x,))
        assert check(restore, (kept, pruned))
        assert check(gather, (x,))
        sizes = torch.randint(1, 5, (2, 9)).float()
        merge = lambda x: ops.merge(x, parts[1], parts[3], sizes, 6, features, 1)[0]  # noqa: E731, B023
        features = torch.randn(2, 9, 5)
        assert check(merge, (x,))
    for count in (1, 3):
        queries = torch.randn(count, 6, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda q: ops.attend(x.detach(), q, 0.4), (queries,))


# torch.compile


def test_compiles_whole_with_dynamic_shapes_and_without_recompiling():
    torch._dynamo.reset()

    def step(x, query, num_keep):
        kept, kept_idx, pruned, pruned_idx = ops.prune(x * 2, query, num_keep, 1)
        return ops.restore(kept + 1, kept_idx, pruned, pruned_idx)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    query = torch.randn(16)

    def compare(batch, n, num_keep):
        x = torch.randn(batch, n, 16, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        plain, fast = step(x, query, num_keep), compiled(y, query, num_keep)
        torch.testing.assert_close(plain, fast)
        plain.square().sum().backward()
        fast.square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)

    compare(2, 20, 11)
    with torch.compiler.set_stance("fail_on_recompile"):
        compare(3, 31, 17)
        compare(5, 44, 40)


def test_autocast_leaves_scores_in_float32_and_rows_in_their_dtype():
    x, query = torch.randn(2, 9, 6), torch.randn(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.scores(x, query), ops.scores(x, query))
        assert ops.scores(x, query).dtype == torch.float32
        assert ops.prune(x, query, 4)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("scores", 2 * 2 * 9 * 6),
        ("prune", 2 * 2 * 9 * 6),
        ("select", 0),
        ("split", 0),
        ("attend_scores", 4 * 2 * 3 * 9 * 6),
        ("gather", 0),
        ("restore", 0),
        ("attend", 4 * 2 * 3 * 9 * 6),
        ("attend_backward", 6 * 2 * 3 * 9 * 6),
        ("gather_norm", 0),
        ("add_", 0),
        ("add_norm_", 0),
        ("add_select_", 2 * 2 * 4 * 6),
        ("merge", 2 * 2 * 4 * 5 * 6),
        ("merge_", 2 * 2 * 4 * 2 * 6),
        ("rotate_", 0),
    ],
)
def test_flops(name, flops):
    args = samples()[name]
    with FlopCounterMode(display=False) as counter:
        getattr(ops, name)(*args)
    assert counter.get_total_flops() == flops


# Refusals


def bad_calls():
    x, query = torch.zeros(2, 9, 6), torch.zeros(6)
    idx4, idx5 = torch.arange(4).expand(2, -1), torch.arange(4, 9).expand(2, -1)
    kept, pruned, queries = x[:, :4], x[:, 4:], torch.zeros(3, 6)
    return [
        ("prune", (x, query, 10, 1), r"prune: num_keep must be in \[num_prefix, N\] = \[1, 9\], got 10"),
        ("prune", (x, query, 0, 1), r"prune: num_keep must be in \[num_prefix, N\] = \[1, 9\], got 0"),
        ("prune", (x, query, 4, -1), r"prune: num_prefix must be in \[0, N\] = \[0, 9\], got -1"),
        ("prune", (x, query, 9, 10), r"prune: num_prefix must be in \[0, N\] = \[0, 9\], got 10"),
        ("prune", (x[0], query, 4), r"prune: x must have shape \(B, N, D\), got \(9, 6\)"),
        ("prune", (x, query[:5], 4), r"prune: query must have shape \(D = 6,\) or \(M, D = 6\), got \(5,\)"),
        ("prune", (x, x, 4), r"prune: query must have shape \(D = 6,\) or \(M, D = 6\), got \(2, 9, 6\)"),
        ("prune", (x.long(), query, 4), r"prune: x must be float32, float64, bfloat16 or float16, got int64"),
        ("prune", (x, query.int(), 4), r"prune: query must be float32, float64, bfloat16 or float16, got int32"),
        ("scores", (x[0], query), r"scores: x must have shape \(B, N, D\), got \(9, 6\)"),
        ("scores", (x, query[:2]), r"scores: query must have shape \(D = 6,\) or \(M, D = 6\), got \(2,\)"),
        ("select", (x, 4), r"select: scores must have shape \(B, N\), got \(2, 9, 6\)"),
        ("select", (x[0].bool(), 4), r"select: scores must be float32, float64, bfloat16 or float16, got bool"),
        ("select", (x[0], 7), r"select: num_keep must be in \[num_prefix, N\] = \[0, 6\], got 7"),
        ("split", (x, x[..., 0].double(), 4), r"split: scores must be float32, got float64"),
        ("split", (x, x[:1, :, 0], 4), r"split: scores must have shape \(B = 2, N = 9\), got \(1, 9\)"),
        ("split", (x, x[..., 0], 10), r"split: num_keep must be in \[num_prefix, N\] = \[0, 9\], got 10"),
        (
            "select",
            (x[..., 0], 4, 1, torch.zeros(2, 9)),
            r"select: priority must be int8 or bool, got float32",
        ),
        (
            "prune",
            (x, query, 4, 1, torch.zeros(2, 4, dtype=torch.bool)),
            r"prune: priority must have shape \(B = 2, N = 9\), got \(2, 4\)",
        ),
        (
            "split",
            (x, x[..., 0], 4, 1, torch.zeros(9, dtype=torch.int8)),
            r"split: priority must have shape \(B = 2, N = 9\), got \(9,\)",
        ),
        ("attend_scores", (x, query, 1.0), r"attend_scores: queries must have shape \(M, D = 6\), got \(6,\)"),
        ("gather", (x[0], idx4), r"gather: x must have shape \(B, N, D\), got \(9, 6\)"),
        ("gather", (x, idx4[0]), r"gather: idx must have shape \(B = 2, K\), got \(4,\)"),
        ("gather", (x, idx4.int()), r"gather: idx must be int64, got int32"),
        ("gather", (x, idx4[:1]), r"gather: idx must have shape \(B = 2, K\), got \(1, 4\)"),
        ("restore", (kept[0], idx4, pruned, idx5), r"restore: kept must have shape \(B, K, D\), got \(4, 6\)"),
        ("restore", (kept, idx4.float(), pruned, idx5), r"restore: kept_idx must be int64, got float32"),
        (
            "restore",
            (kept, idx4[:, :3], pruned, idx5),
            r"restore: kept_idx must have shape \(B = 2, K = 4\), got \(2, 3\)",
        ),
        (
            "restore",
            (kept, idx4, pruned[..., :5], idx5),
            r"restore: pruned must have shape \(B = 2, R, D = 6\), got \(2, 5, 5\)",
        ),
        (
            "restore",
            (kept, idx4, pruned.half(), idx5),
            r"restore: pruned must be the dtype of the first tensor, float32, got float16",
        ),
        ("attend", (x[0], queries, 1.0), r"attend: x must have shape \(B, N, D\), got \(9, 6\)"),
        ("attend", (x, query, 1.0), r"attend: queries must have shape \(M, D = 6\), got \(6,\)"),
        ("attend", (x, queries[:, :2], 1.0), r"attend: queries must have shape \(M, D = 6\), got \(3, 2\)"),
        ("attend", (x[:, :0], queries, 1.0), r"attend: x must have at least one token, got shape \(2, 0, 6\)"),
        (
            "attend_backward",
            (x, x, queries, 1.0),
            r"attend_backward: grad_out must have shape \(B = 2, M = 3, D = 6\), got \(2, 9, 6\)",
        ),
        *bad_stream_calls(),
        *bad_merge_calls(),
    ]


def bad_merge_calls():
    x, sizes, parent = torch.zeros(2, 9, 6), torch.ones(2, 9), torch.arange(9).repeat(2, 1)
    safe, others = torch.arange(4).expand(2, -1), torch.arange(4, 9).expand(2, -1)
    there = (x, safe, others, sizes, parent)
    return [
        ("merge", (x[0], safe, others, sizes, 6), r"merge: x must have shape \(B, N, D\), got \(9, 6\)"),
        ("merge", (x.int(), safe, others, sizes, 6), r"merge: x must be float32, float64, bfloat16 or float16, got"),
        ("merge", (x, safe[0], others, sizes, 6), r"merge: safe_idx must have shape \(B = 2, S\), got \(4,\)"),
        ("merge", (x, safe, others.int(), sizes, 6), r"merge: candidate_idx must be int64, got int32"),
        ("merge", (x, safe, others[:1], sizes, 6), r"merge: candidate_idx must have shape \(B = 2, C\), got"),
        ("merge", (x, safe, others, sizes.double(), 6), r"merge: sizes must be float32, got float64"),
        (
            "merge",
            (x, safe, others, sizes[:, 1:], 6),
            r"merge: sizes must have shape \(B = 2, N = 9\), got \(2, 8\)",
        ),
        ("merge", (x, safe, others, sizes, 3), r"merge: num_keep must be in \[S, S \+ C\] = \[4, 9\], got 3"),
        ("merge", (x, safe, others, sizes, 10), r"merge: num_keep must be in \[S, S \+ C\] = \[4, 9\], got 10"),
        (
            "merge",
            (x, safe, others, sizes, 6, x[:, 1:]),
            r"merge: features must have shape \(B = 2, N = 9, F\), got \(2, 8",
        ),
        (
            "merge",
            (x, safe, others, sizes, 6, x[0]),
            r"merge: features must have shape \(B = 2, N = 9, F\), got \(9, 6\)",
        ),
        ("merge", (x, safe, others, sizes, 6, None, 5), r"merge: num_prefix must be in \[0, S\] = \[0, 4\], got 5"),
        (
            "merge",
            (x, safe, others, sizes, 6, None, 4),
            r"merge: safe_idx must hold a token behind the prefix to merge into, got S = num_prefix = 4",
        ),
        (
            "merge",
            (x, safe, others[:, 1:], sizes, 6),
            r"merge: safe_idx and candidate_idx must together hold N = 9 positions, got 4 \+ 4",
        ),
        ("merge_", (x.transpose(0, 1).contiguous().transpose(0, 1), *there[1:], 6), r"merge_: x must be contiguous"),
        ("merge_", (*there[:3], sizes.t().contiguous().t(), *there[4:], 6), r"merge_: sizes must be contiguous"),
        (
            "merge_",
            (*there[:4], parent.int(), 6),
            r"merge_: parent must be int64, got int32",
        ),
        ("merge_", (*there[:4], parent[:1], 6), r"merge_: parent must have shape \(B = 2, N = 9\), got \(1, 9\)"),
        ("merge_", (*there[:4], parent.t().contiguous().t(), 6), r"merge_: parent must be contiguous, as it changes"),
    ]


def bad_stream_calls():
    x, query, vector = torch.zeros(2, 9, 6), torch.zeros(6), torch.zeros(5)
    idx, update = torch.arange(4).expand(2, -1), torch.zeros(2, 4, 6)
    qk, table = torch.zeros(2, 4, 3, 6), torch.zeros(8, 12)
    choose = (x, idx, update, None, query)
    return [
        ("gather_norm", (x[0], None, None, None, 1e-6), r"gather_norm: x must have shape \(B, N, D\), got \(9, 6\)"),
        ("gather_norm", (x, idx.int(), None, None, 1e-6), r"gather_norm: idx must be int64, got int32"),
        ("gather_norm", (x, idx[0], None, None, 1e-6), r"gather_norm: idx must have shape \(B = 2, K\), got \(4,\)"),
        (
            "gather_norm",
            (x, None, vector, None, 1e-6),
            r"gather_norm: weight must have shape \(D = 6,\), got \(5,\)",
        ),
        (
            "gather_norm",
            (x, None, None, query.int(), 1e-6),
            r"gather_norm: bias must be float32, float64, bfloat16 or float16, got int32",
        ),
        ("add_", (x.transpose(0, 1), None, x, None), r"add_: x must be contiguous, as it changes in place"),
        ("add_", (x, idx[:1], update, None), r"add_: idx must have shape \(B = 2, K\), got \(1, 4\)"),
        (
            "add_",
            (x, idx, x, None),
            r"add_: update must have shape \(B = 2, K = 4, D = 6\), got \(2, 9, 6\)",
        ),
        ("add_", (x, idx, update, vector), r"add_: gamma must have shape \(D = 6,\), got \(5,\)"),
        (
            "add_norm_",
            (x, idx, update.long(), None, None, None, 1e-6),
            r"add_norm_: update must be float32, float64, bfloat16 or float16, got int64",
        ),
        ("add_norm_", (x, idx, update, None, vector, None, 1e-6), r"add_norm_: weight must have shape \(D = 6,\)"),
        ("add_select_", (*choose, 5), r"add_select_: num_keep must be in \[num_prefix, K\] = \[0, 4\], got 5"),
        ("add_select_", (*choose, 1, 2), r"add_select_: num_keep must be in \[num_prefix, K\] = \[2, 4\], got 1"),
        (
            "add_select_",
            (*choose[:4], vector, 3),
            r"add_select_: query must have shape \(D = 6,\) or \(M, D = 6\), got \(5,\)",
        ),
        (
            "add_select_",
            (*choose, 3, 1, torch.ones(2, 4), 1.0),
            r"add_select_: sizes must have shape \(B = 2, N = 9\), got \(2, 4\)",
        ),
        (
            "add_select_",
            (*choose, 3, 1, None, 0.0, torch.zeros(2, 4, dtype=torch.int8)),
            r"add_select_: priority must have shape \(B = 2, N = 9\), got \(2, 4\)",
        ),
        ("rotate_", (x, table, idx), r"rotate_: x must have shape \(B, K, H, C\), got \(2, 9, 6\)"),
        ("rotate_", (qk[..., :5], table[:, :10], idx), r"rotate_: x must have an even number of channels, got 5"),
        (
            "rotate_",
            (qk, table[:, :6], idx),
            r"rotate_: table must have shape \(P, 2 C = 12\), got \(8, 6\)",
        ),
        ("rotate_", (qk, table, idx, 5), r"rotate_: num_prefix must be in \[0, K\] = \[0, 4\], got 5"),
        ("rotate_", (qk, table[:2], None, 1), r"rotate_: table must have a row for each of the 3 patches, got 2"),
        (
            "rotate_",
            (qk, table, idx[:, :3]),
            r"rotate_: idx must have shape \(B = 2, K = 4\), got \(2, 3\)",
        ),
        (
            "rotate_",
            (qk.transpose(2, 3).contiguous().transpose(2, 3), table, idx),
            r"rotate_: x must have a stride of 1 in the last dimension",
        ),
    ]


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "args", "message"), bad_calls())
def test_bad_input_is_refused_in_the_same_sentence_everywhere(kernels, name, args, message):
    args = [arg.to(kernels.device) if isinstance(arg, torch.Tensor) else arg for arg in args]
    with pytest.raises(RuntimeError, match=message) as real:
        getattr(kernels, name)(*args)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(RuntimeError) as fake:
        getattr(ops, name)(*[mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args])
    assert str(real.value).partition("\n")[0] == str(fake.value).partition("\n")[0]  # torch adds where it was raised


def test_positions_that_do_not_exist_or_repeat_are_refused():
    x, parts = split_inputs()
    kept, kept_idx, pruned, pruned_idx = parts
    with pytest.raises(RuntimeError, match=r"gather: idx must hold positions in \[0, 9\), got 9"):
        ops.gather(x, torch.full((2, 1), 9))
    with pytest.raises(RuntimeError, match=r"gather: idx must hold positions in \[0, 9\), got -1"):
        ops.gather(x, torch.full((2, 1), -1))
    with pytest.raises(RuntimeError, match=r"restore: .* each position in \[0, 9\) once, got 9 in image 0"):
        ops.restore(kept, kept_idx.clone().fill_(9), pruned, pruned_idx)
    with pytest.raises(RuntimeError, match=r"gather_norm: idx must hold positions in \[0, 9\), got 9"):
        ops.gather_norm(x.detach(), torch.full((2, 1), 9), None, None, 1e-6)
    with pytest.raises(RuntimeError, match=r"rotate_: idx must hold positions in \[1, 4\) behind the prefix, got 4"):
        ops.rotate_(torch.zeros(1, 2, 1, 2), torch.zeros(3, 4), torch.tensor([[0, 4]]), 1)
    with pytest.raises(RuntimeError, match=r"merge: safe_idx and .* position in \[0, 9\) once, got 9 in image 0"):
        ops.merge(x, kept_idx.clone().fill_(9), pruned_idx, torch.ones(2, 9), 6)
    twice = kept_idx.clone()
    twice[1, 1] = twice[1, 0]
    with pytest.raises(RuntimeError, match=r"once, got \d twice in image 1"):
        ops.restore(kept, twice, pruned, pruned_idx)
    with pytest.raises(RuntimeError, match=r"merge: .* once, got \d twice in image 1"):
        ops.merge(x, twice, pruned_idx, torch.ones(2, 9), 6)


def test_tensors_on_different_devices_are_refused():
    x, query = torch.zeros(2, 9, 6), torch.zeros(6)
    with pytest.raises(RuntimeError, match="query must be on the same device as the other tensors, meta, got cpu"):
        ops.prune(x.to("meta"), query, 4)
    with pytest.raises(RuntimeError, match="queries must be on the same device"):
        ops.attend(x.to("meta"), query.unsqueeze(0), 1.0)


def test_wrong_argument_types_are_refused_by_the_dispatcher():
    with pytest.raises((TypeError, RuntimeError), match="num_keep"):
        ops.prune(torch.zeros(1, 3, 2), torch.zeros(2), 1.5)
    with pytest.raises((TypeError, RuntimeError), match="num_keep"):
        ops.prune(torch.zeros(1, 3, 2), torch.zeros(2))
