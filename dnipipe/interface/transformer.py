"""A bidirectional block as the interface of a sequence: the gradient at a token comes from the tokens after it."""

from torch import Tensor, nn

from .base import Regressed, start_at_zero
from .block import Block
from .conditional import ConditionedLinear
from .precision import LayerNorm


class Transformer(Regressed):
    """Predicts the loss gradient at a stage's output by a narrow block between two projections, the last zero at first.

    Args:    features: D. num_classes: 0 ignores the label, more than 0 adds an embedding of it (cDNI).
             width: of the block, a multiple of num_heads; None = max(32, D // 4), rounded up to one.
             num_heads: of the attention. normalise: as in Regressed.
    Shapes:  h (B, T, D) with label (B, T) or (B,) -> (B, T, D).
    Raises:  ValueError: width is no multiple of num_heads; num_classes > 0 and no label that fits.
    """

    def __init__(
        self,
        features: int,
        num_classes: int = 0,
        *,
        width: int | None = None,
        num_heads: int = 4,
        normalise: bool = True,
    ) -> None:
        super().__init__(normalise=normalise)
        if width is None:
            width = -(-max(32, features // 4) // num_heads) * num_heads
        if width % num_heads != 0:
            raise ValueError(
                f"width = {width} must be a multiple of num_heads = {num_heads}: give another width, or None"
            )
        self.num_classes = num_classes
        self.norm = LayerNorm(features)
        self.narrow = ConditionedLinear(features, width, num_classes, name=type(self).__name__)
        self.block = Block(width, num_heads, causal=False)
        self.out = start_at_zero(nn.Linear(width, features))

    def forward(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        gradient: Tensor = self.out(self.block(self.narrow(self.norm(h), label)))
        return gradient
