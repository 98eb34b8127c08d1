"""What people do with a torch schedule works with ScheduleDNI too."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.pipelining.schedules import get_schedule_class

import dnipipe
from dnipipe import ScheduleDNI
from tests.ranks import run_ranks
from tests.schedule import models
from tests.schedule.harness import Case, Oracle, Pipeline, differences

CPU = torch.device("cpu")


class Scaled(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.module(x if scale is None else x * scale)


def _kwargs(rank: int, world: int) -> bool:
    case = Case(m=2, policy="wait")
    ours = Pipeline(rank, world, case, wrap=Scaled)
    twin = Scaled(models.build("mlp", world)[rank])
    theirs = Schedule1F1B(PipelineStage(twin, rank, world, CPU), 2, models.loss_fn)
    x, y = models.batch("mlp", 0, 4)
    kwargs = {"scale": torch.linspace(0, 1, 4).unsqueeze(1)} if rank == 0 else {}
    args, target = ((x,) if rank == 0 else ()), ({"target": y} if rank == world - 1 else {})
    ours.schedule.step(*args, target=y, **kwargs)
    theirs.step(*args, **target, **kwargs)
    return all(torch.equal(a.grad, b.grad) for a, b in zip(ours.module.parameters(), twin.parameters(), strict=True))


def test_keyword_arguments_of_the_first_stage_are_split_as_torch_splits_them() -> None:
    assert run_ranks(2, _kwargs) == [True, True]


def _kwargs_under_synthetic(rank: int, world: int) -> bool:
    """kwargs of the first stage reach it, and its predictor sees the activation that they made."""
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


def _with_eval(rank: int, world: int, m: int) -> list[str]:
    case = Case(m=m, lag=2)
    pipeline, oracle = Pipeline(rank, world, case), Oracle(world, case)
    outputs = []
    for step in range(-1, 5):
        if step >= 0:
            pipeline.step(step)
            oracle.step(step)
        if step in (-1, 1, 2, 4):
            x, y = models.batch("mlp", 90, case.rows * m)
            losses: list[Tensor] = []
            args = (x,) if rank == 0 else ()
            last = {"target": y, "losses": losses} if rank == world - 1 else {}
            outputs.append((pipeline.schedule.eval(*args, **last), losses))
            model = nn.Sequential(*oracle.reference.stages)
            with torch.no_grad():
                expected = torch.cat([model(chunk) for chunk in x.chunk(m)])
            if rank == world - 1 and not torch.equal(outputs[-1][0], expected):
                return ["eval() output"]
            if rank == world - 1 and len(losses) != m:
                return [f"{len(losses)} losses of eval()"]
    return differences(pipeline, oracle)


def test_eval_before_between_and_after_steps_changes_nothing() -> None:
    for m in (1, 4):
        assert run_ranks(3, _with_eval, m) == [[], [], []]


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


def _accumulated(rank: int, world: int) -> list[str]:
    case = Case(m=2, options={"scale_grads": False})
    pipeline, oracle = Pipeline(rank, world, case), Oracle(world, case)
    oracle.reference.scale_grads = False
    for step in range(6):
        pipeline.step(step, optimize=step % 3 == 2)
        oracle.step(step, optimize=step % 3 == 2)
    return differences(pipeline, oracle)


def test_several_steps_before_one_optimizer_step() -> None:
    assert run_ranks(2, _accumulated) == [[], []]


def _reused(rank: int, world: int) -> list[str]:
    case = Case("sequence", "local_head", m=2, lag=3)
    pipeline, oracle = Pipeline(rank, world, case), Oracle(world, case)
    x_buffer, y_buffer = models.batch("sequence", 0, case.rows * case.m)
    for step in range(5):
        x, y = models.batch("sequence", step, case.rows * case.m)
        x_buffer.copy_(x)
        y_buffer.copy_(y)
        pipeline.schedule.step(*((x_buffer,) if rank == 0 else ()), target=y_buffer)
        x_buffer.zero_()
        y_buffer.zero_()
        pipeline.optimizer.step()
        pipeline.optimizer.zero_grad()
        oracle.step(step)
    return differences(pipeline, oracle)


def test_the_caller_may_reuse_the_memory_of_input_and_target_after_step() -> None:
    assert run_ranks(3, _reused) == [[], [], []]


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


def test_register_makes_torch_know_the_name() -> None:
    import torch.distributed.pipelining.schedules as schedules

    original = schedules.get_schedule_class
    try:
        dnipipe.register()
        dnipipe.register("Bubbleless")
        for name in ("DNI", "dni", "bubbleless"):
            assert schedules.get_schedule_class(name) is ScheduleDNI
        assert schedules.get_schedule_class("1F1B") is Schedule1F1B
        # a module that had imported the function by value, as this one, is served too
        assert get_schedule_class("DNI") is ScheduleDNI
    finally:
        schedules.get_schedule_class = original
        globals()["get_schedule_class"] = original
