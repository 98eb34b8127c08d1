"""The embedded example: a small GPT over bytes, as a row of layers that any cut splits into stages.

Source: Radford et al. 2019 (GPT-2): pre-LayerNorm blocks, residual projections that start smaller with depth.
Legend: B sequences, T bytes in a sequence, D width, H heads, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """Token plus learned position: (B, T) int64 -> (B, T, D)."""

    def __init__(self, vocab_size: int, seq_len: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(seq_len, width)

    def forward(self, byte_BT: Tensor) -> Tensor:
        return self.token(byte_BT) + self.position(torch.arange(byte_BT.shape[1], device=byte_BT.device))


class Block(nn.Module):
    """Every byte looks at itself and those before it, then thinks for itself: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attend_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attend_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, h_BTD: Tensor) -> Tensor:
        h_BTD = h_BTD + self.attend(self.attend_norm(h_BTD))
        return h_BTD + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(h_BTD))))

    def attend(self, h_BTD: Tensor) -> Tensor:
        heads = self.query_key_value(h_BTD).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, D / H)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attend_out(mixed.transpose(1, 2).flatten(2))


def byte_gpt(
    *, vocab_size: int = 256, seq_len: int = 256, width: int = 128, depth: int = 8, heads: int = 4
) -> nn.Sequential:
    """Embedding, `depth` blocks, head: (B, T) int64 with T <= seq_len -> logits (B, T, V).

    Raises: ValueError: width is not a multiple of heads.
    """
    if width % heads:
        raise ValueError(f"width = {width} must be a multiple of heads = {heads}")
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocab_size))
    model = nn.Sequential(Embedding(vocab_size, seq_len, width), *(Block(width, heads) for _ in range(depth)), head)
    for name, parameter in model.named_parameters():
        if name.endswith(("attend_out.weight", "mlp_out.weight")):
            # 2 x depth of these add up in the residual stream: so scaled, its variance does not grow with depth
            nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model
