"""Times the schedules in turns, so that a slow minute of the machine is everybody's slow minute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Runner(Protocol):
    """What is timed."""

    def step(self) -> None: ...

    def settle(self) -> None: ...


@dataclass(frozen=True)
class Timing:
    """step_ms: milliseconds of a step in each round, on the slowest rank; mean_ms: the mean over the ranks instead."""

    step_ms: list[float]
    mean_ms: list[float]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.step_ms)

    @property
    def spread_ms(self) -> float:
        """Between the quartiles; 0 for a single round."""
        if len(self.step_ms) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.step_ms, n=4, method="inclusive")
        return third - first


def time_in_turns(
    runners: dict[str, Runner], rounds: int, steps: int, on_round: Callable[[], None]
) -> dict[str, Timing]:
    """`steps` steps of each runner per round. Every rank must call it with runners of the same names."""
    own: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            own[name].append(_step_ms(runner, steps))
            on_round()
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return {
        name: Timing(
            [max(values) for values in zip(*(rank[name] for rank in ranks), strict=True)],
            [statistics.mean(values) for values in zip(*(rank[name] for rank in ranks), strict=True)],
        )
        for name in runners
    }


def _step_ms(runner: Runner, steps: int) -> float:
    """The pace of a run under way: the first step, in which a pipeline fills, is not counted."""
    dist.barrier()
    runner.step()
    if not torch.cuda.is_initialized():
        start_s = time.perf_counter()
        for _ in range(steps):
            runner.step()
        seconds = time.perf_counter() - start_s
    else:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(steps):
            runner.step()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3
    runner.settle()
    return seconds / steps * 1e3
