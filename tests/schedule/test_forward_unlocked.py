"""Stages that start from synthetic inputs, against the oracle, bit for bit; saving, evaluation, shapes, refusals."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dnipipe.schedule import unlocked_flow
from dnipipe.schedule.forward_unlocked import Start
from tests.ranks import run_ranks
from tests.schedule.harness import disturb
from tests.schedule.unlocked import UnlockedCase, UnlockedOracle, UnlockedPipeline, unlocked_differences

STEPS = 6


def _pattern(world: int, m: int, steps: int, share: float, seed: int) -> tuple[Start, ...]:
    draw = random.Random(seed)
    every = itertools.product(range(1, world), range(steps), range(m))
    return tuple(start for start in every if draw.random() < share)


def _cases(world: int) -> list[UnlockedCase]:
    kinds = itertools.cycle(
        [("mlp", "mlp", "local"), ("sequence", "linear", "local"), ("mlp", "linear", "none")],
    )
    cases = []
    for m, (window, share), lag in itertools.product((1, 2, 4), ((1, 0.5), (3, 0.3), (9, 1.0)), (1, 2)):
        kind, interface, labels = next(kinds)
        late = _pattern(world, m, STEPS + 2, share, seed=len(cases))
        options = {"post_ahead": False} if len(cases) % 4 == 0 else {}  # as over NCCL
        # AdamW: with SGD some of these diverge, and nan equals nothing
        case = UnlockedCase(kind, interface, m, lag=lag, labels=labels, optimizer="adamw", options=options)
        cases.append(replace(case, window=window, late=late))
    return cases


def _equal(rank: int, world: int) -> list[str]:
    wrong = []
    for case in _cases(world):
        pipeline, oracle = UnlockedPipeline(rank, world, case), UnlockedOracle(world, case)
        for step in range(STEPS):
            pipeline.step(step)
            oracle.step(step)
        wrong += [f"{case}: {each} before flush()" for each in unlocked_differences(pipeline, oracle)]
        pipeline.schedule.flush()
        oracle.reference.flush()
        wrong += [f"{case}: {each} after flush()" for each in unlocked_differences(pipeline, oracle)]
        for step in (STEPS, STEPS + 1):
            pipeline.step(step)
            oracle.step(step)
        wrong += [f"{case}: {each} afterwards" for each in unlocked_differences(pipeline, oracle)]
        if set(pipeline.schedule.early_starts) != {start for start in case.late or () if start[0] == rank}:
            wrong.append(f"{case}: other microbatches started early than were told to")
    return wrong


@pytest.mark.parametrize("world", [2, 3])
def test_forced_starts_equal_the_oracles_for_every_m(world: int) -> None:
    assert run_ranks(world, _equal) == [[]] * world


def test_the_oracle_notices_one_start_and_another_window() -> None:
    """The comparison can fail."""
    late = ((1, 2, 1),)
    cases = [UnlockedCase(m=2, late=()), UnlockedCase(m=2, late=late), UnlockedCase(m=2, late=late, window=4)]
    oracles = [UnlockedOracle(2, case) for case in cases]
    for oracle, step in itertools.product(oracles, range(STEPS)):
        oracle.step(step)
    real, early, wider = ([*oracle.reference.stages[1].parameters()] for oracle in oracles)
    assert not all(torch.equal(a, b) for a, b in zip(real, early, strict=True))
    inputs = [[*oracle.reference.input_learners[1].interfaces.parameters()] for oracle in oracles[1:]]  # type: ignore[attr-defined]
    assert not all(torch.equal(a, b) for a, b in zip(*inputs, strict=True)), "the window says when it learns"


def _after_waiting(rank: int, world: int) -> list[str]:
    """Models of the inputs learn under `wait` already; all stages may fall back to it."""
    late = tuple(start for start in _pattern(world, 2, 7, 0.6, seed=1) if start[1] >= 3)
    case = UnlockedCase("mlp", "linear", 2, late=tuple(s for s in late if s[1] < 5), unlock_after_steps=3)
    pipeline, oracle = UnlockedPipeline(rank, world, case), UnlockedOracle(world, case)
    wrong = []
    for step in range(7):
        if step == 5:
            pipeline.flow.fell_back = oracle.reference.fell_back = True
        pipeline.step(step)
        oracle.step(step)
        if step == 2 and rank > 0 and not float(pipeline.schedule.metrics["input_r2"]) > -10:
            wrong.append("the model of the inputs has not learned under wait")
    return wrong + unlocked_differences(pipeline, oracle)


def test_phases_of_wait_take_real_inputs_and_train_the_models_of_the_inputs() -> None:
    assert run_ranks(3, _after_waiting) == [[], [], []]


def _saving(rank: int, world: int) -> list[str]:
    """Saving changes nothing, and the run that goes on ends as the one that saved; all as the oracle."""
    wrong = []
    for m, window in ((1, 3), (4, 5)):
        case = UnlockedCase(
            "sequence", "linear", m, optimizer="adamw", late=_pattern(world, m, 8, 0.5, seed=m), window=window
        )
        saving, oracle = UnlockedPipeline(rank, world, case), UnlockedOracle(world, case)
        for step in range(8):
            saving.step(step)
            oracle.step(step)
            if step in (0, 4):
                parts = (saving.module.state_dict(), saving.optimizer.state_dict(), saving.schedule.state_dict())
                saved = copy.deepcopy(parts)
        wrong += [f"{case}: {each} in the run that saves" for each in unlocked_differences(saving, oracle)]
        resumed = UnlockedPipeline(rank, world, case)
        resumed.module.load_state_dict(saved[0])
        resumed.optimizer.load_state_dict(saved[1])
        resumed.schedule.load_state_dict(saved[2])
        for step in range(5, 8):
            resumed.step(step)
        resumed.losses = []
        resumed.true_grads = []
        wrong += [f"{case}: {each} in the run that goes on" for each in _parameters_differ(resumed, oracle)]
        if resumed.schedule.early_starts != saving.schedule.early_starts:
            wrong.append(f"{case}: the starts before the save are forgotten")
    return wrong


def _parameters_differ(pipeline: UnlockedPipeline, oracle: UnlockedOracle) -> list[str]:
    return [
        each for each in unlocked_differences(pipeline, oracle) if each in ("parameters", "the model of the inputs")
    ]


def test_a_run_that_saves_one_that_goes_on_and_the_oracle_end_bit_equal() -> None:
    assert run_ranks(3, _saving) == [[], [], []]


def _disturbed(rank: int, world: int) -> list[str]:
    """Evaluation between the steps, and other lengths while late activations of the old ones are still unseen."""
    wrong = []
    for m in (1, 2):
        case = UnlockedCase(
            "sequence", "local_head", m, optimizer="adamw", late=_pattern(world, m, 6, 0.5, seed=m), window=3
        )
        pipeline, oracle = UnlockedPipeline(rank, world, case), UnlockedOracle(world, case)
        disturb(pipeline, oracle, evaluations=(0, 1, 2, 0, 1, 2))
        wrong += [f"{case}: {each}" for each in unlocked_differences(pipeline, oracle)]
    return wrong


def test_evaluation_and_changed_shapes_between_steps_change_no_number() -> None:
    assert run_ranks(3, _disturbed) == [[], [], []]


def _forgetful(rank: int, world: int) -> list[Any]:
    """What is told of 12 early starts where 5 are kept: before a save, after it, and by the run that goes on."""
    unlocked_flow.KEPT_STARTS = 5
    case = UnlockedCase(m=2, late=tuple(itertools.product([1], range(8), range(2))))
    saving, resumed, told = UnlockedPipeline(rank, world, case), UnlockedPipeline(rank, world, case), []
    for step in range(6):
        saving.step(step)
    told.append((saving.schedule.early_starts, saving.schedule.metrics["early_starts"]))
    resumed.schedule.load_state_dict(copy.deepcopy(saving.schedule.state_dict()))
    for pipeline in (saving, resumed):
        pipeline.step(6)
        metrics = pipeline.schedule.metrics
        told.append((pipeline.schedule.early_starts, metrics["early_starts"], metrics["early_in_step"]))
    return told


def test_the_newest_early_starts_are_kept_and_all_are_counted() -> None:
    first, second = run_ranks(2, _forgetful)
    assert first == [((), 0), ((), 0, ""), ((), 0, "")]
    assert second[0] == (((1, 3, 1), (1, 4, 0), (1, 4, 1), (1, 5, 0), (1, 5, 1)), 12)
    assert second[1] == second[2] == (((1, 4, 1), (1, 5, 0), (1, 5, 1), (1, 6, 0), (1, 6, 1)), 14, "0 1")


def _lately(rank: int, world: int) -> list[str]:
    """Real lateness: stage 0 stalls twice. The oracle replays what all stages say that they did."""
    case = UnlockedCase("mlp", "mlp", 2, patience_s=0.1, late=None, window=4)
    pipeline, logged = UnlockedPipeline(rank, world, case), set()
    for step in range(12):
        time.sleep(0.6 if rank == 0 and step in (4, 8) else 0.0)
        pipeline.step(step)
        metrics = pipeline.schedule.metrics
        logged |= {(rank, step, int(number)) for number in str(metrics["early_in_step"]).split()}
    told: list[tuple[Start, ...]] = [()] * world
    dist.all_gather_object(told, pipeline.schedule.early_starts)
    everything = {start for starts in told for start in starts}
    oracle = UnlockedOracle(world, case, late=everything)
    for step in range(12):
        oracle.step(step)
    wrong = unlocked_differences(pipeline, oracle)
    number = int(pipeline.schedule.metrics["early_starts"])
    if number != len(logged) or logged != set(pipeline.schedule.early_starts):
        wrong.append("metrics tell of other starts than the schedule has kept")
    if rank == 1 and not 0 < number < 24:
        wrong.append(f"{number} early starts of 24: the test wants some of both")
    return wrong


def test_what_was_late_in_a_real_run_is_replayed_bit_for_bit() -> None:
    assert run_ranks(3, _lately) == [[], [], []]


def _patient(rank: int, world: int) -> int:
    """Stages that work equally fast and wait a little for their input find it in time."""
    pipeline = UnlockedPipeline(rank, world, UnlockedCase(m=2, patience_s=5.0, late=None))
    for step in range(6):
        pipeline.step(step)
    return len(pipeline.schedule.early_starts)


def test_a_patient_stage_starts_from_real_inputs() -> None:
    assert run_ranks(3, _patient) == [0, 0, 0]


def _threads_left(rank: int, world: int) -> list[list[str]]:
    """Of boundaries, while there is a schedule, and when it has been flushed and is gone."""

    def names() -> list[str]:
        return [each.name for each in threading.enumerate() if each.name.startswith("dnipipe boundary")]

    pipeline = UnlockedPipeline(rank, world, UnlockedCase(m=2))
    for step in range(3):
        pipeline.step(step)
    pipeline.schedule.flush()
    before = names()
    del pipeline
    gc.collect()
    deadline = time.monotonic() + 10.0
    while names() and time.monotonic() < deadline:
        time.sleep(0.01)
    return [before, names()]


def test_no_thread_is_left_of_a_schedule_that_is_flushed_and_gone() -> None:
    assert run_ranks(3, _threads_left) == [[[], []], [["dnipipe boundary 1-0"], []], [["dnipipe boundary 2-1"], []]]
