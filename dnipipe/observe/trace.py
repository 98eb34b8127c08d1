"""Where a rank's time goes: named spans, measured without holding up what they measure.

On a CPU a span is two readings of one clock. On a CUDA device the host runs ahead of the work, so a span is two events
in the stream; they are read only by export(), which waits for the device once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import torch

Mark: TypeAlias = "float | torch.cuda.Event"

# one for all: a disabled trace allocates nothing
_NOTHING: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work of one rank; dataclasses.asdict() makes it JSON.

    Args:
        name: what was done: "forward", "backward", "wait", "predict", "learn", "optimizer" or "eval".
        rank, stage: who did it.
        microbatch: the number of the microbatch, None for work on none in particular.
        start_s, end_s: seconds since the Unix epoch, so that the ranks of one host line up.
    """

    name: str
    rank: int
    stage: int
    microbatch: int | None
    start_s: float
    end_s: float


class Trace:
    """Records what one rank does: `with trace.span("forward", microbatch=3): ...`.

    A span is taken or left by the value of `enabled` when it opens: set it to trace a window of a long run.

    Args:
        rank, stage: stand in every span.
        device: a CUDA device is timed by events in its current stream, any other by the host's clock.
        enabled: whether spans are recorded now; False costs one comparison a span.
    """

    def __init__(self, rank: int, stage: int, device: torch.device | str, *, enabled: bool = True) -> None:
        self.rank = rank
        self.stage = stage
        self.device = torch.device(device)
        self.enabled = enabled
        self._marks: list[tuple[str, int | None, Mark, Mark]] = []
        # perf_counter never jumps, but its zero means nothing: this moves it to the epoch
        self._epoch_s = time.time() - time.perf_counter()

    def span(self, name: str, *, microbatch: int | None = None) -> AbstractContextManager[None]:
        """A context whose duration is recorded under `name`, also when it ends by an exception."""
        if not self.enabled:
            return _NOTHING
        return _OpenSpan(self, name, microbatch)

    def export(self) -> list[Span]:
        """Returns the closed spans in order of their start and forgets them; on CUDA it synchronizes the device once.

        On CUDA, call it soon after the traced window: host and device clocks meet here, and drift apart by microseconds
        a second.
        """
        marks, self._marks = self._marks, []
        if not marks:
            return []
        times = self._read([mark for _, _, start, end in marks for mark in (start, end)])
        spans = [
            Span(name, self.rank, self.stage, microbatch, start_s, end_s)
            for (name, microbatch, _, _), start_s, end_s in zip(marks, times[::2], times[1::2], strict=True)
        ]
        return sorted(spans, key=lambda span: span.start_s)

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            return self._now_s()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _now_s(self) -> float:
        return self._epoch_s + time.perf_counter()

    def _read(self, marks: Sequence[Mark]) -> list[float]:
        """Turns marks into seconds since the epoch."""
        events = [mark for mark in marks if isinstance(mark, torch.cuda.Event)]
        if not events:
            return [mark for mark in marks if isinstance(mark, float)]
        last = self._mark()
        assert isinstance(last, torch.cuda.Event)
        torch.cuda.synchronize(self.device)
        now_s = self._now_s()
        # elapsed_time is a float32 of milliseconds: from the window's first event it is short, hence exact
        first_s = now_s - events[0].elapsed_time(last) / 1e3
        return [first_s + events[0].elapsed_time(event) / 1e3 for event in events]


class _OpenSpan(AbstractContextManager[None]):
    """A span between its two marks."""

    __slots__ = ("_trace", "_name", "_microbatch", "_start")

    def __init__(self, trace: Trace, name: str, microbatch: int | None) -> None:
        self._trace = trace
        self._name = name
        self._microbatch = microbatch

    def __enter__(self) -> None:
        self._start = self._trace._mark()

    def __exit__(self, *exception: object) -> None:
        self._trace._marks.append((self._name, self._microbatch, self._start, self._trace._mark()))


def idle_share(spans: Sequence[Span]) -> float:
    """The share of the time of one rank's spans, 0 to 1, in which it did nothing but wait; nan without any."""
    if not spans:
        return math.nan
    start_s, end_s = min(span.start_s for span in spans), max(span.end_s for span in spans)
    busy_s, until_s = 0.0, start_s
    for span in sorted((span for span in spans if span.name != "wait"), key=lambda span: span.start_s):
        busy_s += max(0.0, span.end_s - max(span.start_s, until_s))
        until_s = max(until_s, span.end_s)
    return 1 - busy_s / (end_s - start_s) if end_s > start_s else math.nan
