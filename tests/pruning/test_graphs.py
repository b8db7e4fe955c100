"""CUDA graphs of a function: captures and the order of streams, on a torch.cuda that records its
calls."""

import copy
from collections import OrderedDict

import pytest
import torch
from helpers.graphs import CountingGraphs, RecordedCuda

from cropr_kernels.pruning.graphs import Captured, GraphPool, Graphs

pytestmark = pytest.mark.usefixtures("two_threads")


def test_graphs_are_bounded_and_results_are_copies():
    graphs = CountingGraphs(2)

    def double(x):
        return x * 2

    first = graphs(double, (torch.ones(3),), "a")
    second = graphs(double, (torch.full((3,), 5.0),), "a")
    assert first.tolist() == [2.0] * 3 and second.tolist() == [10.0] * 3
    assert graphs.captures == 1
    graphs(double, (torch.ones(1),), "b")
    graphs(double, (torch.ones(3),), "a")
    graphs(double, (torch.ones(2),), "c")  # "b" is the least recently used
    assert list(graphs.captured) == ["a", "c"] and graphs.captures == 3
    assert copy.deepcopy(graphs).captured == OrderedDict()
    with pytest.raises(ValueError, match="capacity must be >= 1, got 0"):
        Graphs(0)


def test_there_is_room_again_once_a_graph_was_not_used_for_long():
    graphs = CountingGraphs(1, patience=3)
    assert graphs.has_room()
    graphs(torch.neg, (torch.ones(1),), "a")
    assert [graphs.has_room() for _ in range(5)] == [False, False, False, True, True]
    graphs(torch.neg, (torch.ones(1),), "a")
    assert not graphs.has_room()
    impatient = CountingGraphs(1)
    impatient(torch.neg, (torch.ones(1),), "a")
    assert impatient.has_room() and copy.deepcopy(graphs).patience == 3


def test_capture_warms_up_on_a_stream_of_its_own_without_autograd_or_casts_that_outlive_it(
    monkeypatch,
):
    cuda = RecordedCuda(monkeypatch)

    def run(x):
        cache = "cached" if torch.is_autocast_cache_enabled() else "uncached"
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        cuda.note(
            f"runs, casts {cache}, {torch.get_autocast_dtype('cpu')} "
            f"{torch.is_autocast_enabled('cpu')}, {mode}"
        )
        return x * 2

    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        captured = Captured(run, (torch.ones(1),), GraphPool())
    runs = "runs, casts uncached, torch.bfloat16 True, (False, False)"
    assert cuda.log == [
        "caller's: enters cpu",
        "stream 1: waits for caller's",
        f"stream 1: {runs}",
        f"stream 1: {runs}",
        "caller's: waits for stream 1",
        "stream 1: captures, thread_local, in pool 1",
        f"stream 1: {runs}",
        "stream 1: has captured",
        "caller's: leaves cpu",
    ]
    captured((torch.ones(1),))  # static inputs are written outside inference mode too
    Captured(run, (torch.ones(1),), captured.pool)
    assert torch.is_autocast_cache_enabled() and "torch.bfloat16 False" in cuda.log[-3]


def test_the_graphs_of_a_device_share_stream_and_memory(monkeypatch):
    cuda, graphs = RecordedCuda(monkeypatch), Graphs(2)
    for key in "ab":
        graphs(torch.neg, (torch.ones(1),), key)
    graphs.pools["another"] = graphs.pools.pop(torch.device("cpu"))
    graphs(torch.neg, (torch.ones(1),), "c")
    captures = [line for line in cuda.log if " captures" in line]
    assert captures == [f"stream {i}: captures, thread_local, in pool {i}" for i in (1, 1, 2)]
    assert (
        cuda.log.count("caller's: waits for the record") == cuda.log.count("caller's: records") == 3
    )


def test_a_call_waits_for_the_one_before_on_another_stream(monkeypatch):
    cuda = RecordedCuda(monkeypatch)
    captured = Captured(lambda x: x * 2, (torch.ones(1),), GraphPool())
    output = captured.output
    captured.graph.runs.append(lambda: cuda.note(f"reads {captured.inputs[0].item()}"))
    captured.graph.runs.append(lambda: output.copy_(captured.inputs[0] * 2))
    del cuda.log[:]
    results = []
    for name, value in (("one", 3.0), ("two", 4.0)):
        cuda.current = name
        results.append(captured((torch.full((1,), value, requires_grad=True),)))
    assert cuda.log == [
        f"{name}: {event}"
        for name, value in (("one", 3.0), ("two", 4.0))
        for event in (
            "enters cpu",
            "waits for the record",
            "replays",
            f"reads {value}",
            "records",
            "leaves cpu",
        )
    ]
    assert [result.item() for result in results] == [6.0, 8.0] and not results[0].requires_grad
    assert not captured.inputs[0].requires_grad


def test_a_failed_capture_raises_its_first_line(monkeypatch):
    cuda = RecordedCuda(monkeypatch)

    def run(x):
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return x

    with pytest.raises(RuntimeError, match=r"^operation not permitted when stream is capturing$"):
        Captured(run, (torch.ones(1),), GraphPool())
