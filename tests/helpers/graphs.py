"""CUDA graphs without a GPU."""

from contextlib import contextmanager

import torch

from cropr_kernels.pruning.graphs import CaptureError, Graphs


class CountingGraphs(Graphs):
    """Graphs whose capture needs no GPU: a replay runs the function again, on copies of its
    inputs."""

    captures, replays, cannot_capture = 0, 0, False

    def capture(self, run, inputs):
        if self.cannot_capture:
            raise CaptureError("an operation waits for the GPU")
        self.captures += 1
        return Rerun(self, run, inputs)


class Rerun:
    def __init__(self, graphs, run, inputs):
        self.graphs, self.run, self.inputs = graphs, run, tuple(value.clone() for value in inputs)

    def __call__(self, inputs):
        self.graphs.replays += 1
        for static, value in zip(self.inputs, inputs):
            static.copy_(value)
        return self.run(*self.inputs)


class RecordedCuda:
    """The part of torch.cuda that graphs use; `log` holds the calls in order, each with its stream.

    Work is done at once, on the CPU; a replay runs the captured functions again.
    """

    def __init__(self, monkeypatch):
        self.log, self.current, self.num_streams, self.pools, self.capturing = (
            [],
            "caller's",
            0,
            0,
            None,
        )
        for name in (
            "device",
            "Stream",
            "stream",
            "current_stream",
            "CUDAGraph",
            "graph",
            "graph_pool_handle",
            "Event",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def note(self, event):
        self.log.append(f"{self.current}: {event}")

    @contextmanager
    def device(self, device):
        self.note(f"enters {device}")
        yield
        self.note(f"leaves {device}")

    def Stream(self):
        self.num_streams += 1
        return RecordedStream(self, f"stream {self.num_streams}")

    def current_stream(self):
        return RecordedStream(self, self.current)

    @contextmanager
    def stream(self, stream):
        outside, self.current = self.current, stream.name
        yield
        self.current = outside

    def CUDAGraph(self):
        return RecordedGraph(self)

    @contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        self.capturing = graph
        with self.stream(stream):
            self.note(f"captures, {capture_error_mode}, in {pool}")
            yield
            self.note("has captured")
        self.capturing = None

    def graph_pool_handle(self):
        self.pools += 1
        return f"pool {self.pools}"

    def Event(self):
        return RecordedEvent(self)


class RecordedStream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name}: waits for {other.name}")


class RecordedEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.cuda.note("records")

    def wait(self):
        self.cuda.note("waits for the record")


class RecordedGraph:
    def __init__(self, cuda):
        self.cuda, self.runs = cuda, []

    def replay(self):
        self.cuda.note("replays")
        for run in self.runs:
            run()
