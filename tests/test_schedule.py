"""Schedules: the published counts, and refusal of those that do not fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropr_kernels import schedule


def test_published_counts():
    vit_l = schedule.rate(197, 24, 8, num_prefix=1, llf=True)
    assert vit_l == list(range(188, 19, -8)) and len(vit_l) == 22
    eva_l = schedule.rate(1025, 24, 40, num_prefix=1, llf=True)
    assert eva_l[:2] == [984, 944] and eva_l[-1] == 144 and len(eva_l) == 22
    assert schedule.rate(197, 24, 8, 1, llf=False) == [*vit_l, 12]


def test_prefix_correction_keeps_multiples_of_four():
    for prefix in range(9):
        assert all(count % 4 == 0 for count in schedule.rate(prefix // 4 * 4 + prefix % 4 + 196, 12, 8, prefix))


def test_rate_zero_drops_nothing():
    assert schedule.rate(197, 12, 0) == [197] * 11


def test_keep_list_and_ratio():
    assert schedule.keep(197, 4, [100, 100, 50]) == [100, 100, 50]
    assert schedule.ratio(197, 4, 0.5) == [99, 50, 26]
    assert schedule.ratio(197, 3, 1.0) == [197, 197]
    assert schedule.ratio(11, 2, 0.7) == [8]


@given(st.integers(1, 400), st.integers(0, 8), st.integers(3, 30), st.floats(0.01, 1.0), st.booleans())
def test_ratio_always_leaves_a_patch(patches, prefix, depth, ratio, llf):
    counts = schedule.ratio(patches + prefix, depth, ratio, prefix, llf)
    assert counts[-1] > prefix
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedule.rate(197, 12, 18), r"rate 18 keeps -2 of 16 tokens in module 10"),
        (lambda: schedule.rate(197, 12, -1), "rate must be >= 0, got -1"),
        (lambda: schedule.rate(197, 1, 8), "depth must be at least 2 without LLF, got 1"),
        (lambda: schedule.rate(197, 2, 8, llf=True), "depth must be at least 3 with LLF, got 2"),
        (lambda: schedule.keep(197, 4, [100, 50]), "keep must list 3 counts for 4 blocks"),
        (lambda: schedule.keep(197, 3, [50, 60]), "keeps 60 of 50 tokens in module 1"),
        (lambda: schedule.keep(197, 3, [50, 1]), "at least one patch beside the 1 prefix tokens"),
        (lambda: schedule.keep(197, 3, [198, 50]), "keeps 198 of 197 tokens in module 0"),
        (lambda: schedule.ratio(197, 3, 0.0), r"ratio must be in \(0, 1\], got 0.0"),
        (lambda: schedule.ratio(197, 3, 1.5), r"ratio must be in \(0, 1\], got 1.5"),
        (lambda: schedule.resolve(rate=8, keep=[1]), "exactly one of rate, keep, ratio and const, got rate, keep"),
        (lambda: schedule.resolve(rate=None), "exactly one of rate, keep, ratio and const, got none"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
