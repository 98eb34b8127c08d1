"""Where the time of a few steps went, as files: one picture of all schedules, and for each a trace to zoom in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..observe.perfetto import write_perfetto
from ..observe.trace import Span
from .folder import TIMELINE


def write_traces(folder: Path, traces: Mapping[str, Sequence[Span]], num_steps: int) -> None:
    """timeline.png of all schedules together, and a Perfetto file for each: trace.json for the first.

    Args: traces: by schedule, the spans of the same num_steps steps of all ranks; without spans a schedule is left out.
    """
    traced = {name: spans for name, spans in traces.items() if spans}
    if not traced:
        return
    steps = "1 step" if num_steps == 1 else f"{num_steps} steps"
    titled = {f"{name}: {steps} in {_length(spans)}": spans for name, spans in traced.items()}
    from ..observe.timeline import draw_timelines  # here: matplotlib takes every rank half a second, and one rank draws

    draw_timelines(titled, folder / TIMELINE)
    for index, (name, spans) in enumerate(traced.items()):
        write_perfetto(spans, folder / (f"trace-{name}.json" if index else "trace.json"))


def _length(spans: Sequence[Span]) -> str:
    length_s = max(span.end_s for span in spans) - min(span.start_s for span in spans)
    return f"{length_s * 1e3:.0f} ms"
