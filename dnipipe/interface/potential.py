"""A conservative predictor: the gradient of a learned scalar, behind a LayerNorm, fitted to the true gradient.

    phi(h, label) = sum over tokens  s_label . G(W LayerNorm(h) + b_label)          G' = GELU
    d phi / d h   = J^T W^T (s_label * GELU(W LayerNorm(h) + b_label))              J: of the LayerNorm

Why: a regressed gradient need be the gradient of nothing. Followed, it may go round in circles, and nothing makes it
shrink when a residual stream grows. This one shrinks as 1 / |h| and never points along h, as every gradient from behind
a LayerNorm. It is written out, so that learning takes one backward and no graph of a gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from . import precision
from .base import Regressed, hidden_rates, start_at_zero
from .conditional import ConditionedLinear, LabelEmbedding

EPS = 1e-5
"""Of the LayerNorm, as torch's."""


class Potential(Regressed):
    """Predicts the loss gradient at a stage's output, row by row or token by token, by that of a scalar.

    Args:    features: D. num_classes: 0 ignores the label, more than 0 makes it conditional (cDNI).
             width: of W; None = max(32, D // 2). normalise: as in Regressed.
    Shapes:  h (B, D) with label (B,), or h (B, T, D) with label (B, T) or (B,) -> the shape of h.
    Raises:  ValueError: num_classes > 0 and no label that fits.
    """

    def __init__(
        self, features: int, num_classes: int = 0, *, width: int | None = None, normalise: bool = True
    ) -> None:
        super().__init__(normalise=normalise, rates=hidden_rates(features))
        width = width or max(32, features // 2)
        self.num_classes = num_classes
        self.inner = ConditionedLinear(features, width, num_classes, name=type(self).__name__)
        # row 0 is there without labels, too
        self.slopes = start_at_zero(LabelEmbedding(num_classes, width))

    def forward(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        x = h.float() if h.device.type in precision.NORMS_IN_FLOAT32 else h
        with precision.full_precision(h):  # autocast would make it float32
            normal, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
        inner = F.gelu(self.inner(normal.to(h.dtype), label))
        slopes = self._slopes(label, h.ndim).to(inner.dtype)
        outer = F.linear(inner * slopes, self.inner.linear.weight.T)
        gradient: Tensor = _ThroughNorm.apply(outer.to(x.dtype), x, mean, inverse)
        return gradient.to(h.dtype)

    def _slopes(self, label: Tensor | None, ndim: int) -> Tensor:
        if self.num_classes == 0:
            return self.slopes.weight[0]
        assert label is not None, "the inner layer has refused it"
        slopes: Tensor = self.slopes(label.long())
        return slopes if slopes.ndim == ndim else slopes.unsqueeze(1)


class _ThroughNorm(Function):
    """J times a vector, J the Jacobian of a LayerNorm without weights.

    J is symmetric, so the backward is the same product. torch's own double backward is a dozen passes over the tensor.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, vector: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, inverse)
        return _jacobian_product(vector, x, mean, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _jacobian_product(grad, *ctx.saved_tensors), None, None, None


def _jacobian_product(vector: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    product: Tensor = torch.ops.aten.native_layer_norm_backward(
        vector, x, x.shape[-1:], mean, inverse, None, None, [True, False, False]
    )[0]
    return product
