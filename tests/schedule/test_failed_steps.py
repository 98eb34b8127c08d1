"""A step that was refused, that failed or that another rank never ends: what is said, and what may be called next."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from dnipipe import ScheduleDNI
from tests.ranks import run_ranks, start_ranks, wait_for
from tests.schedule import models
from tests.schedule.harness import train_until_lost

CPU = torch.device("cpu")


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
    return train_until_lost(schedule, rank, started, at=5, pause_s=0.1)


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
