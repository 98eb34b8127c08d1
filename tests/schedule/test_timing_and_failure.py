"""Stalls, lost neighbours, harm done by bad predictions: what a long run meets."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import re
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.utils._python_dispatch import TorchDispatchMode

from dnipipe import ScheduleDNI
from tests.ranks import run_ranks, start_ranks, wait_for
from tests.schedule import models
from tests.schedule.harness import Case, Oracle, Pipeline, differences, train_until_lost

CPU = torch.device("cpu")


class Stalling(nn.Module):
    """Sleeps before the module runs, as `stall(call)` says, in seconds."""

    def __init__(self, module: nn.Module, stall: Any) -> None:
        super().__init__()
        self.module, self.stall, self.calls = module, stall, 0

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.stall(self.calls))
        self.calls += 1
        return self.module(x)


def _random_stalls(rank: int, world: int) -> list[str]:
    generator = random.Random(rank)
    case = Case(m=2, unlock_after_steps=20)
    pipeline = Pipeline(rank, world, case, wrap=lambda m: Stalling(m, lambda call: generator.uniform(0.0, 0.05)))
    oracle = Oracle(world, case)
    for step in range(200):
        pipeline.step(step)
        oracle.step(step)
    return differences(pipeline, oracle)


def test_random_stalls_on_every_rank_neither_deadlock_nor_change_a_number() -> None:
    assert run_ranks(3, _random_stalls) == [[], [], []]


UNIT = 0.3  # seconds of one microbatch: a tenth forward, the rest backward


class Timed(nn.Module):
    """A stage that takes UNIT seconds, and once, on the last stage, 1.5 UNIT more."""

    def __init__(self, module: nn.Module, stall_at: int | None) -> None:
        super().__init__()
        self.module, self.stall_at, self.calls = module, stall_at, 0

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.1 * UNIT)
        output = self.module(x)
        stall = 1.5 * UNIT if self.calls == self.stall_at else 0.0
        self.calls += 1
        if output.requires_grad:  # torch 2.11 finds shapes without gradients
            output.register_hook(lambda grad: time.sleep(0.9 * UNIT + stall))
        return output


def _one_stall(rank: int, world: int, lag: int) -> list[float]:
    """Seconds of each step."""
    # torch's first sweep calls the module too
    pipeline = Pipeline(rank, world, Case(m=1, lag=lag), wrap=lambda m: Timed(m, 6 if rank == world - 1 else None))
    seconds = []
    for step in range(12):
        start = time.perf_counter()
        pipeline.step(step)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


@pytest.mark.parametrize("lag", [2, 4])
def test_a_stall_of_the_last_stage_does_not_lengthen_a_step_of_the_first(lag: int) -> None:
    first, last = run_ranks(2, _one_stall, lag)
    assert max(last) > 2.4 * UNIT
    assert max(first) < 1.35 * UNIT


def _collectives(rank: int, world: int) -> list[tuple[int, str]]:
    """(step, name) of every collective that is not point to point."""
    seen: list[tuple[int, str]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d" and func._opname not in ("send", "recv_"):
                seen.append((step, func._opname))
            return func(*args, **(kwargs or {}))

    pipeline = Pipeline(rank, world, Case(m=2, options={"check_every_steps": 4}))
    for step in range(10):
        with Record():
            pipeline.step(step)
    return seen


def test_after_the_first_step_the_only_collective_is_the_declared_agreement() -> None:
    for seen in run_ranks(3, _collectives):
        assert {name for step, name in seen if step == 0}, "the recorder sees the agreement of the first step"
        assert [each for each in seen if each[0] > 0] == [(3, "allreduce_"), (7, "allreduce_")]


class Wrong(nn.Module):
    """A predictor that points uphill."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(sign))

    def forward(self, h: Tensor, label: Tensor | None) -> Tensor:
        return self.scale * h


def _no_learning(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def _diverging(rank: int, world: int, fall_back: bool) -> tuple[list[str], list[str], str]:
    """The policy after each step, the warnings, and what was said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return *_train_badly(rank, world, fall_back), said.getvalue()


def _train_badly(rank: int, world: int, fall_back: bool) -> tuple[list[str], list[str]]:
    module = models.build("mlp", world)[rank]
    schedule = ScheduleDNI(
        PipelineStage(module, rank, world, CPU),
        2,
        models.loss_fn if rank < world - 1 else lambda output, target: models.loss_fn(output, target) * factor,
        interface=Wrong(-50.0) if rank < world - 1 else None,
        interface_optimizer=_no_learning,
        policy="synthetic",
        unlock_after_steps=4,
        check_every_steps=5,
        fall_back=fall_back,
    )
    policies, factor = [], 1.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(24):
            factor = 1.0 if step < 6 else 30.0
            x, y = models.batch("mlp", step, 8)
            schedule.step(*((x,) if rank == 0 else ()), target=y)
            policies.append(str(schedule.metrics["policy"]))
    return policies, [str(each.message) for each in caught if each.category is RuntimeWarning]


def test_a_diverging_loss_sends_every_stage_back_to_wait_at_the_same_step() -> None:
    ranks = run_ranks(3, _diverging, True)
    for policies, _, _ in ranks:
        # metrics speak of the next step: 4 waiting, then synthetic until the check after step 10
        assert policies == ["wait"] * 3 + ["synthetic"] * 6 + ["wait"] * 15
    assert "!!! step 10: the loss is" in ranks[-1][2]


def test_falling_back_can_be_switched_off_and_a_useless_predictor_is_named_once() -> None:
    ranks = run_ranks(3, _diverging, False)
    for policies, _, _ in ranks:
        assert policies == ["wait"] * 3 + ["synthetic"] * 21
    for stage, (_, messages, _) in enumerate(ranks[:-1]):
        assert len(messages) == 1
        assert re.match(rf"stage {stage}: after \d+ steps the predicted gradient has a cosine of -?0\.\d+", messages[0])
    assert ranks[-1][1] == []


def _until_lost(rank: int, world: int, timeout_s: float, started: Path) -> tuple[str, float]:
    module = models.build("mlp", world)[rank]
    stage = PipelineStage(Stalling(module, lambda call: 0.05), rank, world, CPU)
    schedule = ScheduleDNI(stage, 2, models.loss_fn, policy="synthetic", timeout_s=timeout_s)
    return train_until_lost(schedule, rank, started, at=3)


def _lose_the_last(sig: signal.Signals, timeout_s: float, folder: Path) -> list[tuple[str, float]]:
    started = folder / "started"
    processes, out = start_ranks(3, _until_lost, timeout_s, started)
    try:
        wait_for(started)
        os.kill(processes[2].pid, sig)
        got = [out.get(timeout=timeout_s + 20) for _ in range(2)]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert all(error is None for _, error, _ in got), got
    return [pickle.loads(result) for _, _, result in sorted(got)]


def test_a_killed_peer_is_named_with_stage_microbatch_and_seconds(tmp_path: Path) -> None:
    _, (message, seconds) = _lose_the_last(signal.SIGKILL, 15.0, tmp_path)
    lost = r"rank 2 \(stage 2\) at microbatch \d+"
    assert re.match(rf"BoundaryError: rank 1 \(stage 1\) waited \d+\.\d s, at most 15 s, for {lost}", message), message
    assert seconds < 15.0


def test_a_stopped_peer_is_named_within_the_stated_timeout(tmp_path: Path) -> None:
    _, (message, seconds) = _lose_the_last(signal.SIGSTOP, 3.0, tmp_path)
    lost = r"rank 2 \(stage 2\) at microbatch \d+"
    assert re.match(rf"BoundaryError: rank 1 \(stage 1\) waited 3\.\d s, at most 3 s, for {lost}", message), message
    assert 3.0 <= seconds < 5.0
