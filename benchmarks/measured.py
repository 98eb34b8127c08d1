"""What was seen of one schedule, and the row that it becomes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import torch

from benchmarks.contestants import Entry
from benchmarks.machine import card, commit
from benchmarks.planned import planned_ms
from benchmarks.reference import Costs
from benchmarks.rounds import Timing
from benchmarks.rows import Row
from benchmarks.workload import Workload
from dnipipe.observe.trace import Span
from dnipipe.schedule.policy import LATE

TRACED_STEPS = 2


@dataclass(frozen=True)
class Settings:
    """One workload at one number of microbatches.

    Args: rows: a file to which rank 0 adds them. timeline: its picture, or None. traces: a folder for a Perfetto file
          of each entry, or None. failed: titles of entries that have failed before, with the reason: they do not run.
          in_flight: of late policies, as of ScheduleDNI.
    """

    workload: Workload
    num_microbatches: int
    entries: tuple[Entry, ...]
    rounds: int
    steps: int
    post_ahead: bool
    rows: Path
    timeline: Path | None
    traces: Path | None = None
    failed: tuple[tuple[str, str], ...] = ()
    in_flight: int | None = None


@dataclass
class Measured:
    """One entry in numbers. peak_bytes: by rank. in_flight: the largest over ranks. interface_ms: predicting and
    learning, per microbatch, on the rank where it takes longest. spans: of all ranks, on rank 0."""

    refused: str | None = None
    bound: float | None = None
    timing: Timing | None = None
    peak_bytes: list[int] | None = None
    activation_bytes: int | None = None
    in_flight: float | None = None
    interface_ms: float | None = None
    transfer_ms: float | None = None
    spans: list[Span] = field(default_factory=list)


def interface_ms(spans: Sequence[Span], num_microbatches: int) -> float:
    """Of one microbatch, where it takes longest, from the spans of TRACED_STEPS steps of all ranks."""
    ms = dict.fromkeys({span.rank for span in spans}, 0.0)
    for span in spans:
        if span.name in ("predict", "learn"):
            ms[span.rank] += (span.end_s - span.start_s) * 1e3
    return max(ms.values()) / num_microbatches / TRACED_STEPS


def row_of(entry: Entry, seen: Measured, settings: Settings, device: torch.device, costs: Costs, alone: Timing) -> Row:
    """The row of one entry, without ratios."""
    workload, m, timing = settings.workload, settings.num_microbatches, seen.timing
    work_ms = costs.forward_ms + costs.backward_ms
    row = Row(
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
        utilisation=_utilisation(alone, timing) if timing else None,
        bound=seen.bound,
        predicted_ms=None,
        ratio_to_gpipe=None,
        ratio_to_1f1b=None,
        peak_bytes=max(seen.peak_bytes) if seen.peak_bytes else None,
        in_flight=seen.in_flight,
        interface_cost_share=seen.interface_ms / work_ms if seen.interface_ms is not None else None,
        commit=commit(),
        torch=torch.__version__,
        date=date.today().isoformat(),
        peak_bytes_by_rank=seen.peak_bytes,
        activation_bytes=seen.activation_bytes,
        given_in_flight=settings.in_flight if entry.policy in LATE else None,
        forward_ms=costs.forward_ms,
        backward_ms=costs.backward_ms,
        transfer_ms=seen.transfer_ms,
        optimizer_ms=costs.optimizer_ms,
    )
    if entry.policy in LATE:  # of which no step is like the next
        return row
    return replace(row, predicted_ms=planned_ms(row))


def _utilisation(alone: Timing, timing: Timing) -> float:
    pairs = zip(alone.mean_ms, timing.step_ms, strict=True)
    return statistics.median(ideal_ms / step_ms for ideal_ms, step_ms in pairs)


def _transport(entry: Entry, device: torch.device) -> str:
    return "direct" if entry.transport == "direct" else "nccl" if device.type == "cuda" else "gloo"
