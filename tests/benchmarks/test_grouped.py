"""The grouped oracle against the one that takes microbatches one by one; its groups; what it can compare."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from benchmarks.grouped import Group, Grouped, groups
from dnipipe.interface import Learner
from dnipipe.schedule.late_reference import LateReference
from dnipipe.schedule.policy import Policy
from dnipipe.schedule.reference import Reference
from tests.schedule import models

STAGES, ROWS, STEPS = 4, 2, 7


def test_groups_are_those_of_the_drawing() -> None:
    assert groups(Policy("stale"), 4, 8, waits=False) == [
        Group(0, 5, (0, 0, 0, 0)),
        Group(5, 1, (1, 0, 0, 0)),
        Group(6, 1, (1, 1, 0, 0)),
        Group(7, 1, (1, 1, 1, 0)),
    ]
    assert groups(Policy("stale"), 4, 1, waits=False) == [Group(0, 1, (3, 2, 1, 0))]
    assert groups(Policy("stale"), 4, 8, waits=True) == [Group(0, 8, (0, 0, 0, 0))]


def _modules() -> tuple[list[nn.Module], list[Learner | None]]:
    learners: list[Learner | None] = [
        Learner([models.interface("sequence", "linear", True)], models.interface_optimizer) for _ in range(STAGES - 1)
    ]
    return [stage.double() for stage in models.build("sequence", STAGES)], [*learners, None]


def _steps(stages: list[nn.Module], trainer: Reference | Grouped, m: int) -> list[Tensor]:
    optimizers = [models.optimizer(stage) for stage in stages]
    for step in range(STEPS):
        x, y = models.batch("sequence", step, ROWS * m)
        if isinstance(trainer, Grouped):
            trainer.step(x, y)
        else:
            trainer.step(x, y, y)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach() for stage in stages for parameter in stage.parameters()]


CASES = [
    (name, m, unlock, in_flight)
    for name, m, unlock, in_flight in itertools.product(
        ("wait", "synthetic", "stale", "corrected"), (1, 2, 4, 8), (0, 2), (None, 2 * STAGES - 1)
    )
    if (name in ("stale", "corrected") or in_flight is None) and (name != "wait" or not unlock)
]


@pytest.mark.parametrize("name, m, unlock, in_flight", CASES)
def test_grouped_learns_what_the_reference_learns(name: str, m: int, unlock: int, in_flight: int | None) -> None:
    policy = Policy(name, unlock_after_steps=None if name == "wait" else unlock, in_flight=in_flight)
    ends = []
    for grouped in (False, True):
        stages, learners = _modules()
        learners = learners if policy.predicts else [None] * STAGES
        kind = Grouped if grouped else LateReference if policy.late else Reference
        options = {} if grouped else {"scale_grads": False}
        trainer = kind(stages, learners, models.loss_fn, num_microbatches=m, policy=policy, **options)  # type: ignore[arg-type]
        ends.append(_steps(stages, trainer, m))
    for one, other in zip(*ends, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)  # interfaces compute in float32


def test_the_weights_of_a_late_backward_make_a_difference() -> None:
    ends = {}
    for weights in ("old", "new", "ahead"):
        stages, learners = _modules()
        masters = {parameter: parameter for stage in stages for parameter in stage.parameters()}
        policy = Policy("stale")
        trainer = Grouped(
            stages,
            [None] * STAGES,
            models.loss_fn,
            num_microbatches=2,
            policy=policy,
            weights=weights,
            masters=masters,  # type: ignore[arg-type]
        )
        ends[weights] = torch.cat([each.flatten() for each in _steps(stages, trainer, 2)])
    for one, other in itertools.combinations(ends.values(), 2):
        assert not torch.allclose(one, other, rtol=1e-6, atol=1e-8)


def test_ahead_meets_the_weights_of_the_backward_where_updates_do_not_change() -> None:
    """A loss that is linear in the weights moves them by the same step each time, so the extrapolation is exact."""
    seen = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.weight.detach().clone())
            return super().forward(x)

    torch.manual_seed(0)
    first, last = Watched(3, 3, bias=False).double(), nn.Identity()
    grouped = Grouped(
        [first, last],
        [None, None],
        lambda out, _: out.sum(),
        num_microbatches=1,
        policy=Policy("stale"),
        weights="ahead",
        masters={first.weight: first.weight},
    )
    x, optimizer, moved = torch.ones(2, 3, dtype=torch.float64), torch.optim.SGD(first.parameters(), lr=0.1), []
    for _ in range(6):
        grouped.step(x, x)
        optimizer.step()
        optimizer.zero_grad()
        moved.append(copy.deepcopy(first.weight.detach()))
    for step in (3, 4):  # the first gradient comes at step 1, so there is an update to go by from step 2 on
        assert torch.allclose(seen[step], moved[step], atol=1e-12)
