"""With which weights a microbatch goes forward and backward that joins a later update, as one text: predicted*2."""

from __future__ import annotations

import math

LATE_WEIGHTS = ("predicted", "old", "new")


def prediction_factor(text: str) -> float | None:
    """How far weights are foretold, times what the newest update says: predicted is 1, predicted*2 is 2.

    Returns: None for old and new, which foretell nothing.
    Raises:  ValueError: another name, or a factor that is no number above 0.
    """
    name, times, factor = str(text).partition("*")
    try:
        value = float(factor) if times else 1.0
    except ValueError:
        value = 0.0
    if name not in LATE_WEIGHTS or (times and name != "predicted") or not 0 < value < math.inf:
        raise ValueError(
            f"unknown late_weights {text!r}: choose one of {', '.join(LATE_WEIGHTS)}, or predicted*FACTOR with a "
            f"factor above 0, as in 'predicted*2'"
        )
    return value if name == "predicted" else None
