"""Stages of several outputs, in bfloat16, compiled, checkpointed, frozen, with dropout, or under DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel

from dnipipe import ScheduleDNI
from dnipipe.interface import Learner
from dnipipe.schedule.policy import Policy
from dnipipe.schedule.reference import Reference
from tests.ranks import run_ranks
from tests.schedule import models
from tests.schedule.harness import Case, Oracle, Pipeline, differences

CPU = torch.device("cpu")


class TwoOutputs(nn.Module):
    """(B, D) -> (h, a mask that needs no gradient, a second h); the next stage uses all three."""

    def __init__(self, stage: int, num_stages: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(models.D, models.D), nn.Linear(models.D, models.D)
        self.first, self.last = stage == 0, stage == num_stages - 1
        self.head = nn.Linear(models.D, models.V)

    def forward(self, h: Tensor, mask: Tensor | None = None, g: Tensor | None = None) -> Any:
        if mask is not None and g is not None:
            h = h * mask + g
        h, g = torch.tanh(self.a(h)), torch.tanh(self.b(h))
        return self.head(h + g) if self.last else (h, (h.detach() > 0).float(), g)


def _two_outputs(rank: int, world: int) -> list[bool]:
    """No optimizer is given, so on both sides each of the two interfaces learns at its own rate."""
    equal = []
    for policy in ("wait", "synthetic"):
        torch.manual_seed(0)
        stages = [TwoOutputs(stage, world) for stage in range(world)]
        torch.manual_seed(0)
        twins = [TwoOutputs(stage, world) for stage in range(world)]

        def interfaces() -> list[nn.Module]:
            return [models.interface("mlp", "linear", True), models.interface("mlp", "mlp", True)]

        given = interfaces()
        if not hasattr(PipelineStage(stages[rank], rank, world, CPU), "_stage_meta"):
            given.insert(1, models.interface("mlp", "linear", True))  # torch 2.11 asks a gradient for the mask too

        learners = [Learner(interfaces()) for _ in range(world - 1)]
        reference = Reference(
            twins, [*learners, None], models.loss_fn, num_microbatches=3, policy=Policy(policy, lag=2)
        )
        schedule = ScheduleDNI(
            PipelineStage(stages[rank], rank, world, CPU),
            3,
            models.loss_fn,
            interface=given if rank < world - 1 else None,
            policy=policy,
        )
        for step in range(4):
            x, y = models.batch("mlp", step, 6)
            schedule.step(*((x,) if rank == 0 else ()), target=y)
            reference.step(x, y, y)
            for module in (stages[rank], *twins):
                models.optimizer(module).step()
                module.zero_grad()
        pairs = zip(stages[rank].parameters(), twins[rank].parameters(), strict=True)
        equal.append(all(torch.equal(a, b) for a, b in pairs))
    return equal


def test_several_outputs_of_which_one_needs_no_gradient() -> None:
    assert run_ranks(3, _two_outputs) == [[True, True]] * 3


def _precision(rank: int, world: int, pure: bool) -> list[str]:
    wrong = []
    for policy in ("wait", "synthetic"):
        case = Case("sequence", "local_head", m=2, policy=policy)
        pipeline = Pipeline(rank, world, case, wrap=(lambda m: m.bfloat16()) if pure else (lambda m: m))
        oracle = Oracle(world, case)
        if pure:
            for stage in oracle.reference.stages:
                stage.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=not pure):
            for step in range(4):
                pipeline.step(step)
                oracle.step(step)
        dtype = next(iter(pipeline.schedule._flow.down.pending), None) if policy == "synthetic" and rank == 0 else None
        if dtype is not None and dtype.activations[0].dtype is not (torch.bfloat16 if pure else torch.float32):
            wrong.append(f"activation dtype {dtype.activations[0].dtype}")
        wrong += differences(pipeline, oracle)
    return wrong


def test_bf16_under_autocast_equals_the_oracle() -> None:
    assert run_ranks(2, _precision, False) == [[], []]


def test_pure_bf16_equals_the_oracle() -> None:
    assert run_ranks(2, _precision, True) == [[], []]


class Checkpointed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.module, x, use_reentrant=False)


def _compile(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="aot_eager")


def _wrapped(rank: int, world: int, name: str) -> list[str]:
    wrap = {"compile": _compile, "checkpoint": Checkpointed}[name]
    case = Case(m=3)
    pipeline, oracle = Pipeline(rank, world, case, wrap=wrap), Oracle(world, case)
    for step in range(3):
        pipeline.step(step)
        oracle.step(step)
    return differences(pipeline, oracle)


def test_compiled_stages_equal_the_oracle() -> None:
    assert run_ranks(2, _wrapped, "compile") == [[], []]


def test_activation_checkpointing_inside_a_stage_equals_the_oracle() -> None:
    assert run_ranks(2, _wrapped, "checkpoint") == [[], []]


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
