"""What is announced is what comes: shapes that differ from one microbatch to the next cross a boundary."""

from __future__ import annotations

import pytest
import torch

from dnipipe.schedule.announce import SIZE, decode, encode


def test_what_was_encoded_is_decoded() -> None:
    tensors = [torch.zeros(3, 0, 5), torch.zeros((), dtype=torch.int64), torch.zeros(2, 1, dtype=torch.bfloat16)]
    assert decode(encode(tensors)) == tuple((each.shape, each.dtype) for each in tensors)
    assert decode(encode([])) == ()


def test_what_cannot_be_announced_is_told() -> None:
    with pytest.raises(ValueError, match="20 tensors of changing shape, and their dtypes and sizes are 101 numbers"):
        encode([torch.zeros(1, 2, 3)] * 20)
    with pytest.raises(ValueError, match="torch.complex64, which cannot cross"):
        encode([torch.zeros(1, dtype=torch.complex64)])
    assert encode([torch.zeros(2)]).shape == (SIZE,)
