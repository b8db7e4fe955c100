"""`cropr doctor` passes correct ops and networks, and names every check that fails."""

import multiprocessing
import os
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.cases import slow_interpreted

from cropr_kernels.cli import __main__ as cli
from cropr_kernels.cli import doctor as doctoring
from cropr_kernels.cli.doctor import NETWORKS, checks, in_process, perform
from cropr_kernels.ops import NAMES, sample_inputs

CPU = torch.device("cpu")
ops = torch.ops.cropr


def plant(monkeypatch, op, wrong):
    """Replace an op by wrong(its function, args, kwargs)."""
    op_function = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *args, **kwargs: wrong(op_function, args, kwargs))


def doctor(capsys, *arguments):
    code = cli.main(["doctor", "--device", "cpu", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_device_that_passes_is_one_line(capsys):
    code, out, err = doctor(capsys)
    versions, device = out.splitlines()
    assert code == 0 and torch.__version__ in versions and "cpu_instruction_set" in versions
    assert (
        device.startswith("cpu, ")
        and device.endswith(f" {len(checks(CPU))} checks passed")
        and not err
    )
    assert {check.name for check in checks(CPU)} == {*NAMES, *NETWORKS}


def test_every_wrong_op_is_named_with_dtype_arguments_and_the_first_difference(monkeypatch, capsys):
    def last_row(op_function, args, kwargs):
        result = op_function(*args, **kwargs)
        if result.dtype == torch.bfloat16:
            result[1, -1, 3] += 1
        return result

    def forgets_idx(op_function, args, kwargs):
        if args[2] is None:
            raise ValueError("no idx")
        return op_function(*args, **kwargs)

    plant(monkeypatch, "gather", last_row)
    plant(monkeypatch, "rotate_", forgets_idx)
    code, out, err = doctor(capsys)
    failures = [line for line in out.splitlines() if line.startswith("cpu: ")]
    rotations = [
        f"cpu: rotate_, {dtype}, without idx:"
        for dtype in ("float32", "float64", "bfloat16", "float16")
    ]
    assert code == 1 and failures == ["cpu: gather, bfloat16:", *rotations]
    assert out.count("ValueError: no idx") == 4
    assert "result 0[1, 119, 3] is " in out and "(1 of 46080 are wrong)" in out
    assert err == f"cropr doctor: 5 of {len(checks(CPU))} checks failed\n"


def test_wrong_writes_to_arguments_are_differences(monkeypatch):
    writes = {"add_": 0, "gather": 0, "merge_": 3}  # x, x that is only read, sizes
    for op, position in writes.items():

        def writes_one_more(op_function, args, kwargs, position=position):
            result = op_function(*args, **kwargs)
            args[position].add_(1)
            return result

        plant(monkeypatch, op, writes_one_more)
    for op in writes:
        float32_checks = [
            check for check in checks(CPU) if check.dtype == torch.float32 and not check.plain
        ]
        [check] = [check for check in float32_checks if check.name == op]
        name = "sizes" if op == "merge_" else "x"
        assert perform(check, CPU).startswith(f"{name}[0, 0")


def test_another_dtype_or_shape_is_a_difference(monkeypatch):
    plant(
        monkeypatch,
        "scores",
        lambda op_function, args, kwargs: op_function(*args, **kwargs).to(args[0].dtype),
    )
    differences = {
        check.dtype: perform(check, CPU) for check in checks(CPU) if check.name == "scores"
    }
    assert differences.pop(torch.float32) == ""
    for difference in differences.values():
        assert "result 0 is torch" in difference and "not torch.float32 (2, 197)" in difference


def test_networks_with_wrong_logits_are_named(monkeypatch):
    plant(
        monkeypatch,
        "add_norm_",
        lambda op_function, args, kwargs: op_function(*args, **kwargs) * 1.5,
    )
    networks = [check for check in checks(CPU) if check.name in NETWORKS]
    assert len(networks) == 12
    assert all("logits differ by" in perform(check, CPU) for check in networks)


@slow_interpreted
@pytest.mark.kernels
@pytest.mark.parametrize("op", NAMES)
def test_kernels_of_every_backend_pass_the_checks(op, kernels, monkeypatch):
    if kernels.name == "compiled":
        pytest.skip("its results are those of C++")
    for name in NAMES:
        monkeypatch.setattr(ops, name, getattr(kernels, name))
    device = torch.device(kernels.device)
    as_integers = kernels.interpreted and op.startswith(
        ("attend", "merge", "parent_offsets", "ragged_nearest")
    )  # as Triton then multiplies
    for check in checks(device):
        if check.name == op and not (as_integers and check.dtype == torch.bfloat16):
            assert perform(check, device, sample_inputs.SIZES) == "", str(check)


def test_every_gpu_has_a_line_and_its_networks_run_as_graphs_too(monkeypatch, capsys):
    gpu = SimpleNamespace(name="A GPU", major=9, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)

    def planted_outcomes(device):
        failing = device == torch.device("cuda", 1)
        return (
            (check, "wrong" if failing and not check.plain and check.name in NETWORKS else "")
            for check in checks(device)
        )

    monkeypatch.setattr(doctoring, "outcomes", planted_outcomes)
    assert cli.main(["doctor", "--quiet"]) == 1
    _, cpu, first, *wrong, second = capsys.readouterr().out.splitlines()
    count = len(checks(CPU)) + len(NETWORKS) * 4
    assert cpu.endswith(f"{len(checks(CPU))} checks passed")
    assert first.startswith("cuda:0, A GPU, sm_90, 80 GB, CUDA ") and first.endswith(
        f"{count} checks passed"
    )
    assert "driver for CUDA " in second and second.endswith(f"12 of {count} checks failed")
    assert wrong[:2] == ["cuda:1: network, float32, CUDA graphs:", "    wrong"] and len(wrong) == 24


def ends_or_hangs(check, device):
    if check.name == "gather":
        os._exit(7)
    if check.name == "restore":
        time.sleep(600)
    return "wrong" if check.name == "select" else ""


def test_a_check_that_ends_or_hangs_its_process_is_named_and_the_next_one_gets_a_new_process(
    monkeypatch,
):
    named = {
        check.name: check
        for check in checks(CPU)
        if check.dtype == torch.float32 and not check.plain
    }
    # Without a GPU a wrong result ends the process too
    todo = [named[name] for name in ("scores", "select", "gather")]
    monkeypatch.setattr(doctoring, "checks", lambda device: todo)
    process = partial(in_process, perform=ends_or_hangs)
    monkeypatch.setattr(doctoring, "in_process", process)
    expected = ["", "wrong", "the process ended, with exit code 7"]
    assert list(doctoring.outcomes(torch.device("cuda"))) == list(zip(todo, expected))
    hanging = [named["restore"], named["scores"]]
    assert list(process(hanging, CPU, 1.0)) == [(hanging[0], "no answer in 1 s")]


@pytest.mark.parametrize("lost", [False, True])
def test_a_process_tells_whether_the_gpu_still_answers_after_a_failure(lost, monkeypatch):
    def synchronize(device):
        if lost:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    todo = [check for check in checks(CPU) if check.name in ("scores", "select")][:2]
    todo = [todo[0], next(check for check in checks(CPU) if check.name == "select")]
    receiver, sender = multiprocessing.Pipe()
    doctoring._serve(sender, todo, CPU, ends_or_hangs)
    assert [receiver.recv() for _ in range(3)] == ["started", ("", True), ("wrong", not lost)]


def test_without_a_driver_its_version_is_unknown(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(doctoring.ctypes, "CDLL", missing)
    assert doctoring._driver() == "unknown"
