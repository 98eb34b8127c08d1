"""A local head: the gradient of a small classifier's own loss stands in for the gradient of the stages behind it.

Why: behind a LayerNorm a gradient shrinks as the activation grows. A regressed gradient need not: a pre-LayerNorm
residual stream that follows it meets no restoring force and explodes. That of a head with a LayerNorm always shrinks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Interface
from .conditional import label_shapes, require_label
from .precision import LayerNorm, full_precision, own_view, precision_of
from .sampled import SampledCrossEntropy

IGNORE_INDEX = -100


class LocalHead(Interface):
    """LayerNorm and a linear classifier; its synthetic gradient is that of its own mean cross-entropy at h.

    The head learns from the label alone: the true gradient only serves the metrics. So without a correction by the true
    gradient, training with a local head is greedy local learning (Belilovsky et al. 2019), and should be called that.
    The classifier starts at zero, so an untrained head moves no weight.

    Args:    features: D. num_classes: C, at least 1.
             rank: of the classifier, D -> rank -> C, for a large C; None: full.
             samples: classes, beside those that are labels of the microbatch, that the cross-entropy is taken over
             (sampled.py), for a large C; None: all.
    Shapes:  h (B, D) with label (B,), or h (B, T, D) with label (B, T), or h (B, T, D) with label (B,), where the mean
             over T is classified -> the shape of h. Label -100 is ignored; if all are, the gradient is exactly 0.
    Units:   gradient of the mean loss of one microbatch, over its labels that count.
    Raises:  ValueError: num_classes < 1, rank < 1, samples not from 1 to C; no label that fits. TypeError: labels that
             are not integers.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        rank: int | None = None,
        samples: int | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(
                f"num_classes = {num_classes}: a local head classifies; give the number of classes, at least 1"
            )
        if rank is not None and rank < 1:
            raise ValueError(f"rank = {rank} must be at least 1: give more, or None for a full classifier")
        self.num_classes = num_classes
        self.norm = LayerNorm(features)
        self.reduce = nn.Identity() if rank is None else nn.Linear(features, rank, bias=False)
        self.classify = nn.Linear(rank or features, num_classes)
        self.sampled = None if samples is None else SampledCrossEntropy(num_classes, samples)
        # the weight at zero makes the gradient zero; the bias has no part in it, but then all classes start alike
        nn.init.zeros_(self.classify.weight)
        nn.init.zeros_(self.classify.bias)

    def loss(self, h: Tensor, label: Tensor | None) -> Tensor:
        """Mean cross-entropy over the labels that are not ignored, 0 if there are none; differentiable in h."""
        label = require_label(type(self).__name__, self.num_classes, label, *label_shapes(tuple(h.shape)))
        if label.ndim < h.ndim - 1:
            h = h.sum(dim=1, dtype=torch.float32) / h.shape[1]  # not mean: its backward divides every token
        total = self._cross_entropy(self.reduce(self.norm(h)).flatten(0, -2), label.flatten())
        return total / (label != IGNORE_INDEX).sum().clamp_min(1)

    def end_step(self, num_learned: int) -> None:
        if self.sampled is not None:
            self.sampled.end_step()

    def _cross_entropy(self, x: Tensor, label: Tensor) -> Tensor:
        """The sum, (), of x (N, E) against label (N,)."""
        if self.sampled is not None:
            sampled: Tensor = self.sampled(x, label, self.classify, IGNORE_INDEX)
            return sampled
        # float32: the log of a sum over a large vocabulary has no place in half precision
        return F.cross_entropy(self.classify(x).float(), label, ignore_index=IGNORE_INDEX, reduction="sum")

    def synthetic_grad(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        with torch.enable_grad(), full_precision(h):
            own_h, loss = self._loss_at_own_copy(h, label)
            (gradient,) = torch.autograd.grad(loss, own_h)
        return self.checked(gradient, h)

    def learn(self, h: Tensor, label: Tensor | None, true_grad: Tensor) -> Tensor:
        with torch.enable_grad(), full_precision(h):
            own_h, loss = self._loss_at_own_copy(h, label)
            torch.autograd.backward(loss)
        assert own_h.grad is not None
        return self.checked(own_h.grad, h)

    def _loss_at_own_copy(self, h: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        own_h = own_view(h).requires_grad_()
        with precision_of(h):
            return own_h, self.loss(own_h, label)
