"""What every kind of training data offers: the batch of a step, the same for whoever asks, and text from tokens.

Legend: B sequences of one replica in a batch, T tokens in a sequence; a byte is a token too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .windows import Split, window_starts


class Corpus(ABC):
    """Two streams of tokens, and batches cut from them. It has no state: a checkpoint needs the step and nothing else.

    unit:       what a token is, for messages and for names of measures.
    vocab_size: tokens are below it; None: not known.
    """

    unit: ClassVar[Literal["byte", "token"]]
    train: Sized
    validation: Sized
    vocab_size: int | None

    def batch(
        self,
        split: Split,
        *,
        step: int,
        batch_size: int,
        seq_len: int,
        seed: int,
        replica: int = 0,
        num_replicas: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """The batch of one step: the same on every rank that asks, with no message between them.

        All replicas together get batch_size * num_replicas sequences, which depend on that product alone: two replicas
        with half the batch each see what one would. Training windows start anywhere, drawn from (seed, step) alone.
        Validation windows follow one another, step after step, and begin anew after the last whole one; there the seed
        means nothing.

        Args:    batch_size: B. seq_len: T. step, seed: 0 or more. replica: 0 to num_replicas - 1.
        Shapes:  (input (B, T), target (B, T)), both int64; target is the input one token later.
        Raises:  ValueError: a split of another name, a number out of range, a split shorter than T + 1 tokens, or a
                 token outside of the vocabulary.
        """
        starts_B = window_starts(
            split,
            len(self.validation if split == "validation" else self.train),
            unit=self.unit,
            step=step,
            batch_size=batch_size,
            seq_len=seq_len,
            seed=seed,
            replica=replica,
            num_replicas=num_replicas,
        )
        window_BT = self._windows(split, starts_B, seq_len + 1)
        return window_BT[:, :-1].contiguous(), window_BT[:, 1:].contiguous()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Raises ValueError where there is no tokenizer."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is no text becomes a replacement character. Raises ValueError as encode() does."""

    @abstractmethod
    def _windows(self, split: Split, starts_B: NDArray[np.int64], length: int) -> Tensor:
        """(B, length) int64: from each start so many tokens on."""
