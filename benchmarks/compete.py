"""One rank's part of the benchmark: builds every schedule, lets them run in turns, and turns what it saw into rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress

from benchmarks.bound import bound
from benchmarks.contestants import Contestant, Entry, Parts, chunks_of
from benchmarks.machine import allocated, card, commit, largest
from benchmarks.reference import Alone, Costs, measure_costs
from benchmarks.rounds import Runner, Timing, time_in_turns
from benchmarks.rows import Row, with_ratios, write_rows
from benchmarks.workload import Workload
from dnipipe.observe.chunks import waits_between
from dnipipe.observe.timeline import draw_timelines
from dnipipe.observe.trace import Span
from dnipipe.plan import Times, simulate
from dnipipe.plan import dni as plan_dni
from dnipipe.plan import gpipe as plan_gpipe
from dnipipe.plan import one_f_one_b as plan_1f1b
from dnipipe.schedule.policy import LATE

ALONE = "alone"
TRACED_STEPS = 2


@dataclass(frozen=True)
class Settings:
    """One workload at one number of microbatches. rows: where rank 0 writes them. timeline: its picture, or None."""

    workload: Workload
    num_microbatches: int
    entries: tuple[Entry, ...]
    rounds: int
    steps: int
    post_ahead: bool
    rows: Path
    timeline: Path | None


@dataclass
class Measured:
    """One entry in numbers. peak_bytes, in_flight: the largest over ranks. interface_ms: predicting and learning, per
    microbatch, on the rank where it takes longest. spans: of all ranks, on rank 0."""

    refused: str | None = None
    bound: float | None = None
    timing: Timing | None = None
    peak_bytes: int | None = None
    in_flight: float | None = None
    interface_ms: float | None = None
    spans: list[Span] = field(default_factory=list)


def compete(rank: int, device: torch.device, settings: Settings) -> None:
    """Every rank must call it."""
    workload, m, num_ranks = settings.workload, settings.num_microbatches, dist.get_world_size()
    parts: dict[tuple[int, ...], Parts] = {}
    runners: dict[str, Runner] = {}
    measured = {entry: Measured() for entry in settings.entries}
    alone = Alone(workload, _parts(parts, "1F1B", workload, device), m)
    costs = _warm_up(alone, workload, settings)
    for entry in settings.entries:
        own_parts, before = _parts(parts, entry.schedule, workload, device), allocated(device)
        try:
            contestant = Contestant(entry, workload, own_parts, m, settings.post_ahead)
        except ValueError as error:
            measured[entry].refused = str(error).splitlines()[0]
            continue
        measured[entry].peak_bytes = largest(_peak_bytes(contestant, before))
        if entry.policy not in LATE:  # whose graphs are taken out of torch's hands, where they are counted
            measured[entry].in_flight = largest(contestant.held.peak)
        if entry.schedule == "DNI":
            measured[entry].bound = 1.0
        else:
            measured[entry].bound = bound(contestant.schedule, num_ranks, m, costs.forward_ms, costs.backward_ms)
        runners[entry.title] = contestant
    with Progress(transient=True, disable=rank != 0) as progress:
        task = progress.add_task(f"M = {m}", total=settings.rounds * (1 + len(runners)))
        turns = {ALONE: alone, **runners}
        timings = time_in_turns(turns, settings.rounds, settings.steps, lambda: progress.advance(task))
    for entry in settings.entries:
        runner = runners.get(entry.title)
        if isinstance(runner, Contestant):
            measured[entry].timing = timings[entry.title]
            measured[entry].spans = _trace(runner)
            measured[entry].interface_ms = _interface_ms(measured[entry].spans, m) if entry.interface else None
    if rank == 0:
        write_rows(with_ratios(_rows(settings, device, costs, timings[ALONE], measured)), settings.rows)
        if settings.timeline is not None:
            _draw(measured, settings.timeline)


def _parts(known: dict[tuple[int, ...], Parts], schedule: str, workload: Workload, device: torch.device) -> Parts:
    indices, num_chunks = chunks_of(schedule, dist.get_rank(), dist.get_world_size())
    key = (num_chunks, *indices)
    if key not in known:
        known[key] = Parts(workload, indices, num_chunks, device)
    return known[key]


def _warm_up(alone: Alone, workload: Workload, settings: Settings) -> Costs:
    for _ in range(2):
        alone.step()
    alone.settle()
    return measure_costs(alone, workload, settings.steps)


def _peak_bytes(contestant: Contestant, before: int) -> int | None:
    """Runs its first steps. The peak of the third, what it has for good included, but nothing that is another's."""
    device = contestant.parts.device
    for _ in range(2):
        contestant.step()
    contestant.settle()
    if device.type != "cuda":
        contestant.step()
        contestant.settle()
        return None
    idle = allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    contestant.step()
    contestant.settle()
    own = idle - before + contestant.parts.num_bytes
    return torch.cuda.max_memory_allocated(device) - idle + own


def _trace(contestant: Contestant) -> list[Span]:
    """What all ranks do in some steps, on rank 0."""
    dist.barrier()
    contestant.step()
    contestant.trace.enabled = True
    for _ in range(TRACED_STEPS):
        contestant.step()
    contestant.trace.enabled = False
    contestant.settle()
    spans = contestant.trace.export()
    if contestant.entry.schedule != "DNI":
        spans += waits_between(spans)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, spans)
    return [span for of_rank in ranks for span in of_rank]


def _interface_ms(spans: Sequence[Span], num_microbatches: int) -> float:
    ms = dict.fromkeys({span.rank for span in spans}, 0.0)
    for span in spans:
        if span.name in ("predict", "learn"):
            ms[span.rank] += (span.end_s - span.start_s) * 1e3
    return max(ms.values()) / num_microbatches / TRACED_STEPS


def _predicted_ms(entry: Entry, costs: Costs, interface_ms: float | None, stages: int, m: int) -> float | None:
    """The planner's step, made of the measured parts; None for schedules that it does not know, and for late policies,
    of which no step is like the next."""
    half_ms = costs.backward_ms / 2
    if entry.policy in LATE:
        return None
    times = Times.ms(costs.forward_ms, half_ms, half_ms, costs.transfer_ms, interface_ms or 0)
    match entry.schedule:
        case "GPipe":
            plan = plan_gpipe.build(stages, m)
        case "1F1B":
            plan = plan_1f1b.build(stages, m)
        case "DNI":
            plan = plan_dni.synthetic(stages, m)
        case _:
            return None
    return float(simulate(plan, times).step_ms) + costs.optimizer_ms


def _rows(
    settings: Settings, device: torch.device, costs: Costs, alone: Timing, measured: dict[Entry, Measured]
) -> list[Row]:
    workload, m = settings.workload, settings.num_microbatches
    rows = []
    for entry, seen in measured.items():
        timing, work_ms = seen.timing, costs.forward_ms + costs.backward_ms
        utilisation = predicted_ms = None
        if timing is not None:
            utilisation = statistics.median(
                ideal_ms / step_ms for ideal_ms, step_ms in zip(alone.mean_ms, timing.step_ms, strict=True)
            )
            predicted_ms = _predicted_ms(entry, costs, seen.interface_ms, workload.stages, m)
        rows.append(
            Row(
                device=device.type,
                card=card(device),
                schedule=entry.schedule,
                interface=entry.interface,
                policy=entry.policy,
                transport=_transport(entry, device),
                stages=workload.stages,
                microbatches=m,
                microbatch_size=workload.microbatch_size,
                seq_len=workload.seq_len,
                width=workload.width,
                blocks_per_stage=workload.blocks_per_stage,
                vocab_size=workload.vocab_size,
                dtype=str(workload.dtype).removeprefix("torch."),
                refused=seen.refused,
                step_ms=timing.median_ms if timing else None,
                spread_ms=timing.spread_ms if timing else None,
                tokens_per_s=workload.tokens(m) / timing.median_ms * 1e3 if timing else None,
                utilisation=utilisation,
                bound=seen.bound,
                predicted_ms=predicted_ms,
                ratio_to_gpipe=None,
                ratio_to_1f1b=None,
                peak_bytes=seen.peak_bytes,
                in_flight=seen.in_flight,
                interface_cost_share=seen.interface_ms / work_ms if seen.interface_ms is not None else None,
                commit=commit(),
                torch=torch.__version__,
                date=date.today().isoformat(),
            )
        )
    return rows


def _transport(entry: Entry, device: torch.device) -> str:
    return "direct" if entry.transport == "direct" else "nccl" if device.type == "cuda" else "gloo"


def _draw(measured: dict[Entry, Measured], path: Path) -> None:
    runs = {
        f"{entry.title}: {seen.timing.median_ms:.1f} ms a step": seen.spans
        for entry, seen in measured.items()
        if seen.timing is not None
    }
    draw_timelines(runs, path)
