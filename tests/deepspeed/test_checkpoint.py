"""Checkpoints: ours goes on exactly where it was, and each of plain and ours loads what the other saved."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deepspeed import jobs
from tests.deepspeed.jobs import CLIP_AND_RATE, RESTORING, Job
from tests.ranks import run_ranks

BEFORE, AFTER = 6, 5
SYNTHETIC = {"policy": "auto", "unlock_after_steps": 3, "lag": 3}


def _go_on(engine: Any) -> tuple[list[float], list[torch.Tensor]]:
    """From the same random numbers and data, whatever came before."""
    torch.manual_seed(7)
    losses = jobs.train(engine, AFTER, jobs.data_of(engine, seed=3))
    return losses, jobs.weights(engine)


def _saved_and_loaded(rank: int, world: int, saver: Job, loader: Job, folder: str) -> tuple[Any, Any, list[str]]:
    jobs.start()
    engine = jobs.build(saver)
    jobs.train(engine, BEFORE)
    engine.save_checkpoint(folder, client_state={"mine": 3})
    went_on = _go_on(engine)
    other = jobs.build(replace(loader, seed=1))
    _, client_state = other.load_checkpoint(folder)
    assert client_state["mine"] == 3 and not any("dnipipe" in key for key in client_state)
    assert other.global_steps == BEFORE
    files = sorted(path.name for path in Path(folder).rglob("dnipipe*"))
    return went_on, _go_on(other), files


def _check(world: int, saver: Job, loader: Job, folder: Path, num_files: int) -> None:
    for one, other, files in run_ranks(world, _saved_and_loaded, saver, loader, str(folder)):
        assert len(files) == num_files, files
        assert one[0] == other[0]
        assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("blocks", [(None, RESTORING), (RESTORING, None)], ids=["plain to ours", "ours to plain"])
def test_plain_and_ours_load_each_others(zero: int, blocks: tuple[Any, Any], tmp_path: Path) -> None:
    plain = Job(2, zero, 2, options=CLIP_AND_RATE)
    saver, loader = (replace(plain, block=block) for block in blocks)
    _check(2, saver, loader, tmp_path, 0 if blocks[0] is None else 2)


@pytest.mark.parametrize("num_stages, world, zero, tied", [(3, 3, 1, False), (2, 4, 0, False), (2, 2, 0, True)])
def test_ours_goes_on_where_it_was(num_stages: int, world: int, zero: int, tied: bool, tmp_path: Path) -> None:
    """With true gradients in flight, which differ between the replicas of a stage, and a tied gradient on its way."""
    job = Job(num_stages, zero, 2, SYNTHETIC, options=CLIP_AND_RATE, tied=tied)
    for one, other, files in run_ranks(world, _saved_and_loaded, job, job, str(tmp_path)):
        assert len(files) == world
        same = [a == b or (a != a and b != b) for a, b in zip(one[0], other[0], strict=True)]
        assert all(same), (one[0], other[0])
        assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def _with_and_without_saving(rank: int, world: int, folder: str) -> list[tuple[list[float], list[torch.Tensor]]]:
    jobs.start()
    outcomes = []
    for saves in (False, True):
        engine = jobs.build(Job(2, 1, 2, SYNTHETIC))
        data = jobs.data_of(engine)
        losses = jobs.train(engine, BEFORE, data)
        if saves:
            engine.save_checkpoint(folder)
        losses += jobs.train(engine, AFTER, data)
        # a save completes what is on its way, so that the first stage hears of newer losses sooner
        outcomes.append((losses if engine.is_last_stage() else [], jobs.weights(engine)))
    return outcomes


def test_saving_changes_no_number(tmp_path: Path) -> None:
    for without, with_saving in run_ranks(2, _with_and_without_saving, str(tmp_path)):
        assert without[0] == with_saving[0]
        assert all(torch.equal(a, b) for a, b in zip(without[1], with_saving[1], strict=True))


def _one_file_is_lost(rank: int, world: int, folder: str) -> str:
    jobs.start()
    engine = jobs.build(Job(2, 0, 1, SYNTHETIC))
    jobs.train(engine, BEFORE)
    engine.save_checkpoint(folder)
    if rank == 0:
        lost = next(path for path in Path(folder).rglob("dnipipe_stage_01*"))
        lost.unlink()
    torch.distributed.barrier()
    try:
        engine.load_checkpoint(folder)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_lost_file_is_told_on_every_rank(tmp_path: Path) -> None:
    said = run_ranks(2, _one_file_is_lost, str(tmp_path))
    assert all("no dnipipe file for ranks [1]" in each for each in said), list(itertools.chain(said))
