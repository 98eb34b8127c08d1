"""One stage's optimizer is torch's own, grouped: same bits; and whatever the stage holds, it learns."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.optim.harness import RATE, draw_gradients, make_optimizer, make_stage, same, train


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
