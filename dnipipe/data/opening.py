"""A corpus of any kind, from plain settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from .byte_text import byte_corpus
from .corpus import Corpus
from .sources import find_files, stdlib_sources
from .token_cache import default_cache, tokenize_files
from .token_files import SUFFIXES, TokenDtype, map_tokens, token_corpus
from .tokenizer import Tokenizer

Kind: TypeAlias = Literal["bytes", "text", "tokens"]


def open_corpus(
    kind: Kind,
    files: Sequence[str | Path] = (),
    *,
    max_bytes: int,
    tokenizer: str | Path | None = None,
    token_dtype: TokenDtype = "uint16",
    vocab_size: int | None = None,
    cache: str | Path | None = None,
) -> Corpus:
    """Opens what is there to train on. Every rank may call it, at the same time or not, and gets the same.

    Args:
        kind: "bytes" of text files, "text" that the tokenizer turns into tokens, or "tokens" in .bin or .npy files.
        files: in this order; a folder stands for all that fit in it, sorted. None, for "bytes" alone: the installed
            Python's own sources.
        max_bytes: of text, both splits together; of "tokens" all are taken.
        tokenizer: a file as Hugging Face's tokenizers write it. "text" needs one; with "tokens" it serves encode() and
            decode().
        token_dtype: of .bin files.
        vocab_size: of the model, for "text" and "tokens"; None checks no token.
        cache: the folder where tokens of "text" are kept; None for one in the user's cache.

    Raises:
        ValueError: settings or files that do not fit; it names them.
        OSError: something cannot be read or written.
        ImportError: a tokenizer without the package that reads it.
    """
    if kind == "bytes":
        return byte_corpus(find_files(files) or stdlib_sources(), max_bytes=max_bytes)
    if kind not in ("text", "tokens"):
        raise ValueError(f'kind = {kind!r}; it must be "bytes", "text" or "tokens"')
    if not files:
        raise ValueError(f'files is empty; kind = "{kind}" needs at least one file or folder')
    reader = None if tokenizer is None else Tokenizer(tokenizer)
    if kind == "tokens":
        mapped = [(path, map_tokens(path, token_dtype)) for path in find_files(files, SUFFIXES)]
        return token_corpus(mapped, vocab_size=vocab_size, tokenizer=reader)
    if reader is None:
        raise ValueError('tokenizer is missing; kind = "text" needs a tokenizer.json')
    if vocab_size is not None and reader.vocab_size > vocab_size:
        raise ValueError(
            f"vocab_size = {vocab_size}, but {tokenizer} has tokens up to {reader.vocab_size - 1}: raise it to "
            f"{reader.vocab_size}, in the model too"
        )
    folder = default_cache() if cache is None else Path(cache)
    tokenized = tokenize_files(find_files(files), reader, max_bytes=max_bytes, cache=folder)
    return token_corpus(tokenized, vocab_size=reader.vocab_size, tokenizer=reader)
