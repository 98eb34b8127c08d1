"""Whether a schedule can be run and computes what it should.

complete   each stage runs each microbatch forward once and backward once, and W once where backwards are split
order      forward before its backward, B before its W
pairing    two neighbours post the same messages in the same order
deadlock   no circle of waits
in flight  a stage holds no more activations than it may
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from .action import Action, Op, Schedule, ScheduleError
from .memory import in_flight
from .simulate import Times, simulate
from .traffic import posted_above, posted_below


def check(schedule: Schedule, *, max_in_flight: Sequence[int] | None = None) -> None:
    """Passes a right schedule in silence.

    Args:   max_in_flight: microbatches that each stage may hold at once; None: any number.
    Raises: ScheduleError: names the schedule, the stage, the action and the rule.
    """
    for stage, actions in enumerate(schedule.stages):
        _check_complete(schedule, stage, actions)
        _check_order(schedule, actions)
    for boundary in range(schedule.num_stages - 1):
        _check_pairing(schedule, boundary)
    simulate(schedule, Times.ms(1, 1, 1))
    if max_in_flight is not None:
        _check_in_flight(schedule, max_in_flight)


def _check_complete(schedule: Schedule, stage: int, actions: Sequence[Action]) -> None:
    ops = tuple(Op) if schedule.splits_backward else (Op.FORWARD, Op.BACKWARD)
    due = {Action(stage, op, m) for op in ops for m in range(schedule.total_microbatches)}
    seen: set[Action] = set()
    for action in actions:
        if action not in due:
            last = schedule.total_microbatches - 1
            raise _wrong(schedule, stage, action, f"does not belong here: stage {stage}, microbatches 0 to {last}")
        if action in seen:
            raise _wrong(schedule, stage, action, "comes twice: each action is run once")
        seen.add(action)
    for action in sorted(due - seen, key=lambda action: (action.microbatch, tuple(Op).index(action.op))):
        raise _wrong(schedule, stage, action, "is missing: each action is run once")


def _check_order(schedule: Schedule, actions: Sequence[Action]) -> None:
    needs = {Op.BACKWARD: Op.FORWARD, Op.WEIGHT: Op.BACKWARD}
    seen: set[Action] = set()
    for action in actions:
        needed = needs.get(action.op)
        if needed is not None and action._replace(op=needed) not in seen:
            rule = f"comes before {action._replace(op=needed)}, which it needs"
            raise _wrong(schedule, action.stage, action, rule)
        seen.add(action)


def _check_pairing(schedule: Schedule, boundary: int) -> None:
    for above, below in zip(posted_above(schedule, boundary), posted_below(schedule, boundary), strict=True):
        for number, (up, down) in enumerate(zip_longest(above, below)):
            if up != down:
                raise ScheduleError(
                    f"{schedule.name}: message {number} between stages {boundary} and {boundary + 1} is {up} for the "
                    f"first and {down} for the second: both must post the same messages in the same order"
                )


def _check_in_flight(schedule: Schedule, max_in_flight: Sequence[int]) -> None:
    if len(max_in_flight) != schedule.num_stages:
        raise ValueError(f"max_in_flight needs {schedule.num_stages} numbers, one per stage, got {max_in_flight}")
    for stage, (actions, most) in enumerate(zip(schedule.stages, max_in_flight, strict=True)):
        for action, held in zip(actions, in_flight(schedule, stage), strict=True):
            if held > most:
                raise _wrong(schedule, stage, action, f"makes {held} microbatches in flight, {most} are allowed")


def _wrong(schedule: Schedule, stage: int, action: Action, rule: str) -> ScheduleError:
    return ScheduleError(f"{schedule.name}, stage {stage}: {action} {rule}")
