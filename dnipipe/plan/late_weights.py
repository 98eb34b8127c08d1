"""With which weights a microbatch goes forward and backward that joins a later update, as one text: predicted@3."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

LATE_WEIGHTS = ("predicted", "old", "new")


@dataclass(frozen=True)
class Distance:
    """How far from the present weights others are foretold, in updates as large as the newest.

    Args: value: for each update that a microbatch is late. alike: for every microbatch, late or not.
    """

    value: float = 1.0
    alike: bool = False

    def __call__(self, late: int) -> float:
        """late: updates from the forward to the backward; 0 means something only where all are alike."""
        return self.value if self.alike else self.value * late

    def foretells(self, late: int) -> bool:
        """Whether a microbatch that is so many updates late goes by other weights than the present ones."""
        return late > 0 or self.alike


def foretold_distance(text: str) -> Distance | None:
    """predicted: as far as gradients are late. predicted*2: twice as far. predicted@3: three updates, for
    every microbatch.

    Returns: None for old and new, which foretell nothing.
    Raises:  ValueError: another name, or a number that is none above 0.
    """
    parts = re.fullmatch(r"(\w+)(?:([*@])(.+))?", str(text))
    name, sign, number = parts.groups("") if parts else ("", "", "")
    try:
        value = float(number) if sign else 1.0
    except ValueError:
        value = 0.0
    if name not in LATE_WEIGHTS or (sign and name != "predicted") or not 0 < value < math.inf:
        raise ValueError(
            f"unknown late_weights {text!r}: choose one of {', '.join(LATE_WEIGHTS)}, or predicted*FACTOR or "
            f"predicted@UPDATES with a number above 0, as in 'predicted*2' and 'predicted@3'"
        )
    return Distance(value, alike=sign == "@") if name == "predicted" else None
