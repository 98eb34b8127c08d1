"""The grouped oracle against the one that takes microbatches one by one; its groups; what it can compare."""

from __future__ import annotations

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
    assert groups(Policy("stale"), 4, 8, step=0) == [
        Group(0, 5, (0, 0, 0, 0)),
        Group(5, 1, (1, 0, 0, 0)),
        Group(6, 1, (1, 1, 0, 0)),
        Group(7, 1, (1, 1, 1, 0)),
    ]
    assert groups(Policy("stale"), 4, 1, step=0) == [Group(0, 1, (3, 2, 1, 0))]
    assert groups(Policy("wait:1,stale"), 4, 8, step=0) == [Group(0, 8, (0, 0, 0, 0))]


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
    ("wait", 4, None, "old"),
    ("wait:2,synthetic", 1, None, "old"),
    ("synthetic", 4, None, "old"),
    ("synthetic:3,stale", 2, None, "old"),
    *[
        (prefix + name, m, in_flight, weights)
        for name, m, in_flight in itertools.product(("stale", "corrected"), (1, 2, 4, 8), (None, 2 * STAGES - 1))
        for prefix, weights in (("", "old"), ("wait:2,", "predicted*2"), ("", "predicted@3"), ("", "new"))
    ],
]


@pytest.mark.parametrize("name, m, in_flight, weights", CASES)
def test_grouped_learns_what_the_reference_learns(name: str, m: int, in_flight: int | None, weights: str) -> None:
    policy = Policy(name, in_flight=in_flight, late_weights=weights)
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
    for weights in ("old", "new", "predicted", "predicted*3", "predicted@3"):
        stages, _ = _modules()
        policy = Policy("stale", late_weights=weights)
        trainer = Grouped(stages, [None] * STAGES, models.loss_fn, num_microbatches=2, policy=policy)
        ends[weights] = torch.cat([each.flatten() for each in _steps(stages, trainer, 2)])
    for one, other in itertools.combinations(ends.values(), 2):
        assert not torch.allclose(one, other, rtol=1e-6, atol=1e-8)
