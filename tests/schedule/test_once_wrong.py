"""Faults that were there once, each with its story."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel

from dnipipe import ScheduleDNI
from tests.ranks import run_ranks, start_ranks, wait_for
from tests.schedule import models
from tests.schedule.harness import Case, Oracle, Pipeline, differences

CPU = torch.device("cpu")


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


def test_an_integer_target_that_is_no_class_of_the_last_axis_does_no_harm() -> None:
    """The number of classes is a guess: binary labels on one logit, or ids up to 1000, were out of range."""
    for out, largest in ((1, 1), (12, 1000)):
        assert all(0.0 < loss < 10.0 for loss in run_ranks(2, _with_target_ids, out, largest))


def _replicas_fall_back(rank: int, world: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage, replica = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    module = DistributedDataParallel(models.build("mlp", 2)[stage], process_group=mesh["dp"].get_group())
    factor = 1.0
    schedule = ScheduleDNI(
        PipelineStage(module, stage, 2, CPU, group=mesh["pp"].get_group()),
        2,
        lambda output, target: models.loss_fn(output, target) * factor,
        policy="synthetic",
        check_every_steps=4,
    )
    optimizer, policies = models.optimizer(module), []
    for step in range(12):
        factor = 30.0 if step > 4 and replica == 1 else 1.0
        x, y = models.batch("mlp", step, 8)
        schedule.step(*((x,) if stage == 0 else ()), target=y)
        optimizer.step()
        optimizer.zero_grad()
        policies.append(str(schedule.metrics["policy"]))
    return policies


def test_all_replicas_fall_back_when_one_diverges() -> None:
    """One pipeline went to `wait` alone, and its flush met another collective of its replicas: a crash."""
    for policies in run_ranks(4, _replicas_fall_back):
        assert policies == ["synthetic"] * 7 + ["wait"] * 5


def _odd_losses(rank: int, world: int, kind: str) -> list[str]:
    step = 0

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        loss = models.loss_fn(output, target)
        if kind == "negative":
            return loss - 10.0
        return loss * (float("nan") if step == 1 else 1.0)

    module = models.build("mlp", world)[rank]
    schedule = ScheduleDNI(
        PipelineStage(module, rank, world, CPU),
        2,
        loss_fn,
        policy="synthetic",
        unlock_after_steps=3,
        check_every_steps=4,
    )
    policies = []
    for step in range(12):
        x, y = models.batch("mlp", step, 8)
        schedule.step(*((x,) if rank == 0 else ()), target=y)
        policies.append(str(schedule.metrics["policy"]))
    return policies


@pytest.mark.parametrize("kind", ["negative", "one that is not a number"])
def test_a_negative_loss_or_a_single_nan_is_no_divergence(kind: str) -> None:
    for policies in run_ranks(2, _odd_losses, kind):
        assert policies == ["wait"] * 2 + ["synthetic"] * 10


def _frozen(rank: int, world: int, policy: str) -> bool:
    stages = models.build("mlp", world), models.build("mlp", world)
    for each in stages:
        each[0].requires_grad_(False)
    ours, theirs = stages[0][rank], stages[1][rank]
    dni = ScheduleDNI(PipelineStage(ours, rank, world, CPU), 3, models.loss_fn, policy=policy)
    one_f_one_b = Schedule1F1B(PipelineStage(theirs, rank, world, CPU), 3, models.loss_fn)
    for step in range(3):
        x, y = models.batch("mlp", step, 6)
        args = (x,) if rank == 0 else ()
        dni.step(*args, target=y)
        one_f_one_b.step(*args, **({"target": y} if rank == world - 1 else {}))
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    alike = all((a.grad is None) == (b.grad is None) for a, b in pairs)
    if policy == "wait" or rank == world - 1:
        alike = alike and all(a.grad is None or torch.equal(a.grad, b.grad) for a, b in pairs)
    return alike


@pytest.mark.parametrize("policy", ["wait", "synthetic"])
def test_a_frozen_first_stage(policy: str) -> None:
    """No output of it needs a gradient, so it has no predictor; that was taken for a missing one."""
    assert run_ranks(3, _frozen, policy) == [True] * 3


class Dropping(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.module(x), 0.3)


def _dropout(rank: int, world: int) -> bool:
    results = []
    for name in ("dni", "1f1b"):
        module = Dropping(models.build("mlp", world)[rank])
        stage = PipelineStage(module, rank, world, CPU)
        torch.manual_seed(7 + rank)
        if name == "dni":
            schedule: Any = ScheduleDNI(stage, 4, models.loss_fn, policy="wait")
        else:
            schedule = Schedule1F1B(stage, 4, models.loss_fn)
        optimizer = models.optimizer(module)
        for step in range(3):
            x, y = models.batch("mlp", step, 8)
            schedule.step(*((x,) if rank == 0 else ()), **({"target": y} if name == "dni" or rank == 1 else {}))
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in module.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_predictors_draw_none_of_the_models_random_numbers() -> None:
    """Building one in the first step moved the global generator, so dropout differed from 1F1B's."""
    assert run_ranks(2, _dropout) == [True, True]


class PassThrough(nn.Module):
    """Returns its activation and, as it came, a mask of the caller's."""

    def __init__(self, stage: int, num_stages: int) -> None:
        super().__init__()
        self.net, self.last = nn.Linear(4, 4), stage == num_stages - 1
        self.seen: list[tuple[float, float]] = []

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        if self.last:
            self.seen.append((float(mask.detach().min()), float(mask.detach().max())))
            return self.net(x)
        return self.net(x), mask


def _reused_mask(rank: int, world: int) -> list[tuple[float, float]]:
    module = PassThrough(rank, world)
    schedule = ScheduleDNI(
        PipelineStage(module, rank, world, CPU),
        1,
        lambda output, target: output.square().mean(),
        policy="synthetic",
        labels="none",
    )
    # torch 2.11 takes the mask for something that needs a gradient, and the predictor would be as wide
    width = 2_000_000 if hasattr(schedule._stage, "_stage_meta") else 10_000
    x, mask = torch.randn(2, 4), torch.empty(2, width)
    for step in range(5):
        mask.fill_(float(step))
        schedule.step(*((x, mask) if rank == 0 else ()), **({"target": x} if rank == world - 1 else {}))
        if rank == world - 1:
            time.sleep(0.05)
    return module.seen[-5:]


def test_an_input_that_is_also_an_output_may_be_overwritten_after_step() -> None:
    """It was sent from the caller's memory, up to `lag` microbatches later."""
    assert run_ranks(2, _reused_mask)[1] == [(float(step), float(step)) for step in range(5)]


def _stopped_at_the_agreement(rank: int, world: int, started: Path) -> tuple[str, float]:
    module = models.build("mlp", world)[rank]
    schedule = ScheduleDNI(
        PipelineStage(module, rank, world, CPU),
        1,
        models.loss_fn,
        policy="synthetic",
        lag=64,
        check_every_steps=4,
        timeout_s=3.0,
    )
    start = time.perf_counter()
    try:
        for step in range(10_000):
            x, y = models.batch("mlp", step, 8)
            start = time.perf_counter()
            schedule.step(*((x,) if rank == 0 else ()), target=y)
            if step == 5 and rank == 0:
                started.touch()
            time.sleep(0.1)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}", time.perf_counter() - start
    return "nothing was lost", 0.0


def test_a_rank_stopped_before_an_agreement_is_noticed_within_the_timeout(tmp_path: Path) -> None:
    """The agreement was a plain all-reduce, with the process group's own timeout of many minutes."""
    processes, out = start_ranks(2, _stopped_at_the_agreement, tmp_path / "started")
    try:
        wait_for(tmp_path / "started")
        os.kill(processes[1].pid, signal.SIGSTOP)
        _, error, result = out.get(timeout=20)
    finally:
        for process in processes:
            process.kill()
            process.join()
    message, seconds = pickle.loads(result)
    assert error is None and 3.0 <= seconds < 5.0, message
    assert message.startswith("BoundaryError: rank 0 (stage 0) at the agreement of all stages after step "), message


def _eval_first(rank: int, world: int) -> list[str]:
    """eval() with other rows before the first step and between steps, as a Hugging Face loop does."""
    case = Case("sequence", "local_head", m=2)
    pipeline, oracle = Pipeline(rank, world, case), Oracle(world, case)
    for step in range(4):
        x, y = models.batch("sequence", 50 + step, 4 * (step + 1), models.T + step)
        pipeline.schedule.eval(*((x,) if rank == 0 else ()), target=y)
        pipeline.step(step)
        oracle.step(step)
    return differences(pipeline, oracle)


def test_eval_may_have_other_shapes_than_training_also_before_the_first_step() -> None:
    assert run_ranks(3, _eval_first) == [[], [], []]


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


def _corrected(rank: int, world: int) -> list[str]:
    module = models.build("mlp", world)[rank]
    schedule = ScheduleDNI(
        PipelineStage(module, rank, world, CPU), 2, models.loss_fn, policy="synthetic", labels="local"
    )
    x, y = models.batch("mlp", 0, 4)
    said = []
    for told in (rank == world - 1, True):
        try:
            schedule.step(*((x,) if rank == 0 else ()), **({"target": y} if told else {}))
        except ValueError as error:
            said.append(str(error)[:14])
    return said


def test_a_step_that_was_refused_can_be_called_again_corrected() -> None:
    """The stages counted as started, though they had not agreed."""
    assert run_ranks(2, _corrected) == [["labels='local'"]] * 2


def _fails_once(rank: int, world: int) -> list[str]:
    failing = True

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if failing:
            raise FloatingPointError("once")
        return models.loss_fn(output, target)

    module = models.build("mlp", world)[rank]
    schedule = ScheduleDNI(PipelineStage(module, rank, world, CPU), 2, loss_fn, policy="synthetic")
    x, y = models.batch("mlp", 0, 4)
    said = []
    failing = False
    schedule.step(*((x,) if rank == 0 else ()), target=y)
    for each in (True, False):
        failing = each
        try:
            schedule.step(*((x,) if rank == 0 else ()), target=y)
        except (RuntimeError, FloatingPointError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_after_a_step_that_failed_in_the_middle_the_next_one_says_so() -> None:
    """It went on with the losses of the failed step, and so with a gradient that was lost in silence."""
    said = run_ranks(1, _fails_once)[0]
    assert said == [
        "FloatingPointError: once",
        "RuntimeError: an earlier step failed in the middle (FloatingPointError('once')) and lost its microbatches: "
        "build the schedule anew on every rank and load the last state",
    ]


def _kwargs_under_synthetic(rank: int, world: int) -> bool:
    """kwargs of the first stage reach it, and its predictor sees the activation that they made."""

    class Scaled(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return self.module(x if scale is None else x * scale)

    case = Case(m=2, lag=1)
    pipeline = Pipeline(rank, world, case, wrap=Scaled)
    oracle = Oracle(world, case)
    scale = torch.linspace(0, 1, 6).unsqueeze(1)
    for step in range(4):
        x, y = models.batch("mlp", step, 6)
        pipeline.schedule.step(*((x,) if rank == 0 else ()), target=y, **({"scale": scale} if rank == 0 else {}))
        oracle.reference.step(x * scale, y, y)
        for optimizer in (pipeline.optimizer, *oracle.optimizers):
            optimizer.step()
            optimizer.zero_grad()
    return not differences(pipeline, oracle)


def test_keyword_arguments_under_synthetic() -> None:
    assert run_ranks(2, _kwargs_under_synthetic) == [True, True]


def _static_graph(rank: int, world: int, schedule_class: Any) -> bool:
    groups: list[Callable[[], Any]] = [lambda each=each: dist.new_group([each]) for each in range(world)]
    own = [make() for make in groups][rank]
    module = DistributedDataParallel(models.build("mlp", world)[rank], process_group=own, static_graph=True)
    schedule = schedule_class(PipelineStage(module, rank, world, CPU), 4, models.loss_fn)
    x, y = models.batch("mlp", 0, 8)
    schedule.step(*((x,) if rank == 0 else ()), **({"target": y} if rank == world - 1 else {}))
    return all(parameter.grad is not None for parameter in module.parameters())


def _works_with_a_static_graph(schedule_class: Any) -> bool:
    try:
        return all(run_ranks(2, _static_graph, schedule_class))
    except RuntimeError as error:
        assert "INTERNAL ASSERT FAILED" in str(error) or "Connection closed" in str(error), error
        return False


def test_ddp_with_a_static_graph_works_wherever_1f1b_takes_it() -> None:
    """torch 2.13's does, 2.11's does not."""
    assert _works_with_a_static_graph(ScheduleDNI) or not _works_with_a_static_graph(Schedule1F1B)
