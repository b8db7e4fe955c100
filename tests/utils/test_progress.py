"""Progress: a bar on a terminal, lines elsewhere; times of interleaved calls."""

import io
import itertools

import pytest
import torch

from cropr_kernels.utils import progress, timing
from cropr_kernels.utils.progress import Progress, each


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that the test sets."""
    times = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: times[0])
    return times


def test_a_log_gets_a_line_every_half_minute(clock, capsys):
    for _ in each(range(100), "calibrating"):
        clock[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "calibrating: 30 of 100, 30 s, about 70 s left",
        "calibrating: 60 of 100, 60 s, about 40 s left",
        "calibrating: 90 of 100, 90 s, about 10 s left",
        "calibrating: 100 of 100, 100 s",
    ]


def test_short_or_quiet_work_prints_nothing(clock, capsys):
    for _ in each(range(9), "calibrating"):
        clock[0] += 1.0
    for _ in each(range(100), "calibrating", show=False):
        clock[0] += 1.0
    assert capsys.readouterr().err == ""


def test_work_done_before_does_not_shorten_the_estimate(clock, capsys):
    with Progress("training", 100, done=40) as shown:
        for _ in range(20):
            clock[0] += 2.0
            shown.update(note="loss 1.5")
    assert capsys.readouterr().err.splitlines() == [
        "training: 55 of 100, 30 s, about 90 s left, loss 1.5",
        "training: 60 of 100, 40 s, about 80 s left, loss 1.5",
    ]


def test_a_single_long_step_prints_its_elapsed_time(clock, capsys, monkeypatch):
    waits = itertools.chain([False] * 3, itertools.repeat(True))

    def wait(seconds):
        clock[0] += 20.0
        return next(waits)

    with Progress("exporting", ticks=True) as shown:
        shown.stopped.set()  # its own thread is over
        monkeypatch.setattr(shown.stopped, "wait", wait)
        clock[0] = 0.0
        shown.line_at = shown.started = 0.0
        shown._refresh()
    assert "exporting: 40 s\n" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_that_disappears(monkeypatch):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    for _ in each(range(3), "calibrating"):
        pass
    text = terminal.getvalue()
    assert "calibrating" in text and text.endswith("\r") and "\n" not in text


def test_the_bar_of_a_single_long_step_moves(clock, monkeypatch):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    refreshed = []
    waits = iter([False, False, True])

    def wait(seconds):
        clock[0] += 1.5
        return next(waits)

    with Progress("exporting", ticks=True) as shown:
        shown.stopped.set()  # its own thread is over
        monkeypatch.setattr(shown.stopped, "wait", wait)
        monkeypatch.setattr(shown.bar, "refresh", lambda: refreshed.append(clock[0]))
        clock[0] = shown.started = 0.0
        shown._refresh()
        monkeypatch.undo()
    assert refreshed == [3.0]  # work of less than two seconds shows none


def test_without_tqdm_a_terminal_gets_lines(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    for _ in each(range(40), "calibrating"):
        clock[0] += 1.0
    assert terminal.getvalue().startswith("calibrating: 30 of 40, 30 s, about 10 s left\n")


def test_calls_are_interleaved_and_their_spread_is_reported(monkeypatch, capsys):
    now, seconds = (
        [0.0],
        {"a": itertools.cycle([1.0, 2.0, 3.0, 4.0, 5.0]), "b": itertools.repeat(2.0)},
    )
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    order = []

    def call(name):
        order.append(name)
        now[0] += next(seconds[name])

    calls = {name: (lambda name=name: call(name)) for name in seconds}
    times = timing.time_interleaved(calls, torch.device("cpu"), 5, show=True, label="batch 8")
    assert times["a"] == (3.0, 2.0, 4.0) and times["a"].spread == pytest.approx(2 / 3)
    assert times["b"] == (2.0, 2.0, 2.0) and times["b"].spread == 0
    assert all(sorted(order[first : first + 2]) == ["a", "b"] for first in range(0, 12, 2))
    assert "batch 8: 5 rounds of 2 calls, about 15 s" in capsys.readouterr().err


def test_rounds_fit_the_time_budget():
    assert [timing.fitting(seconds) for seconds in (0.0, 1.0, 9.0, 60.0)] == [9, 9, 5, 3]


def test_speedups_beyond_the_flops_are_detected():
    assert (
        timing.above_flops(1.6, 1.5)
        and not timing.above_flops(1.52, 1.5)
        and not timing.above_flops(1.2, 1.5)
    )
