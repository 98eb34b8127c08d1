"""When a stage may backpropagate: what it does with a microbatch whose true gradient is not back.

    wait        it waits for the true gradient, as 1F1B does; predictors learn meanwhile
    synthetic   it uses the predicted gradient at once; the true one, `lag` microbatches later, trains the predictor
    auto        wait for the first `unlock_after_steps` step() calls, then the best that is known (today: synthetic)

A policy is a row of this table, so `stale` and `corrected` will be two more rows and two more branches where a
gradient is chosen (Flow.output_grads). What is late follows from (num_stages, num_microbatches, lag) alone, never
from timing.
"""

from __future__ import annotations

from dataclasses import dataclass

# The number of step() calls under `wait` before a policy unlocks by itself. Measured: from a cold start a synthetic
# gradient costs more than after 200 steps, when the steepest part of training is over and the predictor has learned.
UNLOCK_AFTER_STEPS = {"wait": 0, "synthetic": 0, "auto": 200}
DEFAULT_LAG = 2


@dataclass(frozen=True)
class Policy:
    """Which gradient a stage uses, by step.

    Args: name: wait | synthetic | auto. lag: microbatches between an activation and the true gradient that is used with
          it, at least 1. unlock_after_steps: step() calls under `wait` first; None takes the policy's own.
          post_ahead: whether a stage posts the receive of the next step's first activation before that step; None: on
          a CPU only.
    Raises: ValueError for an unknown name or a value out of range.
    """

    name: str = "auto"
    lag: int = DEFAULT_LAG
    unlock_after_steps: int | None = None
    post_ahead: bool | None = None

    def __post_init__(self) -> None:
        if self.name not in UNLOCK_AFTER_STEPS:
            known = ", ".join(sorted(UNLOCK_AFTER_STEPS))
            raise ValueError(f"unknown policy {self.name!r}: choose one of {known}")
        if self.lag < 1:
            raise ValueError(
                f"lag must be at least 1 microbatch, got {self.lag}: gradient t - lag travels beside activation t"
            )
        if self.name == "wait" and self.unlock_after_steps is not None:
            raise ValueError("policy 'wait' never unlocks: leave unlock_after_steps out, or choose policy 'synthetic'")
        if self.unlock_after_steps is not None and self.unlock_after_steps < 0:
            raise ValueError(f"unlock_after_steps must be at least 0 steps, got {self.unlock_after_steps}")

    @property
    def unlock_step(self) -> int | None:
        """The first step() call, counted from 0, that uses synthetic gradients; None: never."""
        if self.name == "wait":
            return None
        return UNLOCK_AFTER_STEPS[self.name] if self.unlock_after_steps is None else self.unlock_after_steps

    def waits(self, step: int) -> bool:
        """Whether step() call `step`, counted from 0, waits for true gradients."""
        return self.unlock_step is None or step < self.unlock_step


def lag_of_wait(stage: int, num_stages: int) -> int:
    """The lag of the boundary below `stage` under `wait`: the microbatches that 1F1B has in flight there."""
    return num_stages - 1 - stage
