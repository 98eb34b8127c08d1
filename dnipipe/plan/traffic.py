"""What crosses the boundaries: which message each stage posts, and which it waits for before an action.

    one by one   activation t leaves after F(t) above, gradient t after B(t) below, each for itself
    exchange t   activation t down and gradient t - lag up together: posted above after F(t), below after B(t - lag),
                 there once both are; the first `lag` carry no gradient, the last `lag` no activation

Two messages between the same two stages meet in posting order (NCCL knows no tags), so both must post the same list.
Boundary k lies between stages k and k + 1.
"""

from __future__ import annotations

from typing import NamedTuple

from .action import Action, Op, Schedule


class Message(NamedTuple):
    """What arrives together over one boundary: microbatch numbers; None: nothing this way."""

    boundary: int
    activation: int | None
    gradient: int | None

    def __str__(self) -> str:
        down = [] if self.activation is None else [f"activation {self.activation}"]
        up = [] if self.gradient is None else [f"gradient {self.gradient}"]
        return f"{' and '.join(down + up)} over boundary {self.boundary}"


def posted_above(schedule: Schedule, boundary: int) -> list[list[Message]]:
    """The messages that the upper stage posts, one list for each channel, in its order."""
    forwards, backwards = _order(schedule, boundary)
    if not schedule.lags:
        return [[Message(boundary, m, None) for m in forwards], [Message(boundary, None, m) for m in backwards]]
    lag, total = schedule.lags[boundary], schedule.total_microbatches
    paired = [_exchange(schedule, boundary, m) for m in forwards]
    return [paired + [_exchange(schedule, boundary, m) for m in range(max(total, lag), total + lag)]]


def posted_below(schedule: Schedule, boundary: int) -> list[list[Message]]:
    """The same of the lower stage."""
    forwards, backwards = _order(schedule, boundary + 1)
    if not schedule.lags:
        return [[Message(boundary, m, None) for m in forwards], [Message(boundary, None, m) for m in backwards]]
    lag = schedule.lags[boundary]
    first = [_exchange(schedule, boundary, m) for m in range(min(lag, schedule.total_microbatches))]
    return [first + [_exchange(schedule, boundary, m + lag) for m in backwards]]


def awaited(schedule: Schedule, action: Action) -> list[Message]:
    """The messages without which an action cannot start."""
    stage, op, microbatch = action
    messages = []
    has_next = stage < schedule.num_stages - 1
    if op is Op.FORWARD and stage > 0:
        messages.append(_with_activation(schedule, stage - 1, microbatch))
    if op is Op.FORWARD and has_next and schedule.synthetic and microbatch > 0:
        # The predictor learns after each backward from the gradient that came beside the newest activation.
        messages.append(_with_activation(schedule, stage, microbatch - 1))
    if op is Op.BACKWARD and has_next and not schedule.synthetic:
        messages.append(_with_gradient(schedule, stage, microbatch))
    return messages


def _order(schedule: Schedule, stage: int) -> tuple[list[int], list[int]]:
    """The microbatches of a stage's forwards and of its backwards, each in order."""
    forwards = [action.microbatch for action in schedule.stages[stage] if action.op is Op.FORWARD]
    return forwards, [action.microbatch for action in schedule.stages[stage] if action.op is Op.BACKWARD]


def _exchange(schedule: Schedule, boundary: int, number: int) -> Message:
    gradient = number - schedule.lags[boundary]
    has_activation = number < schedule.total_microbatches
    return Message(boundary, number if has_activation else None, gradient if gradient >= 0 else None)


def _with_activation(schedule: Schedule, boundary: int, microbatch: int) -> Message:
    return _exchange(schedule, boundary, microbatch) if schedule.lags else Message(boundary, microbatch, None)


def _with_gradient(schedule: Schedule, boundary: int, microbatch: int) -> Message:
    if not schedule.lags:
        return Message(boundary, None, microbatch)
    return _exchange(schedule, boundary, microbatch + schedule.lags[boundary])
