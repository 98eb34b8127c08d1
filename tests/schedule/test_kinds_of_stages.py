"""Stages of several outputs, in bfloat16, compiled, checkpointed: each equals the oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

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
