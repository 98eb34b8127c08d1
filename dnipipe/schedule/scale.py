"""Gradients that carry a factor: a loss scale in float16, or the 1 / M of a loss that was divided beforehand.

A stage uses gradients in its own scale. True ones come in that of the next stage, which may be another, since in
float16 each stage finds its own. Predictors know of no scale: they learn and predict gradients of the mean loss of one
microbatch, in float32 where float16 would lose them. `own` None: gradients carry no factor, and nothing is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..interface import Learner
from .pending import Pending

Own = Callable[[], float] | None


def true_grads(entry: Pending, own: Own) -> tuple[Tensor, ...]:
    """In this stage's scale, once they have arrived."""
    if own is None:
        return tuple(entry.true_grads)
    assert entry.scale is not None, "read when they arrived"
    factor = own() / entry.scale
    # only in float16 may two stages differ: M changes when nothing is under way
    return tuple(grad * factor if grad.dtype == torch.float16 else grad for grad in entry.true_grads)


def predict(learner: Learner, entry: Pending, own: Own) -> tuple[Tensor, ...]:
    """In this stage's scale."""
    if own is None:
        return learner.predict(entry.activations, entry.label)
    scale = own()
    grads = learner.predict(_wide(entry.activations), entry.label)
    return tuple(grad.mul_(scale).to(h.dtype) for grad, h in zip(grads, entry.activations, strict=True))


def learn(learner: Learner, entry: Pending, own: Own) -> None:
    """From the true gradients without their scale."""
    if own is None:
        learner.learn(entry.activations, entry.label, entry.true_grads)
        return
    assert entry.scale is not None, "read when they arrived"
    activations, grads = _wide(entry.activations), tuple(wide / entry.scale for wide in _wide(entry.true_grads))
    if any(grad.dtype == torch.float16 for grad in entry.true_grads):
        # A stage skips a batch that overflows. Predictors cannot, since replicas must learn alike: they learn from it
        # nothing worse than zero.
        activations, grads = _finite(activations), _finite(grads)
    learner.learn(activations, entry.label, grads)


def _wide(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.float() if tensor.dtype == torch.float16 else tensor for tensor in tensors)


def _finite(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0) for tensor in tensors)
