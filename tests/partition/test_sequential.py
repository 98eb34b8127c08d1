"""The split against every possible split, and the stages against the model."""

import itertools
import random

import pytest
import torch
from torch import nn

from dnipipe.partition import split_sequential
from dnipipe.partition.sequential import balanced_cuts


def _dearest(costs, cuts):
    return max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)]))


def _dearest_of_the_best_split(costs, num_stages):
    return min(_dearest(costs, cuts) for cuts in itertools.combinations(range(1, len(costs)), num_stages - 1))


@pytest.mark.parametrize("largest", [0, 1, 3, 20, 1000])
def test_no_split_is_better(largest):
    draw = random.Random(largest)
    for _ in range(150):
        costs = [draw.randint(0, largest) for _ in range(draw.randint(1, 10))]
        num_stages = draw.randint(1, len(costs))
        cuts = balanced_cuts(costs, num_stages)
        assert len(cuts) == num_stages - 1
        assert all(a < b for a, b in itertools.pairwise([0, *cuts, len(costs)]))
        assert _dearest(costs, cuts) == _dearest_of_the_best_split(costs, num_stages), (costs, num_stages, cuts)


def test_fractions_are_as_good_as_whole_numbers():
    draw = random.Random(0)
    for _ in range(100):
        costs = [draw.random() for _ in range(9)]
        best = _dearest_of_the_best_split(costs, 4)
        assert _dearest(costs, balanced_cuts(costs, 4)) == pytest.approx(best)


def test_equal_layers_are_dealt_out_evenly():
    assert balanced_cuts([1] * 12, 4) == [3, 6, 9]


def test_a_thousand_layers_are_split_at_once():
    assert len(balanced_cuts([1.0] * 1000, 16)) == 15


def test_the_stages_chained_are_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 9), nn.Linear(9, 2), nn.Tanh())
    x = torch.randn(3, 4)
    expected = model(x)
    for num_stages in range(1, 6):
        y = x
        for stage in split_sequential(model, num_stages):
            y = stage(y)
        assert torch.equal(y, expected)


def test_the_state_dicts_of_the_stages_are_the_models():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    parts = [stage.state_dict(keep_vars=True) for stage in split_sequential(model, 2)]
    together = {name: value for part in parts for name, value in part.items()}
    assert {name: id(value) for name, value in together.items()} == {n: id(p) for n, p in model.named_parameters()}


def test_the_default_cost_is_the_number_of_parameters():
    model = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    assert [len(stage) for stage in split_sequential(model, 2)] == [1, 4]


def test_weights_replace_the_default_cost():
    model = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    assert [len(stage) for stage in split_sequential(model, 2, weights=[1, 1, 1, 1, 4])] == [4, 1]


def test_a_layer_that_stands_twice_in_the_row_is_kept_twice():
    relu = nn.ReLU()
    stages = split_sequential(nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu), 2)
    assert [len(stage) for stage in stages] == [2, 2]


def test_a_parameter_that_two_stages_share_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert len(split_sequential(model, 1)) == 1
    with pytest.raises(ValueError, match="0.weight and 2.weight"):
        split_sequential(model, 2)


@pytest.mark.parametrize("num_stages", [0, -1, 4])
def test_an_impossible_number_of_stages_is_refused(num_stages):
    with pytest.raises(ValueError, match=f"num_stages = {num_stages}; 3 layers"):
        split_sequential(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()), num_stages)


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_an_impossible_cost_is_refused(cost):
    with pytest.raises(ValueError, match="layer 1"):
        balanced_cuts([1.0, cost], 1)


def test_weights_of_another_length_are_refused():
    with pytest.raises(ValueError, match="3 numbers.*2 layers"):
        split_sequential(nn.Sequential(nn.ReLU(), nn.ReLU()), 1, weights=[1, 2, 3])


def test_a_model_that_is_no_sequential_is_refused():
    with pytest.raises(TypeError, match="Linear"):
        split_sequential(nn.Linear(2, 2), 1)
