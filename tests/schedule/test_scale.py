"""Outside, gradients carry a factor; inside, predictors see those of the mean loss of one microbatch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dnipipe.interface import MLP, Interface, Learner, Linear, LocalHead
from dnipipe.schedule import scale
from dnipipe.schedule.pending import Pending


def _arrived(h: Tensor, grad: Tensor, factor: float, label: Tensor | None = None) -> Pending:
    return Pending(0, (h,), label, [grad], scale=torch.tensor(factor, dtype=torch.float64), arrived=True)


def test_a_regressed_predictor_learns_the_unscaled_gradient_and_answers_with_a_scaled_one() -> None:
    torch.manual_seed(0)
    plain, scaled = (Learner([Linear(4, normalise=False)], lambda ps: torch.optim.SGD(ps, lr=0.1)) for _ in range(2))
    h, grad = torch.randn(8, 4), torch.randn(8, 4)
    for _ in range(3):
        plain.learn([h], None, [grad])
        scale.learn(scaled, _arrived(h, 0.5 * grad, 0.5), lambda: 0.25)
        plain.end_step()
        scaled.end_step()
    (one,), (other,) = plain.predict([h], None), scale.predict(scaled, Pending(0, (h,), None), lambda: 0.25)
    assert one.abs().max() > 0 and torch.equal(0.25 * one, other)


def test_a_local_head_which_derives_its_gradient_answers_with_a_scaled_one() -> None:
    head = LocalHead(4, 3)
    torch.nn.init.normal_(head.classify.weight)
    h, label = torch.randn(8, 4), torch.randint(3, (8,))
    (one,) = Learner([head]).predict([h], label)
    (other,) = scale.predict(Learner([head]), Pending(0, (h,), label), lambda: 0.5)
    assert torch.equal(0.5 * one, other)


def test_true_gradients_are_used_in_the_scale_of_this_stage() -> None:
    grad = torch.randn(2, 4).half()
    (same,), (doubled,) = (scale.true_grads(_arrived(grad, grad, 512.0), lambda s=s: s) for s in (512.0, 1024.0))
    assert torch.equal(same, grad) and torch.equal(doubled, 2 * grad) and doubled.dtype == torch.float16
    assert scale.true_grads(_arrived(grad, grad, 512.0), None)[0] is grad


def test_half_precision_loses_no_small_gradient_and_none_that_its_own_scale_would_overflow() -> None:
    """1e-9 is 0 in float16, and 1024 times 2^20 is infinite there; the scales are what both are for."""
    torch.manual_seed(0)
    learner = Learner([Linear(4, normalise=False)], lambda ps: torch.optim.SGD(ps, lr=0.1))
    with torch.no_grad():
        for parameter in learner.interfaces.parameters():
            parameter.fill_(1e-9)
    h = torch.ones(2, 4).half()
    (grad,) = scale.predict(learner, Pending(0, (h,), None), lambda: 2.0**20)
    assert grad.dtype == torch.float16 and bool((grad > 0).all())
    seen: list[Tensor] = []
    learner.learn = lambda hs, label, grads: seen.extend(grads)  # type: ignore[method-assign]
    scale.learn(learner, _arrived(h, torch.full((2, 4), 1024.0).half(), 1024.0), lambda: 2.0**26)
    assert torch.equal(seen[0], torch.ones(2, 4))


@pytest.mark.parametrize("interface", [Linear(4), MLP(4), LocalHead(4, 3)])
def test_an_overflow_in_half_precision_teaches_nothing_worse_than_zero(interface: Interface) -> None:
    """Of the gradient, or of the activation, which a local head learns from alone."""
    learner = Learner([interface])
    h, grad = torch.randn(2, 4).half(), torch.full((2, 4), float("inf")).half()
    h[0, 0] = float("inf")
    scale.learn(learner, _arrived(h, grad, 1024.0, torch.tensor([1, 2])), lambda: 1024.0)
    learner.end_step()
    assert all(bool(torch.isfinite(each).all()) for each in learner.interfaces.parameters())


def test_what_is_pending_keeps_its_scale_in_a_state() -> None:
    h, grad = torch.randn(2, 4).half(), torch.randn(2, 4).half()
    entry = _arrived(h, grad, 512.0, torch.tensor([1, 2]))
    loaded = Pending.from_state(entry.state_dict(), torch.device("cpu"))
    assert loaded.arrived and loaded.microbatch == 0 and loaded.label is not None
    assert torch.equal(loaded.label, torch.tensor([1, 2])) and torch.equal(loaded.activations[0], h)
    assert torch.equal(scale.true_grads(loaded, lambda: 1024.0)[0], 2 * grad)


def test_a_predictor_learns_and_answers_in_single_precision_under_half() -> None:
    """Autocast is for the stage; a predictor that got float16 would round what it is there to keep."""
    learner = Learner([Linear(4)])
    seen: list[torch.dtype] = []
    learner.predict = lambda hs, label: seen.extend(h.dtype for h in hs) or (torch.zeros(2, 4),)  # type: ignore
    learner.learn = lambda hs, label, grads: seen.extend(t.dtype for t in (*hs, *grads))  # type: ignore
    h = torch.randn(2, 4).half()
    assert scale.predict(learner, Pending(0, (h,), None), lambda: 2.0)[0].dtype == torch.float16
    scale.learn(learner, _arrived(h, h, 2.0), lambda: 2.0)
    assert seen == [torch.float32] * 3
    scale.learn(learner, _arrived(h.bfloat16(), h.bfloat16(), 2.0), lambda: 2.0)
    assert seen[3:] == [torch.bfloat16] * 2, "which has float32's range"


def test_an_overflow_in_another_precision_is_not_hidden() -> None:
    learner, seen = Learner([Linear(4)]), list[Tensor]()
    learner.learn = lambda hs, label, grads: seen.extend(grads)  # type: ignore[method-assign]
    scale.learn(learner, _arrived(torch.ones(2, 4), torch.full((2, 4), float("inf")), 0.5), lambda: 0.5)
    assert bool(seen[0].isinf().all())
