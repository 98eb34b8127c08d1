"""Targets as losses have them, whether or not they are labels for a predictor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from dnipipe import ScheduleDNI
from tests.ranks import run_ranks
from tests.schedule import models
from tests.schedule.harness import Case, Oracle, Pipeline, differences

CPU = torch.device("cpu")


def _flattened(rank: int, world: int) -> bool:
    """A target that only the loss function understands, as many a training loop has it, passed on every rank."""
    ours, theirs = (models.build("sequence", world)[rank] for _ in range(2))
    dni = ScheduleDNI(PipelineStage(ours, rank, world, CPU), 2, models.loss_fn)
    torch_schedule = Schedule1F1B(PipelineStage(theirs, rank, world, CPU), 2, models.loss_fn)
    x, y = models.batch("sequence", 0, 4)
    for schedule in (dni, torch_schedule):
        schedule.step(*((x,) if rank == 0 else ()), target=y.reshape(-1))
    return all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_flattened_target_is_left_to_the_loss_function() -> None:
    assert run_ranks(2, _flattened) == [True, True]


def _label_fn(rank: int, world: int) -> list[str]:
    """The label is derived from the input on the first stage; the oracle is told the same."""
    case = Case("sequence", "local_head", m=3, labels="relay", options={"label_fn": lambda x: (x + 1) % models.V})
    pipeline = Pipeline(rank, world, case)
    oracle = Oracle(world, case)
    for step in range(4):
        x, y = models.batch("sequence", step, case.rows * case.m)
        losses: list[Tensor] = []
        args = (x,) if rank == 0 else ()
        pipeline.schedule.step(*args, **({"target": y} if rank == world - 1 else {}), losses=losses)
        oracle.reference.step(x, y, (x + 1) % models.V)
        for optimizer in (pipeline.optimizer, *oracle.optimizers):
            optimizer.step()
            optimizer.zero_grad()
    return differences(pipeline, oracle)


def test_label_fn_on_the_first_stage_reaches_every_predictor() -> None:
    assert run_ranks(3, _label_fn) == [[], [], []]


def _masked_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.reshape(-1, models.V), target.reshape(-1), ignore_index=-100)


def _ignored(rank: int, world: int) -> float:
    module = models.build("sequence", world)[rank]
    schedule = ScheduleDNI(PipelineStage(module, rank, world, CPU), 2, _masked_loss, policy="synthetic")
    optimizer = models.optimizer(module)
    for step in range(12):
        x, y = models.batch("sequence", step, 8)
        y[:, : 1 + step % models.T] = -100
        schedule.step(*((x,) if rank == 0 else ()), target=y)
        optimizer.step()
        optimizer.zero_grad()
    schedule.flush()
    return sum(float(p.detach().abs().sum()) for p in module.parameters()) + float(schedule.metrics["loss"])


def test_a_loss_with_ignored_tokens_gives_finite_weights() -> None:
    assert all(abs(value) < 1e6 for value in run_ranks(2, _ignored))
