"""Parts of token files as one long stream, of which only the windows that are asked for are read.

Legend: B windows, L tokens in a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Part:
    """Tokens of one file. tokens: (N,), any integers, as a rule memory-mapped. first: where in the file they begin."""

    file: str
    first: int
    tokens: NDArray[Any]


class TokenStream:
    """Parts one after another; a window may begin in one and end in another."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part.tokens) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def windows(self, starts_B: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """From each start so many tokens on, (B, L) int64."""
        window_BL = np.empty((len(starts_B), length), dtype=np.int64)
        for row_L, start in zip(window_BL, starts_B, strict=True):
            filled = 0
            while filled < length:
                part, inside = self._find(int(start) + filled)
                tokens = part.tokens[inside : inside + length - filled]
                row_L[filled : filled + len(tokens)] = tokens
                filled += len(tokens)
        return window_BL

    def where(self, position: int) -> str:
        """The file of a position in the stream, and which token of that file it is, counted from 0."""
        part, inside = self._find(position)
        return f"{part.file}, token {part.first + inside}"

    def _find(self, position: int) -> tuple[Part, int]:
        index = int(np.searchsorted(self._ends, position, side="right"))
        part = self._parts[index]
        return part, position - int(self._ends[index]) + len(part.tokens)
