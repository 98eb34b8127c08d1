"""Saving changes nothing; shapes may change; a step leaves behind what it must and no more."""

from __future__ import annotations

import copy
import itertools

import torch

from tests.ranks import run_ranks
from tests.schedule import models
from tests.schedule.harness import LENGTHS, Case, Oracle, Pipeline, differences, disturb

CASES = [
    Case(m=1, lag=3),
    Case(m=4, lag=2),
    Case("sequence", "transformer", m=2, lag=3, labels="relay"),
    Case("sequence", "local_head", m=3, lag=1, unlock_after_steps=3),
]


def _saving(rank: int, world: int) -> list[str]:
    wrong = []
    for case in CASES:
        undisturbed, saving = Pipeline(rank, world, case), Pipeline(rank, world, case)
        for step in range(8):
            undisturbed.step(step)
            saving.step(step)
            if step in (0, 4):
                saved = copy.deepcopy(
                    (saving.module.state_dict(), saving.optimizer.state_dict(), saving.schedule.state_dict())
                )
        resumed = Pipeline(rank, world, case)
        resumed.module.load_state_dict(saved[0])
        resumed.optimizer.load_state_dict(saved[1])
        resumed.schedule.load_state_dict(saved[2])
        early = resumed.schedule.state_dict()  # before the first step: what was loaded, untouched
        if early is not saved[2]:
            wrong.append(f"{case}: a state saved before the first step is not the one loaded")
        for step in range(5, 8):
            resumed.step(step)
        for name, run in (("saving", saving), ("resumed", resumed)):
            run.schedule.flush()
            if name == "saving":
                undisturbed.schedule.flush()
            if not all(torch.equal(a, b) for a, b in zip(undisturbed.state(), run.state(), strict=True)):
                wrong.append(f"{case}: the {name} run ends otherwise")
        pending = saved[2]["flow"]["pending"]
        if rank < world - 1 and case.unlock_after_steps is None and len(pending) != min(case.lag, 5 * case.m):
            wrong.append(f"{case}: {len(pending)} microbatches pending in the state")
    return wrong


def test_runs_with_and_without_a_save_and_a_resumed_run_end_bit_equal() -> None:
    assert run_ranks(3, _saving) == [[], [], []]


def _loading_back(rank: int, world: int) -> bool:
    """load_state_dict on a schedule that has gone further takes it back."""
    pipeline = Pipeline(rank, world, Case(m=2))
    pipeline.step(0)
    saved = copy.deepcopy((pipeline.module.state_dict(), pipeline.optimizer.state_dict()))
    schedule_state = copy.deepcopy(pipeline.schedule.state_dict())
    ends = []
    for _ in range(2):
        pipeline.module.load_state_dict(saved[0])
        pipeline.optimizer.load_state_dict(copy.deepcopy(saved[1]))
        pipeline.schedule.load_state_dict(copy.deepcopy(schedule_state))
        for step in range(1, 4):
            pipeline.step(step)
        ends.append(pipeline.state())
    return all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_state_can_be_loaded_into_a_schedule_that_has_gone_further() -> None:
    assert run_ranks(2, _loading_back) == [True, True]


def _automatic(rank: int, world: int) -> list[str]:
    wrong = []
    for m, lag in ((1, 2), (3, 2), (2, 1)):
        case = Case("sequence", "local_head", m=m, lag=lag)
        wrong += disturb(Pipeline(rank, world, case), Oracle(world, case))
    return wrong


def test_a_changed_length_is_automatic_where_every_rank_passes_target() -> None:
    assert run_ranks(3, _automatic) == [[], [], []]


def _told(rank: int, world: int) -> list[str]:
    case = Case("sequence", "local_head", m=2, labels="relay")
    pipeline, oracle = Pipeline(rank, world, case), Oracle(world, case)
    for step, (before, length) in enumerate(itertools.pairwise([models.T, *LENGTHS])):
        if length != before:
            pipeline.schedule.reset_shapes()
        pipeline.step(step, length)
        oracle.step(step, length)
    return differences(pipeline, oracle)


def test_reset_shapes_on_every_rank_changes_the_length() -> None:
    assert run_ranks(3, _told) == [[], [], []]


def _refused(rank: int, world: int) -> str:
    case = Case("sequence", "local_head", m=2, labels="relay")
    pipeline = Pipeline(rank, world, case)
    pipeline.step(0)
    if rank == 0:
        try:
            pipeline.step(1, length=8)
        except ValueError as error:
            pipeline.step(1)  # nothing was sent: the other ranks still take the old shape
            return str(error)
    else:
        pipeline.step(1)
    return ""


def test_the_first_rank_refuses_a_changed_length_before_it_sends_anything() -> None:
    assert run_ranks(3, _refused)[0] == (
        "stage 0: the input of one microbatch was (3, 5) and is (3, 8), which the other ranks cannot know: call "
        "reset_shapes() on every rank before this step, or pass on every rank a target= whose shape changes too"
    )


def _graphs(rank: int, world: int) -> tuple[list[int], int]:
    """The most bytes that were saved for backward at once, at M = 1, 4 and 32, and the graphs left after a step."""
    peaks = []
    for m in (1, 4, 32):
        pipeline = Pipeline(rank, world, Case(m=m, lag=2))
        saved = _SavedBytes()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            for step in range(5):
                args, kwargs = pipeline.arguments(step)
                pipeline.schedule.step(*args, **kwargs, return_outputs=False)
        peaks.append(saved.peak)
    return peaks, len(pipeline.stage.fwd_cache)


class _Saved:
    def __init__(self, tensor: torch.Tensor, total: _SavedBytes) -> None:
        self.tensor, self.total = tensor, total
        total.add(tensor.nbytes)

    def __del__(self) -> None:
        self.total.add(-self.tensor.nbytes)


class _SavedBytes:
    """Bytes that autograd keeps for backward, now and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def pack(self, tensor: torch.Tensor) -> _Saved:
        return _Saved(tensor, self)

    def unpack(self, saved: _Saved) -> torch.Tensor:
        return saved.tensor


def test_one_graph_is_alive_whatever_the_number_of_microbatches() -> None:
    for (at_1, at_4, at_32), left in run_ranks(2, _graphs):
        assert at_1 == at_4 == at_32 > 0
        assert left == 0
