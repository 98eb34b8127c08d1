"""How long a schedule takes: every action starts as soon as its stage is free and what it waits for has arrived.

    start = max(end of the stage's previous action, arrival of each awaited message)
    arrival = end of the last action whose result the message carries + transfer

Where a stage predicts its gradient, it is busy with that after each backward, for as long as times.interface says.

Source of the cost: Zero Bubble Pipeline Parallelism, Qi et al. 2023: cost = the largest time that any stage takes from
its first start to its last end; bubble = (cost - M (F + B + W)) / cost. Transfers cost time, not compute: they run
beside it. Prediction takes its time from a stage and is no work of the model: it counts as bubble. Stages are alike;
optimizer and loss cost nothing. Times are counted in whole ticks, so results are exact fractions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from math import lcm

from .action import Action, Op, Schedule, ScheduleError
from .traffic import Message, awaited

MAX_DOUBLINGS = 6


@dataclass(frozen=True)
class Times:
    """Milliseconds per microbatch on one stage; ms() makes them from any numbers.

    Fields: forward F, backward B (gradient of the input), weight W (gradient of the weights), transfer C (one message
            between neighbours), interface P (predicting a gradient and learning from the true one). A backward that is
            not split takes B + W. transfers: C of each boundary, in place of transfer; (): all alike.
    """

    forward: Fraction
    backward: Fraction
    weight: Fraction
    transfer: Fraction
    interface: Fraction = Fraction(0)
    transfers: tuple[Fraction, ...] = ()

    def __post_init__(self) -> None:
        for name, time in self._named():
            if time < 0:
                raise ValueError(f"{name} must be at least 0 ms, got {float(time):g}")
        if self.compute == 0:
            raise ValueError("forward, backward and weight are all 0 ms: at least one must take time")

    @classmethod
    def ms(
        cls,
        forward: object,
        backward: object,
        weight: object,
        transfer: object = 0,
        interface: object = 0,
        transfers: Sequence[object] = (),
    ) -> Times:
        """From numbers or their texts, taken as they are written: 0.1 is a tenth. Raises: ValueError."""
        given = (forward, backward, weight, transfer, interface)
        f, b, w, c, p = (_exact(each.name, value) for each, value in zip(fields(cls)[:-1], given, strict=True))
        return cls(f, b, w, c, p, tuple(_exact("transfers", each) for each in transfers))

    @property
    def compute(self) -> Fraction:
        """F + B + W: what the model itself needs."""
        return self.forward + self.backward + self.weight

    @property
    def tick_ms(self) -> Fraction:
        """The longest time of which all of them are whole multiples."""
        return Fraction(1, lcm(*(time.denominator for _, time in self._named())))

    def _named(self) -> Iterator[tuple[str, Fraction]]:
        """Each time with its name."""
        for each in fields(self):
            value = getattr(self, each.name)
            yield from ((each.name, time) for time in (value if isinstance(value, tuple) else (value,)))

    def transfer_over(self, boundary: int) -> Fraction:
        """C between the stages `boundary` and `boundary` + 1."""
        return self.transfers[boundary] if self.transfers else self.transfer

    def predicting(self, schedule: Schedule, stage: int) -> Fraction:
        """What a stage adds to each backward: P where it predicts the gradient, as the last stage never does."""
        return self.interface if schedule.synthetic and stage < schedule.num_stages - 1 else Fraction(0)


def _exact(name: str, value: object) -> Fraction:
    try:
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{name} must be a finite number of milliseconds, got {value!r}") from None


@dataclass(frozen=True)
class Span:
    """When an action runs, in ms from the first start of all."""

    action: Action
    start_ms: Fraction
    end_ms: Fraction


@dataclass(frozen=True)
class Run:
    """A timed schedule. starts and ends: per stage and action, in ticks of times.tick_ms."""

    schedule: Schedule
    times: Times
    starts: tuple[tuple[int, ...], ...]
    ends: tuple[tuple[int, ...], ...]

    def spans(self, stage: int) -> Iterator[Span]:
        """What one stage does, in order."""
        tick = self.times.tick_ms
        for action, start, end in zip(self.schedule.stages[stage], self.starts[stage], self.ends[stage], strict=True):
            yield Span(action, start * tick, end * tick)

    @property
    def step_ms(self) -> Fraction:
        """The cost of one step on the slowest stage; of a schedule that runs on, that of a step in its steady state."""
        if self.schedule.num_steps == 1:
            return max(map(self._cost_ms, range(self.schedule.num_stages)))
        if not self.is_steady:
            raise ValueError(
                f"{self.schedule.name}: stage {self._steady.index(None)} is not steady after "
                f"{self.schedule.total_microbatches} microbatches: raise num_steps, now {self.schedule.num_steps}"
            )
        return max(ticks for ticks in self._steady if ticks is not None) * self.times.tick_ms

    @property
    def is_steady(self) -> bool:
        """Whether it is long enough to show what a step costs."""
        return self.schedule.num_steps == 1 or None not in self._steady

    @cached_property
    def _steady(self) -> list[Fraction | None]:
        return [self._steady_ticks(stage) for stage in range(self.schedule.num_stages)]

    def _cost_ms(self, stage: int) -> Fraction:
        ticks = self.ends[stage][-1] - self.starts[stage][0]
        return ticks * self.times.tick_ms + self.times.predicting(self.schedule, stage)

    def _steady_ticks(self, stage: int) -> Fraction | None:
        """Ticks per step, once the same pattern repeats: p microbatches later, every forward ends d ticks later."""
        schedule = self.schedule
        pairs = zip(schedule.stages[stage], self.ends[stage], strict=True)
        ends = [end for action, end in pairs if action.op is Op.FORWARD]
        seen = len(ends) // 3
        # shorter than the pipeline is deep, and what has not reached the other end yet looks steady
        deep = max((2 * schedule.num_stages, *schedule.lags))
        for period in range(1, seen + 1 if seen >= deep else 1):
            later = ends[-1] - ends[-1 - period]
            if all(ends[-k] - ends[-k - period] == later for k in range(2, seen + 1)):
                return Fraction(later * schedule.num_microbatches, period)
        return None

    @property
    def bubble(self) -> Fraction:
        """The part of a step in which the slowest stage computes nothing, 0 to 1."""
        return 1 - self.schedule.num_microbatches * self.times.compute / self.step_ms


def simulate(schedule: Schedule, times: Times) -> Run:
    """Runs a schedule on paper.

    Raises: ScheduleError: a deadlock; names what each stuck stage waits for.
    """
    clock = _Clock(schedule, times)
    ready = deque(range(schedule.num_stages))
    while ready:
        stage = ready.popleft()
        if clock.advance(stage):
            ready.extend(near for near in (stage - 1, stage + 1) if 0 <= near < schedule.num_stages)
    clock.require_finished()
    return Run(schedule, times, tuple(map(tuple, clock.starts)), tuple(map(tuple, clock.ends)))


def simulate_steady(build: Callable[[int | None], Schedule], times: Times) -> Run:
    """Simulates for as long as it takes: of two circles of waits that are nearly as long the longer shows late.

    build: makes the schedule for a number of steps; None: its own.
    """
    run = simulate(build(None), times)
    for _ in range(MAX_DOUBLINGS):
        if run.is_steady:
            break
        run = simulate(build(2 * run.schedule.num_steps), times)
    return run


class _Clock:
    """How far each stage is, in ticks."""

    def __init__(self, schedule: Schedule, times: Times) -> None:
        self.schedule, stages = schedule, range(schedule.num_stages)
        backward = times.backward if schedule.splits_backward else times.backward + times.weight
        self._forward, self._backward, self._weight = (
            int(time / times.tick_ms) for time in (times.forward, backward, times.weight)
        )
        self._transfers = [int(times.transfer_over(each) / times.tick_ms) for each in stages[:-1]]
        self._predicting = [int(times.predicting(schedule, stage) / times.tick_ms) for stage in stages]
        self._free = [0 for _ in stages]
        self.starts: list[list[int]] = [[] for _ in stages]
        self.ends: list[list[int]] = [[] for _ in stages]
        self._forward_ends: list[dict[int, int]] = [{} for _ in stages]
        self._backward_ends: list[dict[int, int]] = [{} for _ in stages]

    def advance(self, stage: int) -> bool:
        """Runs a stage until it must wait. False: it could not go on at all."""
        actions, starts, ends = self.schedule.stages[stage], self.starts[stage], self.ends[stage]
        before = len(ends)
        while len(ends) < len(actions):
            action, start = actions[len(ends)], self._free[stage]
            for message in awaited(self.schedule, action):
                arrival = self._arrival(message)
                if arrival is None:
                    return len(ends) > before
                start = max(start, arrival)
            starts.append(start)
            ends.append(self._run(action, start))
        return len(ends) > before

    def _run(self, action: Action, start: int) -> int:
        """Notes when an action ends, and when its stage is free again."""
        stage, op, microbatch = action
        if op is Op.FORWARD:
            end = free = self._forward_ends[stage][microbatch] = start + self._forward
        elif op is Op.BACKWARD:
            end = self._backward_ends[stage][microbatch] = start + self._backward
            free = end + self._predicting[stage]
        else:
            end = free = start + self._weight
        self._free[stage] = free
        return end

    def _arrival(self, message: Message) -> int | None:
        """None: not all that the message carries is there."""
        boundary, activation, gradient = message
        down = 0 if activation is None else self._forward_ends[boundary].get(activation)
        up = 0 if gradient is None else self._backward_ends[boundary + 1].get(gradient)
        return None if down is None or up is None else max(down, up) + self._transfers[boundary]

    def require_finished(self) -> None:
        stuck = []
        for actions, ends in zip(self.schedule.stages, self.ends, strict=True):
            for action in actions[len(ends) : len(ends) + 1]:
                missing = [str(m) for m in awaited(self.schedule, action) if self._arrival(m) is None]
                stuck.append(f"stage {action.stage} stands before {action}, waiting for {' and '.join(missing)}")
        if stuck:
            raise ScheduleError(f"{self.schedule.name}: deadlock; {'; '.join(stuck)}")
