"""Bytes of text as training data, with nothing to download: by default the Python sources of the running installation.

Legend: B sequences in a batch, T bytes in a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .corpus import Corpus
from .holdout import VALIDATION_EVERY, hold_out
from .sources import read_texts
from .windows import Split


@dataclass(frozen=True)
class ByteCorpus(Corpus):
    """Two streams of bytes, in memory.

    Shapes: train, validation: (N,) uint8.
    """

    unit: ClassVar[Literal["byte", "token"]] = "byte"

    train: Tensor
    validation: Tensor
    vocab_size: int = field(default=256, init=False)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def _windows(self, split: Split, starts_B: NDArray[np.int64], length: int) -> Tensor:
        stream = self.train if split == "train" else self.validation
        return stream[torch.from_numpy(starts_B)[:, None] + torch.arange(length)].long()


def byte_corpus(paths: Iterable[Path], *, max_bytes: int) -> ByteCorpus:
    """Reads files one after another; every 20th file that is not empty goes to validation, all others to training.

    Where there are fewer than 20 files, the last twentieth of each one's bytes goes to validation instead.

    Args:
        paths: read in this order. Sort them: ranks and runs agree on the data only if they agree on the order.
        max_bytes: of both splits together; the file that reaches it is cut and the rest is not read.

    Raises: ValueError: too few files or bytes to leave anything in both splits.
    """
    texts = [text for _, text in read_texts(paths, max_bytes)]
    train, validation = (b"".join(texts[n][part] for n, part in parts) for parts in hold_out(list(map(len, texts))))
    if not train or not validation:
        raise ValueError(
            f"read {sum(map(len, texts))} bytes in {len(texts)} files, max_bytes = {max_bytes}; one byte in "
            f"{VALIDATION_EVERY} is for validation: give more text or raise max_bytes"
        )
    return ByteCorpus(_to_tensor(train), _to_tensor(validation))


def _to_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
