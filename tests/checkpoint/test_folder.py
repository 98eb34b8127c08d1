"""A checkpoint is whole or it is not there: under kill -9, a full disk, and files that go missing."""

import random
import resource
import shutil
import time

import pytest
import torch
import torch.distributed as dist

from dnipipe.checkpoint import CheckpointFolder, load_checkpoint, newest_step
from dnipipe.checkpoint.data import is_whole
from tests.ranks import run_ranks, start_ranks, wait_for

NUM_KILLS = 20


def _open(folder, keep_last=2):
    return CheckpointFolder(folder, keep_last=keep_last, group=dist.group.WORLD)


def _state(step, rank):
    return {"step": step, "numbers": torch.full((300,), step + rank / 2), "more": [torch.tensor(step)] * 3}


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _save_and_change(rank, world, folder):
    checkpoints = _open(folder)
    nothing = checkpoints.latest()
    for step in (5, 10, 15):
        state = _state(step, rank)
        checkpoints.save(step, state)
        state["numbers"].zero_()  # the training goes on
    checkpoints.wait()
    checkpoints.wait()  # nothing to wait for
    newest = checkpoints.latest()
    loaded = checkpoints.load(newest, rank)
    return nothing, newest, loaded["step"], loaded["numbers"]


def test_the_newest_few_are_kept_and_hold_what_was_true_when_they_were_saved(tmp_path):
    for rank, (nothing, newest, step, numbers) in enumerate(run_ranks(2, _save_and_change, tmp_path / "new")):
        assert (nothing, newest, step) == (None, 15, 15)
        assert torch.equal(numbers, torch.full((300,), 15 + rank / 2))
    assert _names(tmp_path / "new") == ["step-00000010", "step-00000015"]


def _save(rank, world, folder, *steps):
    checkpoints = _open(folder)
    before = checkpoints.latest()
    for step in steps:
        checkpoints.save(step, _state(step, rank))
    checkpoints.wait()
    return before


def test_what_is_partial_or_damaged_is_passed_over_and_removed(tmp_path):
    run_ranks(2, _save, tmp_path, 5)
    whole = tmp_path / "step-00000005"
    for name in ("step-00000010.partial", "step-00000004.old.partial", "step-00000020", "step-00000025"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / "step-00000020" / ".metadata").unlink()
    (tmp_path / "step-00000025" / "__1_0.distcp").write_bytes(b"short")
    (tmp_path / "notes.txt").touch()
    assert run_ranks(2, _save, tmp_path, 10) == [5, 5]
    assert _names(tmp_path) == ["notes.txt", "step-00000005", "step-00000010"]
    (whole.with_name("step-00000010") / ".metadata").write_bytes(b"")
    assert run_ranks(2, _save, tmp_path, 10) == [5, 5]
    assert newest_step(tmp_path) == 10


def _fill_the_disk(rank, world, folder):
    checkpoints = _open(folder)
    checkpoints.save(5, _state(5, rank))
    checkpoints.wait()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    checkpoints.save(10, _state(10, rank))
    with pytest.raises(RuntimeError) as failure:
        checkpoints.save(15, _state(15, rank)) if rank else checkpoints.wait()
    return str(failure.value), checkpoints.latest()


def test_what_one_rank_could_not_write_all_ranks_are_told(tmp_path):
    for message, newest in run_ranks(2, _fill_the_disk, tmp_path):
        assert f"{tmp_path} has not got its newest checkpoint" in message and "rank 1: OSError(27" in message
        assert newest == 5
    assert _names(tmp_path) == ["step-00000005", "step-00000010.partial"]
    assert run_ranks(2, _save, tmp_path, 10) == [5, 5] and newest_step(tmp_path) == 10


def _keep_none(rank, world, folder):
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        _open(folder, keep_last=0)


def test_at_least_one_is_kept(tmp_path):
    run_ranks(1, _keep_none, tmp_path)


def _save_for_ever(rank, world, folder, first, begun):
    checkpoints = _open(folder)
    step = first
    while True:
        checkpoints.save(step, _state(step, rank))
        begun.with_name(f"{begun.name}-{step - first}").touch()
        step += 1


def test_whatever_moment_a_kill_comes_at_the_newest_is_whole_and_none_is_lost(tmp_path):
    moments, folder, newest, num_whole = random.Random(0), tmp_path / "row", 0, 0
    for kill in range(NUM_KILLS):
        begun = tmp_path / f"begun{kill}"
        processes, _ = start_ranks(2, _save_for_ever, folder, newest + 1, begun)
        try:
            saves = moments.choice((0, 1, 3))  # 0: the first is under way, which there may be only remains of
            wait_for(begun.with_name(f"{begun.name}-{saves}"))
            time.sleep(moments.uniform(0.0, 0.1))
            num_whole += saves
            whole_before = newest_step(folder) or newest
            moments.choice(processes).kill()
        finally:
            for process in processes:
                process.kill()
                process.join()
        newest = newest_step(folder) or 0
        assert newest >= whole_before
        for rank in (0, 1) if newest else ():
            state = load_checkpoint(folder / f"step-{newest:08d}", rank)
            assert state["step"] == newest and torch.equal(state["numbers"], _state(newest, rank)["numbers"])
        named_whole = [path for path in folder.glob("step-*") if ".partial" not in path.name]
        assert len(named_whole) <= 3 and all(is_whole(path) for path in named_whole)
    assert newest >= num_whole > NUM_KILLS / 2
