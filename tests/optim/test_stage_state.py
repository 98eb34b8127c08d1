"""The state of a stage's optimizer goes by names: saved, loaded as a copy, under another cut, or refused."""

import copy

import pytest
import torch

from dnipipe.checkpoint import load_checkpoint, save_checkpoint
from dnipipe.optim import StageClip
from dnipipe.partition.sequential import split_sequential
from tests.optim.harness import draw_gradients, loaded, make_optimizer, make_stage, same, state_of, train


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_what_is_saved_by_name_goes_on_under_another_cut(tmp_path, name, dtype):
    whole = make_stage().to(dtype)
    optimizer = make_optimizer(whole, name=name, head=whole[-1])
    train(whole, optimizer, range(4))
    save_checkpoint(tmp_path, 0, {"model": whole.state_dict(), "optimizer": optimizer.state_dict()})
    kept = load_checkpoint(tmp_path, 0)
    assert list(kept["optimizer"]["state"]) == [name for name, _ in whole.named_parameters()]

    again = make_stage().to(dtype)
    again.load_state_dict(kept["model"])
    with torch.no_grad():
        again[0].weight += 1  # what the float32 copy says, counts: as in a model that was saved in few bits
    stages = split_sequential(again, 2, weights=[1, 1, 2])
    optimizers = [make_optimizer(stage, name=name, head=again[-1], clip=StageClip(0)) for stage in stages]
    for stage_optimizer in optimizers:
        stage_optimizer.load_state_dict(kept["optimizer"])
    assert same(again, whole) is (dtype == torch.bfloat16)
    with torch.no_grad():
        again[0].weight.copy_(whole[0].weight)
    optimizer = loaded(whole, kept["optimizer"], name=name, head=whole[-1], clip=StageClip(0))
    for step in range(4, 7):
        for model in (whole, again):
            draw_gradients(model, step)
        for each in (optimizer, *optimizers):
            each.step(step)
    assert same(again, whole)


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_what_is_loaded_is_a_copy(name):
    one = make_stage().bfloat16()
    optimizer = make_optimizer(one, name=name)
    train(one, optimizer, range(2))
    other = copy.deepcopy(one)
    twin = loaded(other, optimizer.state_dict(), name=name)
    before = copy.deepcopy(optimizer.state_dict())
    train(other, twin, range(2, 5))
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    train(one, optimizer, range(2, 5))
    assert same(one, other)


def test_a_frozen_parameter_is_left_alone():
    stage = make_stage()
    stage[1].requires_grad_(False)
    for name in ("AdamW", "Muon"):
        assert list(state_of(stage, name=name)["state"]) == ["0.weight", "2.weight", "2.bias"]


def test_a_parameter_that_never_had_a_gradient_has_no_moments():
    stage = make_stage()
    optimizer = make_optimizer(stage)
    draw_gradients(stage, 0)
    stage[0].weight.grad = None
    optimizer.step(0)
    state = optimizer.state_dict()
    assert state["state"]["0.weight"] == {} and set(state["state"]["2.bias"]) == {"step", "exp_avg", "exp_avg_sq"}
    again = loaded(stage, state)
    assert again.state_dict()["state"]["0.weight"] == {}
    train(stage, again, [1])


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    stage = make_stage()
    state = state_of(make_stage())
    optimizer = make_optimizer(stage)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="nothing about 2.weight, 2.bias: load the states of all stages"):
        optimizer.load_state_dict({"state": {n: kept for n, kept in state["state"].items() if n[0] != "2"}})
    bad = copy.deepcopy(state)
    bad["state"]["2.bias"]["exp_avg"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"2.bias has exp_avg of shape \(4,\), the parameter has \(5,\)"):
        optimizer.load_state_dict(bad)
    with pytest.raises(ValueError, match="1.1.weight holds momentum_buffer, AdamW keeps exp_avg, exp_avg_sq, step"):
        optimizer.load_state_dict(state_of(make_stage(), name="Muon"))
    assert optimizer.state_dict() == before and same(stage, make_stage())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_on_a_gpu_it_waits_for_nothing_and_its_state_comes_home(name):
    stage = make_stage().bfloat16().cuda()
    optimizer = make_optimizer(stage, name=name)
    train(stage, optimizer, range(2))
    draw_gradients(stage, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.grad_norm.is_cuda
    home = copy.deepcopy(stage).cpu()
    again = loaded(home, optimizer.state_dict(), name=name)
    train(home, again, [3])
    train(stage, optimizer, [3])
    for a, b in zip(home.parameters(), stage.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=0.02, atol=1e-4)
