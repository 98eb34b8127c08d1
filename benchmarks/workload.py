"""What every schedule is given to do: the same GPT, cut into equal runs of blocks, and the same batch of tokens.

Legend: B sequences of a microbatch, T tokens in a sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.gpt import byte_gpt

HEAD_WIDTH = 64


@dataclass(frozen=True)
class Workload:
    """Sizes of the model and of the batch. microbatch_size: B, sequences."""

    stages: int
    blocks_per_stage: int
    width: int
    seq_len: int
    vocab_size: int
    microbatch_size: int
    dtype: torch.dtype

    @property
    def heads(self) -> int:
        return max(1, self.width // HEAD_WIDTH)

    def chunks(self, indices: list[int], num_chunks: int, device: torch.device, seed: int = 0) -> list[nn.Sequential]:
        """Some of the `num_chunks` equal parts of the model; the embedding is in the first, the head in the last.

        Args:   seed: of the weights, which are the same however the model is cut.

        Raises: ValueError: the blocks cannot be divided evenly.
        """
        depth = self.stages * self.blocks_per_stage
        if depth % num_chunks:
            raise ValueError(f"{depth} blocks cannot be cut into {num_chunks} equal parts: change --blocks")
        torch.manual_seed(seed)
        with device:
            embedding, *blocks, head = byte_gpt(
                vocab_size=self.vocab_size, seq_len=self.seq_len, width=self.width, depth=depth, heads=self.heads
            )
        each, parts = depth // num_chunks, []
        for index in indices:
            layers = blocks[index * each : (index + 1) * each]
            layers = [embedding] * (index == 0) + layers + [head] * (index == num_chunks - 1)
            parts.append(nn.Sequential(*layers).to(self.dtype))
        return parts

    def batch(self, num_microbatches: int, device: torch.device) -> Tensor:
        """(M B, T) int64: input and target alike, for the time that it takes does not depend on them."""
        torch.manual_seed(1)
        size = (num_microbatches * self.microbatch_size, self.seq_len)
        return torch.randint(0, self.vocab_size, size, device=device)

    def tokens(self, num_microbatches: int) -> int:
        return num_microbatches * self.microbatch_size * self.seq_len


def token_loss(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Mean cross-entropy of a token in nats."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), target_BT.flatten())


def make_optimizer(modules: list[nn.Sequential], device: torch.device) -> torch.optim.Optimizer:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")
