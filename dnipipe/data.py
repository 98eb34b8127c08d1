"""Bytes of text as training data, with nothing to download: by default the Python sources of the running installation.

Legend: B sequences in a batch, T bytes in a sequence.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

VALIDATION_EVERY = 20


def stdlib_sources() -> list[Path]:
    """The *.py files of the installed standard library, sorted; what was installed beside it is left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    foreign = {"site-packages", "dist-packages"}
    return sorted(path for path in root.rglob("*.py") if foreign.isdisjoint(path.relative_to(root).parts))


@dataclass(frozen=True)
class ByteCorpus:
    """Two streams of bytes, and batches cut from them.

    Shapes: train, validation: (N,) uint8.
    """

    train: Tensor
    validation: Tensor

    def batch(
        self, split: Literal["train", "validation"], *, step: int, batch_size: int, seq_len: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """The batch of one step: the same on every rank that asks, with no message between them.

        Training windows start anywhere, drawn from (seed, step) alone. Validation windows follow one another, step
        after step, and begin anew after the last whole one; there the seed means nothing.

        Args:    batch_size: B. seq_len: T. step, seed: 0 or more.
        Shapes:  (input (B, T), target (B, T)), both int64; target is the input one byte later.
        Raises:  ValueError: a split of another name, a number out of range, or a split shorter than T + 1 bytes.
        """
        if split not in ("train", "validation"):
            raise ValueError(f'split = {split!r}; it must be "train" or "validation"')
        for name, value, least in (
            ("step", step, 0),
            ("seed", seed, 0),
            ("batch_size", batch_size, 1),
            ("seq_len", seq_len, 1),
        ):
            if value < least:
                raise ValueError(f"{name} = {value}; it must be at least {least}")
        stream = self.train if split == "train" else self.validation
        if len(stream) < seq_len + 1:
            raise ValueError(
                f"the {split} split has {len(stream)} bytes, but seq_len = {seq_len} needs {seq_len + 1}: "
                "read more files or bytes, or shorten seq_len"
            )
        if split == "train":
            starts = np.random.default_rng([seed, step]).integers(len(stream) - seq_len, size=batch_size)
        else:
            num_windows = (len(stream) - 1) // seq_len
            starts = (step * batch_size + np.arange(batch_size)) % num_windows * seq_len
        window_BT = stream[torch.from_numpy(starts)[:, None] + torch.arange(seq_len + 1)].long()
        return window_BT[:, :-1].contiguous(), window_BT[:, 1:].contiguous()


def byte_corpus(paths: Iterable[Path], *, max_bytes: int) -> ByteCorpus:
    """Reads files one after another; every 20th file that is not empty goes to validation, all others to training.

    Whole files are split off, not bytes, so that no validation text continues a training text. Where there are fewer
    than 20 files, the last twentieth of each one's bytes goes to validation instead.

    Args:
        paths: read in this order. Sort them: ranks and runs agree on the data only if they agree on the order.
        max_bytes: of both splits together; the file that reaches it is cut and the rest is not read.

    Raises: ValueError: too few files or bytes to leave anything in both splits.
    """
    texts: list[bytes] = []
    left = max_bytes
    for path in paths:
        if left <= 0:
            break
        with open(path, "rb") as file:
            texts.append(file.read(left))
        left -= len(texts[-1])
    texts = [text for text in texts if text]
    if len(texts) < VALIDATION_EVERY:
        cuts = [len(text) - len(text) // VALIDATION_EVERY for text in texts]
        train = b"".join(text[:cut] for text, cut in zip(texts, cuts, strict=True))
        validation = b"".join(text[cut:] for text, cut in zip(texts, cuts, strict=True))
    else:
        train = b"".join(text for number, text in enumerate(texts, 1) if number % VALIDATION_EVERY)
        validation = b"".join(texts[VALIDATION_EVERY - 1 :: VALIDATION_EVERY])
    if not train or not validation:
        raise ValueError(
            f"read {sum(map(len, texts))} bytes in {len(texts)} files, max_bytes = {max_bytes}; one byte in "
            f"{VALIDATION_EVERY} is for validation: give more text or raise max_bytes"
        )
    return ByteCorpus(_to_tensor(train), _to_tensor(validation))


def _to_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
