"""The comparison of schedules: counts at equal FLOPs, published counts, latency curves, and the
page."""

import json
import random
import sys

import pytest
import torch
from helpers.models import randomize, reference_vit

import cropr_kernels as cropr
from benchmarks.accuracy import counts as counting
from benchmarks.accuracy import schedules
from benchmarks.accuracy.agreement import calibrated
from benchmarks.report import schedules as page

TOKENS, DIM, DEPTH = 197, 192, 12
SHAPE = dict(tokens=TOKENS, dim=DIM, modules=DEPTH - 1)


def flops(keep):
    return counting.block_flops([TOKENS, *keep], DIM)


@pytest.mark.parametrize("rate", schedules.RATES)
@pytest.mark.parametrize(
    "lost", [counting.constant_rate, counting.rising_total, counting.rising_rate]
)
def test_fitted_schedules_take_the_flops_of_the_constant_rate(lost, rate):
    goal = flops(cropr.Schedule(rate=rate).counts(TOKENS, DEPTH))
    keep = counting.fitted(lost, goal, **SHAPE)
    assert cropr.Schedule(keep=keep).counts(TOKENS, DEPTH) == keep
    assert flops(keep) == pytest.approx(goal, rel=0.005)
    steps = [before - after for before, after in zip([TOKENS, *keep], keep)]
    rises = steps[-3:] > steps[:3] or keep[-1] == 2
    assert rises or lost is counting.constant_rate
    once = counting.fitted_once(4, goal, **SHAPE)
    assert cropr.Schedule(const=(4, once[-1])).counts(TOKENS, DEPTH) == once
    assert flops(once) == pytest.approx(goal, rel=0.005)


def test_pruned_tokens_follow_the_requested_curve():
    goal, blocks = 0.8 * flops([TOKENS] * (DEPTH - 1)), range(1, DEPTH)
    sums = [sum(block**1.3 for block in range(1, last + 1)) for last in blocks]
    for lost, shape in [
        (counting.constant_rate, list(blocks)),
        (counting.rising_total, [block**1.3 for block in blocks]),
        (counting.rising_rate, sums),
    ]:
        keep = counting.fitted(lost, goal, **SHAPE)
        total = TOKENS - keep[-1]
        assert [TOKENS - count for count in keep] == pytest.approx(
            [total * s / shape[-1] for s in shape], abs=1
        )
    with pytest.raises(ValueError, match="fitted: 11 modules cannot lower 197 tokens"):
        counting.fitted(counting.constant_rate, 1.0, **SHAPE)


@pytest.mark.parametrize(
    "published", counting.DIFFRATE.values(), ids=map(", ".join, counting.DIFFRATE)
)
def test_published_counts_make_a_legal_schedule(published):
    keep = counting.diffrate(published)
    assert len(published) == DEPTH and cropr.Schedule(keep=keep).counts(TOKENS, DEPTH) == keep
    assert all(count == min(published[: layer + 1]) for layer, count in enumerate(keep))


def planted(seed):
    """Return a latency that falls in steps and an accuracy that falls with fewer tokens, both
    noisy."""
    rng = random.Random(seed)
    tile = rng.choice([1, 8, 16, 33])
    latency = {n: 1 + -(-n // tile) * tile / 50 + rng.random() / 10 for n in range(2, 198)}
    accuracy = {n: 90 * (1 - (1 - n / 197) ** 3) + rng.random() for n in range(2, 198)}
    return latency, accuracy


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_one_more_token_has_the_highest_utility(alpha, seed):
    latency, accuracy = planted(seed)
    slowest, best = sorted(latency.values())[-1], sorted(accuracy.values())[-1]
    chosen, highest = None, -1.0
    for n in range(197, 1, -1):
        utility = alpha * (1.0 - latency[n] / slowest) + (1.0 - alpha) * (accuracy[n] / best)
        if utility > highest:
            chosen, highest = n, utility
    assert counting.one_more_token(latency, accuracy, alpha) == chosen


def test_one_more_token_stops_just_below_a_step():
    accuracy = {n: 100 - (197 - n) / 10 for n in range(2, 198)}
    latency = {n: 10.0 if n > 128 else 6.0 for n in range(2, 198)}
    assert counting.one_more_token(latency, accuracy) == 128
    assert (
        counting.one_more_token(dict.fromkeys(latency, 10.0), dict.fromkeys(accuracy, 50.0)) == 197
    ), "nothing to gain"


def small():
    return randomize(reference_vit(depth=6)).eval().requires_grad_(False)


@torch.inference_mode()
def test_estimated_accuracy_is_100_with_all_tokens_and_reaches_one_patch():
    estimates = schedules.estimated_accuracy(small(), torch.randn(6, 3, 64, 64), 20)
    assert list(estimates) == [65, 45, 25, 5, 2]
    assert estimates[65] == 100 and all(0 <= value <= 100 for value in estimates.values())


@pytest.mark.slow
def test_planned_schedules_are_compared_timed_and_rendered(tmp_path, monkeypatch):
    """From end to end on a small network, whose images are noise."""
    monkeypatch.setattr(schedules, "load_model", lambda folder: (small(), []))
    monkeypatch.setattr(
        schedules,
        "read_photos",
        lambda path, split, count, seed: (torch.randn(count, 3, 64, 64), []),
    )
    monkeypatch.setattr(schedules, "calibrated", lambda base, images: calibrated(base, images, 2))
    monkeypatch.setattr(schedules, "RATES", (4,))
    monkeypatch.setattr(counting, "DIFFRATE", {("DeiT-Ti", "0.8"): (65, 64, 50, 55, 40, 3)})
    monkeypatch.setattr(schedules, "SIZE", 64)
    monkeypatch.setattr(cropr, "tune", lambda model, images, **options: Tuned([60] * 5, 1.2))
    files = [tmp_path / f"schedules{name}.json" for name in ("_plan", "", "_speed")]
    every = [
        "schedules",
        "--data",
        "x",
        "--photos",
        "4",
        "--rounds",
        "1",
        "--planned",
        str(files[0]),
        "--batches",
        "2",
    ]
    every += ["--estimate", "4", "--curve-rounds", "1", "--step", "16"]
    with pytest.raises(FileNotFoundError, match="run it with --plan first"):
        run(monkeypatch, [*every, "--out", str(files[1])])
    run(monkeypatch, [*every, "--plan"])
    run(monkeypatch, [*every, "--seeds", "1", "--out", str(files[1])])
    run(monkeypatch, [*every, "--speed", "--out", str(files[2])])
    planned, agreed, fast = ([*json.loads(file.read_text())["rows"]] for file in files)
    assert [row["schedule"] for row in planned if row["group"] == "R = 4"] == [
        "constant",
        "once",
        "l^1.3",
        "R_l as l^1.3",
        "tuned, batch 2",
    ]
    assert next(row["keep"] for row in planned if row["schedule"] == "DiffRate") == [
        65,
        64,
        50,
        50,
        40,
    ]
    [pomt] = [row for row in planned if row["schedule"] == "POMT"]
    assert pomt["keep"] == [65] * 3 + [pomt["kept"]] * 2 and str(pomt["kept"]) in pomt["latency"]
    assert len(fast) == 2 * len(planned) + 1 and len(agreed) == 2 * len(fast)
    assert all(row["FLOPs"] >= 1 for row in agreed if row["method"] == "dropping")
    results = {file.stem: json.loads(file.read_text()) for file in files}
    monkeypatch.setattr(
        page, "load", lambda name: (results[name]["environment"], results[name]["rows"])
    )
    methods = {row[0] for row in page.table().rows}
    assert {"dropping", "merging"} <= methods
    assert (schedules.RANKED in methods) == (pomt["kept"] < 65), (
        "schedules that keep all tokens are not shown"
    )
    assert len(page.counts().rows) == len(planned) and "schedules.csv" in page.section()
    monkeypatch.setattr(page, "DOCS", tmp_path)
    page.plot()
    assert (tmp_path / "schedules.png").stat().st_size > 1000
    monkeypatch.setattr(page, "load", lambda name: None)
    assert page.table() is page.counts() is None and page.section() == "Not measured yet."


class Tuned:
    def __init__(self, keep, measured):
        self.keep, self.measured = keep, measured


def run(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", arguments)
    schedules.main()
