"""How long a schedule takes: every action starts as soon as its stage is free and what it waits for has arrived.

    start = max(end of the stage's previous action, arrival of each awaited message)
    arrival = end of the last action whose result the message carries + transfer

Source of the cost: Zero Bubble Pipeline Parallelism, Qi et al. 2023: cost = the largest time that any stage takes from
its first start to its last end; bubble = (cost - M (F + B + W)) / cost. Transfers cost time, not compute: they run
beside it. Stages are alike; optimizer, predictors and loss cost nothing. Times are counted in whole ticks, so results
are exact fractions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

from .action import Action, Op, Schedule, ScheduleError
from .traffic import Message, awaited


@dataclass(frozen=True)
class Times:
    """Milliseconds per microbatch on one stage; ms() makes them from any numbers.

    Fields: forward F, backward B (gradient of the input), weight W (gradient of the weights), transfer C (one message
            between neighbours). A backward that is not split takes B + W.
    """

    forward: Fraction
    backward: Fraction
    weight: Fraction
    transfer: Fraction

    def __post_init__(self) -> None:
        for name in ("forward", "backward", "weight", "transfer"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0 ms, got {float(getattr(self, name)):g}")
        if self.compute == 0:
            raise ValueError("forward, backward and weight are all 0 ms: at least one must take time")

    @classmethod
    def ms(cls, forward: object, backward: object, weight: object, transfer: object = 0) -> Times:
        """From numbers or their texts, taken as they are written: 0.1 is a tenth. Raises: ValueError."""
        named = {"forward": forward, "backward": backward, "weight": weight, "transfer": transfer}
        return cls(**{name: _exact(name, value) for name, value in named.items()})

    @property
    def compute(self) -> Fraction:
        """F + B + W."""
        return self.forward + self.backward + self.weight

    @property
    def tick_ms(self) -> Fraction:
        """The longest time of which all four are whole multiples."""
        times = (self.forward, self.backward, self.weight, self.transfer)
        return Fraction(1, lcm(*(time.denominator for time in times)))


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
        if self.schedule.num_steps > 1:
            ticks = max(self._steady_ticks(stage) for stage in range(self.schedule.num_stages))
        else:
            ticks = Fraction(max(ends[-1] - starts[0] for starts, ends in zip(self.starts, self.ends, strict=True)))
        return ticks * self.times.tick_ms

    def _steady_ticks(self, stage: int) -> Fraction:
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
        raise ValueError(
            f"{schedule.name}: stage {stage} is not steady after {len(ends)} microbatches: raise num_steps, now "
            f"{schedule.num_steps}"
        )

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


class _Clock:
    """How far each stage is, in ticks."""

    def __init__(self, schedule: Schedule, times: Times) -> None:
        self.schedule, stages = schedule, range(schedule.num_stages)
        backward = times.backward if schedule.splits_backward else times.backward + times.weight
        self._forward, self._backward, self._weight, self._transfer = (
            int(time / times.tick_ms) for time in (times.forward, backward, times.weight, times.transfer)
        )
        self.starts: list[list[int]] = [[] for _ in stages]
        self.ends: list[list[int]] = [[] for _ in stages]
        self._forward_ends: list[dict[int, int]] = [{} for _ in stages]
        self._backward_ends: list[dict[int, int]] = [{} for _ in stages]

    def advance(self, stage: int) -> bool:
        """Runs a stage until it must wait. False: it could not go on at all."""
        actions, starts, ends = self.schedule.stages[stage], self.starts[stage], self.ends[stage]
        before = len(ends)
        while len(ends) < len(actions):
            action, start = actions[len(ends)], ends[-1] if ends else 0
            for message in awaited(self.schedule, action):
                arrival = self._arrival(message)
                if arrival is None:
                    return len(ends) > before
                start = max(start, arrival)
            starts.append(start)
            ends.append(self._run(action, start))
        return len(ends) > before

    def _run(self, action: Action, start: int) -> int:
        """Notes when an action ends."""
        if action.op is Op.WEIGHT:
            return start + self._weight
        forward = action.op is Op.FORWARD
        end = start + (self._forward if forward else self._backward)
        (self._forward_ends if forward else self._backward_ends)[action.stage][action.microbatch] = end
        return end

    def _arrival(self, message: Message) -> int | None:
        """None: not all that the message carries is there."""
        boundary, activation, gradient = message
        down = 0 if activation is None else self._forward_ends[boundary].get(activation)
        up = 0 if gradient is None else self._backward_ends[boundary + 1].get(gradient)
        return None if down is None or up is None else max(down, up) + self._transfer

    def require_finished(self) -> None:
        stuck = []
        for actions, ends in zip(self.schedule.stages, self.ends, strict=True):
            for action in actions[len(ends) : len(ends) + 1]:
                missing = [str(m) for m in awaited(self.schedule, action) if self._arrival(m) is None]
                stuck.append(f"stage {action.stage} stands before {action}, waiting for {' and '.join(missing)}")
        if stuck:
            raise ScheduleError(f"{self.schedule.name}: deadlock; {'; '.join(stuck)}")
