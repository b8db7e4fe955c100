"""Schedules: the published counts, and errors of those that do not fit."""

import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropr_kernels import Fusion, Merge, Schedule, Windows


def test_a_rate_gives_the_published_counts():
    vit_l = Schedule(rate=8).counts(197, 24, num_prefix=1, llf=True)
    assert vit_l == list(range(188, 19, -8)) and len(vit_l) == 22
    eva_l = Schedule(rate=40).counts(1025, 24, num_prefix=1, llf=True)
    assert eva_l[:2] == [984, 944] and eva_l[-1] == 144 and len(eva_l) == 22
    assert Schedule(rate=8).counts(197, 24, 1, llf=False) == [*vit_l, 12]


def test_prefix_correction_keeps_multiples_of_four():
    for prefix in range(9):
        assert all(
            count % 4 == 0
            for count in Schedule(rate=8).counts(prefix // 4 * 4 + prefix % 4 + 196, 12, prefix)
        )


def test_rate_zero_drops_nothing():
    assert Schedule(rate=0).counts(197, 12) == [197] * 11


def test_lists_are_kept_as_given_and_ratios_round_up():
    assert Schedule(keep=[100, 100, 50]).counts(197, 4) == [100, 100, 50]
    assert Schedule(ratio=0.5).counts(197, 4) == [99, 50, 26]
    assert Schedule(ratio=1.0).counts(197, 3) == [197, 197]
    assert Schedule(ratio=0.7).counts(11, 2) == [8]


@given(
    st.integers(1, 400), st.integers(0, 8), st.integers(3, 30), st.floats(0.01, 1.0), st.booleans()
)
def test_ratio_always_leaves_a_patch(patches, prefix, depth, ratio, llf):
    counts = Schedule(ratio=ratio).counts(patches + prefix, depth, prefix, llf)
    assert counts[-1] > prefix
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Schedule(rate=18).counts(197, 12),
            "rate must be at most 17 for 197 tokens and 11 modules, .* got 18",
        ),
        (
            lambda: Schedule(rate=8).counts(101, 13, 5),
            r"at most 7 for 101 tokens .* the 5 prefix tokens, got 8",
        ),
        (lambda: Schedule(rate=-1).counts(197, 12), "rate must be an integer >= 0, got -1"),
        (lambda: Schedule(rate=8).counts(197, 1), "depth must be at least 2 without LLF, got 1"),
        (
            lambda: Schedule(rate=8).counts(197, 2, llf=True),
            "depth must be at least 3 with LLF, got 2",
        ),
        (lambda: Schedule(keep=[100, 50]).counts(197, 4), "keep must list 3 counts for 4 blocks"),
        (lambda: Schedule(keep=[50, 60]).counts(197, 3), "keeps 60 of 50 tokens in module 1"),
        (
            lambda: Schedule(keep=[50, 1]).counts(197, 3),
            "at least one patch beside the 1 prefix tokens",
        ),
        (lambda: Schedule(keep=[198, 50]).counts(197, 3), "keeps 198 of 197 tokens in module 0"),
        (
            lambda: Schedule(ratio=0.0).counts(197, 3),
            r"ratio must be a number in \(0, 1\], got 0.0",
        ),
        (
            lambda: Schedule(ratio=1.5).counts(197, 3),
            r"ratio must be a number in \(0, 1\], got 1.5",
        ),
        (
            lambda: Schedule(rate=8, keep=[1]),
            "exactly one of rate, keep, ratio and const, got rate, keep",
        ),
        (lambda: Schedule(rate=None), "exactly one of rate, keep, ratio and const, got none"),
    ],
)
def test_schedules_that_do_not_fit_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


NUMBERS = {  # of every option that is one
    "schedule: rate must be an integer >= 0": (lambda value: Schedule(rate=value), int),
    "schedule: keep must be integers >= 1": (lambda value: Schedule(keep=[100, value]), int),
    "schedule: const must be integers >= 1": (lambda value: Schedule(const=(value, 100)), int),
    "schedule: ratio must be a number in (0, 1]": (lambda value: Schedule(ratio=value), float),
    "schedule: share must be a number in [0, 1]": (
        lambda value: Schedule(rate=8, share=value),
        float,
    ),
    "Merge: candidates must be a number that is finite and >= 1": (
        lambda value: Merge(candidates=value),
        float,
    ),
    "Merge: size_weight must be a number that is finite and >= 0": (
        lambda value: Merge(size_weight=value),
        float,
    ),
    "Fusion: blocks must be an integer >= 0": (lambda value: Fusion(blocks=value), int),
    "Windows: size must be an integer >= 1": (lambda value: Windows(value), int),
    "Windows: global_blocks must be integers >= 0": (lambda value: Windows(4, (value,)), int),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_other_values_than_numbers_are_named(name):
    make, kind = NUMBERS[name]
    for value in (
        True,
        "8",
        1j,
        [8],
        float("nan"),
        np.bool_(1),
        *([3.5, 8.0, np.float64(8)] if kind is int else []),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(f"{name}, got {value!r}")):
            make(value)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy_become_those_of_python(name):
    make, kind = NUMBERS[name]
    made = make(np.int64(1))
    assert made == make(1) and repr(made) == repr(make(1))
    json.dumps(dataclasses.asdict(made))
    if kind is float:
        assert make(np.float32(1)) == made and json.dumps(dataclasses.asdict(make(np.float32(1))))


@pytest.mark.parametrize("value", [8, "8", None, {"a": 1}, [8, 2.5], [True]])
def test_lists_of_other_values_are_named_also_in_files(value, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"keep": value}))
    with pytest.raises(ValueError, match=rf"schedule: keep in {path} must be integers >= 1, got "):
        Schedule(keep=path)
    for make in (lambda: Schedule(const=value), lambda: Windows(4, value)):
        with pytest.raises(
            ValueError, match=r"must be integers >= [01], got |give exactly one of .* got none"
        ):
            make()
