"""The smallest interface: the gradient as a linear function of the activation and the label.

Source: Jaderberg et al. 2016: with the label, one linear layer is enough for deep networks on MNIST.
"""

from torch import Tensor

from .base import LINEAR, Regressed, start_at_zero
from .conditional import ConditionedLinear


class Linear(Regressed):
    """Predicts the loss gradient at a stage's output by one linear layer that starts at zero.

    Args:    features: D. num_classes: 0 ignores the label, more than 0 makes it conditional (cDNI).
             normalise: as in Regressed.
    Shapes:  h (B, D) with label (B,), or h (B, T, D) with label (B, T) or (B,) -> the shape of h.
    Raises:  ValueError: num_classes > 0 and no label that fits.
    """

    def __init__(self, features: int, num_classes: int = 0, *, normalise: bool = True) -> None:
        super().__init__(normalise=normalise, rates=LINEAR)
        self.num_classes = num_classes
        self.out = start_at_zero(ConditionedLinear(features, features, num_classes, name=type(self).__name__))

    def forward(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        gradient: Tensor = self.out(h, label)
        return gradient
