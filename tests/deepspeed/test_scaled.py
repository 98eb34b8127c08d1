"""Outside, gradients carry DeepSpeed's factors; inside, predictors see those of the mean loss of one microbatch."""

from __future__ import annotations

import torch

from dnipipe.deepspeed.scaled import ScaledLearner
from dnipipe.interface import Learner, Linear, LocalHead


def test_a_regressed_predictor_learns_the_unscaled_gradient_and_answers_with_a_scaled_one() -> None:
    torch.manual_seed(0)
    plain, scaled = (Learner([Linear(4, normalise=False)], lambda ps: torch.optim.SGD(ps, lr=0.1)) for _ in range(2))
    scaled = ScaledLearner(scaled, lambda: 0.25)
    h, grad = torch.randn(8, 4), torch.randn(8, 4)
    for _ in range(3):
        plain.learn([h], None, [grad])
        scaled.learn([h], None, [0.25 * grad])
        plain.end_step()
        scaled.end_step()
    (one,), (other,) = plain.predict([h], None), scaled.predict([h], None)
    assert one.abs().max() > 0 and torch.equal(0.25 * one, other)


def test_a_local_head_which_derives_its_gradient_answers_with_a_scaled_one() -> None:
    head = LocalHead(4, 3)
    torch.nn.init.normal_(head.classify.weight)
    h, label = torch.randn(8, 4), torch.randint(3, (8,))
    (one,) = Learner([head]).predict([h], label)
    (other,) = ScaledLearner(Learner([head]), lambda: 0.5).predict([h], label)
    assert torch.equal(0.5 * one, other)


def test_an_overflow_in_half_precision_teaches_nothing() -> None:
    learner = ScaledLearner(Learner([Linear(4)]), lambda: 1024.0)
    h, grad = torch.randn(2, 4).half(), torch.full((2, 4), float("inf")).half()
    learner.learn([h], None, [grad])
    learner.end_step()
    assert all(bool(torch.isfinite(each).all()) for each in learner.interfaces.parameters())
