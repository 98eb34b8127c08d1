"""Which parameters Muon moves and which AdamW, and that each is torch's own."""

import torch
from torch import nn

from dnipipe.optim import StageOptimizer
from dnipipe.partition import decoder_as_sequential
from dnipipe.partition.sequential import split_sequential
from tests.optim.harness import RATE, draw_gradients, make_optimizer, make_stage, same, train
from tests.partition.test_decoder import FAMILIES, options_of


def _moved(stage, **options):
    optimizer = make_optimizer(stage, name="Muon", **options)
    train(stage, optimizer, [0])
    return {name for name, kept in optimizer.state_dict()["state"].items() if set(kept) == {"momentum_buffer"}}


def test_muon_moves_the_matrices_between_the_embedding_and_the_head():
    stage = make_stage()
    assert _moved(stage, head=stage[-1]) == {"1.1.weight", "1.3.weight"}
    assert _moved(make_stage()) == {"1.1.weight", "1.3.weight", "2.weight"}
    (last,) = split_sequential(make_stage(), 2, weights=[2, 1, 1])[1:]
    assert _moved(last, head=last[-1]) == {"1.1.weight", "1.3.weight"}
    tied = make_stage()
    tied[2].weight = tied[0].weight
    assert _moved(tied) == {"1.1.weight", "1.3.weight"}
    other = nn.Sequential(nn.Conv1d(2, 3, 1), nn.MultiheadAttention(4, 2))
    assert _moved(other) == {"1.out_proj.weight"}


def test_muon_leaves_alone_what_may_be_an_embedding_elsewhere():
    stage = make_stage()
    assert _moved(stage, alone=[stage[2].weight]) == {"1.1.weight", "1.3.weight"}


def test_muon_moves_the_linear_layers_of_every_family_of_decoders():
    for family in FAMILIES:
        row = decoder_as_sequential(options_of(family))
        optimizer = StageOptimizer(row, name="Muon", learning_rate=RATE, weight_decay=0.1, head=row[-1])
        row(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
        optimizer.step(0)
        moved = {name for name, kept in optimizer.state_dict()["state"].items() if "momentum_buffer" in kept}
        matrices = {name for name, parameter in row[1:-1].named_parameters() if parameter.ndim == 2}
        assert moved and moved == matrices, family


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
