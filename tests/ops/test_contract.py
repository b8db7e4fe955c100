"""The contract of every op: opcheck, fakes, gradients, compilation, FLOPs, autocast, and errors."""

import inspect

import pytest
import torch
from helpers.cases import DTYPES, illegal_calls, legal_call, tokens
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from cropr_kernels import ops as typed
from cropr_kernels.ops import NAMES
from cropr_kernels.ops.sample_inputs import bare_call

ops = torch.ops.cropr
ATTEND = ("attend", "attend_scores", "attend_backward")


GRADIENT = {"x", "scores", "kept", "pruned", "queries"}


def split_inputs(dtype=torch.float32, grad=False):
    x = tokens(2, 9, 6, dtype, "cpu").requires_grad_(grad)
    with torch.no_grad():
        kept, kept_idx, pruned, pruned_idx = ops.prune(x, torch.randn(6), 4, 1)
    return x, [kept.requires_grad_(grad), kept_idx, pruned.requires_grad_(grad), pruned_idx]


def sample(name, dtype=torch.float32, grad=False):
    """Return the arguments of a legal call; with grad, tensors require a gradient if the op has
    one."""
    args = legal_call(name, dtype)
    for argument in (
        GRADIENT & set(args) if grad and not name.endswith(("_", "norm", "backward")) else ()
    ):
        if not (argument == "x" and name.startswith("attend")) and args[argument].dtype == dtype:
            args[argument].requires_grad_()
    return tuple(args.values())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_op_passes_opcheck(name, grad):
    torch.library.opcheck(getattr(ops, name).default, sample(name, grad=grad))


@pytest.mark.parametrize("name", NAMES)
def test_optional_tensors_may_be_left_out(name):
    args = bare_call(name)
    schema = getattr(ops, name).default._schema
    optional = {
        argument.name for argument in schema.arguments if str(argument.type) == "Optional[Tensor]"
    }
    assert optional == {argument for argument, value in args.items() if value is None}
    torch.library.opcheck(getattr(ops, name).default, tuple(args.values()))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"attend_backward"}))
def test_the_typed_function_equals_the_op(name):
    function, schema = getattr(typed, name), getattr(ops, name).default._schema
    parameters = inspect.signature(function).parameters
    assert list(parameters) == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        default = parameters[argument.name].default
        assert (default is inspect.Parameter.empty) != argument.has_default_value()
        assert not argument.has_default_value() or default == argument.default_value
    assert function.__doc__
    args = legal_call(name)
    copies = {
        key: value.clone() if torch.is_tensor(value) else value for key, value in args.items()
    }
    got, expected = function(**args), getattr(ops, name)(**copies)
    assert (got is None) == (expected is None)
    for a, b in zip(*(part if isinstance(part, tuple) else (part,) for part in (got, expected))):
        assert a is None or torch.equal(a, b)
    assert all(
        torch.equal(args[key], value) for key, value in copies.items() if torch.is_tensor(value)
    )


def test_prune_passes_opcheck_on_permuted_and_empty_inputs():
    x = torch.randn(6, 9, 2).permute(2, 1, 0).requires_grad_()
    torch.library.opcheck(ops.prune.default, (x, torch.randn(6), 4, 1))
    torch.library.opcheck(ops.prune.default, (torch.randn(0, 9, 6), torch.randn(6), 4, 1))
    torch.library.opcheck(ops.prune.default, (torch.randn(2, 9, 6), torch.randn(6), 9, 1))
    torch.library.opcheck(ops.prune.default, (x, torch.randn(6), 4, 1, torch.rand(9, 2).t() > 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_fake_result_looks_like_the_real_one(name, dtype):
    args = sample(name, dtype)
    real = getattr(ops, name)(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake_args = [
            mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args
        ]
        fake = getattr(ops, name)(*fake_args)
    assert (real is None) == (fake is None)
    pair = (real, fake) if isinstance(real, tuple) else ((real,), (fake,))
    if real is None:
        return
    for a, b in zip(*pair):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


# Gradients


def test_prune_passes_gradient_to_the_rows_only():
    x, query = (
        tokens(2, 7, 5, torch.float64, "cpu").requires_grad_(),
        torch.randn(5, dtype=torch.float64),
    )
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
    for queries, asks in ((query.detach(), False), (query, True)):
        results = ops.attend_scores(x, queries.unsqueeze(0), 1.0)
        assert [result.requires_grad for result in results] == [asks, False]
    targets, candidates = ops.select(torch.randn(2, 7), 4)
    sizes = torch.ones(2, 7, requires_grad=True)
    assert not any(
        result.requires_grad for result in ops.merge(x.detach(), targets, candidates, sizes, 5)
    )


def test_attend_reads_tokens_as_detached():
    x, queries = torch.randn(2, 7, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    ops.attend(x, queries, 0.5).sum().backward()
    assert x.grad is None
    assert queries.grad.abs().sum() > 0


def test_gradients_match_finite_differences():
    x, parts = split_inputs(torch.float64, grad=True)
    query = torch.randn(6, dtype=torch.float64)
    priority = torch.randint(-1, 2, (2, 9), dtype=torch.int8)
    sizes = torch.randint(1, 5, (2, 9)).float()
    kept, pruned = parts[0].detach().requires_grad_(), parts[2].detach().requires_grad_()
    for check in (gradcheck, gradgradcheck):
        assert check(lambda x: ops.prune(x, query, 4, 1, priority)[::2], (x,))
        assert check(
            lambda kept, pruned: ops.restore(kept, parts[1], pruned, parts[3]), (kept, pruned)
        )
        assert check(lambda x: ops.gather(x, torch.tensor([[1, 1], [0, 8]])), (x,))
        assert check(lambda x: ops.merge(x, parts[1], parts[3], sizes, 6, 1)[0], (x,))
    for count in (1, 3):
        queries = torch.randn(count, 6, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda q: ops.attend(x.detach(), q, 0.4), (queries,))


# torch.compile


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_prune_and_restore_compile_to_one_graph_without_recompiling(compiler):
    torch._dynamo.reset()

    def step(x, query, num_keep):
        kept, kept_idx, pruned, pruned_idx = ops.prune(x * 2, query, num_keep, 1)
        return ops.restore(kept + 1, kept_idx, pruned, pruned_idx)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
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


FLOPS = {
    "scores": 2 * 2 * 9 * 6,
    "prune": 2 * 2 * 9 * 6,
    "attend": 4 * 2 * 3 * 9 * 6,
    "attend_scores": 4 * 2 * 3 * 9 * 6,
    "attend_backward": 6 * 2 * 3 * 9 * 6,
    "add_select_": 2 * 2 * 4 * 6,
    "merge": 2 * 2 * 4 * 5 * 6,
    "merge_": 2 * 2 * 4 * 5 * 6,
    "parent_offsets": 2 * 2 * 4 * 5 * 6,
    "parent_offsets_": 2 * 2 * 4 * 5 * 6,
    "ragged_add_select_": 2 * 13 * 6,
    "ragged_nearest": 2 * 3 * (13 - 2 * 3) * 6,
    "attend_segments": 4 * (2 * 2 + 2 * 2) * 3 * 5,
}


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_of_the_products(name):
    with FlopCounterMode(display=False) as counter:
        getattr(ops, name)(*sample(name))
    assert getattr(ops, name) in flop_registry
    assert counter.get_total_flops() == FLOPS.get(name, 0)


# Autograd

IN_PLACE = tuple(name for name in NAMES if name.endswith("_"))


@pytest.mark.parametrize("name", [*IN_PLACE, "gather_norm", "attend_segments"])
def test_ops_without_a_gradient_reject_tensors_that_require_one(name):
    args = legal_call(name)
    for argument, value in args.items():
        if torch.is_tensor(value) and value.is_floating_point():
            call = args | {argument: value.clone().requires_grad_()}
            with pytest.raises(
                RuntimeError,
                match=f"{name}: {argument} must not require a gradient, as the op has none",
            ):
                getattr(ops, name)(*call.values())
            with torch.no_grad():
                getattr(ops, name)(*call.values())


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_change_in_place_invalidates_tensors_saved_for_backward(name):
    args, weight = legal_call(name), torch.ones((), requires_grad=True)
    for argument in getattr(ops, name).default._schema.arguments:
        if argument.alias_info is None or not args[argument.name].is_floating_point():
            continue
        product = (weight * args[argument.name]).sum()
        getattr(ops, name)(*args.values())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    versions = {key: value._version for key, value in args.items() if torch.is_tensor(value)}
    with torch.inference_mode():  # tensors from outside have versions there too
        getattr(ops, name)(*args.values())
    written = {"x", "parent", "sizes" if "merge_" in name else "cost_scale"}
    assert all(
        (args[key]._version > version) == (key in written) for key, version in versions.items()
    )


# Errors


@pytest.mark.kernels
@pytest.mark.parametrize("name", IN_PLACE)
def test_tensors_that_change_in_place_must_share_no_memory(kernels, name):
    args = legal_call(name)
    x = args["x"] = args["x"].to(kernels.device)
    args = {
        key: value.to(kernels.device) if torch.is_tensor(value) else value
        for key, value in args.items()
    }
    same = {
        key: value
        for key, value in args.items()
        if torch.is_tensor(value) and value.dtype == x.dtype and key != "x"
    }
    for key, value in same.items():
        if value.numel() <= x.numel():
            call = args | {key: x.flatten()[-value.numel() :].view(value.shape)}
            with pytest.raises(
                RuntimeError,
                match=f"{name}: {key} must not share memory with x, which changes in place",
            ):
                getattr(kernels, name)(*call.values())
    # One storage, different parts of it
    beside = torch.zeros(2 * x.numel(), dtype=x.dtype, device=x.device)
    for key, value in [item for item in same.items() if item[1].numel() <= x.numel()][:1]:
        apart = {
            "x": beside[: x.numel()].view(x.shape),
            key: beside[x.numel() :][: value.numel()].view(value.shape),
        }
        getattr(kernels, name)(*(args | apart).values())


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", ["merge", "merge_", "parent_offsets", "parent_offsets_"])
def test_lists_of_positions_must_ascend(name, which):
    args = legal_call(name)
    argument = [key for key in args if key.endswith("_idx")][which]
    args[argument] = args[argument].flip(1)
    with pytest.raises(
        RuntimeError, match=rf"{name}: {argument} must be ascending, got \d+ before \d+ in image 0"
    ):
        getattr(ops, name)(*args.values())


def both_errors(kernels, name, args):
    """Return the first line of the errors that the kernel and the fake raise."""
    args = [arg.to(kernels.device) if isinstance(arg, torch.Tensor) else arg for arg in args]
    with pytest.raises(RuntimeError) as real:
        getattr(kernels, name)(*args)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(RuntimeError) as fake:
        getattr(ops, name)(
            *[mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        )
    return [str(error.value).partition("\n")[0] for error in (real, fake)]


@pytest.mark.kernels
@pytest.mark.parametrize("name", NAMES)
def test_kernel_and_fake_raise_the_same_error_for_every_argument(kernels, name):
    for args, argument in illegal_calls(name):
        real, fake = both_errors(kernels, name, args.values())
        assert real == fake
        assert real.startswith(f"{name}: {argument} must "), real
        assert ", got " in real, real


def error_cases():
    """Return an illegal call and its error for each check: of the table of ops, and beyond it."""

    def call(name, **changes):
        return name, tuple((legal_call(name) | changes).values())

    x, idx = torch.zeros(2, 9, 6), torch.arange(4).expand(2, -1)
    return [
        (
            *call("prune", num_keep=10),
            "prune: num_keep must be in [num_prefix, N] = [1, 9], got 10",
        ),
        (*call("prune", num_keep=0), "prune: num_keep must be in [num_prefix, N] = [1, 9], got 0"),
        (*call("prune", num_prefix=-1), "prune: num_prefix must be in [0, N] = [0, 9], got -1"),
        (
            *call("add_select_", num_keep=5),
            "add_select_: num_keep must be in [num_prefix, K] = [1, 4], got 5",
        ),
        (*call("merge", num_keep=3), "merge: num_keep must be in [T, T + C] = [4, 9], got 3"),
        (*call("prune", x=x[0]), "prune: x must have shape (B, N, D), got (9, 6)"),
        (
            *call("prune", query=x[0, 0, :5]),
            "prune: query must have shape (D = 6,) or (M, D = 6), got (5,)",
        ),
        (
            *call("prune", x=x.long()),
            "prune: x must be float32, float64, bfloat16 or float16, got int64",
        ),
        (*call("select", priority=x[..., 0]), "select: priority must be int8 or bool, got float32"),
        (*call("gather", idx=idx[0]), "gather: idx must have shape (B = 2, K), got (4,)"),
        (*call("gather", idx=idx.int()), "gather: idx must be int64, got int32"),
        (*call("split", scores=x[..., 0].double()), "split: scores must be float32, got float64"),
        (
            *call("restore", pruned=x[:, :5].half()),
            "restore: pruned must be the dtype of the first tensor, float32, got float16",
        ),
        (
            *call("add_", update=x),
            "add_: update must have shape (B = 2, K = 4, D = 6), got (2, 9, 6)",
        ),
        (
            *call("add_", x=x.transpose(0, 1).contiguous().transpose(0, 1)),
            "add_: x must be contiguous, as it changes in place, got strides (6, 12, 1)",
        ),
        (
            *call("rotate_", table=torch.zeros(8, 6)),
            "rotate_: table must have shape (P, 2 C = 12), got (8, 6)",
        ),
        (
            *call("rotate_", x=torch.zeros(2, 4, 6, 3).transpose(2, 3)),
            "rotate_: x must have a stride of 1 in the last dimension, as it changes in place, "
            "got strides (72, 18, 1, 3)",
        ),
        (
            *call("rotate_", x=torch.zeros(2, 4, 3, 5), table=torch.zeros(8, 10)),
            "rotate_: x must have an even number of channels, got 5",
        ),
        (
            *call("rotate_", table=torch.zeros(2, 12), idx=None),
            "rotate_: table must have a row for each of the 3 patches, got 2",
        ),
        *(
            (
                *call(name, x=x[:, :0]),
                f"{name}: x must have at least one token, got shape (2, 0, 6)",
            )
            for name in ATTEND
        ),
        (
            *call("merge", num_prefix=4),
            "merge: target_idx must hold a token after the prefix, got T = num_prefix = 4",
        ),
        (
            *call("merge_", num_prefix=4),
            "merge_: target_idx must hold a token after the prefix, got T = num_prefix = 4",
        ),
        *(
            (
                *call(name, num_prefix=4),
                f"{name}: kept_idx must hold a token after the prefix, got K = num_prefix = 4",
            )
            for name in ("parent_offsets", "parent_offsets_")
        ),
        *(
            (
                *call(name, starts=torch.tensor([0, 13])),
                f"{name}: starts must have shape (B + 1 = 3,), got (2,)",
            )
            for name in NAMES
            if name.startswith("ragged_")
        ),
        (
            *call("ragged_merge_", num_kept=14),
            "ragged_merge_: num_kept must be in [0, T] = [0, 13], got 14",
        ),
        (
            *call("merge", candidate_idx=torch.arange(5, 9).expand(2, -1)),
            "merge: target_idx and candidate_idx must together hold N = 9 positions, got 4 + 4",
        ),
    ]


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "args", "message"), error_cases())
def test_an_error_says_what_was_allowed_and_what_came(kernels, name, args, message):
    assert both_errors(kernels, name, args) == [message, message]


def test_positions_that_do_not_exist_or_repeat_raise():
    x, parts = split_inputs()
    kept, kept_idx, pruned, pruned_idx = parts
    with pytest.raises(RuntimeError, match=r"gather: idx must hold positions in \[0, 9\), got 9"):
        ops.gather(x, torch.full((2, 1), 9))
    with pytest.raises(RuntimeError, match=r"gather: idx must hold positions in \[0, 9\), got -1"):
        ops.gather(x, torch.full((2, 1), -1))
    with pytest.raises(
        RuntimeError, match=r"restore: .* each position in \[0, 9\) once, got 9 in image 0"
    ):
        ops.restore(kept, kept_idx.clone().fill_(9), pruned, pruned_idx)
    with pytest.raises(
        RuntimeError, match=r"gather_norm: idx must hold positions in \[0, 9\), got 9"
    ):
        ops.gather_norm(x.detach(), torch.full((2, 1), 9), None, None, 1e-6)
    with pytest.raises(
        RuntimeError, match=r"rotate_: idx must hold positions in \[1, 4\) after the prefix, got 4"
    ):
        ops.rotate_(torch.zeros(1, 2, 1, 2), torch.zeros(3, 4), torch.tensor([[0, 4]]), 1)
    with pytest.raises(
        RuntimeError, match=r"merge: target_idx and .* position in \[0, 9\) once, got 9 in image 0"
    ):
        ops.merge(x, kept_idx.clone().fill_(9), pruned_idx, torch.ones(2, 9), 6)
    twice = kept_idx.clone()
    twice[1, 1] = twice[1, 0]
    with pytest.raises(RuntimeError, match=r"once, got \d twice in image 1"):
        ops.restore(kept, twice, pruned, pruned_idx)
    with pytest.raises(RuntimeError, match=r"merge: .* once, got \d twice in image 1"):
        ops.merge(x, twice, pruned_idx, torch.ones(2, 9), 6)


def test_tensors_on_different_devices_raise():
    x, query = torch.zeros(2, 9, 6), torch.zeros(6)
    with pytest.raises(
        RuntimeError, match="query must be on the same device as the other tensors, meta, got cpu"
    ):
        ops.prune(x.to("meta"), query, 4)
    with pytest.raises(RuntimeError, match="queries must be on the same device"):
        ops.attend(x.to("meta"), query.unsqueeze(0), 1.0)


def test_the_dispatcher_rejects_wrong_argument_types():
    with pytest.raises((TypeError, RuntimeError), match="num_keep"):
        ops.prune(torch.zeros(1, 3, 2), torch.zeros(2), 1.5)
    with pytest.raises((TypeError, RuntimeError), match="num_keep"):
        ops.prune(torch.zeros(1, 3, 2), torch.zeros(2))
