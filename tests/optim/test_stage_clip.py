"""The norm of a stage's gradients: measured, clipped by, and of what stands alone; after the division by a number."""

import pytest
import torch
from torch import nn

from dnipipe.optim import StageClip
from tests.optim.harness import draw_gradients, make_optimizer, make_stage, same


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


def test_what_cannot_stand_alone_is_refused():
    stage = make_stage()
    with pytest.raises(ValueError, match="alone holds 2 parameters, 1 of them move in this module"):
        make_optimizer(stage, alone=[stage[2].weight, make_stage()[2].weight])
    stage[2].requires_grad_(False)
    with pytest.raises(ValueError, match="alone holds 1 parameters, 0 of them"):
        make_optimizer(stage, alone=[stage[2].weight])
