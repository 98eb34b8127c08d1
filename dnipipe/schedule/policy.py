"""When a stage may backpropagate: what it does with a microbatch whose true gradient is not back.

    wait        it waits for the true gradient, as 1F1B does; predictors learn meanwhile
    synthetic   it uses the predicted gradient at once; the true one, `lag` microbatches later, trains the predictor
    stale       it goes on forward, and goes backward when the true one is here, if need be some optimizer steps later
    corrected   as stale; what would be late for its own step uses the predicted one at once, and when the true one is
                here, true - predicted goes backward too
    auto        the phases that are best as far as is known (choose.py)

A run may go by one after the other: wait:200,synthetic:800,stale is `wait` for 200 step() calls, `synthetic` for 800
more, and `stale` from then on. What is late follows from (num_stages, num_microbatches, in_flight or lag) alone, never
from timing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..plan.in_flight import in_flight_by_stage
from ..plan.late_weights import Distance, foretold_distance
from ..plan.phases import AUTO as AUTO
from ..plan.phases import LATE as LATE
from ..plan.phases import PREDICTING, Phase, parse_phases, text_of

DEFAULT_LAG = 2


@dataclass(frozen=True)
class Policy:
    """Which gradient a stage uses, by step.

    Args: name: wait | synthetic | stale | corrected | auto, or phases of them (plan/phases.py).
          lag: microbatches between an activation and the true gradient that is used with it, at least 1; stale and
          corrected have in_flight in its place.
          unlock_after_steps: step() calls under `wait` first; None: none, and for `auto` what it chooses. Where `name`
          has several phases, they say it themselves.
          post_ahead: whether a stage posts the receive of the next step's first activation before that step; None: on
          a CPU only.
          in_flight: microbatches that each stage but the last holds under stale and corrected, stage i of S from
          S - i (None), which leaves no time for a transfer, to 2 (S - i) - 1, which leaves each way of one a slot of
          its own, at up to twice the lateness; or of the first stage alone (plan/in_flight.py). "auto": the fewest
          that hide the transfers measured at the first step (plan/dial.py).
          late_weights: with which a microbatch whose backward falls into a later step goes forward and backward under
          stale and corrected: "predicted": foretold for the backward (weight_prediction.py), "predicted*2" twice as
          far from the present ones as the newest update says, or any other factor above 0; "predicted@3": three such
          updates from them, or any other number, and so all microbatches of all stages, late or not; "old": those of
          the forward, kept (old_weights.py); "new": for the backward those that are there by then, which meet old
          activations.
          steps_per_update: step() calls for each step of the optimizer, which comes after the last of them.
    Raises: ValueError for an unknown name, phases that make no sense, or a value out of range.
    """

    name: str = AUTO
    lag: int = DEFAULT_LAG
    unlock_after_steps: int | None = None
    post_ahead: bool | None = None
    in_flight: int | Sequence[int] | str | None = None
    late_weights: str = "predicted"
    steps_per_update: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.in_flight, list):
            object.__setattr__(self, "in_flight", tuple(self.in_flight))  # policies are compared by their hash
        phases, unlock = self.phases, self.unlock_after_steps
        if self.lag < 1:
            raise ValueError(
                f"lag must be at least 1 microbatch, got {self.lag}: gradient t - lag travels beside activation t"
            )
        if self.name == "wait" and unlock is not None:
            raise ValueError("policy 'wait' never unlocks: leave unlock_after_steps out, or choose policy 'synthetic'")
        if unlock is not None and unlock < 0:
            raise ValueError(f"unlock_after_steps must be at least 0 steps, got {unlock}")
        if unlock is not None and "," in self.name:
            raise ValueError(
                f"unlock_after_steps is for a single policy, got {unlock} beside {self.name!r}: say it there, as in "
                f"'wait:{max(unlock, 1)},{phases[-1]}'"
            )
        if self.in_flight is not None and not self.late and self.name != AUTO:
            raise ValueError(
                f"in_flight is for the policies {' and '.join(LATE)}: with policy {self.name!r} leave it out"
            )
        foretold_distance(self.late_weights)
        if self.steps_per_update < 1:
            raise ValueError(f"steps_per_update must be at least 1 step() call, got {self.steps_per_update}")
        numbers = self.in_flight if isinstance(self.in_flight, tuple) else (self.in_flight,)
        if self.in_flight not in (None, AUTO) and not all(type(each) is int for each in numbers):
            raise ValueError(
                f"in_flight must be a number of microbatches, one for each stage but the last, {AUTO!r} or None, got "
                f"{self.in_flight!r}"
            )

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """In order, the last one without end. Before `auto` has chosen it is `wait`."""
        phases = (Phase("wait"),) if self.name == AUTO else parse_phases(self.name)
        return (Phase("wait", self.unlock_after_steps), *phases) if self.unlock_after_steps else phases

    def chosen(self, name: str) -> Policy:
        """`auto`, once it has chosen the phases `name`; unlock_after_steps takes the place of the `wait` that they
        begin with."""
        phases = parse_phases(name)
        if self.unlock_after_steps is not None and len(phases) > 1 and phases[0].policy == "wait":
            phases = phases[1:]
        if self.unlock_after_steps and phases[0].policy != "wait":
            phases = (Phase("wait", self.unlock_after_steps), *phases)
        late = any(phase.policy in LATE for phase in phases)
        return replace(self, name=text_of(phases), unlock_after_steps=None, in_flight=self.in_flight if late else None)

    @property
    def late(self) -> bool:
        """Whether graphs are ever held until the true gradient is here."""
        return any(phase.policy in LATE for phase in self.phases)

    @cached_property
    def prediction(self) -> Distance | None:
        """How far late weights are foretold; None: they are not."""
        return foretold_distance(self.late_weights)

    @property
    def needs_predictor(self) -> bool:
        """Whether a predicted gradient is ever used."""
        return any(phase.policy in PREDICTING for phase in self.phases)

    @property
    def predicts(self) -> bool:
        """Whether predictors are of use. `wait` alone trains them too: a run that goes on under another policy has
        them."""
        return self.needs_predictor or not self.late

    def at(self, step: int) -> str:
        """The policy of step() call `step`, counted from 0: wait, synthetic, stale or corrected."""
        return next(self._from(step))

    def waits(self, step: int) -> bool:
        """Whether step() call `step`, counted from 0, waits for true gradients."""
        return self.at(step) == "wait"

    def learns(self, step: int) -> bool:
        """Whether predictors learn in step() call `step`: under stale only where they are used again later."""
        return self.at(step) != "stale" or any(name in PREDICTING for name in self._from(step))

    def _from(self, step: int) -> Iterator[str]:
        """The policy of `step`, and those after it."""
        end = 0
        for phase in self.phases:
            end += phase.num_steps or 0
            if phase.num_steps is None or step < end:
                yield phase.policy

    def check(self, num_stages: int) -> None:
        """Raises: ValueError for an in_flight that `num_stages` stages cannot have."""
        self.held(num_stages)

    def held(self, num_stages: int) -> tuple[int, ...]:
        """Microbatches that each stage holds at most under stale and corrected; the least, before `auto` is chosen."""
        in_flight = None if isinstance(self.in_flight, str) else self.in_flight
        return in_flight_by_stage(num_stages, in_flight)

    def delay(self, stage: int, num_stages: int) -> int:
        """Microbatches that go forward on `stage` before the first goes backward, under stale and corrected; also the
        lag of the boundary below it."""
        return self.held(num_stages)[stage] - 1

    def updates_late(self, stage: int, num_stages: int, microbatch: int, num_microbatches: int) -> int:
        """Updates between the forward and the last backward of a microbatch under stale and corrected.

        Args: microbatch: since the last update, over all steps since then, from 0.
        """
        return (microbatch + self.delay(stage, num_stages)) // (num_microbatches * self.steps_per_update)


def lag_of_wait(stage: int, num_stages: int) -> int:
    """The lag of the boundary below `stage` under `wait`: the microbatches that 1F1B has in flight there."""
    return num_stages - 1 - stage
