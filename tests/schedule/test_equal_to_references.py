"""ScheduleDNI against independent references, bit for bit: torch's schedules, and one process without a pipeline."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from tests.ranks import run_ranks
from tests.schedule import models
from tests.schedule.harness import Case, Oracle, Pipeline, differences

STEPS = 5


def _train_with_torch(rank: int, world: int, case: Case) -> tuple[list[torch.Tensor], list[float]]:
    module = models.build(case.kind, world)[rank]
    schedule_class = Schedule1F1B if case.m >= world else ScheduleGPipe
    stage = PipelineStage(module, rank, world, torch.device("cpu"))
    schedule = schedule_class(stage, n_microbatches=case.m, loss_fn=models.loss_fn)
    optimizer, all_losses = models.optimizer(module), []
    for step in range(STEPS):
        x, y = models.batch(case.kind, step, case.rows * case.m)
        losses: list[torch.Tensor] = []
        target = {"target": y} if rank == world - 1 else {}
        schedule.step(*((x,) if rank == 0 else ()), **target, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        all_losses += [float(loss.detach()) for loss in losses]
    return list(module.parameters()), all_losses


def _wait_body(rank: int, world: int) -> list[str]:
    wrong = []
    for m, kind in itertools.product((1, 2, 3, 4, 6, 8), ("mlp", "sequence")):
        case = Case(kind=kind, interface="linear", m=m, policy="wait")
        pipeline, oracle = Pipeline(rank, world, case), Oracle(world, case)
        for step in range(STEPS):
            pipeline.step(step)
            oracle.step(step)
        parameters, losses = _train_with_torch(rank, world, case)
        ours = list(pipeline.module.parameters())
        if not all(torch.equal(a, b) for a, b in zip(ours, parameters, strict=True)):
            wrong.append(f"{case}: parameters differ from torch's")
        if [float(loss) for loss in pipeline.losses] != losses:
            wrong.append(f"{case}: losses differ from torch's")
        wrong += [f"{case}: {each} differ from the oracle's" for each in differences(pipeline, oracle)]
    return wrong


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_wait_equals_torchs_1f1b_or_gpipe_and_the_oracle(world: int) -> None:
    assert run_ranks(world, _wait_body) == [[]] * world


SETTINGS = [
    ("mlp", "mlp", "local", 0),
    ("sequence", "local_head", "relay", 2),
    ("mlp", "linear", "none", 1),
    ("sequence", "transformer", "local", 0),
    ("sequence", "linear", "relay", 0),
    ("sequence", "scaled_head", "relay", 1),
    ("mlp", "potential", "local", 0),
]


def _synthetic_body(rank: int, world: int) -> list[str]:
    wrong = []
    settings = itertools.cycle(SETTINGS)
    for m, lag in itertools.product(range(1, 9), (1, 2, 3)):
        kind, interface, labels, unlock = next(settings)
        case = Case(kind, interface, m, lag=lag, labels=labels, unlock_after_steps=unlock)
        pipeline, oracle = Pipeline(rank, world, case), Oracle(world, case)
        for step in range(STEPS):
            pipeline.step(step)
            oracle.step(step)
        wrong += [f"{case}: {each} before flush()" for each in differences(pipeline, oracle)]
        pipeline.schedule.flush()
        oracle.reference.flush()
        pipeline.step(STEPS)
        oracle.step(STEPS)
        wrong += [f"{case}: {each} after flush()" for each in differences(pipeline, oracle)]
    return wrong


@pytest.mark.parametrize("world", [2, 3, 4])
def test_synthetic_equals_the_oracle_for_every_m_and_lag(world: int) -> None:
    assert run_ranks(world, _synthetic_body) == [[]] * world


def test_the_oracle_notices_another_lag() -> None:
    """The comparison can fail: an oracle with another lag trains other weights."""
    case, other = Case(m=2, lag=2), Case(m=2, lag=3)
    oracles = [Oracle(2, case), Oracle(2, other)]
    for oracle, step in itertools.product(oracles, range(STEPS)):
        oracle.step(step)
    first, second = ([*oracle.reference.stages[0].parameters()] for oracle in oracles)
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
