"""A conservative predictor: the gradient of a learned scalar, behind a LayerNorm, fitted to the true gradient.

    phi(h, label) = sum over tokens  s_label . G(W LayerNorm(h) + b_label)          G' = GELU
    d phi / d h   = J^T W^T (s_label * GELU(W LayerNorm(h) + b_label))              J: of the LayerNorm

Why: a regressed gradient need be the gradient of nothing. Followed, it may go round in circles, and nothing makes it
shrink when a residual stream grows. This one shrinks as 1 / |h| and never points along h, as every gradient from behind
a LayerNorm. It is written out, so that learning takes one backward and no graph of a gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Regressed, start_at_zero
from .conditional import ConditionedLinear, LabelEmbedding

EPS = 1e-5
"""Of the LayerNorm, as torch's."""


class Potential(Regressed):
    """Predicts the loss gradient at a stage's output, row by row or token by token, by that of a scalar.

    Args:    features: D. num_classes: 0 ignores the label, more than 0 makes it conditional (cDNI).
             width: of W; None = D. normalise: as in Regressed.
    Shapes:  h (B, D) with label (B,), or h (B, T, D) with label (B, T) or (B,) -> the shape of h.
    Raises:  ValueError: num_classes > 0 and no label that fits.
    """

    def __init__(
        self, features: int, num_classes: int = 0, *, width: int | None = None, normalise: bool = True
    ) -> None:
        super().__init__(normalise=normalise)
        width = width or features
        self.num_classes = num_classes
        self.inner = ConditionedLinear(features, width, num_classes, name=type(self).__name__)
        # row 0 is there without labels, too
        self.slopes = start_at_zero(LabelEmbedding(num_classes, width))

    def forward(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        # float32: the statistics of a LayerNorm; the matrix products are in the precision of h all the same
        centred = h.float() - h.mean(-1, keepdim=True, dtype=torch.float32)
        inverse = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
        normal = centred * inverse
        inner = F.gelu(self.inner(normal, label))
        outer = F.linear(inner * self._slopes(label, h.ndim).to(inner.dtype), self.inner.linear.weight.T).float()
        along = (outer * normal).mean(-1, keepdim=True)
        gradient: Tensor = (outer - outer.mean(-1, keepdim=True) - normal * along) * inverse
        return gradient

    def _slopes(self, label: Tensor | None, ndim: int) -> Tensor:
        if self.num_classes == 0:
            return self.slopes.weight[0]
        assert label is not None, "the inner layer has refused it"
        slopes: Tensor = self.slopes(label.long())
        return slopes if slopes.ndim == ndim else slopes.unsqueeze(1)
