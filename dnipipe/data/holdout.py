"""What is held out for validation: every 20th file, or a twentieth of each where there are fewer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

VALIDATION_EVERY = 20

Parts: TypeAlias = list[tuple[int, slice]]
"""(number of a file, what to take of it), in order."""


def hold_out(lengths: Sequence[int]) -> tuple[Parts, Parts]:
    """What of each file is for training and for validation; an empty file does not count.

    Whole files are split off, so that no validation text continues a training text. Where there are fewer than 20
    files, the last twentieth of each goes to validation instead.

    Args:    lengths: of the files, in whatever unit the slices shall have.
    Returns: (training, validation); either may be empty.
    """
    kept = [(number, length) for number, length in enumerate(lengths) if length]
    if len(kept) >= VALIDATION_EVERY:
        whole = [(number, slice(0, length)) for number, length in kept]
        train = [part for count, part in enumerate(whole, 1) if count % VALIDATION_EVERY]
        return train, whole[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    cuts = [(number, length - length // VALIDATION_EVERY, length) for number, length in kept]
    train = [(number, slice(0, cut)) for number, cut, _ in cuts]
    return train, [(number, slice(cut, length)) for number, cut, length in cuts if cut < length]
