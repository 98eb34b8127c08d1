"""What the stages conclude about labels from what each of them knows: a pure function, so every case is a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dnipipe.interface import TensorMeta
from dnipipe.schedule.agreement import agree
from dnipipe.schedule.policy import Policy
from tests.schedule.facts import FLOAT, ROW, B, T, V, agree_all, changed, label_meta, refusal, stages

# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, told, mode",
    [
        ("auto", "TTT", "local"),
        ("auto", "TT-", "local"),
        ("auto", "T-T", "relay"),
        ("auto", "T--", "relay"),
        ("auto", "F-T", "relay"),
        ("auto", "BTT", "relay"),
        ("auto", "-TT", "none"),
        ("auto", "--T", "none"),
        ("auto", "---", "none"),
        ("local", "TTT", "local"),
        ("local", "TT-", "local"),
        ("local", "FT-", "local"),
        ("relay", "TTT", "relay"),
        ("relay", "T--", "relay"),
        ("relay", "F--", "relay"),
        ("none", "TTT", "none"),
        ("none", "F--", "none"),
        ("auto", "T", "none"),
        ("local", "-", "none"),
        ("relay", "-", "none"),
        ("auto", "TT", "local"),
        ("auto", "F-", "relay"),
    ],
)
def test_labels_go_the_way_that_is_there(asked: str, told: str, mode: str) -> None:
    for agreement in agree_all(stages(told, labels=asked)):
        assert agreement.labels == mode
        assert agreement.label == (None if mode == "none" else label_meta())


def test_a_label_rides_to_the_middle_stages_only_and_only_when_relayed() -> None:
    for mode in ("local", "relay", "none"):
        for agreement in agree_all(stages("TTTT", labels=mode)):
            assert [agreement.relays_label_to(stage) for stage in range(4)] == [False, *[mode == "relay"] * 2, False]


@pytest.mark.parametrize("told, every", [("TTT", True), ("BTT", True), ("FTT", False), ("TT-", False), ("-TT", False)])
def test_a_changed_target_is_seen_by_all_only_if_all_have_one(told: str, every: bool) -> None:
    assert {agreement.every_rank_has_target for agreement in agree_all(stages(told))} == {every}


def test_local_labels_that_are_missing_name_the_ranks() -> None:
    assert refusal(stages("-T-T", labels="local")) == (
        "labels='local' needs target= on every rank but the last, and ranks [10, 12] passed none: pass it there, or "
        "labels='relay' with target= or label_fn= on the first stage"
    )


def test_relayed_labels_must_start_on_the_first_stage() -> None:
    assert refusal(stages("-TT", labels="relay")) == (
        "labels='relay' needs target= or label_fn= on the first stage, which passed neither"
    )


def _rows_message(rank: int, shape: tuple[int, ...]) -> str:
    return (
        f"rank {rank}: the label of one microbatch has shape {shape}, the activation {ROW}: target= must hold one row "
        "for each row of the input, or pass labels='none'"
    )


def test_a_local_label_must_have_the_rows_of_its_activation_on_every_rank() -> None:
    short = changed(stages("TTTT", labels="local"), 1, label=label_meta((B - 1,)))
    assert refusal(short) == _rows_message(11, (B - 1,))
    assert refusal(stages("TTT", label_meta(()), labels="local")) == _rows_message(10, ())
    last = changed(stages("TTT", labels="local"), 2, label=label_meta((B - 1,)))
    assert agree(last, 0).labels == "local", "the last predicts nothing"


def test_local_labels_of_unlike_shapes_are_refused() -> None:
    facts = changed(stages("TTT", label_meta((B, 5)), labels="local"), 1, label=label_meta((B, 6)))
    assert (
        refusal(facts) == "the shape of the target must be the same on every rank, got rank 10: (4, 5), rank 11: (4, 6)"
    )


def test_a_relayed_label_must_have_the_rows_of_the_first_activation_only() -> None:
    facts = stages("TTT", labels="relay")
    assert refusal(changed(facts, 0, label=label_meta((2 * B,)))) == _rows_message(10, (2 * B,))
    assert agree(changed(facts, 1, label=label_meta((2 * B,))), 0).labels == "relay"


def test_auto_leaves_a_target_alone_that_only_the_loss_function_understands() -> None:
    flattened = stages("TTT", label_meta((B * T,)))
    assert [agreement.labels for agreement in agree_all(flattened)] == ["none"] * 3
    said = "(labels none, for a target of shape (24,) has no row for each of the activation's (4, 8))"
    assert all(said in agreement.summary for agreement in agree_all(flattened))
    assert "(labels none)" in agree(stages("TTT", label_meta((B * T,)), labels="none"), 0).summary


def test_a_target_that_does_not_show_the_classes_is_named_with_the_cure() -> None:
    said = "(labels local, no classes known by a target of shape (4, 1) and an output of (4, 10): pass num_classes=)"
    assert all(said in agreement.summary for agreement in agree_all(stages("TTT", label_meta((B, 1)))))
    assert "no classes known" not in agree(stages("TTT"), 0).summary
    assert "no classes known" not in agree(stages("TTT", label_meta((B, 1), FLOAT)), 0).summary, "a regression"
    assert "no classes known" not in agree(stages("---"), 0).summary
    assert "no classes known" not in agree(stages("TTT", label_meta((B, 1)), num_classes=0), 0).summary, "as told"
    own = agree(stages("TTT", label_meta((B, 1)), interfaces=("given: Mine",)), 0)
    assert "no classes known" not in own.summary


# --- what must be equal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"num_microbatches": 3},
            "num_microbatches must be the same on every rank, got rank 10: 2, rank 11: 3, rank 12: 2",
        ),
        ({"labels": "none"}, "labels must be the same on every rank, got rank 10: auto, rank 11: none, rank 12: auto"),
        (
            {"policy": replace(stages()[0].policy, lag=3)},
            "policy must be the same on every rank, got rank 10: lag=2, rank 11: lag=3, rank 12: lag=2",
        ),
        (
            {"policy": Policy("stale", late_weights="old")},
            "policy must be the same on every rank, got rank 10: name='wait:200,synthetic', late_weights='predicted', "
            "rank 11: name='stale', late_weights='old', rank 12: name='wait:200,synthetic', late_weights='predicted'",
        ),
    ],
)
def test_what_differs_between_ranks_is_listed_by_rank(values: dict[str, Any], message: str) -> None:
    assert refusal(changed(stages(), 1, **values)) == message


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label, logits, classes",
    [
        (label_meta((B,)), (B, V), V),
        (label_meta((B, T)), (B, T, V), V),
        (label_meta((B, T)), (B, V, T), V),
        (label_meta((B, T, 5)), (B, V, T, 5), V),
        (label_meta((B, T)), (B, T, T), T),
        (label_meta((B,), torch.uint8), (B, V), V),
        (label_meta((B,), torch.float32), (B, V), 0),
        (label_meta((B,), torch.bool), (B, V), 0),
        (label_meta((B, T)), (B, T), 0),
        (label_meta((B, T)), (B, V), 0),
        (label_meta((B, T)), (B, V, T + 1), 0),
        (label_meta((B,)), (B, T, V), 0),
    ],
)
def test_the_number_of_classes_is_the_axis_that_the_output_has_and_the_label_has_not(
    label: TensorMeta, logits: tuple[int, ...], classes: int
) -> None:
    assert {agreement.num_classes for agreement in agree_all(stages("TTT", label, logits=logits))} == {classes}


def test_a_number_of_classes_that_was_told_on_any_rank_wins() -> None:
    assert agree(changed(stages(), 1, num_classes=99), 0).num_classes == 99
    assert agree(changed(stages("---"), 0, num_classes=99), 2).num_classes == 99


def test_without_labels_or_without_an_output_there_are_no_classes() -> None:
    assert agree(stages("--T"), 0).num_classes == 0
    assert agree(changed(stages(), 2, outputs=()), 0).num_classes == 0
