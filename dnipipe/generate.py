"""Text from a pipelined byte model: the whole pipeline runs once for every byte.

Legend: B sequences in a batch, T bytes in a sequence, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def generate(
    schedule: Any,
    prompt: bytes,
    *,
    num_bytes: int,
    batch_size: int,
    seq_len: int,
    temperature: float,
    seed: int,
    device: torch.device,
    group: dist.ProcessGroup,
) -> bytes:
    """Continues a prompt. Every rank of the pipeline must call it, with the same arguments.

    Each byte sees the last T bytes at most. Shapes stay those of training, (B, T), so that no stage must find its
    shapes anew: all B rows are alike, and what is behind the text's end is filled up, for a causal model never looks
    there.

    Args:
        schedule: with eval(), whose last stage returns logits (B, T, V), V >= 256.
        prompt: at least one byte. num_bytes: to add.
        temperature: above 0; the lower, the more often the likeliest byte.
        group: of all ranks, for CPU tensors: the last rank draws the byte and tells the others.

    Returns: prompt and continuation, on every rank.
    """
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    generator = torch.Generator().manual_seed(seed)
    text = torch.tensor(list(prompt), dtype=torch.int64)
    for _ in range(num_bytes):
        window = text[-seq_len:]
        input_BT = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        input_BT[:, : len(window)] = window
        input_BT = input_BT.to(device)
        with torch.no_grad():
            # the target means nothing here, but training passed one, and a schedule may tell new shapes by it
            logits_BTV = schedule.eval(*([input_BT] if rank == 0 else []), target=input_BT)
        byte = torch.zeros(1, dtype=torch.int64)
        if rank == last:
            byte = _draw(logits_BTV[0, len(window) - 1], temperature, generator)
        dist.broadcast(byte, src=last, group=group)
        text = torch.cat([text, byte])
    return bytes(text.tolist())


def printable(text: bytes) -> str:
    """The text for a terminal: what is no UTF-8, or would move the cursor, becomes a replacement character."""
    decoded = text.decode("utf-8", errors="replace")
    harmless = (c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in decoded)
    return "".join(harmless)


def _draw(logits_V: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    probability = torch.softmax(logits_V[:256].float().cpu() / temperature, dim=0)
    return torch.multinomial(probability, 1, generator=generator)
