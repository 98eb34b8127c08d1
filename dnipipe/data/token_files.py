"""Files of tokens, raw .bin or .npy, as training data: mapped into memory, and read only where a batch lies.

Legend: B sequences in a batch, T tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .corpus import Corpus
from .holdout import VALIDATION_EVERY, Parts, hold_out
from .stream import Part, TokenStream
from .tokenizer import Tokenizer
from .windows import Split

TokenDtype: TypeAlias = Literal["uint16", "uint32"]
SUFFIXES = (".bin", ".npy")


@dataclass(frozen=True)
class TokenCorpus(Corpus):
    """Two streams of tokens. vocab_size: every batch is checked against it. tokenizer: for text in and out."""

    unit: ClassVar[Literal["byte", "token"]] = "token"

    train: TokenStream
    validation: TokenStream
    vocab_size: int | None = None
    tokenizer: Tokenizer | None = None

    def encode(self, text: str) -> list[int]:
        return self._given_tokenizer().encode(text, special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._given_tokenizer().decode(tokens)

    def _given_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("there is no tokenizer between these tokens and text: give the one that wrote them")
        return self.tokenizer

    def _windows(self, split: Split, starts_B: NDArray[np.int64], length: int) -> Tensor:
        stream = self.train if split == "train" else self.validation
        window_BT = stream.windows(starts_B, length)
        if self.vocab_size is not None:
            wrong = np.argwhere((window_BT < 0) | (window_BT >= self.vocab_size))
            if len(wrong):
                row, column = wrong[0]
                raise ValueError(
                    f"{stream.where(int(starts_B[row]) + int(column))} is {window_BT[row, column]}, but vocab_size = "
                    f"{self.vocab_size} allows 0 to {self.vocab_size - 1}: raise vocab_size, or check token_dtype and "
                    "which tokenizer wrote the file"
                )
        return torch.from_numpy(window_BT)


def map_tokens(path: Path, dtype: TokenDtype) -> NDArray[Any]:
    """The tokens of a file, (N,), mapped and not read. dtype: of raw little-endian .bin; a .npy says its own.

    Raises: ValueError: no whole number of tokens, or a .npy of something else. OSError: it cannot be read.
    """
    if path.suffix == ".npy":
        try:
            tokens = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no whole .npy of numbers: {error}; write it anew") from error
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"{path} is {tokens.dtype} of shape {tokens.shape}: tokens must be integers in one row; "
                "convert it with numpy"
            )
        return np.asarray(tokens)
    raw = np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size
    if size % raw.itemsize:
        raise ValueError(
            f"{path} has {size} bytes: it must be a multiple of {raw.itemsize}, a token of {dtype}; "
            "check token_dtype, and whether the file is whole"
        )
    # an empty file cannot be mapped
    return np.asarray(np.memmap(path, dtype=raw, mode="r")) if size else np.empty(0, raw)


def token_corpus(
    files: Iterable[tuple[Path, NDArray[Any]]], *, vocab_size: int | None = None, tokenizer: Tokenizer | None = None
) -> TokenCorpus:
    """Divides files of tokens, each with its tokens (N,): every 20th is for validation, or the last twentieth of each.

    Raises: ValueError: too few tokens to leave any in both splits.
    """
    given = list(files)

    def stream(parts: Parts) -> TokenStream:
        return TokenStream([Part(str(given[n][0]), part.start, given[n][1][part]) for n, part in parts])

    train, validation = map(stream, hold_out([len(tokens) for _, tokens in given]))
    if not len(train) or not len(validation):
        raise ValueError(
            f"{len(train) + len(validation)} tokens in {len(given)} files; one token in {VALIDATION_EVERY} is for "
            "validation: give more, and where they come from text, check max_bytes"
        )
    return TokenCorpus(train, validation, vocab_size, tokenizer)
