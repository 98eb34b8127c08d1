"""Training time by one clock, and a pause that all ranks make after the same step, though none waits to agree on it.

    rank 0   . . . . b . . . . b . . |      b, a beat: says elapsed seconds and pace, and hears the beat before
    rank 1   . . . . b . . . . b . . |      |, the step at which, by that beat, time is up: the same everywhere

To hear what rank 0's clock says now would take a message that everyone waits for, which ties together the stages that a
schedule without waiting has just set free. A beat is rare, is started and not waited for, and is read one beat later,
when it has long arrived.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Beat:
    """What all ranks know, and know alike.

    Args: step: steps done when it was said. elapsed_s, step_s: rank 0's seconds of training, and of one step.
          of_ranks: what each rank had to say, by its own meaning of each number.
    """

    step: int
    elapsed_s: float
    step_s: float
    of_ranks: list[list[float]] = field(default_factory=list)


class Pace:
    """Counts the seconds between start() and stop(), which every rank calls after the same steps.

    Args: group: of all ranks, for CPU tensors, used for nothing else meanwhile. every: steps between two beats, at
          least 1. device: waited for at start and stop, so that a second counts the work and not its being queued.
          num_facts: numbers that every rank says of itself in each beat.
    """

    def __init__(self, group: dist.ProcessGroup, *, every: int, device: torch.device, num_facts: int) -> None:
        self.group, self.every, self.device, self.num_facts = group, every, device, num_facts
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.newest: Beat | None = None
        self._before_s = 0.0
        self._started_s: float | None = None
        self._first_step: int | None = None
        self._under_way: tuple[int, Tensor, dist.Work] | None = None
        self._until_s = self._end_step = math.inf

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, between start() and stop(), by this rank's clock."""
        since_start_s = 0.0 if self._started_s is None else time.perf_counter() - self._started_s
        return self._before_s + since_start_s

    def resume(self, elapsed_s: float) -> None:
        """Before the first start(): counts on from the seconds of an earlier process, the same on every rank."""
        self._before_s = elapsed_s

    def start(self, step: int, *, until_s: float) -> None:
        """Begins a stretch after `step` steps, to pause when `until_s` seconds in all are over; inf: never."""
        self._meet()
        self._first_step = step if self._first_step is None else self._first_step
        self._until_s = until_s
        self._plan()
        self._stretch_step, self._started_s = step, time.perf_counter()

    def beat(self, step: int, facts: Sequence[float]) -> None:
        """To be called after each step that is_beat() says, with what this rank says of itself."""
        self._hear()
        told = self._told(step, facts)
        work = dist.all_reduce(told, group=self.group, async_op=True)
        assert work is not None, "an asynchronous collective returns its handle"
        self._under_way = (step, told, work)

    def is_over(self, step: int) -> bool:
        """Whether to pause after `step` steps; the same on every rank."""
        return step >= self._end_step

    def stop(self, step: int, facts: Sequence[float]) -> Beat:
        """Ends the stretch when all ranks are here, and says how far they are."""
        self._meet()
        self._hear()
        told = self._told(step, facts)
        dist.all_reduce(told, group=self.group)
        self.newest = _beat(step, told)
        self._before_s, self._started_s = self.newest.elapsed_s, None
        return self.newest

    def is_beat(self, step: int) -> bool:
        """Whether ranks speak after `step` steps; never before the first start()."""
        if self._first_step is None:
            return False
        since = step - self._first_step
        # at first nobody knows the pace, and the time may be over before a beat is due: 1, 2, 4, 8, ... steps
        return since % self.every == 0 or (since < self.every and since & (since - 1) == 0)

    def _told(self, step: int, facts: Sequence[float]) -> Tensor:
        """A row of a rank is zeros but on that rank, so that one sum carries what all of them know."""
        told = torch.zeros(self.world_size, 2 + self.num_facts, dtype=torch.float64)
        seconds = self.elapsed_s
        told[self.rank] = torch.tensor(
            [seconds, (seconds - self._before_s) / max(1, step - self._stretch_step), *facts], dtype=torch.float64
        )
        return told

    def _hear(self) -> None:
        if self._under_way is None:
            return
        step, told, work = self._under_way
        self._under_way = None
        work.wait()
        self.newest = _beat(step, told)
        self._plan()

    def _plan(self) -> None:
        if self.newest is not None and math.isfinite(self._until_s):
            left_s = self._until_s - self.newest.elapsed_s
            self._end_step = self.newest.step + math.ceil(left_s / self.newest.step_s)

    def _meet(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier(group=self.group)


def _beat(step: int, told: Tensor) -> Beat:
    rows = told.tolist()
    elapsed_s, step_s = rows[0][:2]
    return Beat(step, elapsed_s, step_s, [row[2:] for row in rows])
