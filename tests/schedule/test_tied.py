"""A tied weight on two stages against one process, in which it gets both halves' gradients one step late."""

from __future__ import annotations

import copy
import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from dnipipe import ScheduleDNI
from dnipipe.boundary import BoundaryError
from dnipipe.schedule import TiedWeights
from tests.ranks import run_ranks
from tests.schedule import models

CPU = torch.device("cpu")
STEPS, M = 6, 3


def _stages(world: int) -> tuple[list[nn.Module], nn.Parameter, nn.Parameter]:
    """The stages, and both copies of the weight, equal at the start."""
    stages = models.build("sequence", world)
    first, last = stages[0].embed.weight, stages[-1].head.weight
    with torch.no_grad():
        last.copy_(first)
    return stages, first, last


def _optimizer(modules: list[nn.Module]) -> torch.optim.Optimizer:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


class End:
    """One rank's stage, with its copy of the weight if it is an end of the pipeline."""

    def __init__(self, rank: int, world: int, group: Any) -> None:
        self.rank, self.world = rank, world
        stages, *ends = _stages(world)
        self.module = stages[rank]
        stage = PipelineStage(self.module, rank, world, CPU)
        self.schedule = ScheduleDNI(stage, M, loss_fn=models.loss_fn, policy="wait", timeout_s=20.0)
        self.optimizer = _optimizer([self.module])
        self.tied: TiedWeights | None = None
        if rank in (0, world - 1):
            peer = world - 1 - rank
            weight = ends[0] if rank == 0 else ends[1]
            self.tied = TiedWeights(weight, group, stage=rank, peer=peer, peer_stage=peer, timeout_s=20.0)

    def step(self, step: int) -> None:
        x, y = models.batch("sequence", step, 2 * M)
        self.schedule.step(*((x,) if self.rank == 0 else ()), target=y)
        if self.tied is not None:
            self.tied.after_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.module.parameters()]

    def state(self) -> dict[str, Any]:
        assert self.tied is not None
        parts = {"module": self.module, "optimizer": self.optimizer, "schedule": self.schedule, "tied": self.tied}
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    def load(self, state: dict[str, Any]) -> None:
        assert self.tied is not None
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.tied.load_state_dict(state["tied"])


def _oracle(world: int) -> list[list[Tensor]]:
    """The parameters of every stage after STEPS steps in one process."""
    stages, first, last = _stages(world)
    optimizer, late = _optimizer(stages), None
    for step in range(STEPS):
        x, y = models.batch("sequence", step, 2 * M)
        models.loss_fn(nn.Sequential(*stages)(x), y).backward()
        assert first.grad is not None and last.grad is not None
        now = first.grad + last.grad
        first.grad, last.grad = late, copy.copy(late)
        late = now
        optimizer.step()
        optimizer.zero_grad()
    return [[parameter.detach() for parameter in stage.parameters()] for stage in stages]


def _ends(world: int) -> Any:
    """The group of both ends; in between it is nothing to use."""
    return dist.new_group([0, world - 1])


def _trained(rank: int, world: int) -> tuple[list[Tensor], Tensor | None]:
    end = End(rank, world, _ends(world))
    for step in range(STEPS):
        end.step(step)
    if end.tied is not None:
        end.tied.drain()
    return end.values(), None if end.tied is None else end.tied.weight.detach()


@pytest.mark.parametrize("world", [2, 3])
def test_both_copies_take_the_sum_of_both_ends_one_step_late(world: int) -> None:
    results, oracle = run_ranks(world, _trained), _oracle(world)
    assert torch.equal(results[0][1], results[-1][1])
    for (ours, _), expected in zip(results, oracle, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def _resumed(rank: int, world: int) -> list[str]:
    """A run that was saved between, and one that took up from there, end as one that was left alone."""
    group, wrong = _ends(world), []
    alone, saved = End(rank, world, group), End(rank, world, group)
    for step in range(STEPS):
        alone.step(step)
        saved.step(step)
        if step == 2:
            state = saved.state()
    resumed = End(rank, world, group)
    resumed.step(0)  # and is taken elsewhere, with an exchange under way
    resumed.load(state)
    for step in range(3, STEPS):
        resumed.step(step)
    for name, run in (("saved", saved), ("resumed", resumed)):
        if not all(torch.equal(a, b) for a, b in zip(alone.values(), run.values(), strict=True)):
            wrong.append(name)
    for run in (alone, saved, resumed):
        assert run.tied is not None
        run.tied.drain()
    return wrong


def test_runs_with_and_without_a_save_and_a_resumed_run_end_bit_equal() -> None:
    assert run_ranks(2, _resumed) == [[], []]


def _first_step(rank: int, world: int) -> bool:
    """Step 0 leaves the weight alone, decay or not, and an end without a gradient counts as zero."""
    weight = nn.Parameter(torch.ones(2, 3))
    tied = TiedWeights(weight, _ends(world), stage=rank, peer=1 - rank, peer_stage=1 - rank, timeout_s=20.0)
    other = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight, other], weight_decay=0.5)
    weight.grad = torch.full((2, 3), 2.0) if rank == 0 else None
    tied.after_backward()
    optimizer.step()
    untouched = torch.equal(weight, torch.ones(2, 3))
    tied.after_backward()
    summed = weight.grad is not None and torch.equal(weight.grad, torch.full((2, 3), 2.0))
    tied.drain()
    return untouched and summed and [id(each) for each in tied.others([weight, other])] == [id(other)]


def test_the_first_step_leaves_the_weight_alone_and_no_gradient_counts_as_zero() -> None:
    assert run_ranks(2, _first_step) == [True, True]


def _left_alone(rank: int, world: int) -> str:
    group = _ends(world)
    if rank == 1:
        time.sleep(3)  # there, but it never takes a step
        return ""
    weight = nn.Parameter(torch.ones(2, 3))
    tied = TiedWeights(weight, group, stage=4, peer=1, peer_stage=9, timeout_s=1.0)
    tied.after_backward()
    try:
        tied.after_backward()
    except BoundaryError as error:
        return str(error)
    return "nothing"


def test_an_end_that_is_left_alone_says_whom_it_waited_for() -> None:
    message, _ = run_ranks(2, _left_alone)
    expected = r"rank 0 \(stage 4\) waited 1\.\d s, at most 1 s, for rank 1 \(stage 9\) at microbatch 0: "
    assert re.match(expected, message), message
