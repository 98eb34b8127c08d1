"""One rank's part of the benchmark: builds every schedule, lets them run in turns, and turns what it saw into rows."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from rich.progress import Progress

from benchmarks.bound import bound
from benchmarks.contestants import Contestant, Entry, Parts, activation_like, chunks_of
from benchmarks.failures import ContestantError, note_failure, work_of
from benchmarks.machine import allocated, largest, of_all
from benchmarks.measured import TRACED_STEPS, Measured, Settings, interface_ms, row_of
from benchmarks.memory import measure_memory
from benchmarks.reference import Alone, Costs, measure_costs, measure_transfer
from benchmarks.rounds import Runner, time_in_turns
from benchmarks.rows import Row, read_rows, with_ratios, write_rows
from benchmarks.workload import Workload
from dnipipe.observe.chunks import waits_between
from dnipipe.observe.perfetto import write_perfetto
from dnipipe.observe.timeline import draw_timelines
from dnipipe.observe.trace import Span
from dnipipe.schedule.policy import LATE

ALONE = "alone"
TRACE_WARM_UPS = 3  # until a pipeline that never flushes is as full as it gets, and its ranks are in step


def compete(rank: int, device: torch.device, all_settings: Sequence[Settings], until_s: float) -> None:
    """Every rank must call it.

    Args:   all_settings: one after the other, of one model. until_s: seconds since the Unix epoch; what would not be
            done by then, at the pace of the last, is left out and named.
    Raises: ContestantError, when it is noted beside the rows.
    """
    competition, pace_s = Competition(device), 0.0
    for settings in all_settings:
        slots, start_s = settings.num_microbatches + settings.workload.stages - 1, time.time()
        if largest(start_s + pace_s * slots) > until_s and pace_s:
            if rank == 0:
                print(f"no time is left for M = {settings.num_microbatches}", file=sys.stderr, flush=True)
            continue
        try:
            competition.run(settings)
        except ContestantError as error:
            note_failure(error, settings.num_microbatches, rank, settings.rows.parent)
            if device.type == "cuda":
                os._exit(1)  # at once: NCCL would wait for neighbours that wait for this rank
            raise
        gc.collect()  # stages and schedules hold each other
        pace_s = (time.time() - start_s) / slots


class Competition:
    """What lasts from one number of microbatches to the next: the stages, cut in each way, and the transfers' times."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._parts: dict[tuple[int, ...], Parts] = {}
        self._transfers: dict[tuple[int, str | None], float] = {}

    def run(self, settings: Settings) -> None:
        """Measures all entries; rank 0 writes their rows and draws what they did. Raises: ContestantError."""
        workload, rank = settings.workload, dist.get_rank()
        failed = dict(settings.failed)
        measured = {entry: Measured(refused=failed.get(entry.title)) for entry in settings.entries}
        alone = Alone(workload, self._cut("1F1B", workload), settings.num_microbatches)
        costs = _warm_up(alone, settings.steps)
        runners: dict[str, Runner] = {ALONE: alone}
        for entry, seen in measured.items():
            contestant = None if seen.refused else self._enter(entry, seen, settings, costs)
            if contestant is not None:
                runners[entry.title] = contestant
        with Progress(transient=True, disable=rank != 0) as progress:
            task = progress.add_task(f"M = {settings.num_microbatches}", total=settings.rounds * len(runners))
            timings = time_in_turns(runners, settings.rounds, settings.steps, lambda: progress.advance(task))
        for entry, seen in measured.items():
            runner = runners.get(entry.title)
            if isinstance(runner, Contestant):
                seen.timing, seen.spans = timings[entry.title], _trace(runner)
                if entry.interface:
                    seen.interface_ms = interface_ms(seen.spans, settings.num_microbatches)
        if rank == 0:
            rows = [
                row_of(entry, seen, settings, self.device, costs, timings[ALONE]) for entry, seen in measured.items()
            ]
            _keep(rows, measured, settings)
        dist.barrier()  # nobody's memory is given to others while a neighbour may copy out of it

    def _cut(self, schedule: str, workload: Workload) -> Parts:
        indices, num_chunks = chunks_of(schedule, dist.get_rank(), dist.get_world_size())
        key = (num_chunks, *indices)
        if key not in self._parts:
            self._parts[key] = Parts(workload, indices, num_chunks, self.device)
        return self._parts[key]

    def _enter(self, entry: Entry, seen: Measured, settings: Settings, costs: Costs) -> Contestant | None:
        """Builds it and runs its first steps; None: it is refused."""
        workload, m = settings.workload, settings.num_microbatches
        try:
            with work_of(entry.title):
                parts = self._cut(entry.schedule, workload)
                of_others = allocated(self.device) - parts.num_bytes
                contestant = Contestant(
                    entry, workload, parts, m, post_ahead=settings.post_ahead, in_flight=settings.in_flight
                )
                seen.peak_bytes, seen.activation_bytes = measure_memory(contestant, of_others)
                seen.transfer_ms = self._transfer_ms(workload, entry.transport)
        except ValueError as error:  # on all ranks alike, before anything is sent
            seen.refused = str(error).splitlines()[0]
            return None
        if entry.policy not in LATE:  # whose graphs are taken out of torch's hands, where they are counted
            seen.in_flight = largest(contestant.held.peak)
        seen.bound = 1.0
        if entry.schedule != "DNI":
            seen.bound = bound(contestant.schedule, workload.stages, m, costs.forward_ms, costs.backward_ms)
        return contestant

    def _transfer_ms(self, workload: Workload, transport: str | None) -> float:
        key = (workload.microbatch_size, transport)
        if key not in self._transfers:
            self._transfers[key] = measure_transfer(activation_like(workload, self.device), transport)
        return self._transfers[key]


def _warm_up(alone: Alone, steps: int) -> Costs:
    for _ in range(2):
        alone.step()
    alone.settle()
    return measure_costs(alone, steps)


def _trace(contestant: Contestant) -> list[Span]:
    """What all ranks do in some steps, on rank 0."""
    dist.barrier()
    for _ in range(TRACE_WARM_UPS):
        contestant.step()
    contestant.trace.enabled = True
    for _ in range(TRACED_STEPS):
        contestant.step()
    contestant.trace.enabled = False
    contestant.settle()
    spans = contestant.trace.export()
    if contestant.entry.schedule != "DNI":
        spans += waits_between(spans)
    return [span for of_rank in of_all(spans) for span in of_rank]


def _keep(rows: list[Row], measured: dict[Entry, Measured], settings: Settings) -> None:
    """Writes the rows first: what is drawn after them may be missed."""
    before = read_rows(settings.rows) if settings.rows.exists() else []
    write_rows([*before, *with_ratios(rows)], settings.rows)
    runs = {entry.title: seen for entry, seen in measured.items() if seen.timing is not None}
    if settings.traces is not None:
        for title, seen in runs.items():
            name = f"m{settings.num_microbatches}-{title.replace(' ', '-')}.json"
            write_perfetto(seen.spans, settings.traces / name)
    if settings.timeline is not None and runs:
        titles = {
            f"{title}: {seen.timing.median_ms:.1f} ms a step": seen.spans for title, seen in runs.items() if seen.timing
        }
        draw_timelines(titles, settings.timeline)
