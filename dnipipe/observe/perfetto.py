"""A trace that https://ui.perfetto.dev opens: one process per rank, one slice per span.

Source: Trace Event Format (Google, 2016), the JSON form with complete ("X") and metadata ("M") events.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnipipe.observe.trace import Span


def write_perfetto(spans: Sequence[Span], path: str | Path) -> None:
    """Writes the spans of any number of ranks as one JSON file.

    Args:
        spans: in any order; those of one rank and stage may nest.
        path: the file, replaced if it exists; its folder is made.

    Units: microseconds after the earliest span.
    Raises: ValueError: no spans.
    """
    if not spans:
        raise ValueError("write_perfetto() got no spans: was the trace enabled during the steps meant to be seen?")
    zero_s = min(span.start_s for span in spans)
    events = _names(spans) + [_slice(span, zero_s) for span in sorted(spans, key=lambda span: span.start_s)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")


def _names(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """What the viewer calls each process and thread, and the order in which it shows the processes."""
    stages: dict[int, set[int]] = {}
    for span in spans:
        stages.setdefault(span.rank, set()).add(span.stage)
    events: list[dict[str, Any]] = []
    for rank in sorted(stages):
        label = ", ".join(f"stage {stage}" for stage in sorted(stages[rank]))
        events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank} ({label})"}})
        events.append({"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}})
        for stage in sorted(stages[rank]):
            thread: dict[str, Any] = {"ph": "M", "pid": rank, "tid": stage, "name": "thread_name"}
            events.append(thread | {"args": {"name": f"stage {stage}"}})
    return events


def _slice(span: Span, zero_s: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": span.name,
        "cat": "dnipipe",
        "pid": span.rank,
        "tid": span.stage,
        "ts": (span.start_s - zero_s) * 1e6,
        "dur": (span.end_s - span.start_s) * 1e6,
        "args": {} if span.microbatch is None else {"microbatch": span.microbatch},
    }
