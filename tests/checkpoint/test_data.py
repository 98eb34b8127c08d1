"""What is loaded is bit for bit what was saved, and nothing in the folder gets to run."""

import pickle

import pytest
import torch
from torch import nn

from dnipipe.checkpoint import load_checkpoint, save_checkpoint
from dnipipe.config import load_config
from dnipipe.data import byte_corpus, stdlib_sources
from tests.ranks import run_ranks
from tests.trainer.test_trainer import QUICKSTART, TINY
from tests.trainer.workers import make_worker


def _train_save_load_train(rank, world, folder):
    corpus = byte_corpus(stdlib_sources(), max_bytes=10**6)
    synthetic = [*TINY, "pipeline.unlock_after_steps=0"]
    configs = [load_config(QUICKSTART, [*synthetic, f"run.seed={seed}"]) for seed in (0, 1)]
    first, second = (make_worker(config, "DNI", corpus) for config in configs)
    for step in range(3):
        first.train_step(step)
    save_checkpoint(folder, rank, first.state_dict(3))
    state = load_checkpoint(folder, rank)
    second.config = first.config  # from here on the same batches
    differed = not _equal(first.module, second.module)
    step = second.load_state_dict(state)
    loaded = _equal(first.module, second.module)
    alike = True
    for later in range(step, step + 3):
        drawn = []
        for worker in (first, second):
            worker.train_step(later)
            drawn.append(torch.rand(3))  # as dropout would go on
        alike &= torch.equal(*drawn)
    return differed, step, loaded, alike and _equal(first.module, second.module)


def _equal(one: nn.Module, other: nn.Module):
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_loaded_worker_is_bit_equal_and_stays_so_in_training(tmp_path):
    for result in run_ranks(2, _train_save_load_train, str(tmp_path / "checkpoint")):
        assert result == (True, 3, True, True)


def _save(rank, world, folder, state):
    save_checkpoint(folder, rank, {"rank": rank, **state})


def test_mappings_sequences_and_numbers_come_back_as_they_were(tmp_path):
    state = {"a": {0: [torch.arange(3), None], 1: (0.9, "x", True)}, "empty": {}, "scalar": torch.tensor(2.5)}
    run_ranks(2, _save, str(tmp_path), state)
    for rank in (0, 1):
        loaded = load_checkpoint(tmp_path, rank)
        assert loaded["rank"] == rank and loaded["empty"] == {} and loaded["a"][1] == (0.9, "x", True)
        assert torch.equal(loaded["a"][0][0], torch.arange(3)) and loaded["a"][0][1] is None
        assert torch.equal(loaded["scalar"], torch.tensor(2.5))
    with pytest.raises(ValueError, match="holds no stage 2, it holds stage0, stage1"):
        load_checkpoint(tmp_path, 2)


def test_a_value_that_is_no_data_is_refused_by_its_place(tmp_path):
    with pytest.raises(TypeError, match="stage0/optimizer/1 is a Linear"):
        save_checkpoint(tmp_path, 0, {"optimizer": [1, nn.Linear(1, 1)]})


class _Harm:
    def __reduce__(self):
        return (print, ("harm",))


def test_an_index_that_would_run_code_is_refused(tmp_path, capsys):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Harm()))
    with pytest.raises(ValueError, match="builtins.print"):
        load_checkpoint(tmp_path, 0)
    assert capsys.readouterr().out == ""
