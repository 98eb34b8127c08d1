"""Where a step's sequences begin: drawn from the seed and the step alone, so that ranks agree without a message.

Legend: B sequences of one replica in a batch.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Split: TypeAlias = Literal["train", "validation"]


def window_starts(
    split: Split,
    length: int,
    *,
    unit: str,
    step: int,
    batch_size: int,
    seq_len: int,
    seed: int,
    replica: int,
    num_replicas: int,
) -> NDArray[np.int64]:
    """The first positions of one replica's windows of seq_len + 1.

    The step has batch_size * num_replicas windows, which depend on that product alone, and the replica gets its
    contiguous part. Training windows start anywhere. Validation windows follow one another, step after step, and begin
    anew after the last whole one; there the seed means nothing.

    Args:    length: of the split. unit: what it is counted in, for messages. batch_size: B.
    Shapes:  (B,).
    Raises:  ValueError: a split of another name, a number out of range, or too short a split.
    """
    if split not in ("train", "validation"):
        raise ValueError(f'split = {split!r}; it must be "train" or "validation"')
    _check_least(step=(step, 0), seed=(seed, 0), batch_size=(batch_size, 1), seq_len=(seq_len, 1))
    _check_least(replica=(replica, 0), num_replicas=(num_replicas, 1))
    if replica >= num_replicas:
        raise ValueError(f"replica = {replica}; it must be below num_replicas = {num_replicas}")
    if length < seq_len + 1:
        raise ValueError(
            f"the {split} split has {length} {unit}s, but seq_len = {seq_len} needs {seq_len + 1}: "
            f"read more files or {unit}s, or shorten seq_len"
        )
    num_windows = batch_size * num_replicas
    starts: NDArray[Any]
    if split == "train":
        starts = np.random.default_rng([seed, step]).integers(length - seq_len, size=num_windows)
    else:
        starts = (step * num_windows + np.arange(num_windows)) % ((length - 1) // seq_len) * seq_len
    return starts[replica * batch_size : (replica + 1) * batch_size]


def _check_least(**numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if value < least:
            raise ValueError(f"{name} = {value}; it must be at least {least}")
