from __future__ import annotations

import pytest

from benchmarks.harness.search import find_ratio


@pytest.mark.parametrize("target", [0.95, 0.75, 0.5, 0.3])
def test_smooth_target_is_hit(target):
    found = find_ratio(lambda ratio: (1 - ratio) ** 2, target, {})
    assert found.hit
    assert abs(found.macs - target) <= 0.01
    assert found.macs == pytest.approx((1 - found.ratio) ** 2)


def test_steps_that_jump_over_the_target_are_a_miss():
    found = find_ratio(lambda ratio: 1.0 if ratio < 0.3 else 0.4, 0.5, {})
    assert not found.hit
    assert found.macs == 0.4
    assert found.tries <= 40


def test_target_beside_the_first_bracket_is_found_by_the_scan():
    def macs(ratio: float) -> float:  # falls to 0.62, jumps back to 1, passes the target, and jumps again
        if ratio < 0.2:
            return 1 - 1.9 * ratio
        return 1.2 - ratio if ratio < 0.75 else 0.2

    found = find_ratio(macs, 0.5, {})
    assert found.hit
    assert abs(macs(found.ratio) - 0.5) <= 0.01


def test_non_monotone_end_is_handled():
    # At the largest ratio a group would vanish, is skipped, and the MACs rise above the target again.
    found = find_ratio(lambda ratio: 1 - ratio if ratio < 0.8 else 0.95, 0.5, {})
    assert found.hit


def test_memo_serves_later_targets():
    memo: dict[float, float] = {}
    calls = []

    def macs(ratio: float) -> float:
        calls.append(ratio)
        return 1 - ratio

    find_ratio(macs, 0.5, memo)
    find_ratio(macs, 0.75, memo)
    before = len(calls)
    again = find_ratio(macs, 0.5, memo)
    assert len(calls) == before
    assert again.hit
    assert again.tries == 0
    assert len(calls) == len(set(calls))
