"""One stage's optimizer is torch's own, grouped: same bits; and in bfloat16 it moves as it would in float32."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dnipipe.checkpoint import load_checkpoint, save_checkpoint
from dnipipe.optim import StageClip, StageOptimizer
from dnipipe.partition import decoder_as_sequential
from dnipipe.partition.sequential import split_sequential
from tests.optim.harness import RATE, draw_gradients, make_optimizer, make_stage, same, train
from tests.partition.test_decoder import FAMILIES, options_of


def test_adamw_is_torchs_own_that_decays_all_but_gains_and_biases():
    ours = train(stage := make_stage(), make_optimizer(stage), range(9))
    theirs = make_stage()
    decays = [p for p in theirs.parameters() if p.ndim > 1]
    groups = [{"params": decays}, {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(9):
        draw_gradients(theirs, step)
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = RATE(step)
        adamw.step()
    assert len(decays) == 4 and same(ours, theirs)


def test_after_a_step_there_are_no_gradients_and_the_norm_is_kept():
    stage, same_stage = make_stage(), make_stage()
    optimizer = make_optimizer(stage, clip=StageClip(0.5))
    draw_gradients(stage, 0)
    draw_gradients(same_stage, 0)
    optimizer.step(0)
    assert all(p.grad is None for p in stage.parameters())
    assert torch.equal(optimizer.grad_norm, nn.utils.clip_grad_norm_(same_stage.parameters(), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_0_does_not_clip_and_still_measures(dtype):
    stage, clipped = make_stage().to(dtype), make_stage().to(dtype)
    options = {"learning_rate": lambda step: 0.1}
    optimizers = [
        make_optimizer(stage, **options, clip=StageClip(0)),
        make_optimizer(clipped, **options, clip=StageClip(1e-9)),
    ]
    for module, optimizer in zip((stage, clipped), optimizers, strict=True):
        draw_gradients(module, 0)
        optimizer.step(0)
    assert torch.equal(optimizers[0].grad_norm, optimizers[1].grad_norm) and optimizers[0].grad_norm > 1
    before = make_stage().to(dtype)[1][0].bias
    # of Adam's first step every entry is the learning rate, unless its epsilon, 1e-8, outweighs the gradient
    assert (stage[1][0].bias - before).abs().min() > 0.09 and (clipped[1][0].bias - before).abs().max() < 0.01


def _moved_by_muon(stage, **options):
    optimizer = make_optimizer(stage, name="Muon", **options)
    train(stage, optimizer, [0])
    return {name for name, kept in optimizer.state_dict()["state"].items() if set(kept) == {"momentum_buffer"}}


def test_muon_moves_the_matrices_between_the_embedding_and_the_head():
    stage = make_stage()
    assert _moved_by_muon(stage, head=stage[-1]) == {"1.1.weight", "1.3.weight"}
    assert _moved_by_muon(make_stage()) == {"1.1.weight", "1.3.weight", "2.weight"}
    (last,) = split_sequential(make_stage(), 2, weights=[2, 1, 1])[1:]
    assert _moved_by_muon(last, head=last[-1]) == {"1.1.weight", "1.3.weight"}
    tied = make_stage()
    tied[2].weight = tied[0].weight
    assert _moved_by_muon(tied) == {"1.1.weight", "1.3.weight"}
    other = nn.Sequential(nn.Conv1d(2, 3, 1), nn.MultiheadAttention(4, 2))
    assert _moved_by_muon(other) == {"1.out_proj.weight"}


def test_under_muon_each_group_is_torchs_own():
    ours = train(stage := make_stage(), make_optimizer(stage, name="Muon", head=stage[-1]), range(6))
    theirs = make_stage()
    hidden = [theirs[1][1].weight, theirs[1][3].weight]
    groups = [{"params": [theirs[0].weight, theirs[2].weight]}]
    groups += [{"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    both = [
        torch.optim.Muon(hidden, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    for step in range(6):
        draw_gradients(theirs, step)
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = RATE(step)
            optimizer.step()
    assert same(ours, theirs)


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns(name, dtype):
    stage = make_stage().to(dtype)
    optimizer = make_optimizer(stage, name=name, head=stage[-1], weight_decay=0.0, learning_rate=lambda step: 0.02)
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
            optimizer = make_optimizer(module, name=name)
            optimizer.step(0)
            assert optimizer.grad_norm == 0
            optimizer.load_state_dict(optimizer.state_dict())


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
    optimizer = _loaded(whole, kept["optimizer"], name=name, head=whole[-1], clip=StageClip(0))
    for step in range(4, 7):
        for model in (whole, again):
            draw_gradients(model, step)
        for each in (optimizer, *optimizers):
            each.step(step)
    assert same(again, whole)


def _loaded(module, state, **options):
    optimizer = make_optimizer(module, **options)
    optimizer.load_state_dict(state)
    return optimizer


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_what_is_loaded_is_a_copy(name):
    one = make_stage().bfloat16()
    optimizer = make_optimizer(one, name=name)
    train(one, optimizer, range(2))
    other = copy.deepcopy(one)
    twin = _loaded(other, optimizer.state_dict(), name=name)
    before = copy.deepcopy(optimizer.state_dict())
    train(other, twin, range(2, 5))
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    train(one, optimizer, range(2, 5))
    assert same(one, other)


def test_a_frozen_parameter_is_left_alone():
    stage = make_stage()
    stage[1].requires_grad_(False)
    for name in ("AdamW", "Muon"):
        assert list(_optimizer_state(stage, name=name)["state"]) == ["0.weight", "2.weight", "2.bias"]


def test_a_parameter_that_never_had_a_gradient_has_no_moments():
    stage = make_stage()
    optimizer = make_optimizer(stage)
    draw_gradients(stage, 0)
    stage[0].weight.grad = None
    optimizer.step(0)
    state = optimizer.state_dict()
    assert state["state"]["0.weight"] == {} and set(state["state"]["2.bias"]) == {"step", "exp_avg", "exp_avg_sq"}
    again = _loaded(stage, state)
    assert again.state_dict()["state"]["0.weight"] == {}
    train(stage, again, [1])


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    stage = make_stage()
    state = _optimizer_state(make_stage())
    optimizer = make_optimizer(stage)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="nothing about 2.weight, 2.bias: load the states of all stages"):
        optimizer.load_state_dict({"state": {n: kept for n, kept in state["state"].items() if n[0] != "2"}})
    bad = copy.deepcopy(state)
    bad["state"]["2.bias"]["exp_avg"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"2.bias has exp_avg of shape \(4,\), the parameter has \(5,\)"):
        optimizer.load_state_dict(bad)
    with pytest.raises(ValueError, match="1.1.weight holds momentum_buffer, AdamW keeps exp_avg, exp_avg_sq, step"):
        optimizer.load_state_dict(_optimizer_state(make_stage(), name="Muon"))
    assert optimizer.state_dict() == before and same(stage, make_stage())


def _optimizer_state(module, **options):
    optimizer = make_optimizer(module, **options)
    train(module, optimizer, range(2))
    return optimizer.state_dict()


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
    state = _optimizer_state(stage)["state"]
    assert {name for name, kept in state.items() if "master" in kept} == {n for n in state if n.startswith("1.")}
    assert "master" not in _optimizer_state(make_stage().bfloat16(), master_weights=False)["state"]["1.1.weight"]


def test_a_float32_run_goes_on_in_bfloat16_and_back():
    full = make_stage()
    state = _optimizer_state(full)
    low = copy.deepcopy(full).bfloat16()
    low_state = _loaded(low, state).state_dict()
    assert torch.equal(low_state["state"]["0.weight"]["master"], full[0].weight.bfloat16().float())
    back = make_stage()
    _loaded(back, low_state)
    assert torch.equal(back[0].weight, low_state["state"]["0.weight"]["master"])


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
    again = _loaded(home, optimizer.state_dict(), name=name)
    train(home, again, [3])
    train(stage, optimizer, [3])
    for a, b in zip(home.parameters(), stage.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_over_batches_is_divided_in_float32_before_it_is_measured(dtype):
    stage, mean = make_stage().to(dtype), make_stage().to(dtype).float()
    optimizer, reference = make_optimizer(stage), make_optimizer(mean)
    for step in range(4):
        draw_gradients(stage, step)
        draw_gradients(mean, step)
        for parameter in mean.parameters():
            parameter.grad /= 3
        optimizer.step(step, divide_by=3)
        reference.step(step)
        assert torch.equal(optimizer.grad_norm, reference.grad_norm)
    for name, parameter in mean.named_parameters():
        assert torch.equal(stage.get_parameter(name), parameter.to(dtype))


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_undivided_is_divided_by_1(name):
    stage, other = make_stage(), make_stage()
    optimizers = [make_optimizer(stage, name=name), make_optimizer(other, name=name)]
    for step in range(4):
        draw_gradients(stage, step)
        draw_gradients(other, step)
        optimizers[0].step(step)
        optimizers[1].step(step, divide_by=1.0)
    assert same(stage, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_alone_is_clipped_by_its_own_norm_and_counts_in_no_other(dtype):
    stage = make_stage().to(dtype)
    optimizer = make_optimizer(stage, alone=[stage[2].weight], clip=StageClip(0.5))
    theirs = make_stage().to(dtype).float()
    reference = make_optimizer(theirs, clip=StageClip(0))
    for step in range(4):
        draw_gradients(stage, step)
        draw_gradients(theirs, step)
        together = [parameter for parameter in theirs.parameters() if parameter is not theirs[2].weight]
        norm = nn.utils.clip_grad_norm_(together, 0.5)
        assert nn.utils.clip_grad_norm_(theirs[2].weight, 0.5) > 0.5
        optimizer.step(step)
        reference.step(step)
        assert torch.equal(optimizer.grad_norm, norm)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(stage.get_parameter(name), parameter.to(dtype))


def test_muon_leaves_alone_what_may_be_an_embedding_elsewhere():
    stage = make_stage()
    assert _moved_by_muon(stage, alone=[stage[2].weight]) == {"1.1.weight", "1.3.weight"}


def test_what_cannot_stand_alone_is_refused():
    stage = make_stage()
    with pytest.raises(ValueError, match="alone holds 2 parameters, 1 of them move in this module"):
        make_optimizer(stage, alone=[stage[2].weight, make_stage()[2].weight])
    stage[2].requires_grad_(False)
    with pytest.raises(ValueError, match="alone holds 1 parameters, 0 of them"):
        make_optimizer(stage, alone=[stage[2].weight])


def test_muon_moves_the_linear_layers_of_every_family_of_decoders():
    for family in FAMILIES:
        row = decoder_as_sequential(options_of(family))
        optimizer = StageOptimizer(row, name="Muon", learning_rate=RATE, weight_decay=0.1, head=row[-1])
        row(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
        optimizer.step(0)
        moved = {name for name, kept in optimizer.state_dict()["state"].items() if "momentum_buffer" in kept}
        matrices = {name for name, parameter in row[1:-1].named_parameters() if parameter.ndim == 2}
        assert moved and moved == matrices, family
