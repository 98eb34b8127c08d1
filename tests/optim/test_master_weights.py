"""A stage in half precision moves as it would in float32, by float32 copies of its parameters."""

import copy

import pytest
import torch
from torch import nn

from tests.optim.harness import loaded, make_optimizer, make_stage, state_of, train


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_master_weights_move_as_a_float32_run_does(name, half):
    low = make_stage().to(half)
    full = copy.deepcopy(low).float()
    optimizer = make_optimizer(low, name=name)
    train(low, optimizer, range(8))
    train(full, make_optimizer(full, name=name), range(8))
    for parameter_name, parameter in full.named_parameters():
        assert torch.equal(optimizer.state_dict()["state"][parameter_name]["master"], parameter)
        assert torch.equal(low.get_parameter(parameter_name), parameter.to(half))


def test_small_steps_add_up_in_the_master_weights_and_are_lost_without():
    moved = {}
    for master_weights in (True, False):
        layer = nn.Linear(4, 4).bfloat16()
        nn.init.ones_(layer.weight)
        options = {"learning_rate": lambda step: 1e-4, "weight_decay": 0.0, "master_weights": master_weights}
        optimizer = make_optimizer(layer, **options)
        for step in range(100):  # each of 1e-4, where the next number below 1 is 1 - 2 ** -8
            layer.weight.grad = torch.ones_like(layer.weight)
            optimizer.step(step)
        moved[master_weights] = (1 - layer.weight).mean().item()
    assert moved[False] == 0 and moved[True] == pytest.approx(100 * 1e-4, abs=2**-9)


def test_float32_parameters_have_no_copy():
    stage = make_stage()
    stage[1].bfloat16()
    state = state_of(stage)["state"]
    assert {name for name, kept in state.items() if "master" in kept} == {n for n in state if n.startswith("1.")}
    assert "master" not in state_of(make_stage().bfloat16(), master_weights=False)["state"]["1.1.weight"]


def test_a_float32_run_goes_on_in_bfloat16_and_back():
    full = make_stage()
    state = state_of(full)
    low = copy.deepcopy(full).bfloat16()
    low_state = loaded(low, state).state_dict()
    assert torch.equal(low_state["state"]["0.weight"]["master"], full[0].weight.bfloat16().float())
    back = make_stage()
    loaded(back, low_state)
    assert torch.equal(back[0].weight, low_state["state"]["0.weight"]["master"])
