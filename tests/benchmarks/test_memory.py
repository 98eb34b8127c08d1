"""What counts as activations: what graphs keep, whatever the schedule, and no weights."""

from __future__ import annotations

import torch

from benchmarks.contestants import Contestant, Entry, Parts, chunks_of
from benchmarks.memory import measure_memory
from benchmarks.workload import Workload
from tests.ranks import run_ranks

CPU = torch.device("cpu")
M = 4
ENTRIES = {
    "GPipe": Entry("GPipe"),
    "1F1B": Entry("1F1B"),
    "synthetic": Entry("DNI", "linear", "group", "synthetic"),
    "stale": Entry("DNI", None, "group", "stale"),
}


def contestant_of(rank: int, world: int, entry: Entry, m: int) -> Contestant:
    workload = Workload(world, 2, 64, 8, 16, 1, torch.float32)
    indices, num_chunks = chunks_of(entry.schedule, rank, world)
    return Contestant(entry, workload, Parts(workload, indices, num_chunks, CPU), m)


def _activations(rank: int, world: int, m: int) -> tuple[dict[str, int], bool]:
    """Of each schedule that can be for m microbatches; whether any gradient is left."""
    found, left = {}, False
    for name, entry in ENTRIES.items():
        if m >= world or entry.schedule == "DNI":
            contestant = contestant_of(rank, world, entry, m)
            peaks, found[name] = measure_memory(contestant, 0)
            assert peaks is None, "on a CPU"
            left = left or any(parameter.grad is not None for parameter in contestant.parts.parameters)
    return found, left


def test_activations_are_those_of_the_microbatches_in_flight() -> None:
    (of_each, left), (others, _) = run_ranks(2, _activations, M)
    assert of_each == others, "all ranks are told of the first"
    assert not left
    one = of_each["GPipe"] / M
    # of two stages the first holds 2 under 1F1B, and as many when nothing is flushed
    for name, microbatches in {"1F1B": 2, "stale": 2, "synthetic": 1}.items():
        assert abs(of_each[name] / one - microbatches) < 0.1, (name, of_each)


def test_weights_that_late_backwards_go_by_do_not_count() -> None:
    """At one microbatch each graph goes by others."""
    (alone, _), _ = run_ranks(2, _activations, 1)
    (of_each, _), _ = run_ranks(2, _activations, M)
    assert abs(alone["stale"] / of_each["stale"] - 1) < 0.1, (alone, of_each)
