"""For activations whose shapes are known only when they exist: a small message ahead of each says what comes.

It goes from CPU to CPU over a group of its own, because the receiving host needs the sizes before it can post anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..boundary import Boundary, Exchange

Metas = tuple[tuple[torch.Size, torch.dtype], ...]

SIZE = 64
"""int64 numbers of one message: tensors, then of each its dtype, its dimensions and its sizes."""
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip


class Announcer:
    """Args: boundary: of the same two ranks, over gloo, that carries nothing else."""

    def __init__(self, boundary: Boundary) -> None:
        self.boundary = boundary

    def tell(self, outputs: Sequence[Tensor], *, microbatch: int) -> Exchange:
        """Says what `outputs` will come next; to be waited for like their own exchange."""
        return self.boundary.exchange([encode(outputs)], [], microbatch=microbatch)

    def hear(self, *, microbatch: int) -> Metas:
        """Waits until the previous stage has said what comes next. Raises: BoundaryError."""
        message = torch.empty(SIZE, dtype=torch.int64)
        self.boundary.exchange([], [message], microbatch=microbatch).wait()
        return decode(message)


def encode(tensors: Sequence[Tensor]) -> Tensor:
    """(SIZE,) int64. Raises: ValueError: more tensors or dimensions than a message holds, or another dtype."""
    numbers = [len(tensors)]
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(each) for each in DTYPES)
            raise ValueError(f"a stage sends a tensor of {tensor.dtype}, which cannot cross: make it one of {known}")
        numbers += [DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
    if len(numbers) > SIZE:
        raise ValueError(
            f"a stage sends {len(tensors)} tensors of changing shape, and their dtypes and sizes are {len(numbers)} "
            f"numbers where {SIZE} fit: pass fewer tensors between stages"
        )
    return torch.tensor(numbers + [0] * (SIZE - len(numbers)), dtype=torch.int64)


def decode(message: Tensor) -> Metas:
    """What encode() was given."""
    numbers = iter(message.tolist())
    return tuple(
        (torch.Size([next(numbers) for _ in range(dims)]), dtype)
        for dtype, dims in ((DTYPES[next(numbers)], next(numbers)) for _ in range(next(numbers)))
    )
