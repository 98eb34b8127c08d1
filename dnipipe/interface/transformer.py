"""A bidirectional block as the interface of a sequence: the gradient at a token comes from the tokens after it.

Source: pre-LayerNorm block of Xiong et al. 2020; no positions of its own, since the activation carries them.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Regressed, hidden_rates, start_at_zero
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
        super().__init__(normalise=normalise, rates=hidden_rates(features))
        if width is None:
            width = -(-max(32, features // 4) // num_heads) * num_heads
        if width % num_heads != 0:
            raise ValueError(
                f"width = {width} must be a multiple of num_heads = {num_heads}: give another width, or None"
            )
        self.num_classes, self.num_heads = num_classes, num_heads
        self.norm = LayerNorm(features)
        self.narrow = ConditionedLinear(features, width, num_classes, name=type(self).__name__)
        self.attention_norm = LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.out = start_at_zero(nn.Linear(width, features))

    def forward(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        x: Tensor = self.narrow(self.norm(h), label)
        x = x + self._attend(self.attention_norm(x))
        x = x + self.feed_forward(x)
        gradient: Tensor = self.out(x)
        return gradient

    def _attend(self, x: Tensor) -> Tensor:
        """Every token attends to every other, before and after it: (B, T, width) -> (B, T, width)."""
        qkv: Tensor = self.qkv(x)
        batch, time, _ = x.shape
        query, key, value = qkv.view(batch, time, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.mix(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return mixed
