"""Watches the stages of a schedule that is not ours: when they work, and how many microbatches they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .trace import Span, Trace

WORK = {"forward_one_chunk": "forward", "backward_one_chunk": "backward", "backward_weight_one_chunk": "backward"}


class Held:
    """How many microbatches a rank's stages hold the graphs of.

    Fields: peak: the most at any time; a microbatch in one of n stages of the rank counts 1 / n.
    """

    def __init__(self, num_stages_of_rank: int) -> None:
        self.num_stages_of_rank = num_stages_of_rank
        self._graphs: set[tuple[int, int]] = set()
        self._most = 0

    @property
    def peak(self) -> float:
        return self._most / self.num_stages_of_rank

    def add(self, stage: int, microbatch: int) -> None:
        self._graphs.add((stage, microbatch))
        self._most = max(self._most, len(self._graphs))

    def remove(self, stage: int, microbatch: int) -> None:
        self._graphs.discard((stage, microbatch))


def watch_chunks(stages: Sequence[Any], trace: Trace) -> Held:
    """Lets torch's pipeline stages of this rank record spans and count what they hold."""
    held = Held(len(stages))
    for stage in stages:
        for name, span in WORK.items():
            if hasattr(stage, name):
                setattr(stage, name, _watched(getattr(stage, name), name, span, stage.stage_index, trace, held))
    return held


def _watched(
    work: Callable[..., Any], name: str, span: str, stage: int, trace: Trace, held: Held
) -> Callable[..., Any]:
    def run(microbatch: int, *args: Any, **kwargs: Any) -> Any:
        if name == "forward_one_chunk":
            held.add(stage, microbatch)
        with trace.span(span, microbatch=microbatch):
            result = work(microbatch, *args, **kwargs)
        # a backward of the input alone leaves the graph for the weights
        if name == "backward_weight_one_chunk" or (name == "backward_one_chunk" and kwargs.get("full_backward", True)):
            held.remove(stage, microbatch)
        return result

    return run


def waits_between(spans: Sequence[Span]) -> list[Span]:
    """A span named "wait" for each gap between two spans of one rank, given in order of their start."""
    return [
        Span("wait", before.rank, before.stage, None, before.end_s, after.start_s)
        for before, after in zip(spans, spans[1:], strict=False)
        if after.start_s > before.end_s
    ]
