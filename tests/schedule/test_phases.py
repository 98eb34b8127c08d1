"""One policy after the other: in any order bit-equal to the oracle, saved and gone on with, and what is refused."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from dnipipe.plan.phases import Phase, parse_phases, text_of
from dnipipe.schedule.policy import LATE, Policy
from tests.ranks import run_ranks
from tests.schedule.harness import Case, Oracle, Pipeline, differences, fall_back


def _cases(world: int) -> list[Case]:
    """Every policy before and after every other; some end before the first gradient is back."""
    kinds = itertools.cycle([("mlp", "mlp", "local"), ("sequence", "linear", "relay"), ("mlp", "linear", "none")])
    ms, optimizers = itertools.cycle([1, 4, 2, 8, 3]), itertools.cycle(["optimizer", "adamw"])
    lengths, held = itertools.cycle([3, 1, 2]), itertools.cycle([None, 2 * world - 1])
    cases = []
    for names in itertools.permutations(("wait", "synthetic", "stale", "corrected")):
        kind, interface, labels = next(kinds)
        phases = [*(Phase(name, next(lengths)) for name in names[:3]), Phase(names[3])]
        case = Case(kind, interface, next(ms), text_of(phases), labels=labels, optimizer=next(optimizers))
        case.in_flight = next(held)
        cases.append(case)
    return cases


def _equal(rank: int, world: int, part: int, parts: int) -> list[str]:
    wrong = []
    for case in _cases(world)[part::parts]:
        pipeline, oracle = Pipeline(rank, world, case), Oracle(world, case)
        for step in range(9):
            pipeline.step(step)
            oracle.step(step)
        wrong += [f"{case}: {each}" for each in differences(pipeline, oracle)]
    return wrong


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_order_of_policies_is_equal_to_the_oracle(world: int, part: int) -> None:
    assert run_ranks(world, _equal, part, 2) == [[]] * world


def _parts(pipeline: Pipeline) -> Any:
    modules = pipeline.module.state_dict(), pipeline.optimizer.state_dict(), pipeline.schedule.state_dict()
    return copy.deepcopy(modules)


def _go_on(rank: int, world: int, case: Case, saved: Any, steps: range) -> Pipeline:
    resumed = Pipeline(rank, world, case)
    resumed.module.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    resumed.schedule.load_state_dict(saved[2])
    for step in steps:
        resumed.step(step)
    return resumed


def _saved_at(rank: int, world: int, at: int) -> list[str]:
    wrong = []
    for m, text in (
        (1, "synthetic:3,stale:3,wait"),
        (4, "wait:2,corrected:2,synthetic"),
        (2, "stale:3,synthetic:2,stale"),
    ):
        case = Case("mlp", "mlp", m, text, in_flight=2 * world - 1)
        saving, oracle = Pipeline(rank, world, case), Oracle(world, case)
        saved: Any = None
        for step in range(9):
            if step == at:
                saved = _parts(saving)
                if Policy(text).at(at - 1) in LATE:
                    oracle.reference.complete()
            saving.step(step)
            oracle.step(step)
        wrong += [f"{text}: {each} in the run that saves" for each in differences(saving, oracle)]
        resumed = _go_on(rank, world, case, saved, range(at, 9))
        if not all(torch.equal(a, b) for a, b in zip(saving.state(), resumed.state(), strict=True)):
            wrong.append(f"{text}: the run that goes on ends otherwise")
    return wrong


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6])
def test_a_run_saved_before_at_and_after_a_change_goes_on_bit_equal(at: int) -> None:
    assert run_ranks(3, _saved_at, at) == [[], [], []]


def _under_another(rank: int, world: int) -> list[str]:
    """Saved under one policy and gone on with under another: as if both had been phases of one run."""
    wrong = []
    for m, before, after in ((1, "corrected", "synthetic"), (4, "corrected", "wait"), (2, "synthetic", "corrected")):
        # "old": a run that begins under another policy has no update to foretell weights by
        saving = Pipeline(rank, world, Case("mlp", "mlp", m, before, late_weights="old"))
        oracle = Oracle(world, Case("mlp", "mlp", m, f"{before}:4,{after}", late_weights="old"))
        for step in range(4):
            saving.step(step)
        resumed = _go_on(rank, world, Case("mlp", "mlp", m, after, late_weights="old"), _parts(saving), range(4, 8))
        for step in range(8):
            oracle.step(step)
        resumed.losses = saving.losses + resumed.losses
        resumed.true_grads.clear()
        wrong += [f"{before}, {after}: {each}" for each in differences(resumed, oracle) if "order" not in each]
    return wrong


def test_what_one_policy_leaves_is_taken_up_by_another_that_loads_it() -> None:
    assert run_ranks(3, _under_another) == [[], [], []]


def _fallen_back(rank: int, world: int) -> list[str]:
    wrong = []
    for text in ("synthetic:2,stale", "stale:2,synthetic:3,stale"):
        case = Case("mlp", "mlp", 1, text)
        pipeline = Pipeline(rank, world, case)
        wrong += fall_back(pipeline, Oracle(world, case), steps=7, at=4)
        wrong += [] if pipeline.schedule.metrics["policy"] == "wait" else ["metrics name another policy"]
    return wrong


def test_falling_back_ends_all_phases() -> None:
    assert run_ranks(3, _fallen_back) == [[], [], []]


def _watched(rank: int, world: int) -> list[Any]:
    """A loss that explodes in a later phase: at which steps which policy held."""
    case = Case("mlp", "linear", 2, "wait:3,synthetic:4,stale", options={"check_every_steps": 4})
    pipeline, policies = Pipeline(rank, world, case), []
    for step in range(20):
        if step == 9:
            for parameter in pipeline.module.parameters():
                parameter.data.mul_(30.0)
        pipeline.step(step)
        policies.append(pipeline.schedule.metrics["policy"])
    return policies


def test_a_loss_that_explodes_in_a_later_phase_sends_all_stages_back_to_wait() -> None:
    told = run_ranks(2, _watched)
    # metrics name the policy of the step to come
    before = ["wait"] * 2 + ["synthetic"] * 4 + ["stale"] * 5
    assert told == [[*before, *["wait"] * 9]] * 2


_NO_END = "policy {!r}: the last phase has no end: leave out its steps, as in {!r}, or add what comes after them"
_STEPS = (
    "policy {!r}: 'wait' must hold for a whole number of steps, at least 1, got {!r}: write wait:200, or leave the "
    "phase out"
)
_UNKNOWN = "unknown policy {!r} in {!r}: choose one of auto, corrected, stale, synthetic, wait"


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "wait,stale",
            "policy 'wait,stale': only the last phase has no end: say for how many steps 'wait' holds, as in wait:200",
        ),
        ("wait:5", _NO_END.format("wait:5", "wait")),
        ("wait:5,stale:5", _NO_END.format("wait:5,stale:5", "stale")),
        ("wait:0,stale", _STEPS.format("wait:0,stale", "0")),
        ("wait:-1,stale", _STEPS.format("wait:-1,stale", "-1")),
        ("wait:x,stale", _STEPS.format("wait:x,stale", "x")),
        ("wait:5,hope", _UNKNOWN.format("hope", "wait:5,hope")),
        ("wait:5,", _UNKNOWN.format("", "wait:5,")),
        ("wait:5,auto", "policy 'wait:5,auto': auto chooses all phases: write it alone, or the phases in its place"),
    ],
)
def test_phases_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        Policy(text)
    assert str(refusal.value) == message


def test_a_policy_that_is_no_text_is_refused() -> None:
    phases: Any = [("wait", 200), "stale"]
    with pytest.raises(ValueError, match="a policy is written as text, as in 'wait:200,synthetic:800,stale', got"):
        Policy(phases)


def test_phases_are_read_with_or_without_spaces_and_written_back() -> None:
    phases = parse_phases("wait: 200, synthetic :800,stale")
    assert phases == (Phase("wait", 200), Phase("synthetic", 800), Phase("stale"))
    assert (
        text_of(phases) == "wait:200,synthetic:800,stale"
        and text_of(phases, times=2) == "wait:400,synthetic:1600,stale"
    )
