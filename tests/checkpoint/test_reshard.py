"""What 2 stages saved goes on in 3, then in 1, then in 4: weights and moments bit for bit, by their names."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dnipipe.checkpoint import CheckpointFolder, load_stage
from dnipipe.checkpoint.reshard import reshard
from dnipipe.config import load_config
from dnipipe.data import byte_corpus, stdlib_sources
from dnipipe.worker import Worker
from tests.ranks import run_ranks
from tests.test_trainer import QUICKSTART, TINY

FOUR_LAYERS = [*TINY, "model.options.depth=4", "pipeline.num_microbatches=4", "pipeline.unlock_after_steps=1"]


def _go_on(rank, world, folder, step):
    """Loads if there is something, notes it, trains two steps, saves. Returns (told, what it began and ended with)."""
    corpus = byte_corpus(stdlib_sources(), max_bytes=10**6)
    worker = Worker(load_config(QUICKSTART, FOUR_LAYERS), "DNI", corpus, torch.device("cpu"))
    checkpoints = CheckpointFolder(folder, keep_last=2, group=dist.group.WORLD)
    told, begun = None, None
    if step:
        state, told = load_stage(checkpoints, step, rank, worker.module, worker.cut)
        assert worker.load_state_dict(state) == step
        begun = _parts(worker, step)
    worker.train_step(step)
    assert worker.schedule.metrics["step"] == step + 1
    worker.train_step(step + 1)
    checkpoints.save(step + 2, worker.state_dict(step + 2))
    checkpoints.wait()
    return told, begun, _parts(worker, step + 2)


def _parts(worker, step):
    state = worker.state_dict(step)
    return copy.deepcopy((state["model"], state["optimizer"]["state"]))  # the training goes on with these tensors


def _together(ranks):
    """{name: tensor} of all stages' weights and moments."""
    whole = {}
    for model, moments in ranks:
        of_moments = {(name, key): value for name, kept in moments.items() for key, value in kept.items()}
        assert not whole.keys() & (model.keys() | of_moments.keys())
        whole |= model | of_moments
    return whole


def test_weights_and_moments_follow_their_names_through_2_3_1_4_stages(tmp_path):
    saved = None
    for step, world in ((0, 2), (2, 3), (4, 1), (6, 4)):
        ranks = run_ranks(world, _go_on, tmp_path, step)
        if saved is not None:
            loaded = _together([begun for _, begun, _ in ranks])
            assert loaded.keys() == saved.keys() and len(loaded) > 100
            assert all(torch.equal(loaded[name], saved[name]) for name in loaded)
            assert any(isinstance(name, tuple) and name[1] == "exp_avg_sq" and loaded[name].any() for name in loaded)
            before = {3: 2, 1: 3, 4: 1}[world]
            for told, _, _ in ranks:
                assert told.startswith(f"a checkpoint of {before} stages goes on in {world}")
                assert told.endswith("predictors begin anew, for they belong to the old cut")
        saved = _together([ended for _, _, ended in ranks])


def _load_again(rank, world, folder, moved):
    corpus = byte_corpus(stdlib_sources(), max_bytes=10**6)
    worker = Worker(load_config(QUICKSTART, FOUR_LAYERS), "DNI", corpus, torch.device("cpu"))
    cut = [[*worker.cut[0], "x"], worker.cut[1][1:]] if moved else worker.cut
    checkpoints = CheckpointFolder(folder, keep_last=2, group=dist.group.WORLD)
    state, told = load_stage(checkpoints, 2, rank, worker.module, cut)
    return told, [entry["microbatch"] for entry in state["schedule"]["flow"]["pending"]], state["schedule"]


def test_predictors_and_what_is_in_flight_stay_where_the_cut_is_the_same(tmp_path):
    run_ranks(2, _go_on, tmp_path, 0)
    (told, pending, schedule), (last_told, _, _) = run_ranks(2, _load_again, tmp_path, False)
    assert told is None and last_told is None and pending == [6, 7] and schedule["flow"]["learner"] is not None
    (told, pending, schedule), _ = run_ranks(2, _load_again, tmp_path, True)
    assert "predictors begin anew" in told and pending == [] and schedule["flow"]["learner"] is None
    assert (schedule["flow"]["step"], schedule["flow"]["microbatch"]) == (2, 8)


def test_a_checkpoint_of_another_model_is_refused_by_the_first_names_that_it_lacks():
    module = nn.Sequential(nn.Linear(2, 2))
    state = {"cut": [["0"]], "model": {"0.weight": torch.zeros(2, 2)}, "optimizer": {"state": {}}}
    with pytest.raises(ValueError, match="holds no 0.bias: it is of another model"):
        reshard([state], module)
