"""A schedule is one list of actions per stage; an action is 2F0: stage 2 runs microbatch 0 forward.

    F  forward
    B  backward; in a schedule that has weight actions, only the gradient of the input
    W  the gradient of the weights, where it is run apart from B

What travels between the stages is not written down: it follows from the actions (traffic.py). The notation is that of
torch.distributed.pipelining, so that schedules of both can be read side by side.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple

_FORM = re.compile(r"(\d+)([FBW])(\d+)")


class ScheduleError(ValueError):
    """A schedule breaks a rule. The message names stage, action and rule."""


class Op(Enum):
    """What is computed. The value is its letter in print."""

    FORWARD = "F"
    BACKWARD = "B"
    WEIGHT = "W"


class Action(NamedTuple):
    """One computation of one stage. stage and microbatch count from 0, microbatches on through all steps."""

    stage: int
    op: Op
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The inverse of str(). Raises: ValueError for anything that is not such a text."""
        form = _FORM.fullmatch(text)
        if form is None:
            raise ValueError(f"{text!r} is no action: write stage, F, B or W, and microbatch, as in 2F0")
        return cls(int(form[1]), Op(form[2]), int(form[3]))


@dataclass(frozen=True)
class Schedule:
    """What each stage does, in order.

    Args:
        name: for tables and pictures.
        num_microbatches: of one step.
        stages: the actions of each stage, first stage first.
        num_steps: steps in the lists. A schedule that flushes has one; others run on from step to step.
        lags: per boundary, first one first; activation t and gradient t - lag travel together, in one exchange.
            Empty: each travels by itself as soon as it is there.
        synthetic: backward takes a predicted gradient and waits for none.

    Raises: ValueError: no stage, microbatch or step, or lags that do not fit the boundaries.
    """

    name: str
    num_microbatches: int
    stages: tuple[tuple[Action, ...], ...]
    num_steps: int = 1
    lags: tuple[int, ...] = ()
    synthetic: bool = False

    def __post_init__(self) -> None:
        require_positive(num_stages=self.num_stages, num_microbatches=self.num_microbatches, num_steps=self.num_steps)
        if self.lags and len(self.lags) != self.num_stages - 1:
            raise ValueError(f"{self.num_stages} stages have {self.num_stages - 1} boundaries, got lags {self.lags}")
        if any(lag < 1 for lag in self.lags):
            raise ValueError(f"a lag is at least 1 microbatch, got {self.lags}: an exchange would wait for itself")

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def total_microbatches(self) -> int:
        """Of all steps."""
        return self.num_microbatches * self.num_steps

    @cached_property
    def splits_backward(self) -> bool:
        """Whether the gradients of the weights are computed apart."""
        return any(action.op is Op.WEIGHT for actions in self.stages for action in actions)


def require_positive(**counts: int) -> None:
    """Raises ValueError, naming it, for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def one_forward_one_backward(stage: int, warmup: int, total: int) -> tuple[Action, ...]:
    """`warmup` forwards, then one forward and one backward in turn, then the backwards that are left."""
    forwards = [Action(stage, Op.FORWARD, m) for m in range(total)]
    backwards = [Action(stage, Op.BACKWARD, m) for m in range(total)]
    warmup = min(warmup, total)
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    return (*forwards[:warmup], *steady, *backwards[total - warmup :])
