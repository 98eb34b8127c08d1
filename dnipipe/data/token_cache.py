"""Text is tokenized once: what comes of it lies in a folder named by the content of the text and of the tokenizer.

A folder is filled under another name and then renamed. So who finds one finds it whole, and if several processes fill
one at a time, the first to be done gives it its name, and the others take that and drop their own.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache_folder import cache_folder
from .sources import read_texts
from .token_files import TokenDtype, map_tokens
from .tokenizer import Tokenizer

LAYOUT = b"tokens.bin and lengths.json, 1"


def default_cache() -> Path:
    """tokens/ in the user's cache."""
    return cache_folder() / "tokens"


def tokenize_files(
    paths: Sequence[Path], tokenizer: Tokenizer, *, max_bytes: int, cache: Path
) -> list[tuple[Path, NDArray[Any]]]:
    """Each file with its tokens (N,), mapped from the cache, which is filled first if it lacks them.

    A file is tokenized whole, with the special tokens that the tokenizer puts around a text.

    Args:   max_bytes: of all text together; the file that reaches it is cut and the rest is not read.
    Raises: ValueError: a file that is no UTF-8, or a cache that was damaged. OSError: something cannot be read or
            written.
    """
    dtype: TokenDtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    folder = cache / _key(paths, tokenizer, max_bytes)
    if not folder.is_dir():
        _fill(folder, paths, tokenizer, max_bytes, dtype)
    lengths = json.loads((folder / "lengths.json").read_text())
    tokens = map_tokens(folder / "tokens.bin", dtype)
    if sum(lengths) != len(tokens):
        raise ValueError(
            f"{folder} holds {len(tokens)} tokens, but it was made with {sum(lengths)}: delete it, then it is made anew"
        )
    return list(zip(paths, np.split(tokens, np.cumsum(lengths)[:-1]), strict=False))


def _key(paths: Sequence[Path], tokenizer: Tokenizer, max_bytes: int) -> str:
    """Of what the tokens follow from. Not of names: a text that was moved is the same text."""
    key = hashlib.sha256(LAYOUT)
    for content in (tokenizer.version.encode(), tokenizer.content):
        key.update(hashlib.sha256(content).digest())
    for _, text in read_texts(paths, max_bytes):
        key.update(hashlib.sha256(text).digest())
    return key.hexdigest()


def _fill(folder: Path, paths: Sequence[Path], tokenizer: Tokenizer, max_bytes: int, dtype: TokenDtype) -> None:
    own = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}")
    own.mkdir(parents=True)
    try:
        lengths = []
        with open(own / "tokens.bin", "wb") as file:
            for path, text in read_texts(paths, max_bytes):
                tokens = tokenizer.encode(_decode(path, text), special_tokens=True)
                file.write(np.array(tokens, dtype=np.dtype(dtype).newbyteorder("<")).tobytes())
                lengths.append(len(tokens))
        (own / "lengths.json").write_text(json.dumps(lengths))
        try:
            own.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, and what it wrote is the same
                raise
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _decode(path: Path, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":  # max_bytes may cut through a character
            return text[: error.start].decode()
        raise ValueError(
            f"{path} is no UTF-8 text: {error.reason} at byte {error.start}; convert it, or leave it out"
        ) from error
