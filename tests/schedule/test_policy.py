"""When a policy waits, with which lag, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from dnipipe.schedule.policy import DEFAULT_LAG, Policy


@pytest.mark.parametrize(
    "values, message",
    [
        ({"name": "hope"}, "unknown policy 'hope': choose one of auto, synthetic, wait"),
        ({"name": ""}, "unknown policy '': choose one of auto, synthetic, wait"),
        ({"lag": 0}, "lag must be at least 1 microbatch, got 0: gradient t - lag travels beside activation t"),
        ({"lag": -2}, "lag must be at least 1 microbatch, got -2: gradient t - lag travels beside activation t"),
        ({"unlock_after_steps": -1}, "unlock_after_steps must be at least 0 steps, got -1"),
    ],
)
def test_a_bad_value_is_refused_with_the_rule(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Policy(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "policy, first_synthetic",
    [
        (Policy(), 200),
        (Policy("auto", unlock_after_steps=3), 3),
        (Policy("auto", unlock_after_steps=0), 0),
        (Policy("synthetic"), 0),
        (Policy("synthetic", unlock_after_steps=5), 5),
        (Policy("wait"), None),
        (Policy("wait", unlock_after_steps=5), None),
    ],
)
def test_it_waits_up_to_the_unlock_step_and_never_after(policy: Policy, first_synthetic: int | None) -> None:
    assert policy.unlock_step == first_synthetic
    waiting = [policy.waits(step) for step in range(300)]
    assert waiting == [first_synthetic is None or step < first_synthetic for step in range(300)]


def test_while_it_waits_the_lag_is_the_number_of_stages_below_and_then_its_own() -> None:
    policy = Policy("auto", lag=5, unlock_after_steps=2)
    assert [policy.lag_at(1, stage, 4) for stage in range(4)] == [3, 2, 1, 0]
    assert [policy.lag_at(2, stage, 4) for stage in range(3)] == [5, 5, 5]
    assert [Policy("wait", lag=5).lag_at(10_000, stage, 2) for stage in range(2)] == [1, 0]
    assert Policy("synthetic").lag_at(0, 0, 9) == DEFAULT_LAG == 2
