"""The text of benchmarks.policies: bytes of the Python sources of the installed packages, at most 40 000 of a file."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import torch

from dnipipe.data import ByteCorpus

MAX_BYTES = 120_000_000
MAX_FILE_BYTES, MIN_FILE_BYTES = 40_000, 2_000
VALIDATION_EVERY = 40
LEAST_BYTES = 1_000_000


def recipe_corpus(max_bytes: int = MAX_BYTES) -> ByteCorpus:
    """Every 40th file is for validation; the order of the files is drawn once and for all.

    Args:   max_bytes: at least LEAST_BYTES.
    Raises: ValueError: fewer are installed.
    """
    paths = sysconfig.get_paths()
    roots = {Path(paths[name]) for name in ("stdlib", "purelib", "platlib")}
    found = sorted({path for root in roots for path in root.rglob("*.py") if path.is_file()})
    files = [path for path in found if path.stat().st_size > MIN_FILE_BYTES]
    random.Random(1).shuffle(files)
    train, validation, read = bytearray(), bytearray(), 0
    for number, path in enumerate(files):
        text = path.read_bytes()[:MAX_FILE_BYTES] + b"\n"
        (train if number % VALIDATION_EVERY else validation).extend(text)
        read += len(text)
        if read > max_bytes:
            break
    if read < LEAST_BYTES:
        raise ValueError(
            f"the Python sources installed here have {read} bytes: install torch's wheel, or more packages"
        )
    return ByteCorpus(torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(validation, dtype=torch.uint8))
