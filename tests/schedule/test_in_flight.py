"""How many microbatches stages hold: each boundary's own number equal to the oracle, and "auto", which measures."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from dnipipe.plan.dial import choose_in_flight
from dnipipe.schedule import timing
from dnipipe.schedule.policy import Policy
from tests.ranks import run_ranks
from tests.schedule.harness import Case, Oracle, Pipeline, differences

FALLING = {
    2: [(2,), (3,)],
    3: [(3, 2), (4, 2), (4, 3), (5, 2), (5, 3)],
    4: [(4, 3, 2), (5, 3, 2), (5, 4, 2), (5, 4, 3), (6, 4, 3), (7, 3, 2), (7, 5, 3)],
}


def _equal(rank: int, world: int) -> list[str]:
    wrong = []
    ms, policies = itertools.cycle([1, 4, 2, 8, 3]), itertools.cycle(["stale", "corrected"])
    for in_flight in FALLING[world]:
        case = Case("mlp", "linear", next(ms), next(policies), in_flight=in_flight, labels="none", optimizer="adamw")
        pipeline, oracle = Pipeline(rank, world, case), Oracle(world, case)
        for step in range(7):
            pipeline.step(step)
            oracle.step(step)
        wrong += [f"{case}: {each}" for each in differences(pipeline, oracle)]
        # with no more than it may hold
        most = max(pipeline.most_held, default=0)
        if rank < world - 1 and most != min(in_flight[rank], 7 * case.m):
            wrong.append(f"{case}: it held {most}")
    return wrong


@pytest.mark.parametrize("world", [2, 3, 4])
def test_each_boundary_may_have_its_own_number(world: int) -> None:
    assert run_ranks(world, _equal) == [[]] * world


class _Counts(nn.Module):
    """How often it was called. BatchNorm's statistics would tell too, but torch's own sweep fills them with noise."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * (1 + self.calls / 100)


def _with_state(module: nn.Module) -> nn.Module:
    """What a try of a forward would leave traces in: a count and random numbers."""
    return nn.Sequential(_Counts(), nn.Dropout(0.2), module)


def _tensors(pipeline: Pipeline) -> list[torch.Tensor]:
    return [*pipeline.state(), *pipeline.module.buffers(), torch.get_rng_state()]


def _measured(rank: int, world: int) -> tuple[Any, bool, str]:
    """The choice, and whether the run that measured equals one that was told it."""
    ends, chosen = [], None
    for in_flight in ("auto", None):
        case = Case("mlp", "mlp", 2, "wait:1,corrected", in_flight=in_flight or chosen)
        pipeline = Pipeline(rank, world, case, wrap=_with_state)
        for step in range(4):
            pipeline.step(step)
        chosen = pipeline.schedule._flow.policy.in_flight
        ends.append(_tensors(pipeline))
    return chosen, all(torch.equal(a, b) for a, b in zip(*ends, strict=True)), str(pipeline.schedule._flow.phase)


def test_measuring_changes_no_number_but_by_what_is_chosen() -> None:
    told = run_ranks(3, _measured)
    chosen = told[0][0]
    Policy("stale", in_flight=chosen).check(3)
    assert told == [(chosen, True, "corrected")] * 3


def _as_if(microbatch_ms: float, *transfers_ms: float) -> None:
    """Has the measuring find these times on this rank."""
    timing._microbatch_ms = lambda *_: microbatch_ms  # type: ignore[assignment]
    timing._side_ms = lambda side, *_: transfers_ms[min(side.boundary.stage, side.boundary.peer_stage)]  # type: ignore


def _chosen(pipeline: Pipeline) -> Any:
    return pipeline.schedule._flow.policy.in_flight


def _kept(rank: int, world: int) -> list[Any]:
    """The choices of a run, of one that goes on from it, of one that had begun otherwise; whether both end alike."""
    case = Case("mlp", "linear", 2, "stale", labels="none", in_flight="auto")
    _as_if(10.0 + rank, 5.0, 5.0)
    saving, found = Pipeline(rank, world, case), []
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy(
                (saving.module.state_dict(), saving.optimizer.state_dict(), saving.schedule.state_dict())
            )
        saving.step(step)
    found.append(_chosen(saving))
    _as_if(1000.0, 0.0, 0.0)
    for begun in (False, True):
        resumed = Pipeline(rank, world, case)
        if begun:
            resumed.step(0)
            found.append(_chosen(resumed))
            resumed.schedule.flush()
            resumed.optimizer.zero_grad()
        resumed.module.load_state_dict(saved[0])
        resumed.optimizer.load_state_dict(copy.deepcopy(saved[1]))  # it keeps the tensors that it is given
        resumed.schedule.load_state_dict(copy.deepcopy(saved[2]))
        for step in range(3, 6):
            resumed.step(step)
        found.append(_chosen(resumed))
        found.append(all(torch.equal(a, b) for a, b in zip(saving.state(), resumed.state(), strict=True)))
    return found


def test_the_choice_goes_by_the_slowest_stage_and_is_kept_by_a_run_that_goes_on() -> None:
    chosen = choose_in_flight(12.0, [5.0, 5.0]).in_flight
    assert chosen != (3, 2)
    assert run_ranks(3, _kept) == [[chosen, chosen, True, (3, 2), chosen, True]] * 3


def _replicas(rank: int, world: int) -> Any:
    mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("copies", "stages"))
    stage, copies = mesh["stages"].get_local_rank(), mesh["copies"].get_group()
    _as_if(10.0, *((0.0, 0.0), (8.0, 8.0))[mesh["copies"].get_local_rank()])
    flow = _Flow(stage)
    schedule = _Stage(stage, mesh["stages"].get_group())
    return timing.measure_in_flight(schedule, flow, (True,), (), {}, [copies])[0]


class _Boundary:
    def __init__(self, stage: int, peer_stage: int) -> None:
        self.stage, self.peer_stage = stage, peer_stage


class _Side:
    def __init__(self, stage: int, peer_stage: int) -> None:
        self.boundary = _Boundary(stage, peer_stage)


class _Flow:
    """As much of a flow as is measured."""

    device = torch.device("cpu")

    def __init__(self, stage: int) -> None:
        self.up = _Side(stage, stage - 1) if stage > 0 else None
        self.down = _Side(stage, stage + 1) if stage < 2 else None


class _Stage:
    num_stages = 3

    def __init__(self, stage: int, group: dist.ProcessGroup) -> None:
        self.stage_index, self.group, self.is_first = stage, group, stage == 0
        self.args_recv_info = [[]]


def test_copies_of_a_pipeline_hold_alike_what_the_slowest_needs() -> None:
    most = choose_in_flight(10.0, [8.0, 8.0]).in_flight
    assert choose_in_flight(10.0, [0.0, 0.0]).in_flight != most and run_ranks(6, _replicas) == [most] * 6


def _one_copy_fails(rank: int, world: int) -> str:
    mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("copies", "stages"))
    stage, copies = mesh["stages"].get_local_rank(), mesh["copies"]
    _as_if(10.0, 1.0, 1.0)
    if (copies.get_local_rank(), stage) == (1, 2):

        def fail(*_: Any) -> float:
            raise FloatingPointError("all zeros")

        timing._microbatch_ms = fail
    with pytest.raises(ValueError) as refused:
        held = _Stage(stage, mesh["stages"].get_group())
        timing.measure_in_flight(held, _Flow(stage), (True,), (), {}, [copies.get_group()])
    return str(refused.value)


def test_a_failure_in_one_copy_of_a_pipeline_is_told_on_all_ranks_of_all() -> None:
    told = run_ranks(6, _one_copy_fails)
    assert len(set(told)) == 1 and "failed on stage 2: FloatingPointError: all zeros; give numbers" in told[0]


def _failing(rank: int, world: int) -> tuple[str, str]:
    """What each rank hears when one stage bears no zeros; and what another try, with numbers, holds."""

    def fail(*_: Any) -> float:
        raise FloatingPointError("all zeros")

    _as_if(10.0, 1.0, 1.0)
    if rank == 1:
        timing._microbatch_ms = fail
    case = Case("mlp", "linear", 2, "stale", labels="none", in_flight="auto")
    with pytest.raises(ValueError) as refused:
        Pipeline(rank, world, case).step(0)
    case.in_flight = (4, 2)
    told = Pipeline(rank, world, case)
    told.step(0)
    return str(refused.value), str(_chosen(told))


def test_a_stage_that_cannot_be_timed_is_named_on_every_rank() -> None:
    message = (
        "in_flight='auto' times a microbatch, with zeros where activations will be, and that failed on stage 1: "
        "FloatingPointError: all zeros; give numbers in its place"
    )
    assert run_ranks(3, _failing) == [(message, "(4, 2)")] * 3


@pytest.mark.parametrize("in_flight", ["many", True, [2.0], (3, None), 2.5])
def test_what_is_no_number_of_microbatches_is_refused(in_flight: Any) -> None:
    with pytest.raises(ValueError, match="in_flight must be a number of microbatches, one for each stage but the last"):
        Policy("stale", in_flight=in_flight)
