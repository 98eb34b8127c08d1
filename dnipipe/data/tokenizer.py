"""Text to tokens and back, by a file as Hugging Face's tokenizers write it; the package is loaded only when one is."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path


class Tokenizer:
    """A tokenizer file.

    content:    its bytes.
    version:    of the package that reads it.
    vocab_size: every token is below it.

    Raises: ImportError: the package is missing. OSError: the file cannot be read. ValueError: it is no tokenizer.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            package = importlib.import_module("tokenizers")
        except ImportError as error:
            raise ImportError(
                f"to read {path} takes the package tokenizers: pip install 'dnipipe[hf]', or train on bytes"
            ) from error
        self.version = str(package.__version__)
        self.content = Path(path).read_bytes()
        try:
            self._inner = package.Tokenizer.from_buffer(self.content)
        except Exception as error:  # the package raises no narrower one
            raise ValueError(
                f"{path} is no tokenizer that tokenizers {self.version} reads: {error}; give a tokenizer.json"
            ) from error
        # the file may say how a model's input is cut and filled up; here texts are longer than any input
        self._inner.no_truncation()
        self._inner.no_padding()
        self.vocab_size = max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        """The tokens of a text. special_tokens: also those that the file puts before or after a whole text, if any."""
        tokens: list[int] = self._inner.encode(text, add_special_tokens=special_tokens).ids
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones too; a token that the file does not know is left out."""
        text: str = self._inner.decode(list(tokens), skip_special_tokens=False)
        return text
