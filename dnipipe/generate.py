"""Tokens from a trained model, one by one: through the pipeline, or through the whole model in one process.

Legend: B sequences in a batch, T tokens in a sequence, V vocabulary; a byte is a token too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def generate(
    schedule: Any,
    prompt: Sequence[int],
    *,
    num_tokens: int,
    vocab_size: int | None,
    batch_size: int,
    seq_len: int,
    temperature: float,
    seed: int,
    device: torch.device,
    group: dist.ProcessGroup,
) -> list[int]:
    """Continues a prompt through the pipeline. Every rank must call it, with the same arguments.

    Each token sees the last T tokens at most. Shapes stay those of training, (B, T), so that no stage must find its
    shapes anew: all B rows are alike, and what is behind the text's end is filled up, for a causal model never looks
    there.

    Args:
        schedule: with eval(), whose last stage returns logits (B, T, V).
        prompt: at least one token. num_tokens: to add. vocab_size: only smaller tokens are drawn; None: of all V.
        temperature: above 0; the lower, the more often the likeliest token.
        group: of all stages in their order, for CPU tensors: the last draws the token and tells the others.

    Returns: prompt and continuation, on every rank.
    """
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1
    generator = torch.Generator().manual_seed(seed)

    def next_token(window: Tensor) -> Tensor:
        input_BT = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        input_BT[:, : len(window)] = window
        input_BT = input_BT.to(device)
        with torch.no_grad():
            # the target means nothing here, but training passed one, and a schedule may tell new shapes by it
            logits_BTV = schedule.eval(*([input_BT] if rank == 0 else []), target=input_BT)
        token = torch.zeros(1, dtype=torch.int64)
        if rank == last:
            token = _draw(logits_BTV[0, len(window) - 1], vocab_size, temperature, generator)
        dist.broadcast(token, group_src=last, group=group)
        return token

    return _continue(prompt, num_tokens, seq_len, next_token)


def generate_alone(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    num_tokens: int,
    vocab_size: int | None,
    seq_len: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """The same through a whole model, (1, t) int64 -> (1, t, V) for t <= T, in one process; draws the same tokens."""
    generator = torch.Generator().manual_seed(seed)

    def next_token(window: Tensor) -> Tensor:
        with torch.no_grad():
            logits_V = model(window[None])[0, -1]
        return _draw(logits_V, vocab_size, temperature, generator)

    return _continue(prompt, num_tokens, seq_len, next_token)


def _continue(
    prompt: Sequence[int], num_tokens: int, seq_len: int, next_token: Callable[[Tensor], Tensor]
) -> list[int]:
    text = torch.tensor(list(prompt), dtype=torch.int64)
    for _ in range(num_tokens):
        text = torch.cat([text, next_token(text[-seq_len:])])
    return [int(token) for token in text]


def printable(text: str) -> str:
    """The text for a terminal: what would move the cursor becomes a replacement character."""
    harmless = (c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(harmless)


def _draw(logits_V: Tensor, vocab_size: int | None, temperature: float, generator: torch.Generator) -> Tensor:
    probability = torch.softmax(logits_V[:vocab_size].float().cpu() / temperature, dim=0)
    return torch.multinomial(probability, 1, generator=generator)
