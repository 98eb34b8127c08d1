"""When a stage may backpropagate: what it does with a microbatch whose true gradient is not back.

    wait        it waits for the true gradient, as 1F1B does; predictors learn meanwhile
    synthetic   it uses the predicted gradient at once; the true one, `lag` microbatches later, trains the predictor
    stale       it goes on forward, and goes backward when the true one is here, if need be some optimizer steps later
    corrected   as stale; what would be late for its own step uses the predicted one at once, and when the true one is
                here, true - predicted goes backward too
    auto        wait for the first `unlock_after_steps` step() calls, then the best that is known (today: synthetic)

What is late follows from (num_stages, num_microbatches, in_flight or lag) alone, never from timing.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..plan.dni import in_flight_of_stale

# The number of step() calls under `wait` before a policy unlocks by itself. Measured: from a cold start a synthetic
# gradient costs more than after 200 steps, when the steepest part of training is over and the predictor has learned.
UNLOCK_AFTER_STEPS = {"wait": 0, "synthetic": 0, "stale": 0, "corrected": 0, "auto": 200}
LATE = ("stale", "corrected")  # they hold graphs until the true gradient is here
OLD_WEIGHTS = ("copies", "new")  # what a late backward sees
DEFAULT_LAG = 2


@dataclass(frozen=True)
class Policy:
    """Which gradient a stage uses, by step.

    Args: name: wait | synthetic | stale | corrected | auto. lag: microbatches between an activation and the true
          gradient that is used with it, at least 1; stale and corrected have in_flight in its place.
          unlock_after_steps: step() calls under `wait` first; None takes the policy's own.
          post_ahead: whether a stage posts the receive of the next step's first activation before that step; None: on
          a CPU only.
          in_flight: microbatches that the first of S stages holds under stale and corrected, from S (None), which
          leaves no time for a transfer, to 2 S - 1, which leaves each hop of one a slot of its own, at up to twice the
          lateness. Stage i holds in_flight - i of them, and at most 2 (S - i) - 1.
          old_weights: what a late backward sees under stale and corrected: "copies" of the weights of its forward, or
          "new", the weights as they are by then (old_weights.py).
    Raises: ValueError for an unknown name or a value out of range.
    """

    name: str = "auto"
    lag: int = DEFAULT_LAG
    unlock_after_steps: int | None = None
    post_ahead: bool | None = None
    in_flight: int | None = None
    old_weights: str = "copies"

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
        if self.in_flight is not None and not self.late:
            raise ValueError(
                f"in_flight is for the policies {' and '.join(LATE)}: with policy {self.name!r} leave it out"
            )
        if self.old_weights not in OLD_WEIGHTS:
            raise ValueError(f"unknown old_weights {self.old_weights!r}: choose one of {', '.join(OLD_WEIGHTS)}")

    @property
    def late(self) -> bool:
        """Whether graphs are held until the true gradient is here, once the policy has unlocked."""
        return self.name in LATE

    @property
    def predicts(self) -> bool:
        """Whether predictors are of use. `wait` trains them too: a run that goes on under another policy has them."""
        return self.name != "stale"

    @property
    def unlocked_name(self) -> str:
        """What it is after `wait`."""
        return self.name if self.late else "synthetic"

    @property
    def unlock_step(self) -> int | None:
        """The first step() call, counted from 0, that does not wait; None: never."""
        if self.name == "wait":
            return None
        return UNLOCK_AFTER_STEPS[self.name] if self.unlock_after_steps is None else self.unlock_after_steps

    def waits(self, step: int) -> bool:
        """Whether step() call `step`, counted from 0, waits for true gradients."""
        return self.unlock_step is None or step < self.unlock_step

    def check(self, num_stages: int) -> None:
        """Raises: ValueError for an in_flight that `num_stages` stages cannot have."""
        if self.in_flight is not None and not num_stages <= self.in_flight <= 2 * num_stages - 1:
            raise ValueError(
                f"in_flight must be from {num_stages} to {2 * num_stages - 1} microbatches for {num_stages} stages, "
                f"got {self.in_flight}: with fewer every stage waits, and more hide nothing more"
            )

    def delay(self, stage: int, num_stages: int) -> int:
        """Microbatches that go forward on `stage` before the first goes backward, once the policy has unlocked."""
        if not self.late:
            return 0
        slack = 0 if self.in_flight is None else self.in_flight - num_stages
        return in_flight_of_stale(stage, num_stages, slack) - 1

    def lag_below(self, stage: int, num_stages: int) -> int:
        """The lag of the boundary below `stage`, once the policy has unlocked."""
        return self.delay(stage, num_stages) if self.late else self.lag


def lag_of_wait(stage: int, num_stages: int) -> int:
    """The lag of the boundary below `stage` under `wait`: the microbatches that 1F1B has in flight there."""
    return num_stages - 1 - stage
