"""A multilayer perceptron as the interface of fully connected layers, or of each token of a sequence alone.

Source: Jaderberg et al. 2016: 0 to 2 hidden layers, there 1024 wide with batch normalisation and ReLU.
"""

from torch import Tensor

from .base import LINEAR, Regressed, check_num_hidden, hidden_rates, relu_layers, start_at_zero
from .conditional import ConditionedLinear


class MLP(Regressed):
    """Predicts the loss gradient at a stage's output by num_hidden ReLU layers and a last layer that starts at zero.

    Args:    features: D. num_classes: 0 ignores the label, more than 0 makes it conditional (cDNI).
             num_hidden: 0 to 2. width: of the hidden layers; None = min(1024, max(64, 2 * D)).
             batch_norm: normalise the hidden layers by the statistics of the microbatch; needs B > 1, or B * T > 1.
             normalise: as in Regressed.
    Shapes:  h (B, D) with label (B,), or h (B, T, D) with label (B, T) or (B,) -> the shape of h.
    Raises:  ValueError: num_hidden outside 0 to 2; num_classes > 0 and no label that fits.
    """

    def __init__(
        self,
        features: int,
        num_classes: int = 0,
        *,
        num_hidden: int = 1,
        width: int | None = None,
        batch_norm: bool = False,
        normalise: bool = True,
    ) -> None:
        super().__init__(normalise=normalise, rates=hidden_rates(features) if num_hidden else LINEAR)
        check_num_hidden(type(self).__name__, num_hidden)
        self.num_classes = num_classes
        sizes = [width or min(1024, max(64, 2 * features))] * num_hidden + [features]
        self.first = ConditionedLinear(features, sizes[0], num_classes, name=type(self).__name__)
        self.rest = relu_layers(sizes, batch_norm)
        start_at_zero(self.rest[-1] if num_hidden else self.first)

    def forward(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        gradient: Tensor = self.rest(self.first(h, label).flatten(0, -2))
        return gradient.view(h.shape)
