"""When a policy waits, with which lag, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from dnipipe.schedule.policy import DEFAULT_LAG, Policy, lag_of_wait


@pytest.mark.parametrize(
    "values, message",
    [
        ({"name": "hope"}, "unknown policy 'hope': choose one of auto, corrected, stale, synthetic, wait"),
        ({"name": ""}, "unknown policy '': choose one of auto, corrected, stale, synthetic, wait"),
        ({"lag": 0}, "lag must be at least 1 microbatch, got 0: gradient t - lag travels beside activation t"),
        ({"lag": -2}, "lag must be at least 1 microbatch, got -2: gradient t - lag travels beside activation t"),
        ({"unlock_after_steps": -1}, "unlock_after_steps must be at least 0 steps, got -1"),
        (
            {"name": "synthetic", "in_flight": 4},
            "in_flight is for the policies stale and corrected: with policy 'synthetic' leave it out",
        ),
    ],
)
def test_a_bad_value_is_refused_with_the_rule(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Policy(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "policy, first_synthetic",
    [
        (Policy().chosen("wait:200,synthetic"), 200),
        (Policy("auto", unlock_after_steps=3).chosen("wait:200,synthetic"), 3),
        (Policy("auto", unlock_after_steps=0).chosen("wait:200,synthetic"), 0),
        (Policy("auto", unlock_after_steps=3).chosen("stale"), 3),
        (Policy("auto", unlock_after_steps=0).chosen("wait"), None),
        (Policy("auto"), None),  # before it has chosen
        (Policy("synthetic"), 0),
        (Policy("synthetic", unlock_after_steps=5), 5),
        (Policy("wait"), None),
    ],
)
def test_it_waits_up_to_the_unlock_step_and_never_after(policy: Policy, first_synthetic: int | None) -> None:
    waiting = [policy.waits(step) for step in range(300)]
    assert waiting == [first_synthetic is None or step < first_synthetic for step in range(300)]


def test_a_policy_that_never_unlocks_refuses_to_be_told_when() -> None:
    with pytest.raises(ValueError, match="policy 'wait' never unlocks: leave unlock_after_steps out"):
        Policy("wait", unlock_after_steps=5)
    with pytest.raises(
        ValueError, match="unlock_after_steps is for a single policy, got 0 beside 'wait:5,stale'.*wait:1,"
    ):
        Policy("wait:5,stale", unlock_after_steps=0)


def test_each_step_has_the_policy_of_its_phase() -> None:
    policy = Policy("wait:2,synthetic:1,stale:1,wait:1,corrected:1,stale")
    at = ["wait", "wait", "synthetic", "stale", "wait", "corrected", "stale", "stale"]
    assert [policy.at(step) for step in range(8)] == at
    assert [policy.learns(step) for step in range(8)] == [True] * 6 + [False] * 2
    assert Policy("stale", unlock_after_steps=3).phases == Policy("wait:3,stale").phases


@pytest.mark.parametrize(
    "name, late, predicts, needs",
    [
        ("wait", False, True, False),
        ("synthetic", False, True, True),
        ("stale", True, False, False),
        ("corrected", True, True, True),
        ("wait:5,stale", True, False, False),
        ("stale:5,synthetic", True, True, True),
        ("synthetic:5,wait", False, True, True),
    ],
)
def test_predictors_are_of_use_where_any_phase_uses_them_or_none_is_late(
    name: str, late: bool, predicts: bool, needs: bool
) -> None:
    policy = Policy(name)
    assert (policy.late, policy.predicts, policy.needs_predictor) == (late, predicts, needs)


@pytest.mark.parametrize("in_flight, held", [(None, [4, 3, 2, 1]), (5, [5, 4, 3, 1]), (7, [7, 5, 3, 1])])
def test_a_stage_holds_from_one_to_two_graphs_for_each_stage_below_and_its_own(
    in_flight: int | None, held: list[int]
) -> None:
    policy = Policy("stale", in_flight=in_flight)
    policy.check(4)
    assert [policy.delay(stage, 4) + 1 for stage in range(4)] == held
    assert all(policy.delay(stage, 4) > policy.delay(stage + 1, 4) for stage in range(3))  # the ledger's condition


@pytest.mark.parametrize("in_flight", [3, 8])
def test_an_in_flight_that_the_stages_cannot_have_is_refused(in_flight: int) -> None:
    with pytest.raises(ValueError, match=f"in_flight must be from 4 to 7 microbatches for 4 stages, got {in_flight}"):
        Policy("corrected", in_flight=in_flight).check(4)


def test_while_it_waits_the_lag_is_the_number_of_stages_below() -> None:
    assert [lag_of_wait(stage, 4) for stage in range(4)] == [3, 2, 1, 0]
    assert Policy("synthetic").lag == DEFAULT_LAG == 2
