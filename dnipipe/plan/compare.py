"""All schedules side by side, and what more stages would make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from . import dni, gpipe, one_f_one_b, zb_h1
from .action import Schedule
from .memory import peak_in_flight
from .simulate import Run, Times, simulate, simulate_steady
from .theory import stale_step_ms, synthetic_step_ms

STALE_TIGHT = f"{dni.STALE}, tight"

ASSUMPTIONS = (
    "Every stage takes the same F, B, W and C as given: a larger cluster runs a deeper model, layers per stage alike.",
    "The slowest link sets C; neighbours have it to themselves, and transfers run beside the computation.",
    "Predicting gradients and learning to takes P a microbatch on all stages but the last, in DNI synthetic alone.",
    "Optimizer step, data parallelism, stragglers and failures cost nothing here.",
    "'same M': the global batch stays as it is. 'same M/S': it grows with the stages, which changes the training.",
    "GPipe, 1F1B, ZB-H1 and DNI wait are simulated at full size; the steady step of the others is a formula.",
    "Says nothing of how well a model learns: the more stages, the later or the more predicted its gradients.",
)


@dataclass(frozen=True)
class Row:
    """One schedule in numbers.

    Fields: bubble: 0 to 1. peak_in_flight: microbatches on the fullest stage. step_ms: cost of a step.
    """

    schedule: str
    stages: int
    microbatches: int
    bubble: float
    peak_in_flight: int
    step_ms: float


def flushing(num_stages: int, num_microbatches: int) -> list[Schedule]:
    """The schedules that end each step with nothing in flight."""
    builders: tuple[Callable[[int, int], Schedule], ...] = (gpipe.build, one_f_one_b.build, zb_h1.build, dni.wait)
    return [build(num_stages, num_microbatches) for build in builders]


def running_on(num_stages: int, num_microbatches: int, lag: int) -> list[Callable[[int | None], Schedule]]:
    """The schedules that go from step to step without a flush, for any number of steps; None: their own."""
    return [
        lambda num_steps: dni.synthetic(num_stages, num_microbatches, lag=lag, num_steps=num_steps),
        lambda num_steps: replace(dni.stale(num_stages, num_microbatches, num_steps=num_steps), name=STALE_TIGHT),
        lambda num_steps: dni.stale(num_stages, num_microbatches, in_flight=2 * num_stages - 1, num_steps=num_steps),
    ]


def compare(num_stages: int, num_microbatches: int, times: Times, *, lag: int = dni.DEFAULT_LAG) -> list[Run]:
    """Simulates every schedule."""
    runs = [simulate(schedule, times) for schedule in flushing(num_stages, num_microbatches)]
    return runs + [simulate_steady(build, times) for build in running_on(num_stages, num_microbatches, lag)]


def row_of(run: Run) -> Row:
    """The numbers of a simulated schedule."""
    schedule = run.schedule
    peak = max(peak_in_flight(schedule))
    step_ms = float(run.step_ms)
    return Row(schedule.name, schedule.num_stages, schedule.num_microbatches, float(run.bubble), peak, step_ms)


def scale(num_stages: int, num_microbatches: int, times: Times, *, lag: int = dni.DEFAULT_LAG) -> list[Row]:
    """The rows of compare() for many stages, under ASSUMPTIONS; agrees with it where both can be had."""
    rows = [row_of(simulate(schedule, times)) for schedule in flushing(num_stages, num_microbatches)]
    work_ms = num_microbatches * times.compute
    in_flight_of = {STALE_TIGHT: num_stages, dni.STALE: 2 * num_stages - 1}
    steps = {dni.SYNTHETIC: (synthetic_step_ms(num_stages, num_microbatches, times, lag=lag), 1)}
    for name, in_flight in in_flight_of.items():
        step_ms = stale_step_ms(num_stages, num_microbatches, times, in_flight=in_flight)
        steps[name] = (step_ms, in_flight)
    for name, (step_ms, peak) in steps.items():
        bubble = float(1 - work_ms / step_ms)
        rows.append(Row(name, num_stages, num_microbatches, bubble, peak, float(step_ms)))
    return rows
