"""The policies `stale` and `corrected` against the oracle, bit for bit; old weights; saving, evaluation, refusals."""

from __future__ import annotations

import itertools

import pytest

from tests.ranks import run_ranks
from tests.schedule.harness import Case, Oracle, Pipeline, differences

STEPS = 6


def _cases(world: int) -> list[Case]:
    kinds = itertools.cycle([("mlp", "mlp", "local"), ("sequence", "linear", "relay"), ("mlp", "linear", "none")])
    optimizers, slack = itertools.cycle(["optimizer", "adamw"]), itertools.cycle([None, world, 2 * world - 1])
    cases = []
    for policy, m, unlock in itertools.product(("stale", "corrected"), (1, 2, 4, 8), (0, 2)):
        kind, interface, labels = next(kinds)
        case = Case(kind, interface, m, policy, unlock_after_steps=unlock, labels=labels)
        case.optimizer, case.in_flight = next(optimizers), next(slack)
        cases.append(case)
    return cases


def _optimize(pipeline: Pipeline, oracle: Oracle) -> None:
    """The update that flush() has left."""
    for optimizer in (pipeline.optimizer, *oracle.optimizers):
        optimizer.step()
        optimizer.zero_grad()


def _equal(rank: int, world: int, half: int) -> list[str]:
    wrong = []
    for case in _cases(world)[half::2]:
        pipeline, oracle = Pipeline(rank, world, case), Oracle(world, case)
        for step in range(STEPS):
            pipeline.step(step)
            oracle.step(step)
        wrong += [f"{case}: {each} before flush()" for each in differences(pipeline, oracle)]
        pipeline.schedule.flush()
        oracle.reference.flush()
        _optimize(pipeline, oracle)
        wrong += [f"{case}: {each} after flush()" for each in differences(pipeline, oracle)]
        for step in (STEPS, STEPS + 1):
            pipeline.step(step)
            oracle.step(step)
        wrong += [f"{case}: {each} afterwards" for each in differences(pipeline, oracle)]
    return wrong


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_late_gradients_equal_the_oracles_for_every_m(world: int, half: int) -> None:
    assert run_ranks(world, _equal, half) == [[]] * world
