"""The policies `stale` and `corrected` against the oracle, bit for bit; old weights; saving, evaluation, refusals."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.pipelining import PipelineStage

from dnipipe import ScheduleDNI
from tests.ranks import run_ranks
from tests.schedule import models
from tests.schedule.harness import Case, Oracle, Pipeline, differences, disturb, fall_back

CPU = torch.device("cpu")
STEPS = 6


def _cases(world: int) -> list[Case]:
    kinds = itertools.cycle(
        [
            ("mlp", "mlp", "local"),
            ("sequence", "linear", "relay"),
            ("mlp", "linear", "none"),
            ("sequence", "scaled_head", "relay"),
            ("mlp", "potential", "local"),
        ]
    )
    optimizers, slack = itertools.cycle(["optimizer", "adamw"]), itertools.cycle([None, world, 2 * world - 1])
    cases = []
    for policy, m, unlock in itertools.product(("stale", "corrected"), (1, 2, 4, 8), (0, 2)):
        kind, interface, labels = next(kinds)
        case = Case(kind, interface, m, policy, unlock_after_steps=unlock, labels=labels)
        case.optimizer, case.in_flight = next(optimizers), next(slack)
        case.late_weights = "old"  # those foretold are in test_weight_prediction.py
        cases.append(case)
    return cases


def _optimize(pipeline: Pipeline, oracle: Oracle) -> None:
    """The update that flush() has left."""
    for optimizer in (pipeline.optimizer, *oracle.optimizers):
        optimizer.step()
        optimizer.zero_grad()


def _equal(rank: int, world: int, half: int) -> list[str]:
    wrong = []
    for case in _cases(world)[half::2]:
        pipeline, oracle = Pipeline(rank, world, case), Oracle(world, case)
        for step in range(STEPS):
            pipeline.step(step)
            oracle.step(step)
        wrong += [f"{case}: {each} before flush()" for each in differences(pipeline, oracle)]
        pipeline.schedule.flush()
        oracle.reference.flush()
        _optimize(pipeline, oracle)
        wrong += [f"{case}: {each} after flush()" for each in differences(pipeline, oracle)]
        for step in (STEPS, STEPS + 1):
            pipeline.step(step)
            oracle.step(step)
        wrong += [f"{case}: {each} afterwards" for each in differences(pipeline, oracle)]
    return wrong


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_late_gradients_equal_the_oracles_for_every_m(world: int, half: int) -> None:
    assert run_ranks(world, _equal, half) == [[]] * world


CASES = [
    Case("mlp", "linear", 1, "stale", labels="none", optimizer="adamw"),
    Case("sequence", "linear", 2, "corrected", in_flight=5, labels="relay"),
    Case("mlp", "mlp", 4, "corrected", unlock_after_steps=2),
]


def _saving(rank: int, world: int) -> list[str]:
    """The run that saves equals the oracle that completes at that step; the one that goes on equals the run."""
    wrong = []
    for case in CASES:
        saving, oracle = Pipeline(rank, world, case), Oracle(world, case)
        for step in range(8):
            saving.step(step)
            oracle.step(step)
            if step in (0, 4):
                parts = (saving.module.state_dict(), saving.optimizer.state_dict(), saving.schedule.state_dict())
                saved = copy.deepcopy(parts)
                oracle.reference.complete()
        wrong += [f"{case}: {each} in the run that saves" for each in differences(saving, oracle)]
        resumed = Pipeline(rank, world, case)
        resumed.module.load_state_dict(saved[0])
        resumed.optimizer.load_state_dict(saved[1])
        resumed.schedule.load_state_dict(saved[2])
        for step in range(5, 8):
            resumed.step(step)
        if not all(torch.equal(a, b) for a, b in zip(saving.state(), resumed.state(), strict=True)):
            wrong.append(f"{case}: the resumed run ends otherwise")
    return wrong


def test_a_saved_run_and_the_one_that_goes_on_from_it_end_bit_equal() -> None:
    assert run_ranks(3, _saving) == [[], [], []]


def _disturbed(rank: int, world: int) -> list[str]:
    """Evaluation between the steps, and other lengths while graphs of the old ones are held."""
    wrong = []
    for m, policy in ((1, "stale"), (2, "corrected"), (4, "stale")):
        case = Case("sequence", "local_head", m, policy)
        wrong += disturb(Pipeline(rank, world, case), Oracle(world, case), evaluations=(1, 2, 0, 2, 1, 2))
    return wrong


def test_evaluation_and_changed_shapes_between_steps_change_no_number() -> None:
    assert run_ranks(3, _disturbed) == [[], [], []]


def _fallen_back(rank: int, world: int) -> list[str]:
    """All stages go back to `wait` with graphs under way."""
    wrong = []
    for m, policy in ((1, "corrected"), (4, "stale")):
        case = Case("mlp", "linear", m, policy, labels="none")
        wrong += fall_back(Pipeline(rank, world, case), Oracle(world, case), steps=6, at=3)
    return wrong


def test_falling_back_to_wait_takes_what_is_under_way_into_the_next_update() -> None:
    assert run_ranks(3, _fallen_back) == [[], [], []]


def _first_steps(rank: int, world: int) -> list[bool]:
    """After each step without an optimizer: whether this stage has a gradient."""
    pipeline, known = Pipeline(rank, world, Case("mlp", "linear", 1, "stale", labels="none")), []
    for step in range(4):
        pipeline.step(step, optimize=False)
        known.append(next(pipeline.module.parameters()).grad is not None)
    return known


def test_upper_stages_have_nothing_to_update_until_the_first_gradient_is_back() -> None:
    assert run_ranks(3, _first_steps) == [[False, False, True, True], [False, True, True, True], [True] * 4]


def _hooked(rank: int, world: int) -> list[str]:
    """What is said of a hook of either kind, and of the old FSDP, when a schedule is built that would hold graphs."""
    said = []
    for policy in ("stale", "wait:5,corrected"):
        for hook in ("register_hook", "register_post_accumulate_grad_hook"):
            module = models.build("mlp", world)[rank]
            getattr(module.net[0].weight, hook)(lambda *_: None)
            said.append(_refusal(module, rank, world, policy))
    said.append(_refusal(FullyShardedDataParallel(nn.Linear(2, 2), device_id=CPU), rank, world, "stale"))
    return said


def _refusal(module: nn.Module, rank: int, world: int, policy: str) -> str:
    with pytest.raises(ValueError) as refused:
        ScheduleDNI(PipelineStage(module, rank, world, CPU), 2, models.loss_fn, policy=policy)
    ScheduleDNI(PipelineStage(module, rank, world, CPU), 2, models.loss_fn, policy="wait:5,synthetic")
    return str(refused.value)


def test_what_hangs_on_parameters_is_refused_in_any_phase_that_holds_graphs() -> None:
    for *hooked, sharded in run_ranks(2, _hooked):
        assert [each.partition(": remove it")[0] for each in hooked] == [
            f"policy {policy!r} runs microbatches with copies of the weights of their own step, so hooks on the "
            f"parameters themselves are never called, and 'net.0.weight' has one"
            for policy in ("stale", "stale", "wait:5,corrected", "wait:5,corrected")
        ]
        assert "FullyShardedDataParallel" in sharded
