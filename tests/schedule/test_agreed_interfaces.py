"""Which interface each stage gets, which pipelines stay at `wait` for want of one, and what is said about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dnipipe.interface import TensorMeta
from dnipipe.schedule.agreement import GIVEN, Facts, agree
from dnipipe.schedule.choose import choose_policy
from dnipipe.schedule.policy import Policy
from tests.schedule.facts import (
    FLOAT,
    LONG,
    ROW,
    ROWS,
    TOKENS,
    B,
    C,
    D,
    T,
    V,
    agree_all,
    changed,
    label_meta,
    refusal,
    stages,
)

IMAGE, SEQUENCE = (B, C, T, T), (B, T, D)


@pytest.mark.parametrize(
    "label, hidden, logits, told, name",
    [
        (label_meta(), ROW, (B, V), "TTT", "local_head"),
        (label_meta(), ROW, (B, V), "---", "mlp"),
        (label_meta(), IMAGE, (B, V), "---", "conv"),
        (label_meta(TOKENS), SEQUENCE, (B, T, V), "TTT", "local_head"),
        (label_meta(TOKENS), SEQUENCE, (B, V, T), "F--", "local_head"),
        (label_meta(), SEQUENCE, (B, V), "TTT", "local_head"),
    ],
)
def test_each_stage_gets_the_interface_of_its_activation(
    label: TensorMeta, hidden: tuple[int, ...], logits: tuple[int, ...], told: str, name: str
) -> None:
    agreements = agree_all(stages(told, label, (hidden,), logits))
    assert [agreement.interfaces for agreement in agreements] == [(name,), (name,), ()]
    assert [agreement.needs_grad for agreement in agreements] == [(True,), (True,), ()]
    assert {agreement.stays_at_wait for agreement in agreements} == {None}


def _no_interface(stage: int, shape: tuple[int, ...]) -> str:
    return (
        f"knows no interface for stage {stage}'s activation of shape {shape} without integer labels and their number: "
        "pass target= on every rank, or label_fn= on the first stage (with num_classes= if it is not the last stage's "
        "last axis), or interface= (docs/guide.md, Interfaces)"
    )


@pytest.mark.parametrize(
    "label, hidden, logits, told",
    [
        (label_meta(TOKENS), SEQUENCE, (B, T, V), "--T"),  # no label above
        (label_meta(TOKENS, FLOAT), SEQUENCE, (B, T, V), "TTT"),  # not of integers
        (label_meta(TOKENS), SEQUENCE, (B, T), "TTT"),  # no classes to be found
        (label_meta((B, T - 1)), SEQUENCE, (B, T - 1, V), "TTT"),  # another label per sequence than positions
        (label_meta(), (B, T, C, D, D), (B, V), "TTT"),  # no interface for five axes
    ],
)
def test_without_an_interface_auto_and_wait_stay_at_wait_and_synthetic_is_refused(
    label: TensorMeta, hidden: tuple[int, ...], logits: tuple[int, ...], told: str
) -> None:
    for policy in ("auto", "wait"):
        for agreement in agree_all(stages(told, label, (hidden,), logits, policy=Policy(policy), no_graphs="a hook")):
            assert agreement.stays_at_wait == _no_interface(0, hidden)
            assert agreement.interfaces == ()
    message = refusal(stages(told, label, (hidden,), logits, policy=Policy("synthetic")))
    assert message == f"policy 'synthetic' {_no_interface(0, hidden)}"


def test_one_stage_without_an_interface_holds_all_of_them_and_is_named() -> None:
    auto = stages("---T", hidden=(ROW,), policy=Policy("auto"), no_graphs="a hook")
    facts = changed(auto, 1, outputs=((torch.Size(SEQUENCE), FLOAT),))
    assert [agreement.stays_at_wait for agreement in agree_all(facts)] == [_no_interface(1, SEQUENCE)] * 4
    asked = changed(facts, 1, interfaces=("transformer",))
    assert [agreement.interfaces for agreement in agree_all(asked)] == [("mlp",), ("transformer",), ("mlp",), ()]


def _two_outputs(**values: Any) -> list[Facts]:
    """Of stage 0: a row, integers that need no gradient, an image."""
    outputs = ((torch.Size(ROW), FLOAT), (torch.Size(ROWS), LONG), (torch.Size(IMAGE), FLOAT))
    facts = changed(stages("TTT"), 0, outputs=outputs, **values)
    return changed(facts, 1, inputs_needing_grad=(True, False, True))


@pytest.mark.parametrize(
    "asked, names",
    [
        ((), ("local_head", "conv")),
        (("linear", "conv"), ("linear", "conv")),
        (("linear", f"{GIVEN}Mine"), ("linear", f"{GIVEN}Mine")),
    ],
)
def test_each_output_that_needs_a_gradient_gets_an_interface(asked: tuple[str, ...], names: tuple[str, ...]) -> None:
    agreement = agree(_two_outputs(interfaces=asked), 0)
    assert agreement.interfaces == names
    assert agreement.needs_grad == (True, False, True)


def test_an_object_cannot_serve_two_outputs_nor_three_names_two() -> None:
    for asked in ((f"{GIVEN}Mine",), ("linear", "conv", "mlp")):
        assert refusal(_two_outputs(interfaces=asked)) == (
            f"stage 0 has 2 outputs that need a gradient, interface= gives {len(asked)} ({', '.join(asked)}): give one "
            "per output"
        )


def test_one_name_serves_all_outputs_that_it_fits() -> None:
    facts = changed(stages("TTT", hidden=(ROW, ROW)), 0, interfaces=("linear",))
    assert agree(facts, 0).interfaces == ("linear", "linear")


@pytest.mark.parametrize(
    "name, why",
    [
        (
            "bogus",
            "unknown interface 'bogus': choose one of linear, mlp, conv, local_head, scaled_head, sampled_head",
        ),
        ("conv", f"interface 'conv' takes an activation of shape (B, C, H, W), got {ROW}: choose linear or mlp"),
    ],
)
def test_a_wrong_name_on_one_stage_is_refused_by_all(name: str, why: str) -> None:
    assert refusal(changed(stages("TTT"), 1, interfaces=(name,))).startswith(f"stage 1: {why}")


def test_a_local_head_needs_the_number_of_classes() -> None:
    facts = stages("TTT", hidden=(SEQUENCE,), interfaces=("local_head",), labels="none")
    assert refusal(facts) == (
        "stage 0: num_classes = 0: a local head classifies; give the number of classes, at least 1"
    )


def test_a_stage_whose_outputs_need_no_gradient_has_no_interface() -> None:
    agreement = agree(changed(stages("TTT", interfaces=("linear",)), 1, inputs_needing_grad=(False,)), 0)
    assert agreement.interfaces == () and agreement.stays_at_wait is None


# --- the one line that is said at the start --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy, told, summary",
    [
        (
            Policy("auto"),
            "TTT",
            "policy wait for 300 steps, then stale, in flight by stage 3, 2, 1; interfaces by stage: none, none "
            f"(labels none). Chosen by auto: {choose_policy(3, 2, None)[1]}",
        ),
        (
            Policy("synthetic", 3),
            "---",
            "policy synthetic, lag 3; interfaces by stage: mlp, mlp (labels none)",
        ),
        (
            Policy("synthetic", 1, 7),
            "F--",
            "policy wait for 7 steps, then synthetic, lag 1; interfaces by stage: local_head, local_head "
            "(labels relay, 10 classes)",
        ),
        (
            Policy("wait"),
            "TTT",
            "policy wait; interfaces by stage: local_head, local_head (labels local, 10 classes)",
        ),
        (
            Policy("auto"),
            "T",
            "policy wait for 300 steps, then stale, in flight by stage 1; interfaces by stage: none (labels none). "
            f"Chosen by auto: {choose_policy(1, 2, None)[1]}",
        ),
        (
            Policy("wait:5,stale", in_flight=4),
            "TTT",
            "policy wait for 5 steps, then stale, in flight by stage 4, 3, 1; interfaces by stage: none, none "
            "(labels none)",
        ),
    ],
)
def test_the_summary_says_what_will_happen(policy: Policy, told: str, summary: str) -> None:
    said = {agreement.summary for agreement in agree_all(stages(told, policy=policy))}
    assert said == {f"DNI over {len(told)} stages, 2 microbatches: {summary}"}


def test_the_summary_says_why_auto_stays_at_wait_and_lists_several_interfaces() -> None:
    assert agree(stages("--T", hidden=(SEQUENCE,), policy=Policy("auto"), no_graphs="a hook"), 1).summary == (
        "DNI over 3 stages, 2 microbatches: policy wait; interfaces by stage: none (labels none). Chosen by auto: it "
        f"stays at policy wait, because it {_no_interface(0, SEQUENCE)}"
    )
    assert "interfaces by stage: local_head+conv, local_head (" in agree(_two_outputs(), 2).summary
