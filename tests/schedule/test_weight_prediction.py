"""Late microbatches under foretold weights: against the oracle bit for bit, saved and resumed, in half precision."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from dnipipe.plan.late_weights import Distance
from dnipipe.schedule.late import LateFlow
from dnipipe.schedule.old_weights import OldWeights
from dnipipe.schedule.weight_prediction import WeightPrediction
from tests.ranks import run_ranks
from tests.schedule.harness import Case, Oracle, Pipeline, differences

STEPS = 7


def _cases(world: int) -> list[Case]:
    kinds = itertools.cycle([("mlp", "mlp", "local"), ("sequence", "linear", "relay"), ("mlp", "linear", "none")])
    optimizers, in_flight = itertools.cycle(["optimizer", "adamw"]), itertools.cycle([None, 2 * world - 1])
    weights, cases = itertools.cycle(["predicted", "predicted*2", "predicted@3", "predicted*0.7", "predicted@1.5"]), []
    for policy, m, unlock in itertools.product(("stale", "corrected"), (1, 2, 4), (0, 2)):
        kind, interface, labels = next(kinds)
        case = Case(kind, interface, m, policy, unlock_after_steps=unlock, labels=labels, late_weights=next(weights))
        case.optimizer, case.in_flight = next(optimizers), next(in_flight)
        cases.append(case)
    return cases


def _equal(rank: int, world: int, steps_per_update: int) -> list[str]:
    wrong = []
    for case in _cases(world)[::steps_per_update]:
        case.steps_per_update = steps_per_update
        pipeline, oracle = Pipeline(rank, world, case), Oracle(world, case)
        for step in range(STEPS):
            pipeline.step(step, optimize=(step + 1) % steps_per_update == 0)
            oracle.step(step, optimize=(step + 1) % steps_per_update == 0)
        wrong += [f"{case}: {each}" for each in differences(pipeline, oracle)]
    return wrong


@pytest.mark.parametrize("world, steps_per_update", [(2, 1), (3, 1), (4, 1), (3, 2)])
def test_foretold_weights_equal_the_oracles(world: int, steps_per_update: int) -> None:
    assert run_ranks(world, _equal, steps_per_update) == [[]] * world


def _resumed(rank: int, world: int, late_weights: str) -> list[str]:
    case = Case("mlp", "linear", 1, "stale", labels="none", optimizer="adamw", late_weights=late_weights)
    saving, resumed = Pipeline(rank, world, case), Pipeline(rank, world, case)
    for step in range(8):
        saving.step(step)
        if step == 4:
            parts = (saving.module.state_dict(), saving.optimizer.state_dict(), saving.schedule.state_dict())
            saved = copy.deepcopy(parts)
    resumed.module.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    resumed.schedule.load_state_dict(saved[2])
    for step in range(5, 8):
        resumed.step(step)
    same = all(torch.equal(a, b) for a, b in zip(saving.state(), resumed.state(), strict=True))
    return [] if same else ["the resumed run ends otherwise"]


@pytest.mark.parametrize("late_weights", ["predicted", "predicted@3"])
def test_a_run_goes_on_with_the_newest_update(late_weights: str) -> None:
    assert run_ranks(3, _resumed, late_weights) == [[], [], []]


def _memory_of_steps(rank: int, world: int) -> list[bool]:
    """Of each step, whether the parameters lay somewhere else within it, and in their own place before and after."""
    pipeline = Pipeline(
        rank, world, Case("mlp", "linear", 2, "wait:1,stale", labels="none", late_weights="predicted@3")
    )
    weight, elsewhere = next(pipeline.module.parameters()), []
    seen: list[int] = []
    pipeline.module.register_forward_pre_hook(lambda module, _: seen.append(next(module.parameters()).data_ptr()))
    for step in range(5):
        own, seen[:] = weight.data_ptr(), []
        pipeline.step(step, optimize=False)
        pipeline.optimizer.zero_grad(set_to_none=True)
        assert rank < world - 1 or weight.data_ptr() == own, "an upper stage's may move, to leave kept ones alone"
        elsewhere.append(all(place != own for place in seen))
    return elsewhere


def test_with_one_distance_for_all_no_microbatch_has_the_present_weights() -> None:
    # under wait; the first step under stale knows the newest update from the step under wait before it
    assert run_ranks(3, _memory_of_steps) == [[False, True, True, True, True]] * 3


def test_exchanged_weights_are_given_back_whatever_happens() -> None:
    module = nn.Linear(2, 2, bias=False)
    before, place = module.weight.detach().clone(), module.weight.data_ptr()
    kept = OldWeights(module, [torch.ones(2, 2)])
    with pytest.raises(RuntimeError, match="in the middle"), kept.exchanged():
        assert torch.equal(module.weight, torch.ones(2, 2))
        raise RuntimeError("in the middle")
    assert torch.equal(module.weight, before) and module.weight.data_ptr() == place


def _weights(ahead: OldWeights | None) -> Tensor:
    assert ahead is not None
    (copy_,) = [kept for _, kept in ahead._copies]
    return copy_.detach()


def _after_an_update(distance: Distance | None) -> tuple[WeightPrediction, Tensor, Tensor]:
    """What foretells for 1 and 3, the weights before the update, and the present ones."""
    module = nn.Linear(2, 2, bias=False)
    prediction = WeightPrediction(module, distance=distance)
    prediction.begin_update([1, 3])
    assert prediction.ahead(1) is None  # no update yet
    first = module.weight.detach().clone()
    prediction.end_update()
    with torch.no_grad():
        module.weight.add_(0.25)
    prediction.begin_update([1, 3])
    return prediction, first, module.weight


def test_the_foretelling_goes_along_the_newest_update() -> None:
    prediction, first, weight = _after_an_update(None)
    assert torch.allclose(_weights(prediction.ahead(3)), weight + 3 * (weight - first))
    assert prediction.ahead(3) is prediction.ahead(3)  # one copy, however many microbatches use it
    assert prediction.ahead(0) is None


def test_one_distance_for_all_is_one_copy_for_all() -> None:
    prediction, first, weight = _after_an_update(Distance(2.5, alike=True))
    assert torch.allclose(_weights(prediction.ahead(1)), weight + 2.5 * (weight - first))
    assert prediction.ahead(1) is prediction.ahead(3)
    prediction.end_update()
    prediction.begin_update([0, 1])
    assert prediction.ahead(0) is prediction.ahead(1) is not None
    assert [Distance(2.5, alike=alike).foretells(late) for alike in (False, True) for late in (0, 1)] == [
        False,
        *[True] * 3,
    ]


def test_masters_know_updates_that_half_precision_loses() -> None:
    module = nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    master = module.weight.detach().float()
    predictions = [WeightPrediction(module), WeightPrediction(module, {module.weight: master})]
    for prediction in predictions:
        prediction.begin_update([16])
        prediction.end_update()
    master += master * 2**-10  # a quarter of the distance to the next bfloat16
    module.weight.data.copy_(master)
    for prediction in predictions:
        prediction.begin_update([16])
    blind, told = (_weights(prediction.ahead(16)) for prediction in predictions)
    assert blind.dtype == told.dtype == torch.bfloat16
    assert torch.equal(blind, module.weight) and not torch.equal(told, module.weight)


def test_gradients_that_nobody_has_used_switch_it_off() -> None:
    """Several step() for one update: predictions would go too far."""
    module = nn.Linear(2, 2, bias=False)
    prediction = WeightPrediction(module)
    for zeroed in (True, True, False):
        prediction.begin_update([1])
        module(torch.ones(1, 2)).sum().backward()
        prediction.end_update()
        if zeroed:
            module.zero_grad(set_to_none=False)
    assert prediction.ahead(1) is not None
    with pytest.warns(UserWarning, match="steps_per_update="):
        prediction.begin_update([1])
    assert prediction.ahead(1) is None
    prediction.end_update()
    module.zero_grad()
    prediction.begin_update([1])
    assert prediction.ahead(1) is None


def test_layers_frozen_and_unfrozen_begin_anew() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].requires_grad_(False)
    prediction = WeightPrediction(module)
    prediction.begin_update([1])
    prediction.end_update()
    for layer in module:
        layer.requires_grad_(not layer.weight.requires_grad)
    prediction.begin_update([1])
    assert prediction.ahead(1) is None
    prediction.end_update()
    prediction.begin_update([1])
    assert prediction.ahead(1) is not None


def test_the_state_of_another_cut_begins_anew() -> None:
    one, other = WeightPrediction(nn.Linear(2, 2)), WeightPrediction(nn.Linear(3, 3))
    one.begin_update([1])
    other.load_state_dict(one.state_dict())
    other.begin_update([1])
    assert other.ahead(1) is None


def _holds(rank: int, world: int, policy: str) -> list[bool]:
    """After each step, whether weights are kept for foretelling."""
    pipeline = Pipeline(rank, world, Case("mlp", "linear", 2, policy, labels="none"))
    held = []
    for step in range(5):
        pipeline.step(step)
        flow = pipeline.schedule._flow
        assert isinstance(flow, LateFlow)
        held.append(bool(flow._prediction._before))
    return held


def test_who_holds_no_graphs_keeps_no_weights_either() -> None:
    assert run_ranks(2, _holds, "synthetic") == [[False] * 5] * 2
    assert run_ranks(2, _holds, "wait:3,stale")[0] == [False, False, True, True, True]
    assert run_ranks(2, _holds, "stale:2,synthetic")[0] == [True, True, False, False, False]
