"""Targets as losses have them, whether or not they are labels for a predictor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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


def _bytes(rank: int, world: int) -> float:
    module = models.build("sequence", world)[rank]
    schedule = ScheduleDNI(
        PipelineStage(module, rank, world, CPU),
        2,
        lambda output, target: models.loss_fn(output, target.long()),
        policy="synthetic",
    )
    for step in range(3):
        x, y = models.batch("sequence", step, 4)
        schedule.step(*((x,) if rank == 0 else ()), target=y.to(torch.uint8))
    schedule.flush()
    return float(schedule.metrics["loss"])


def test_bytes_as_labels() -> None:
    """An unsigned label cannot hold the mark for "no label"."""
    assert all(0.0 < loss < 10.0 for loss in run_ranks(2, _bytes))


def _with_target_ids(rank: int, world: int, out: int, largest: int) -> float:
    """The last axis of the output is no axis of classes, or the target's numbers are no classes."""
    module = nn.Linear(models.D, models.D if rank < world - 1 else out)
    schedule = ScheduleDNI(
        PipelineStage(module, rank, world, CPU),
        2,
        lambda output, target: (output.mean(1) - target.float() / largest).square().mean(),
        unlock_after_steps=2,
    )
    for step in range(6):
        x = models.batch("mlp", step, 8)[0]
        target = torch.randint(0, largest + 1, (8,), generator=torch.Generator().manual_seed(step))
        schedule.step(*((x,) if rank == 0 else ()), target=target)
    schedule.flush()
    return float(schedule.metrics["loss"])


def test_an_integer_target_that_is_no_class_of_the_last_axis_does_no_harm() -> None:
    """The number of classes is a guess: binary labels on one logit, or ids up to 1000, were out of range."""
    for out, largest in ((1, 1), (12, 1000)):
        assert all(0.0 < loss < 10.0 for loss in run_ranks(2, _with_target_ids, out, largest))


def _labels_later(rank: int, world: int) -> list[str]:
    module = models.build("sequence", world)[rank]
    next(module.parameters()).register_hook(lambda grad: grad)  # so auto cannot hold graphs, and needs predictors
    schedule = ScheduleDNI(PipelineStage(module, rank, world, CPU), 2, models.loss_fn, unlock_after_steps=1)
    policies = []
    for step in range(4):
        x, y = models.batch("sequence", step, 4)
        if step == 2:
            schedule.reset_shapes()
        told = rank == world - 1 or step >= 2
        schedule.step(*((x,) if rank == 0 else ()), **({"target": y} if told else {}))
        policies.append(str(schedule.metrics["policy"]))
    return policies


def test_labels_that_come_later_unlock_what_stayed_at_wait() -> None:
    for policies in run_ranks(2, _labels_later):
        assert policies == ["wait", "wait", "synthetic", "synthetic"]
