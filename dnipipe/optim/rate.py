"""How fast the weights of a stage move at each step: a warm-up, then level or along a cosine."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

RateSchedule: TypeAlias = Literal["constant", "cosine"]


def learning_rate_at(
    step: int,
    *,
    peak: float,
    warmup_steps: int = 0,
    total_steps: int = 0,
    schedule: RateSchedule = "constant",
    final_fraction: float = 0.0,
) -> float:
    """The learning rate of one step.

    It rises linearly from peak / warmup_steps at step 0 to the peak at step warmup_steps - 1. Then it stays there, or
    falls along half a cosine from the peak at step warmup_steps to final_fraction * peak at total_steps and later.

    Args:   step: 0 for the first. total_steps: needed by "cosine" alone.
    Raises: ValueError: a cosine that ends before it begins.
    """
    if schedule == "cosine" and total_steps <= warmup_steps:
        raise ValueError(
            f"total_steps = {total_steps}: a cosine falls from warmup_steps = {warmup_steps} to total_steps, which "
            "must be more; train for more steps, or warm up for fewer"
        )
    if step < warmup_steps or schedule == "constant":
        return peak * min(1.0, (step + 1) / max(1, warmup_steps))
    done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return peak * (final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * done)) / 2)
