"""One pre-LayerNorm transformer block, as interfaces of sequences use it.

Source: Xiong et al. 2020, On Layer Normalization in the Transformer Architecture.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .precision import LayerNorm


class Block(nn.Module):
    """Attention and a feed-forward layer four times as wide, each behind a LayerNorm and added to what it reads.

    Args:    width: W. num_heads: a divisor of W. causal: whether a token attends only to itself and those before it.
    Shapes:  x (B, T, W) -> (B, T, W). No positions of its own: an activation carries them.
    """

    def __init__(self, width: int, num_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.attention_norm = LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.attention_norm(x))
        out: Tensor = x + self.feed_forward(x)
        return out

    def _attend(self, x: Tensor) -> Tensor:
        qkv: Tensor = self.qkv(x)
        batch, time, _ = x.shape
        query, key, value = qkv.view(batch, time, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        out: Tensor = self.mix(mixed.transpose(1, 2).flatten(2))
        return out
