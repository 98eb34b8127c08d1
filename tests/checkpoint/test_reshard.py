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
from dnipipe.optim import StageOptimizer
from dnipipe.partition import cut_sequential, decoder_as_sequential, part_ties, shared_names
from tests.partition.test_decoder import options_of
from tests.ranks import run_ranks
from tests.trainer.test_trainer import QUICKSTART, TINY
from tests.trainer.workers import make_worker

FOUR_LAYERS = [*TINY, "model.options.depth=4", "pipeline.num_microbatches=4", "pipeline.unlock_after_steps=1"]


def _go_on(rank, world, folder, step):
    """Loads if there is something, notes it, trains two steps, saves. Returns (told, what it began and ended with)."""
    corpus = byte_corpus(stdlib_sources(), max_bytes=10**6)
    worker = make_worker(load_config(QUICKSTART, FOUR_LAYERS), "DNI", corpus)
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
    worker = make_worker(load_config(QUICKSTART, FOUR_LAYERS), "DNI", corpus)
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


FIRST, FURTHER = "0.tokens.weight", "5.project.weight"


def _tied(lengths):
    """The stages of a GPT-2 whose ends share a weight, their optimizers, and what of the whole model is shared."""
    row = decoder_as_sequential(options_of("gpt2", hidden_size=8, vocab_size=11))
    shared = shared_names(row)
    stages = cut_sequential(row, lengths)
    part_ties(stages)
    optimizers = [StageOptimizer(stage, learning_rate=lambda step: 1e-2, weight_decay=0.1) for stage in stages]
    return stages, optimizers, shared


def _train_tied(stages, optimizers):
    """Two steps in one process; both ends of a parted tie take the sum of both gradients. Returns the states."""
    token_BT = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(1))
    ends = [stages[0][0].tokens.weight, stages[-1][-1].project.weight]
    for step in range(2):
        nn.Sequential(*stages)(token_BT).square().mean().backward()
        if ends[0] is not ends[1]:
            together = ends[0].grad + ends[1].grad
            ends[0].grad, ends[1].grad = together, together.clone()
        for optimizer in optimizers:
            optimizer.step(step)
    return _tied_states(stages, optimizers)


def _tied_states(stages, optimizers):
    states = [
        {
            "step": 2,
            "cut": [[name for name, _ in stage.named_children()] for stage in stages],
            "model": stage.state_dict(),
            "optimizer": {**optimizer.state_dict(), "clip": {"norm": 1.0}},
        }
        for stage, optimizer in zip(stages, optimizers, strict=True)
    ]
    for state in (states[0], states[-1]) if len(states) > 1 else ():
        state["tied"] = {"step": 2, "gradient": torch.ones(11, 8)}
    return copy.deepcopy(states)


class _Saved:
    """A folder of one checkpoint."""

    def __init__(self, states):
        self.states = states

    def load(self, step, stage):
        return copy.deepcopy(self.states[stage])


def _resharded(states, lengths):
    """States of other stages, which their modules and optimizers have taken and given back."""
    stages, optimizers, shared = _tied(lengths)
    cut = [[name for name, _ in stage.named_children()] for stage in stages]
    for number, (stage, optimizer) in enumerate(zip(stages, optimizers, strict=True)):
        state, told = load_stage(_Saved(states), 2, number, stage, cut, shared=shared)
        assert told and "clip" not in state["optimizer"] and ("tied" in state) == (len(states) > 1)
        assert "tied" not in state or torch.equal(state["tied"]["gradient"], torch.ones(11, 8))
        stage.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    return _tied_states(stages, optimizers)


def _weights_and_moments(states):
    whole = {}
    for state in states:
        of_moments = {(n, key): value for n, kept in state["optimizer"]["state"].items() for key, value in kept.items()}
        whole |= state["model"] | of_moments
    return whole


def _assert_holds(states, expected):
    found = _weights_and_moments(states)
    assert found.keys() == expected.keys() and (FIRST, "exp_avg") in found
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_weight_of_both_ends_goes_on_through_2_1_2_stages_and_from_2_in_3():
    two = _train_tied(*_tied([3, 3])[:2])
    expected = _weights_and_moments(two)
    assert expected[FURTHER, "exp_avg_sq"].any()
    assert torch.equal(expected[FIRST, "exp_avg"], expected[FURTHER, "exp_avg"])
    one = _resharded(two, [6])
    _assert_holds(one, {name: value for name, value in expected.items() if name[0] != FURTHER})
    _assert_holds(_resharded(one, [3, 3]), expected)
    _assert_holds(_resharded(two, [2, 2, 2]), expected)


def test_what_one_stage_trained_goes_on_in_two_with_the_moments_on_both_ends():
    one = _train_tied(*_tied([6])[:2])
    assert FURTHER not in one[0]["optimizer"]["state"] and FURTHER in one[0]["model"]
    expected = _weights_and_moments(one)
    of_further = {(FURTHER, key): expected[FIRST, key] for key in ("step", "exp_avg", "exp_avg_sq")}
    _assert_holds(_resharded(one, [4, 2]), expected | of_further)


def test_the_first_name_goes_on_with_the_moments_of_a_further_one():
    (whole,), _, shared = _tied([6])
    (state,) = _train_tied(*_tied([6])[:2])
    moments = state["optimizer"]["state"]
    moments[FURTHER] = moments.pop(FIRST)
    kept = reshard([state], whole, shared)["optimizer"]["state"]
    assert kept[FIRST] is moments[FURTHER] and FURTHER not in kept
    assert FIRST not in reshard([state], whole)["optimizer"]["state"], "nobody said that they are one"


def test_a_tie_that_a_checkpoint_of_one_stage_holds_is_dropped_and_the_same_cut_keeps_all():
    (whole,), optimizers, shared = _tied([6])
    (state,) = _tied_states([whole], optimizers)
    state["tied"] = {"step": 2, "gradient": None}
    assert "tied" not in reshard([state], whole, shared)
    stages, optimizers, shared = _tied([3, 3])
    states = _tied_states(stages, optimizers)
    same, told = load_stage(_Saved(states), 2, 1, stages[1], states[1]["cut"], shared=shared)
    assert told is None and same["optimizer"]["clip"] == {"norm": 1.0} and same["tied"]["step"] == 2
