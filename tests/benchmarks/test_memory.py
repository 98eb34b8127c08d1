"""What of a peak counts as activations: the sums, with a GPU's counters made up; and real copies of weights."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from benchmarks import memory
from benchmarks.contestants import Contestant, Entry, Parts, chunks_of
from benchmarks.memory import copies_bytes
from benchmarks.workload import Workload
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def contestant_of(rank: int, world: int, entry: Entry, m: int) -> Contestant:
    workload = Workload(world, 2, 64, 8, 16, 1, torch.float32)
    indices, num_chunks = chunks_of(entry.schedule, rank, world)
    return Contestant(entry, workload, Parts(workload, indices, num_chunks, CPU), m, post_ahead=False)


def _copies(rank: int, world: int, m: int) -> tuple[int, int]:
    """Bytes of old weights that a stage under `stale` keeps after some steps, and those of its weights."""
    contestant = contestant_of(rank, world, Entry("DNI", None, "group", "stale"), m)
    for _ in range(4):
        contestant.step()
    found = copies_bytes(contestant)
    contestant.settle()
    return found, sum(each.nbytes for each in contestant.parts.parameters)


def test_copies_of_weights_are_counted() -> None:
    # at 1 microbatch each of the 2 graphs that the first of 3 stages holds goes by other weights
    (first, own), (second, own_2), (last, _) = run_ranks(3, _copies, 1)
    assert (first, second, last) == (2 * own, own_2, 0)
    (first, own), _, _ = run_ranks(3, _copies, 4)
    assert first == own


def _accounted(rank: int, world: int, entry: Entry, m: int) -> tuple[int, int, int, int, int]:
    """(peak, activations) where 7000 bytes are allocated between steps and 10**9 at the peak, 1000 of them others'."""
    torch.cuda.reset_peak_memory_stats = lambda device: None
    torch.cuda.max_memory_allocated = lambda device: 10**9
    memory.allocated = lambda device: 7000
    contestant, steps = contestant_of(rank, world, entry, m), count()
    step = contestant.step
    contestant.step = lambda: (next(steps), step())[1]  # type: ignore[method-assign, func-returns-value]
    peak, activations = memory._on_gpu(contestant, 1000)
    num_steps = next(steps)
    copies = world - 1 - rank if entry.policy == "stale" else 0
    return peak, activations, num_steps, copies, sum(each.nbytes for each in contestant.parts.parameters)


@pytest.mark.parametrize(
    "entry, m, expected_steps",
    [
        (Entry("GPipe"), 2, 1),
        (Entry("ZBVZeroBubble"), 4, 1),
        (Entry("DNI", "linear", "group", "synthetic"), 2, 3),
        (Entry("DNI", None, "group", "stale"), 1, 5),
    ],
)
def test_activations_are_what_is_neither_there_between_steps_nor_gradient_nor_copy(
    entry: Entry, m: int, expected_steps: int
) -> None:
    for peak, activations, num_steps, copies, weights in run_ranks(2, _accounted, entry, m):
        assert (peak, num_steps) == (10**9 - 1000, expected_steps)
        assert activations == 10**9 - 7000 - weights - copies * weights
