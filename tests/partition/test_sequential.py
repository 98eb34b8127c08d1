"""The stages against the model."""

import pytest
import torch
from torch import nn

from dnipipe.partition import cut_sequential, split_sequential


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


def test_weights_of_another_length_are_refused():
    with pytest.raises(ValueError, match="3 numbers.*2 layers"):
        split_sequential(nn.Sequential(nn.ReLU(), nn.ReLU()), 1, weights=[1, 2, 3])


def test_a_model_that_is_no_sequential_is_refused():
    with pytest.raises(TypeError, match="Linear"):
        split_sequential(nn.Linear(2, 2), 1)


def test_stages_of_given_lengths_are_the_models_layers_under_their_names():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 3), relu, nn.Linear(3, 2))
    stages = cut_sequential(model, [2, 1, 2])
    assert [[name for name, _ in stage.named_children()] for stage in stages] == [["0", "1"], ["2"], ["3", "4"]]
    assert [layer for stage in stages for layer in stage] == list(model)
    x = torch.randn(3, 4)
    assert torch.equal(nn.Sequential(*stages)(x), model(x))


def test_a_parameter_of_two_stages_stays_one_in_stages_of_given_lengths():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    first, last = cut_sequential(model, [1, 1])
    assert first[0].weight is last[0].weight


@pytest.mark.parametrize("lengths", [[2], [1, 1, 2], [3, 0], [], [4, -1]], ids=str)
def test_lengths_that_are_no_cut_are_refused_and_named(lengths):
    with pytest.raises(ValueError, match=r"lengths = \[.*\]: stages of at least 1 layer, 3 layers together") as caught:
        cut_sequential(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()), lengths)
    assert f"lengths = {lengths}:" in str(caught.value)


def test_only_an_nn_sequential_is_cut():
    with pytest.raises(TypeError, match=r"cut_sequential\(\) splits an nn.Sequential, got Linear"):
        cut_sequential(nn.Linear(2, 2), [1])
