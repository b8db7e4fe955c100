"""`cropr tune`: schedules of efficient token counts, for a speed on the device at hand."""

import itertools
import json

import pytest
import torch
from helpers.models import reference_vit, timm_vit
from hypothesis import given
from hypothesis import strategies as st

import cropr_kernels as cropr
from cropr_kernels import Schedule, tuning
from cropr_kernels.cli import __main__ as cli
from cropr_kernels.models.vit import ViT
from cropr_kernels.utils import timing

# Tiles of 16 tokens; 68 tokens are slower than 72.
STAIRS = {count: -(-count // 16) * 1.0 + (0.5 if count == 68 else 0) for count in range(4, 201, 4)}


def test_efficient_counts_are_faster_than_all_larger_ones():
    assert tuning.efficient(STAIRS) == [*range(16, 200, 16), 200]
    assert tuning.efficient({1: 1.0, 2: 1.0, 3: 2.0}) == [2, 3]
    assert tuning.efficient({1: 3.0, 2: 1.0, 3: 2.0}) == [2, 3]


def test_latencies_become_monotone_by_pooling():
    assert tuning.monotone({1: 1.0, 2: 2.0, 3: 3.0}) == {1: 1.0, 2: 2.0, 3: 3.0}
    assert tuning.monotone({1: 1.0, 2: 4.0, 3: 2.0, 4: 3.0}) == {1: 1.0, 2: 3.0, 3: 3.0, 4: 3.0}
    assert tuning.monotone({3: 0.0, 1: 2.0, 2: 1.0}) == {1: 1.0, 2: 1.0, 3: 1.0}


@given(st.dictionaries(st.integers(2, 200), st.floats(0, 100), min_size=2))
def test_monotone_latencies_keep_their_mean_and_never_fall(latencies):
    pooled = tuning.monotone(latencies)
    values = [pooled[count] for count in sorted(pooled)]
    assert pooled.keys() == latencies.keys() and all(a <= b for a, b in itertools.pairwise(values))
    assert sum(values) == pytest.approx(sum(latencies.values()))


def test_the_curve_is_linear_between_measurements():
    latencies = tuning.interpolate({10: 0.0, 22: 6.0, 30: 6.0}, 4)
    assert latencies == {10: 0.0, 12: 1.0, 16: 3.0, 20: 5.0, 22: 6.0, 24: 6.0, 28: 6.0, 30: 6.0}
    assert tuning.efficient(latencies)[-1] == 30 and 24 not in tuning.efficient(latencies)


@pytest.mark.parametrize("forward", [1e-4, 0.05, 0.25, 1.0])
def test_the_measurement_budget_is_less_than_two_minutes(forward):
    counts, rounds, checks = tuning.measurement_budget(forward, None)
    assert 8 <= counts <= 50 and 3 <= rounds <= 9 and 3 <= checks <= 18
    assert forward * (0.6 * (counts + 2) * (rounds + 1) + 4 * 1.7 * (checks + 1)) < 110
    assert tuning.measurement_budget(forward, 5)[1:] == (5, 10)  # requested rounds are kept


def test_a_fast_model_is_measured_at_every_count_and_a_slow_one_at_few():
    assert tuning.measurement_budget(1e-3, None) == (50, 9, 18) and tuning.measurement_budget(
        60.0, None
    ) == (8, 3, 3)


def test_a_schedule_prunes_steadily_and_keeps_efficient_counts():
    keep = tuning.solve(STAIRS, 30.0, 200, 11, 1)
    assert sum(STAIRS[200] - STAIRS[count] for count in keep) >= 30
    assert all(count in tuning.efficient(STAIRS) for count in keep)
    assert keep == sorted(keep, reverse=True) and Schedule(keep=keep).counts(200, 12) == keep
    gentler = tuning.solve(STAIRS, 29.0, 200, 11, 1)
    assert sum(gentler) >= sum(keep)
    # The same measurements, the same schedule
    assert tuning.solve(STAIRS, 30.0, 200, 11, 1) == keep


def test_unreachable_savings_have_no_schedule():
    assert tuning.solve(STAIRS, 0.0, 200, 11, 1) == [200] * 11
    assert tuning.solve(STAIRS, 11 * 13.0, 200, 11, 1) is None
    assert tuning.solve({100: 1.0, 50: 1.0}, 0.1, 100, 3, 1) is None


@given(st.integers(1, 8), st.integers(0, 4), st.floats(0, 60), st.data())
def test_every_schedule_is_legal(modules, prefix, saving, data):
    tokens = data.draw(st.integers(prefix + modules + 8, 120))
    latencies = {count: data.draw(st.floats(0, 10)) for count in range(prefix + 1, tokens, 3)} | {
        tokens: 10.0
    }
    keep = tuning.solve(tuning.monotone(latencies), saving, tokens, modules, prefix)
    if keep is not None:
        assert Schedule(keep=keep).counts(tokens, modules + 1, prefix) == keep


class Clock:
    """A simulated device: a forward takes 2^-10 s a tile of 16 tokens and block, and `prune` of
    that a pruning."""

    def __init__(self, prune=2**-7):
        self.prune, self.now = prune, 0.0

    def of(self, model, images, output):
        side = model.config.patch_size
        tokens = 1 + (images.shape[2] // side) * (images.shape[3] // side)
        counts = [tokens, *model.cropr.config.counts(tokens, model.config.depth, 1)]
        counts += counts[:1] if model.cropr.config.llf else []
        prunes = sum(a != b for a, b in itertools.pairwise(counts))
        self.now += 2**-10 * (3.0 + sum(-(-count // 16) for count in counts) + self.prune * prunes)
        return output


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    forward = ViT.forward
    monkeypatch.setattr(
        ViT, "forward", lambda model, images: clock.of(model, images, forward(model, images))
    )
    return clock


@pytest.mark.parametrize("llf", [False, True, cropr.Fusion("track_parent", 2)])
def test_predictions_equal_the_measurements_of_a_quiet_device(clock, llf):
    model = cropr.apply(reference_vit(depth=6), rate=0, llf=llf, num_outputs=0)
    tuned = cropr.tune(model, torch.zeros(2, 3, 64, 64), speedup=1.3, rounds=1)
    assert tuned.measured >= 1.3 * 0.98 and tuned.predicted == pytest.approx(
        tuned.measured, rel=0.05
    )
    assert set(tuned.keep) <= {65, 64, 48, 32, 16} and len(tuned.keep) == model.cropr.num_used
    assert tuned.flop_ratio > 1.05 and tuned.spread == 0
    assert tuned == cropr.tune(model, torch.zeros(2, 3, 64, 64), speedup=1.3, rounds=1)
    in_time = cropr.tune(model, torch.zeros(2, 3, 64, 64), latency_ms=tuned.pruned_ms, rounds=1)
    assert in_time.pruned_ms <= tuned.pruned_ms * 1.02
    assert str(model.cropr.config.schedule) == "rate=0"  # only read


def test_pruning_that_does_not_pay_raises_or_warns(clock):
    clock.prune = 2.0
    model = cropr.apply(reference_vit(depth=6), rate=0, num_outputs=0)
    with pytest.raises(
        ValueError,
        match=r"no schedule takes .* at batch 1 on cpu: unpruned takes .* about 1\.\d+ times",
    ):
        cropr.tune(model, torch.zeros(1, 3, 64, 64), speedup=3.0, rounds=1)
    clock.prune = 0.9
    with pytest.warns(UserWarning, match="pruning will not pay at batch 1 on cpu: 1.0"):
        cropr.tune(model, torch.zeros(1, 3, 64, 64), speedup=1.01, rounds=1)


def test_a_missed_goal_warns(clock, monkeypatch):
    plain = tuning.time_interleaved

    def noisy(calls, *rest, **options):  # the schedule turns out slower than its curve
        times = dict(plain(calls, *rest, **options))
        if "pruned" in times:
            times["pruned"] = times["pruned"]._replace(seconds=1.3 * times["pruned"].seconds)
        return times

    monkeypatch.setattr(tuning, "time_interleaved", noisy)
    model = cropr.apply(reference_vit(depth=6), rate=0, num_outputs=0)
    with pytest.warns(
        UserWarning, match=r"the goal was not reached at batch 1 on cpu: 1\.\d+ times as fast"
    ):
        cropr.tune(model, torch.zeros(1, 3, 64, 64), speedup=1.6, rounds=1)


def test_speedups_beyond_the_flops_are_reported(clock, tmp_path, capsys):
    arguments = [
        "tune",
        "vit_tiny_patch16_224",
        "--speedup",
        "1.2",
        "--rounds",
        "1",
        "--out",
        str(tmp_path / "a.json"),
    ]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    # The clock knows no MLP
    assert "not less arithmetic" in printed.out and "times fewer FLOPs" in printed.out
    assert "tune: 51 schedules, 1 rounds, and the chosen one up to 4 times, about" in printed.err


def test_the_command_prints_warnings(clock, tmp_path, capsys):
    clock.prune = 0.9
    out = ["--rounds", "1", "--quiet", "--out", str(tmp_path / "a.json")]
    assert cli.main(["tune", "vit_tiny_patch16_224", "--speedup", "1.01", *out]) == 0
    printed = capsys.readouterr().out
    assert "warning: pruning will not pay at batch 1 on cpu: 1.0" in printed


def test_illegal_goals_raise():
    model = cropr.apply(reference_vit(), rate=0)
    for options in ({}, {"speedup": 2.0, "latency_ms": 1.0}):
        with pytest.raises(ValueError, match="exactly one of speedup and latency_ms"):
            cropr.tune(model, torch.zeros(1, 3, 64, 64), **options)
    for options in ({"speedup": 0.5}, {"latency_ms": 0.0}, {"speedup": float("nan")}):
        with pytest.raises(ValueError, match="speedup must be >= 1 and latency_ms > 0"):
            cropr.tune(model, torch.zeros(1, 3, 64, 64), **options)
    with pytest.raises(TypeError, match="not pruned"):
        cropr.tune(reference_vit(), torch.zeros(1, 3, 64, 64), speedup=2.0)


def test_apply_takes_a_schedule_file(tmp_path):
    path = tmp_path / "schedule.json"
    tuning.save_tuned(
        path, tuning.Tuned([50, 40, 30], 1.5, 1.4, 2.0, 1.4, {30: -0.1}, 1.6, 0.02), {"model": "x"}
    )
    model = cropr.apply(timm_vit(), keep=path)
    assert model.cropr.config.counts(65, 4, 1) == [50, 40, 30]
    assert cropr.apply(reference_vit(), keep=str(path)).cropr.config.counts(65, 4, 1) == [
        50,
        40,
        30,
    ]
    with pytest.raises(ValueError, match=r"keep must list 2 counts for 4 blocks with LLF, got 3"):
        cropr.apply(reference_vit(), keep=path, llf=True)
    with pytest.raises(FileNotFoundError):
        cropr.apply(reference_vit(), keep=tmp_path / "none.json")
    for text in ("nothing", "[]", '{"keep": [1.5]}', '{"keep": 3}', "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"schedule\.json"):
            cropr.apply(reference_vit(), keep=path)


def test_the_command_measures_and_writes(clock, tmp_path, capsys):
    out = tmp_path / "schedule.json"
    arguments = ["tune", "vit_tiny_patch16_224", "--rounds", "1", "--quiet", "--out", str(out)]
    assert cli.main([*arguments, "--speedup", "1.2", "--llf"]) == 0
    text, tuned = capsys.readouterr().out, json.loads(out.read_text())
    assert (
        "measured" in text
        and f"keep='{out}', merge=True, llf=cropr.Fusion(restore='track_parent', blocks=1))" in text
    )
    assert (
        tuned["model"] == "vit_tiny_patch16_224"
        and tuned["batch"] == 1
        and tuned["llf"] == "track_parent"
    )
    assert (
        tuned["unpruned_ms"] == pytest.approx((3 + 12 * 13) * 1e3 / 2**10)
        and tuned["measured"] >= 1.2 * 0.98
    )
    assert (
        len(cropr.apply(cropr.create_vit("vit_tiny_patch16_224"), keep=out, llf=True).cropr) == 10
    )
    assert cli.main([*arguments, "--latency-ms", "0.001"]) == 1
    assert "no schedule takes 0.001 ms" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--speedup", "2", "--batch", "0"])
    assert "--batch: must be >= 1, got 0" in capsys.readouterr().err
