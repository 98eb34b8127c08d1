"""Clipping by a norm that travels, against the formula in one process; and who waits for whom."""

from __future__ import annotations

import copy
import math
import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dnipipe.optim import Clip, StageClip, StageOptimizer, TravellingClip
from tests.optim.harness import draw_gradients, make_optimizer, make_stage, same, train
from tests.ranks import run_ranks

STEPS, MAX_NORM = 8, 0.7
LATE_S = 0.5


def _seed(step: int, rank: int) -> int:
    return step + 1000 * rank


def _step(stage: nn.Module, optimizer: StageOptimizer, step: int, rank: int) -> None:
    draw_gradients(stage, _seed(step, rank))
    for parameter in stage.parameters():
        assert parameter.grad is not None
        parameter.grad *= 1 + 2 * rank * (step % 3)  # no two stages have like norms, and the larger one changes
    optimizer.step(step)


def _trained(rank: int, world: int, dtype: torch.dtype) -> tuple[list[tuple[float, float]], list[Tensor]]:
    """Every step's own norm and the one clipped by; the weights at the end."""
    stage = make_stage().to(dtype)
    clip = TravellingClip(MAX_NORM, dist.new_group(backend="gloo"), timeout_s=20.0)
    assert math.isnan(clip.total_norm)
    optimizer, norms = make_optimizer(stage, clip=clip), []
    for step in range(STEPS):
        _step(stage, optimizer, step, rank)
        norms.append((optimizer.grad_norm.item(), clip.total_norm.item()))
    clip.drain()
    return norms, [parameter.detach() for parameter in stage.parameters()]


def _reference(world: int, dtype: torch.dtype) -> list[tuple[list[tuple[float, float]], list[Tensor]]]:
    """The same of all stages in one process and float32, which clips gradients itself."""
    stages = [make_stage().to(dtype).float() for _ in range(world)]
    optimizers = [make_optimizer(stage, clip=StageClip(0)) for stage in stages]
    norms: list[list[tuple[float, float]]] = [[] for _ in stages]
    before: list[float] = []
    for step in range(STEPS):
        for rank, stage in enumerate(stages):
            draw_gradients(stage, _seed(step, rank))
            for parameter in stage.parameters():
                parameter.grad = (parameter.grad * (1 + 2 * rank * (step % 3))).to(dtype).float()
        own = [nn.utils.get_total_norm([p.grad for p in s.parameters()]).item() for s in stages]
        for rank, stage in enumerate(stages):
            others = max(0.0, sum(before) - before[rank]) if before else 0.0
            total = torch.tensor(math.sqrt(others + own[rank] ** 2))
            norms[rank].append((own[rank], total.item()))
            for parameter in stage.parameters():
                parameter.grad *= (MAX_NORM / (total + 1e-6)).clamp(max=1.0)
        for optimizer in optimizers:
            optimizer.step(step)
        before = [norm**2 for norm in own]
    return [(norms[r], [p.detach() for p in s.parameters()]) for r, s in enumerate(stages)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_clips_by_this_steps_own_norm_and_last_steps_of_the_others(world: int, dtype: torch.dtype) -> None:
    for rank, (norms, weights) in enumerate(run_ranks(world, _trained, dtype)):
        expected_norms, expected = _reference(world, dtype)[rank]
        assert norms == expected_norms
        assert norms[0][0] == norms[0][1] and all(MAX_NORM < own < total for own, total in norms[1:])
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(weights, expected, strict=True))


def _one_stage(rank: int, world: int) -> bool:
    one, other = make_stage(), make_stage()
    clip = TravellingClip(MAX_NORM, dist.new_group(backend="gloo"))
    train(one, make_optimizer(one, clip=clip), range(STEPS))
    train(other, make_optimizer(other, clip=StageClip(MAX_NORM)), range(STEPS))
    clip.drain()
    return same(one, other)


def test_a_pipeline_of_one_stage_clips_as_that_stage_alone() -> None:
    assert run_ranks(1, _one_stage) == [True]


def _resumed(rank: int, world: int) -> list[str]:
    """A run that was saved between, and one that took up from there, end as one that was left alone."""
    runs: dict[str, tuple[nn.Module, StageOptimizer]] = {}
    for name in ("alone", "saved", "resumed", "anew"):
        stage = make_stage()
        clip = TravellingClip(MAX_NORM, dist.new_group(backend="gloo"), timeout_s=20.0)
        runs[name] = (stage, make_optimizer(stage, clip=clip))
    state: dict[str, Any] = {}
    for step in range(STEPS):
        _step(*runs["alone"], step, rank)
        _step(*runs["saved"], step, rank)
        if step == 3:
            state = copy.deepcopy({"stage": runs["saved"][0].state_dict(), **runs["saved"][1].state_dict()})
    for name, kept in (("resumed", state), ("anew", {"state": state["state"]})):
        stage, optimizer = runs[name]
        _step(stage, optimizer, 0, rank)  # and is taken elsewhere, with a sum under way
        stage.load_state_dict(state["stage"])
        optimizer.load_state_dict(kept)
        for step in range(4, STEPS):
            _step(stage, optimizer, step, rank)
            if step == 4 and name == "anew":
                assert torch.equal(optimizer.clip.total_norm, optimizer.grad_norm)
    for _, optimizer in runs.values():
        optimizer.clip.drain()
    return [name for name, (stage, _) in runs.items() if same(stage, runs["alone"][0])]


@pytest.mark.parametrize("world", [2, 3])
def test_a_run_taken_up_ends_bit_equal_and_without_the_clips_state_begins_anew(world: int) -> None:
    assert run_ranks(world, _resumed) == [["alone", "saved", "resumed"]] * world


def _unclipped(rank: int, world: int) -> tuple[bool, float, float]:
    clip = TravellingClip(0.0, dist.new_group(backend="gloo"))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("max_norm is 0, so nothing is to be exchanged")

    dist.all_reduce = refuse
    one, other = make_stage(), make_stage()
    optimizer = make_optimizer(one, clip=clip)
    train(one, optimizer, range(STEPS if rank == 0 else 1))
    train(other, make_optimizer(other, clip=None), range(STEPS if rank == 0 else 1))
    assert optimizer.state_dict()["clip"] == {"others": None}
    optimizer.load_state_dict(optimizer.state_dict())
    return same(one, other), optimizer.grad_norm.item(), clip.total_norm.item()


def test_max_norm_0_measures_and_exchanges_nothing() -> None:
    for equal, own, total in run_ranks(2, _unclipped):
        assert equal and own > 1 and math.isnan(total)


def _two_copies(rank: int, world: int, dtype: torch.dtype, travelling: bool) -> list[Tensor]:
    """A weight of an embedding on one stage and of the head on the other, after every step; and the last norm."""
    shared = nn.Linear(6, 5, bias=False)
    module: nn.Module = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 3)) if rank == 0 else nn.Sequential(shared)
    with torch.no_grad():
        module[0].weight.copy_(torch.linspace(-1, 1, 30).view(5, 6))
    module = module.to(dtype)
    clip: Clip = StageClip(0.1)
    if travelling:
        clip = TravellingClip(0.1, dist.new_group(backend="gloo"), timeout_s=20.0)
    weight = module[0].weight
    optimizer, seen = make_optimizer(module, clip=clip, alone=[weight]), []
    for step in range(6):
        draw_gradients(module, _seed(step, rank))
        weight.grad = None  # as at the first step of TiedWeights
        if step:
            weight.grad = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.step(step)
        seen.append(weight.detach().clone())
    if isinstance(clip, TravellingClip):
        clip.drain()
    return [*seen, optimizer.grad_norm]


@pytest.mark.parametrize("travelling", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_a_weight_on_two_stages_stay_bit_equal(dtype: torch.dtype, travelling: bool) -> None:
    (*first, norm_first), (*last, norm_last) = run_ranks(2, _two_copies, dtype, travelling)
    assert norm_first > 0.1 and norm_last == 0
    assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))
    assert not torch.equal(first[0], first[-1])


def _times(rank: int, world: int) -> list[tuple[float, float]]:
    """When each step began and ended, by a clock that all processes share; rank 1 is late at steps 0 and 4."""
    stage = make_stage()
    clip = TravellingClip(MAX_NORM, dist.new_group(backend="gloo"), timeout_s=20.0)
    optimizer, times = make_optimizer(stage, clip=clip), []
    dist.barrier()
    for step in range(7):
        draw_gradients(stage, step)
        if rank == 1 and step in (0, 4):
            time.sleep(LATE_S)
        began = time.monotonic()
        optimizer.step(step)
        times.append((began, time.monotonic()))
    clip.drain()
    return times


def test_a_late_stage_holds_nobody_back_within_the_step_and_is_waited_for_in_the_next() -> None:
    fast, slow = run_ranks(2, _times)
    for step in (0, 4):
        assert fast[step][1] < slow[step][0], "the step ends before the late stage begins it"
        assert fast[step + 1][0] < slow[step][0] < fast[step + 1][1], "the next one waits for the late stage"
        assert fast[step + 1][1] - fast[step + 1][0] > LATE_S / 2
    assert fast[5][1] - slow[4][0] < LATE_S, "and for no more than that"


def _left_alone(rank: int, world: int) -> str:
    group = dist.new_group(backend="gloo")
    if rank == 1:
        time.sleep(3)  # there, but it never takes a step
        return ""
    stage = make_stage()
    optimizer = make_optimizer(stage, clip=TravellingClip(MAX_NORM, group, timeout_s=1.0))
    train(stage, optimizer, [0])
    try:
        train(stage, optimizer, [1])
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_stage_that_is_left_alone_says_so() -> None:
    message, _ = run_ranks(2, _left_alone)
    assert re.match(r"rank 0 waited 1\.\d s, at most 1 s, for the gradient norms of the other stages: ", message), (
        message
    )


def test_values_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="max_norm = -1: a norm is not negative"):
        StageClip(-1)
    with pytest.raises(ValueError, match="timeout_s = 0: give the seconds"):
        TravellingClip(0, None, timeout_s=0)
