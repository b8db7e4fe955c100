"""Recorded launches equal those of Triton. The driver is a mock: kernels are compiled and launched,
none runs."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers.cases import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")

if INTERPRETED or torch.cuda.is_available():
    pytest.skip("needs a process without a GPU that compiles kernels", allow_module_level=True)


from benchmarks.kernels.mock_driver import mock_cuda
from cropr_kernels.ops.extension import NAMES, replayed
from cropr_kernels.ops.sample_inputs import bare_call, legal_call
from cropr_kernels.ops.triton import launching
from cropr_kernels.ops.triton.scores import scores
from cropr_kernels.ops.validation import OPS

COMPUTE = ("attend", "attend_scores", "attend_backward")  # with PyTorch too: not recorded
SIZES = {"B": 2, "N": 37, "D": 48, "K": 23, "R": 14, "T": 29, "C": 8, "P": 40}


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    with mock_cuda(tmp_path_factory.mktemp("driver")) as driver:
        yield driver


def cases():
    for op in NAMES:
        yield pytest.param(op, torch.bfloat16, False, id=op)
        if OPS[op].optional:
            yield pytest.param(op, torch.float32, True, id=f"{op}, without optional arguments")


def call_of(op, dtype, bare=False):
    args = (bare_call if bare else legal_call)(op, dtype, **SIZES)
    if "query" in args:
        args["query"] = args["query"][0].float()  # as a deployed module holds it: folded
    return args


def addresses(tensors):
    return {tensor.data_ptr().to_bytes(8, "little") for tensor in tensors}


def outputs_of(result):
    return () if result is None else result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(("op", "dtype", "bare"), cases())
def test_recorded_launches_equal_those_of_triton(cuda, op, dtype, bare):
    args = call_of(op, dtype, bare)
    call = getattr(cuda.ops, op)
    with cuda.recording() as launched:
        results = [outputs_of(call(*args.values()))]
        first, was_replayed = list(launched), [replayed()]
        launched.clear()
        results.append(outputs_of(call(*args.values())))
        second = list(launched)
        was_replayed.append(replayed())
    assert first and was_replayed == [False, op not in COMPUTE]
    input_addresses = addresses(value for value in args.values() if isinstance(value, torch.Tensor))
    assert len(first) == len(second)
    for compiled, recorded in zip(first, second):
        assert compiled[:4] == recorded[:4]
        assert len(compiled.parameters) == len(recorded.parameters)
        for before, after in zip(compiled.parameters, recorded.parameters):
            if before == after:
                continue  # a number, an argument, or memory that was free again
            assert before not in input_addresses and len(before) == 8
            for old, new in zip(*results):
                assert (before in addresses([old])) == (after in addresses([new]))
    for old, new in zip(*results):
        assert old.shape == new.shape and old.dtype == new.dtype and old.stride() == new.stride()


def test_calls_that_differ_have_recorded_launches_of_their_own(cuda):
    """Another dtype, size, stride, alignment, number, or an argument left out: another
    recording."""
    x, q = torch.randn(3, 40, 48), torch.randn(48)
    storage = torch.randn(3 * 40 * 48 + 1)
    calls = [
        (x, q, 20),
        (x, q, 21),
        (x, q, 20, 1),
        (x, q, 20, 0, torch.zeros(3, 40, dtype=torch.int8)),
        (x.double(), q, 20),
        (x[:2], q, 20),
        (torch.randn(3, 80, 48)[:, ::2], q, 20),
        (torch.randn(3, 1100, 48), q, 20),
        (storage[:-1].view(3, 40, 48), q, 20),
        (storage[1:].view(3, 40, 48), q, 20),
    ]
    met = [[cuda.ops.prune(*args) is not None and replayed() for args in calls] for _ in range(2)]
    assert met[0] == [False] * 8 + [True, False]  # the last but one is like the first
    assert met[1] == [True] * 9 + [False]  # PyTorch copies the last, so that its rows are aligned


def test_norms_that_differ_have_recorded_launches_of_their_own(cuda):
    x, update, weight = torch.randn(2, 9, 48), torch.randn(2, 9, 48), torch.randn(48)
    kernels = []
    for rms in (False, True) * 2:
        with cuda.recording() as launched:
            cuda.ops.gather_norm(x, None, weight, None, 1e-6, rms)
            cuda.ops.add_norm_(x, None, update, None, weight, None, 1e-6, rms)
        kernels.append([launch.function for launch in launched])
    assert replayed()
    assert kernels[0] == kernels[2] and kernels[1] == kernels[3]
    assert not {*kernels[0]} & {*kernels[1]}


def test_a_scale_that_is_left_out_or_differs_has_recorded_launches_of_its_own(cuda):
    q, starts = torch.randn(9, 2, 16), torch.tensor([0, 4, 9])
    kernels = []
    for scale in (None, 0.5, 0.0) * 2:
        with cuda.recording() as launched:
            cuda.ops.attend_segments(q, q, q, starts, 9, None, scale)
        kernels.append([launch.function for launch in launched])
    assert replayed()
    assert kernels[:3] == kernels[3:] and len({*map(str, kernels)}) == 3


def test_aliased_arguments_are_told_apart(cuda):
    x, both = torch.randn(2, 9, 48), torch.randn(96)
    weight, bias = both[:48], both[48:]
    calls = [(weight, bias), (weight, weight), (bias, weight), (weight.clone(), bias.clone())]
    for args in calls * 2:
        cuda.ops.gather_norm(x, None, *args, 1e-6)
        with cuda.recording() as launched:
            cuda.ops.gather_norm(x, None, *args, 1e-6)
        assert replayed()
        parameters = [value for launch in launched for value in launch.parameters]
        assert all(tensor.data_ptr().to_bytes(8, "little") in parameters for tensor in args)


def test_a_replay_rejects_shared_memory(cuda):
    both, rows = torch.randn(3, 9, 48), torch.randn(2, 9, 48)
    x = both[:2]
    for _ in range(2):
        cuda.ops.add_(x, None, rows, None)
    assert replayed()
    # A second tensor at one address is new
    for update, is_replay in ((x.view(2, 9, 48), False), (both[1:], True)):
        with pytest.raises(
            RuntimeError, match="add_: update must not share memory with x, which changes in place"
        ):
            cuda.ops.add_(x, None, update, None)
        assert replayed() == is_replay


def test_a_replay_rejects_illegal_arguments(cuda):
    x, q = torch.randn(2, 9, 48), torch.randn(48)
    for _ in range(2):
        cuda.ops.prune(x, q, 5)
        with pytest.raises(
            RuntimeError, match=r"prune: num_keep must be in \[num_prefix, N\] = \[0, 9\], got 10"
        ):
            cuda.ops.prune(x, q, 10)


def test_threads_replay_side_by_side(cuda):
    x, q = torch.randn(2, 33, 48), torch.randn(48)
    cuda.ops.prune(x, q, 16)
    wrong = []

    def work():
        for i in range(300):
            results = cuda.ops.prune(x, q, 10 + i % 7)
            if [result.shape[1] for result in results] != [10 + i % 7] * 2 + [23 - i % 7] * 2:
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_replay_keeps_no_tensor_alive(cuda):
    x, q = torch.randn(2, 9, 48), torch.randn(48)
    for _ in range(3):
        kept, *_ = cuda.ops.prune(x, q, 5)
    assert [tensor._use_count() for tensor in (x, q, kept)] == [1, 1, 1]


def test_a_launcher_is_not_recorded_that_returns_an_argument_or_reads_another_tensor(
    cuda, monkeypatch
):
    x, q, other = torch.randn(2, 9, 48), torch.randn(48), torch.randn(2, 9, 48)
    recorded = []
    monkeypatch.setattr(launching, "keep_launches", lambda *recording: recorded.append(recording))
    assert launching.record(lambda x, q: x, (x, q)) is x and not recorded
    launching.record(lambda x, q: scores(other, q), (x, q))
    assert not recorded
    launching.record(scores, (x, q))
    assert len(recorded) == 1


def test_without_triton_an_op_on_cuda_tensors_says_so(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "cropr_kernels.ops.triton.launching", None)
    with pytest.raises(
        ImportError, match=r"cropr::scores: CUDA tensors need triton: pip install triton \("
    ):
        cuda.ops.scores(torch.randn(2, 11, 48), torch.randn(48))


def test_an_error_of_the_driver_is_raised(cuda):
    x, q = torch.randn(2, 9, 48), torch.randn(48)
    cuda.ops.prune(x, q, 6)
    cuda.library.mock_set_error(2)
    try:
        with pytest.raises(
            RuntimeError, match="cropr: a launch failed: an error of the mock driver"
        ):
            cuda.ops.prune(x, q, 6)
    finally:
        cuda.library.mock_set_error(0)


@pytest.mark.slow
def test_the_cost_of_launching_is_measured(tmp_path):
    """Run in a separate process, as the driver does; times depend on the machine, and are only
    printed."""
    out = tmp_path / "cost.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.kernels.launch_cost",
        "--rounds",
        "1",
        "--calls",
        "20",
        "--out",
        out,
    ]
    print(
        subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
        ).stdout
    )
    rows = json.loads(out.read_text())["rows"]
    ops = [
        "gather_norm",
        "add_norm_",
        "add_select_",
        "merge_",
        "parent_offsets_",
        "add_parents",
        "rotate_",
        "prune",
    ]
    assert {row["op"] for row in rows} == {*ops}
    assert all(row["plan"] > 0 and row["triton"] > 0 for row in rows)
