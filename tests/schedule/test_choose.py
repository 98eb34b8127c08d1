"""What `auto` chooses, from whose table, and where it must not."""

from __future__ import annotations

import contextlib
import io
import math

import pytest
import torch
from torch.distributed.pipelining import PipelineStage

from dnipipe import ScheduleDNI
from dnipipe.plan.phases import parse_phases
from dnipipe.schedule import choose
from dnipipe.schedule.choose import OPTIMIZERS, TABLE, WITHOUT_GRAPHS, Row, choose_late_weights, choose_policy
from dnipipe.schedule.policy import Policy
from tests.ranks import run_ranks
from tests.schedule import models
from tests.schedule.facts import agree_all, changed, refusal, stages
from tests.schedule.harness import Case, Oracle, Pipeline, differences

ROWS = (
    Row("AdamW", 0.5, "wait:2,stale", "late by little"),
    Row("AdamW", 2.0, "corrected", "late by more"),
    Row("AdamW", math.inf, "wait:200,synthetic", "too late"),
    Row("Muon", math.inf, "stale", "bears it"),
    Row(None, 0.5, "wait:3,stale", "late by little"),
    Row(None, math.inf, "corrected", "late by more"),
)


def test_the_table_has_an_answer_for_everything_and_none_that_never_comes() -> None:
    for optimizer in (*OPTIMIZERS, None):
        rows = [row for row in TABLE if row.optimizer == optimizer]
        bounds = [row.most_late for row in rows]
        assert bounds == sorted(set(bounds)) and bounds[-1] == math.inf
    assert {row.optimizer for row in TABLE} == {*OPTIMIZERS, None}
    assert all(parse_phases(row.policy) for row in TABLE)
    assert not Policy(WITHOUT_GRAPHS).late


@pytest.mark.parametrize(
    "num_stages, num_microbatches, optimizer, policy",
    [
        (4, 8, "AdamW", "wait:2,stale"),
        (3, 4, "AdamW", "wait:2,stale"),  # just as late as the row bears
        (4, 4, "AdamW", "corrected"),
        (4, 1, "AdamW", "wait:200,synthetic"),
        (4, 1, "Muon", "stale"),
        (4, 4, None, "corrected"),
        (1, 1, None, "wait:3,stale"),
    ],
)
def test_the_first_row_counts_that_bears_so_late_a_gradient(
    monkeypatch: pytest.MonkeyPatch, num_stages: int, num_microbatches: int, optimizer: str | None, policy: str
) -> None:
    monkeypatch.setattr(choose, "TABLE", ROWS)
    assert choose_policy(num_stages, num_microbatches, optimizer)[0] == policy


def test_the_reason_names_measure_lateness_and_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "TABLE", ROWS)
    late = "late by more; stage 0's true ones would be 0.75 updates late on average, with"
    assert choose_policy(4, 4, "AdamW")[1] == f"{late} AdamW"
    assert choose_policy(4, 4, None)[1] == f"{late} an optimizer not named"


def test_weights_are_foretold_far_ahead_only_with_the_optimizer_that_gains_by_it() -> None:
    assert choose_late_weights("auto", "AdamW") == "predicted@3"
    assert choose_late_weights("auto", "Muon") == choose_late_weights("auto", None) == "predicted"
    assert {choose_late_weights("old", name) for name in (*OPTIMIZERS, None)} == {"old"}


def test_an_optimizer_that_is_not_in_the_table_is_refused() -> None:
    for name in ("SGD", "adamw", ""):
        with pytest.raises(ValueError, match=f"unknown optimizer {name!r}: name AdamW or Muon, or leave it out"):
            choose_policy(2, 2, name)


def test_auto_takes_what_the_table_says_and_needs_no_label_where_that_is_stale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choose, "TABLE", ROWS)
    for agreement in agree_all(stages("---", optimizer="Muon", hidden=((4, 6, 8),), policy=Policy("auto"))):
        assert agreement.policy.phases == Policy("stale").phases
        assert agreement.stays_at_wait is None and agreement.interfaces == () and agreement.labels == "none"
        assert "policy stale, in flight by stage 3, 2, 1; interfaces by stage: none, none" in agreement.summary
        assert ". Chosen by auto: bears it; stage 0's" in agreement.summary
    # told how long to wait, and how many to hold
    auto = Policy("auto", unlock_after_steps=7, in_flight=5)
    assert agree_all(stages(optimizer="Muon", policy=auto))[0].policy == Policy("wait:7,stale", in_flight=5)
    assert agree_all(stages(num_microbatches=4, policy=auto))[0].policy == Policy("wait:7,stale", in_flight=5)
    assert agree_all(stages(num_microbatches=1, policy=auto))[0].policy.name == "wait:7,corrected"


def test_a_stage_that_cannot_hold_graphs_keeps_auto_from_it_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "TABLE", ROWS)
    facts = changed(stages(optimizer="Muon", policy=Policy("auto", in_flight=4)), 1, no_graphs="it has a hook")
    for agreement in agree_all(facts):
        assert agreement.policy == Policy(WITHOUT_GRAPHS)
        assert agreement.summary.endswith(
            "Chosen by auto: stale is not possible, stage 1 holds no graphs: it has a hook"
        )
    assert agree_all(changed(facts, 1, no_graphs=None))[0].policy == Policy("stale", in_flight=4)


def test_several_step_calls_for_an_update_make_gradients_less_late_and_phases_longer() -> None:
    policy = Policy("auto", steps_per_update=8)
    for agreement in agree_all(stages("-" * 8, policy=policy)):  # (8 - 1) / (2 * 8) updates late
        assert agreement.policy.name == "wait:2400,stale"


def test_who_gives_an_interface_wants_predicted_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "TABLE", ROWS)
    facts = changed(stages(optimizer="Muon", policy=Policy("auto")), 1, interfaces=("linear",))
    for agreement in agree_all(facts):
        assert agreement.policy == Policy(WITHOUT_GRAPHS)
        assert ". Chosen by auto: stage 1 was given an interface; without one it would be stale, for bears it;" in (
            agreement.summary
        )


def test_ranks_must_name_the_same_optimizer() -> None:
    facts = changed(stages(), 1, optimizer="Muon")
    assert refusal(facts) == (
        "optimizer must be the same on every rank, got rank 10: None, rank 11: Muon, rank 12: None"
    )


def _auto(rank: int, world: int, optimizer: str | None, hook: bool) -> tuple[list[str], str, str]:
    """A run under `auto` beside the oracle of what it should choose; what it said, and how it ended."""
    choose.TABLE = ROWS
    said = io.StringIO()
    case = Case(
        "mlp", "linear", 4, "auto", labels="none", gives_interface=hook, options={"optimizer": optimizer},
        late_weights="auto",
    )  # fmt: skip
    chosen = {"Muon": "stale", "AdamW": "wait:2,stale", None: "wait:3,stale"}[optimizer]
    pipeline = Pipeline(rank, world, case)
    if hook and rank == 1:
        next(pipeline.module.parameters()).register_hook(lambda grad: grad)
    case.policy = WITHOUT_GRAPHS if hook else chosen
    case.late_weights = "predicted@3" if optimizer == "AdamW" else "predicted"
    oracle = Oracle(world, case)
    with contextlib.redirect_stderr(said):
        for step in range(6):
            pipeline.step(step)
            oracle.step(step)
    flow = pipeline.schedule._flow
    assert flow is not None
    return differences(pipeline, oracle), said.getvalue(), flow.policy.name


@pytest.mark.parametrize("optimizer, chosen", [("Muon", "stale"), (None, "wait:3,stale"), ("AdamW", "wait:2,stale")])
def test_a_run_goes_by_what_auto_has_chosen(optimizer: str | None, chosen: str) -> None:
    told = run_ranks(3, _auto, optimizer, False)
    assert [(wrong, name) for wrong, _, name in told] == [([], chosen)] * 3
    assert ". Chosen by auto: " in told[0][1] and told[1][1] == ""
    assert ("in flight by stage 3, 2, 1, predicted@3 weights" in told[0][1]) == (optimizer == "AdamW")


def test_a_run_with_a_hook_on_a_parameter_does_not_get_what_would_not_call_it() -> None:
    told = run_ranks(3, _auto, "Muon", True)
    assert [(wrong, name) for wrong, _, name in told] == [([], WITHOUT_GRAPHS)] * 3
    assert "stale is not possible, stage 1 holds no graphs: policy 'stale'" in told[0][1]


def _refused(rank: int, world: int) -> str:
    stage = PipelineStage(models.build("mlp", world)[rank], rank, world, torch.device("cpu"))
    with pytest.raises(ValueError) as refused:
        ScheduleDNI(stage, 2, models.loss_fn, optimizer="SGD")
    return str(refused.value)


def test_the_schedule_refuses_an_optimizer_that_it_does_not_know() -> None:
    message = "unknown optimizer 'SGD': name AdamW or Muon, or leave it out if it is another"
    assert run_ranks(1, _refused) == [message]
