"""One stage's optimizer is torch's own, grouped: same bits; and in bfloat16 it moves as it would in float32."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dnipipe.checkpoint import load_checkpoint, save_checkpoint
from dnipipe.optim import StageOptimizer, learning_rate_at
from dnipipe.partition.sequential import split_sequential

RATE = partial(learning_rate_at, peak=0.02, warmup_steps=3, total_steps=12, schedule="cosine", final_fraction=0.1)


def _stage():
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    return nn.Sequential(nn.Embedding(5, 8), block, nn.Linear(8, 5))


def _optimizer(module, **options):
    return StageOptimizer(module, **{"learning_rate": RATE, "weight_decay": 0.1, "clip": 1.0, **options})


def _draw_gradients(module, step):
    for index, parameter in enumerate(module.parameters()):
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + index))
        # of so few bits that bfloat16 holds it exactly: a module in either dtype has the same gradients
        parameter.grad = drawn.bfloat16().to(parameter)


def _train(module, optimizer, steps):
    for step in steps:
        _draw_gradients(module, step)
        optimizer.step(step)
    return module


def _same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_adamw_is_torchs_own_that_decays_all_but_gains_and_biases():
    ours = _train(stage := _stage(), _optimizer(stage), range(9))
    theirs = _stage()
    decays = [p for p in theirs.parameters() if p.ndim > 1]
    groups = [{"params": decays}, {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(9):
        _draw_gradients(theirs, step)
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = RATE(step)
        adamw.step()
    assert len(decays) == 4 and _same(ours, theirs)


def test_after_a_step_there_are_no_gradients_and_the_norm_is_kept():
    stage, same = _stage(), _stage()
    optimizer = _optimizer(stage, clip=0.5)
    _draw_gradients(stage, 0)
    _draw_gradients(same, 0)
    optimizer.step(0)
    assert all(p.grad is None for p in stage.parameters())
    assert torch.equal(optimizer.grad_norm, nn.utils.clip_grad_norm_(same.parameters(), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_0_does_not_clip_and_still_measures(dtype):
    stage, clipped = _stage().to(dtype), _stage().to(dtype)
    options = {"learning_rate": lambda step: 0.1}
    optimizers = [_optimizer(stage, **options, clip=0), _optimizer(clipped, **options, clip=1e-9)]
    for module, optimizer in zip((stage, clipped), optimizers, strict=True):
        _draw_gradients(module, 0)
        optimizer.step(0)
    assert torch.equal(optimizers[0].grad_norm, optimizers[1].grad_norm) and optimizers[0].grad_norm > 1
    before = _stage().to(dtype)[1][0].bias
    # of Adam's first step every entry is the learning rate, unless its epsilon, 1e-8, outweighs the gradient
    assert (stage[1][0].bias - before).abs().min() > 0.09 and (clipped[1][0].bias - before).abs().max() < 0.01


def _moved_by_muon(stage, **options):
    optimizer = _optimizer(stage, name="Muon", **options)
    _train(stage, optimizer, [0])
    return {name for name, kept in optimizer.state_dict()["state"].items() if set(kept) == {"momentum_buffer"}}


def test_muon_moves_the_matrices_between_the_embedding_and_the_head():
    stage = _stage()
    assert _moved_by_muon(stage, head=stage[-1]) == {"1.1.weight", "1.3.weight"}
    assert _moved_by_muon(_stage()) == {"1.1.weight", "1.3.weight", "2.weight"}
    (last,) = split_sequential(_stage(), 2, weights=[2, 1, 1])[1:]
    assert _moved_by_muon(last, head=last[-1]) == {"1.1.weight", "1.3.weight"}
    tied = _stage()
    tied[2].weight = tied[0].weight
    assert _moved_by_muon(tied) == {"1.1.weight", "1.3.weight"}
    other = nn.Sequential(nn.Conv1d(2, 3, 1), nn.MultiheadAttention(4, 2))
    assert _moved_by_muon(other) == {"1.out_proj.weight"}


def test_under_muon_each_group_is_torchs_own():
    ours = _train(stage := _stage(), _optimizer(stage, name="Muon", head=stage[-1]), range(6))
    theirs = _stage()
    hidden = [theirs[1][1].weight, theirs[1][3].weight]
    groups = [{"params": [theirs[0].weight, theirs[2].weight]}]
    groups += [{"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    both = [
        torch.optim.Muon(hidden, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    for step in range(6):
        _draw_gradients(theirs, step)
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = RATE(step)
            optimizer.step()
    assert _same(ours, theirs)


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns(name, dtype):
    stage = _stage().to(dtype)
    optimizer = _optimizer(stage, name=name, head=stage[-1], weight_decay=0.0, learning_rate=lambda step: 0.02)
    token = torch.arange(5)
    losses = []
    for step in range(40):
        loss = F.cross_entropy(stage(token).float(), (token * 2) % 5)
        loss.backward()
        losses.append(loss.item())
        optimizer.step(step)
    assert losses[0] > 1.5 and losses[-1] < 0.05


def test_a_stage_may_hold_few_parameters_or_none_that_move():
    for layer in (nn.Flatten(), nn.Linear(2, 3, bias=False), nn.LayerNorm(3), nn.Linear(2, 3).requires_grad_(False)):
        for name in ("AdamW", "Muon"):
            module = nn.Sequential(layer)
            optimizer = _optimizer(module, name=name)
            optimizer.step(0)
            assert optimizer.grad_norm == 0
            optimizer.load_state_dict(optimizer.state_dict())


def test_the_learning_rate_is_exact_at_the_ends():
    warm = partial(learning_rate_at, peak=0.3, warmup_steps=4)
    assert [warm(step) for step in (0, 1, 3, 4, 10**9)] == [0.3 / 4, 0.3 / 2, 0.3, 0.3, 0.3]
    cosine = partial(warm, schedule="cosine", total_steps=14, final_fraction=0.2)
    assert [cosine(step) for step in range(4)] == [warm(step) for step in range(4)]
    assert (cosine(4), cosine(14), cosine(99)) == (0.3, 0.3 * 0.2, 0.3 * 0.2)
    assert cosine(9) == pytest.approx(0.3 * 0.6)
    assert cosine(6) == pytest.approx(0.3 * (0.2 + 0.8 * (1 + math.cos(math.pi / 5)) / 2))
    falling = [cosine(step) for step in range(4, 15)]
    assert falling == sorted(falling, reverse=True)
    assert learning_rate_at(0, peak=0.3) == learning_rate_at(0, peak=0.3, schedule="cosine", total_steps=5) == 0.3


def test_a_cosine_that_ends_before_it_begins_is_refused_at_once():
    rate = partial(learning_rate_at, peak=0.3, warmup_steps=4, schedule="cosine")
    for total_steps in (0, 4):
        with pytest.raises(ValueError, match=f"total_steps = {total_steps}: .*warmup_steps = 4"):
            _optimizer(_stage(), learning_rate=partial(rate, total_steps=total_steps))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_what_is_saved_by_name_goes_on_under_another_cut(tmp_path, name, dtype):
    whole = _stage().to(dtype)
    optimizer = _optimizer(whole, name=name, head=whole[-1])
    _train(whole, optimizer, range(4))
    save_checkpoint(tmp_path, 0, {"model": whole.state_dict(), "optimizer": optimizer.state_dict()})
    kept = load_checkpoint(tmp_path, 0)
    assert list(kept["optimizer"]["state"]) == [name for name, _ in whole.named_parameters()]

    again = _stage().to(dtype)
    again.load_state_dict(kept["model"])
    with torch.no_grad():
        again[0].weight += 1  # what the float32 copy says, counts: as in a model that was saved in few bits
    stages = split_sequential(again, 2, weights=[1, 1, 2])
    optimizers = [_optimizer(stage, name=name, head=again[-1], clip=0) for stage in stages]
    for stage_optimizer in optimizers:
        stage_optimizer.load_state_dict(kept["optimizer"])
    assert _same(again, whole) is (dtype == torch.bfloat16)
    with torch.no_grad():
        again[0].weight.copy_(whole[0].weight)
    optimizer = _loaded(whole, kept["optimizer"], name=name, head=whole[-1], clip=0)
    for step in range(4, 7):
        for model in (whole, again):
            _draw_gradients(model, step)
        for each in (optimizer, *optimizers):
            each.step(step)
    assert _same(again, whole)


def _loaded(module, state, **options):
    optimizer = _optimizer(module, **options)
    optimizer.load_state_dict(state)
    return optimizer


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_what_is_loaded_is_a_copy(name):
    one = _stage().bfloat16()
    optimizer = _optimizer(one, name=name)
    _train(one, optimizer, range(2))
    other = copy.deepcopy(one)
    twin = _loaded(other, optimizer.state_dict(), name=name)
    before = copy.deepcopy(optimizer.state_dict())
    _train(other, twin, range(2, 5))
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    _train(one, optimizer, range(2, 5))
    assert _same(one, other)


def test_a_frozen_parameter_is_left_alone():
    stage = _stage()
    stage[1].requires_grad_(False)
    for name in ("AdamW", "Muon"):
        assert list(_optimizer_state(stage, name=name)["state"]) == ["0.weight", "2.weight", "2.bias"]


def test_a_parameter_that_never_had_a_gradient_has_no_moments():
    stage = _stage()
    optimizer = _optimizer(stage)
    _draw_gradients(stage, 0)
    stage[0].weight.grad = None
    optimizer.step(0)
    state = optimizer.state_dict()
    assert state["state"]["0.weight"] == {} and set(state["state"]["2.bias"]) == {"step", "exp_avg", "exp_avg_sq"}
    again = _loaded(stage, state)
    assert again.state_dict()["state"]["0.weight"] == {}
    _train(stage, again, [1])


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    stage = _stage()
    state = _optimizer_state(_stage())
    optimizer = _optimizer(stage)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="nothing about 2.weight, 2.bias: load the states of all stages"):
        optimizer.load_state_dict({"state": {n: kept for n, kept in state["state"].items() if n[0] != "2"}})
    bad = copy.deepcopy(state)
    bad["state"]["2.bias"]["exp_avg"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"2.bias has exp_avg of shape \(4,\), the parameter has \(5,\)"):
        optimizer.load_state_dict(bad)
    with pytest.raises(ValueError, match="1.1.weight holds momentum_buffer, AdamW keeps exp_avg, exp_avg_sq, step"):
        optimizer.load_state_dict(_optimizer_state(_stage(), name="Muon"))
    assert optimizer.state_dict() == before and _same(stage, _stage())


def _optimizer_state(module, **options):
    optimizer = _optimizer(module, **options)
    _train(module, optimizer, range(2))
    return optimizer.state_dict()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_master_weights_move_as_a_float32_run_does(name, half):
    low = _stage().to(half)
    full = copy.deepcopy(low).float()
    optimizer = _optimizer(low, name=name)
    _train(low, optimizer, range(8))
    _train(full, _optimizer(full, name=name), range(8))
    for parameter_name, parameter in full.named_parameters():
        assert torch.equal(optimizer.state_dict()["state"][parameter_name]["master"], parameter)
        assert torch.equal(low.get_parameter(parameter_name), parameter.to(half))


def test_small_steps_add_up_in_the_master_weights_and_are_lost_without():
    moved = {}
    for master_weights in (True, False):
        layer = nn.Linear(4, 4).bfloat16()
        nn.init.ones_(layer.weight)
        options = {"learning_rate": lambda step: 1e-4, "weight_decay": 0.0, "master_weights": master_weights}
        optimizer = _optimizer(layer, **options)
        for step in range(100):  # each of 1e-4, where the next number below 1 is 1 - 2 ** -8
            layer.weight.grad = torch.ones_like(layer.weight)
            optimizer.step(step)
        moved[master_weights] = (1 - layer.weight).mean().item()
    assert moved[False] == 0 and moved[True] == pytest.approx(100 * 1e-4, abs=2**-9)


def test_float32_parameters_have_no_copy():
    stage = _stage()
    stage[1].bfloat16()
    state = _optimizer_state(stage)["state"]
    assert {name for name, kept in state.items() if "master" in kept} == {n for n in state if n.startswith("1.")}
    assert "master" not in _optimizer_state(_stage().bfloat16(), master_weights=False)["state"]["1.1.weight"]


def test_a_float32_run_goes_on_in_bfloat16_and_back():
    full = _stage()
    state = _optimizer_state(full)
    low = copy.deepcopy(full).bfloat16()
    low_state = _loaded(low, state).state_dict()
    assert torch.equal(low_state["state"]["0.weight"]["master"], full[0].weight.bfloat16().float())
    back = _stage()
    _loaded(back, low_state)
    assert torch.equal(back[0].weight, low_state["state"]["0.weight"]["master"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_on_a_gpu_it_waits_for_nothing_and_its_state_comes_home(name):
    stage = _stage().bfloat16().cuda()
    optimizer = _optimizer(stage, name=name)
    _train(stage, optimizer, range(2))
    _draw_gradients(stage, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.grad_norm.is_cuda
    home = copy.deepcopy(stage).cpu()
    again = _loaded(home, optimizer.state_dict(), name=name)
    _train(home, again, [3])
    _train(stage, optimizer, [3])
    for a, b in zip(home.parameters(), stage.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=0.02, atol=1e-4)
