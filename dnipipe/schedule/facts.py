"""What each stage knows before the stages agree, and what follows for the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..interface import TensorMeta, is_integer
from .announce import Metas
from .forward_unlocked import Agreed
from .policy import Policy

GIVEN = "given: "  # prefix of the name of an interface that is an object of the caller's


@dataclass(frozen=True)
class Facts:
    """What one stage knows.

    label: of one microbatch, where this rank has one. interfaces: asked for, () = choose.

    optimizer: of the stage's weights, as choose.py knows it. no_graphs: why it cannot hold graphs; None: it can.
    forward_unlocked: what must be the same of it; None: inputs are waited for. net_input: of one microbatch, where this
    rank has one. has_input_model: whether a model of its inputs was given.
    """

    rank: int
    stage: int
    num_microbatches: int
    policy: Policy
    labels: str
    has_label_fn: bool
    has_target: bool
    label: TensorMeta | None
    outputs: Metas
    inputs_needing_grad: tuple[bool, ...]
    interfaces: tuple[str, ...]
    num_classes: int | None
    check_every_steps: int
    fall_back: bool
    optimizer: str | None = None
    no_graphs: str | None = None
    forward_unlocked: Agreed | None = None
    net_input: TensorMeta | None = None
    has_input_model: bool = False

    @property
    def label_fits(self) -> bool:
        """Whether the label has one row for each row of the activation."""
        rows = self.label.shape[:1] if self.label is not None else ()
        return tuple(rows) == tuple(self.outputs[0][0][:1])


@dataclass(frozen=True)
class Call:
    """What one rank knows of a call of step() or eval() before torch's sweep over the stages."""

    rank: int
    num_microbatches: int
    trains: bool
    has_target: bool


def check_calls(calls: Sequence[Call]) -> None:
    """Raises: ValueError, alike on every rank. Torch's sweep would fail by a loss of two sizes, or wait for ever."""
    check_equal({call.rank: call.num_microbatches for call in calls}, "n_microbatches")
    training, evaluating = ([call.rank for call in calls if call.trains is each] for each in (True, False))
    if training and evaluating:
        raise ValueError(
            f"rank {evaluating[0]} evaluates while rank {training[0]} trains: give loss_fn= on every rank, not on the "
            f"last alone, and call step() on all of them or eval() on all"
        )


def check_equal(by_rank: Mapping[int, Any], name: str) -> None:
    """Raises: ValueError that lists the ranks, where they do not all have the same value; of policies what differs."""
    if len(set(by_rank.values())) < 2:
        return
    values = [_fields(value) for value in by_rank.values()]
    differing = [field for field in values[0] if any(each.get(field) != values[0][field] for each in values)]
    shown = [", ".join(f"{field}={each.get(field)!r}" for field in differing) for each in values]
    of_each = zip(by_rank, shown if differing else by_rank.values(), strict=True)
    listed = ", ".join(f"rank {rank}: {value}" for rank, value in of_each)
    raise ValueError(f"{name} must be the same on every rank, got {listed}")


def _fields(value: Any) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in fields(value)} if isinstance(value, Policy) else {}


def agree_on_labels(facts: Sequence[Facts]) -> tuple[str, TensorMeta | None]:
    """How labels reach the predictors (local, relay or none), and what one looks like.

    The last stage needs none for a predictor. "auto" takes labels that fit, and leaves others alone, for only the loss
    function knows what they mean; "local" and "relay" insist.
    """
    mode, upper = facts[0].labels, facts[:-1]
    without = [fact.rank for fact in upper if fact.label is None]
    if not upper or mode == "none":
        return "none", None
    if mode == "auto":
        if not upper[0].label_fits:
            return "none", None
        mode = "relay" if upper[0].has_label_fn or not all(fact.label_fits for fact in upper) else "local"
    if mode == "local" and without:
        raise ValueError(
            f"labels='local' needs target= on every rank but the last, and ranks {without} passed none: pass it there, "
            f"or labels='relay' with target= or label_fn= on the first stage"
        )
    if facts[0].label is None:
        raise ValueError("labels='relay' needs target= or label_fn= on the first stage, which passed neither")
    using = upper if mode == "local" else upper[:1]
    _check_rows(using)
    check_equal({fact.rank: fact.label and fact.label.shape for fact in using}, "the shape of the target")
    return mode, facts[0].label


def _check_rows(facts: Sequence[Facts]) -> None:
    for fact in facts:
        if not fact.label_fits and fact.label is not None:
            raise ValueError(
                f"rank {fact.rank}: the label of one microbatch has shape {tuple(fact.label.shape)}, the activation "
                f"{tuple(fact.outputs[0][0])}: target= must hold one row for each row of the input, or pass "
                f"labels='none'"
            )


def agree_on_num_classes(facts: Sequence[Facts], label: TensorMeta | None) -> tuple[int, bool]:
    """(number, whether it was told): as told, else guessed from the last stage's output, 0 for none.

    The guess is cross-entropy's layout, one more axis than the label. It may be wrong, since an integer target need not
    be a class: labels beyond it then count as "no label", and an axis of 1 is never taken for classes.
    """
    told = {fact.rank: fact.num_classes for fact in facts if fact.num_classes is not None}
    check_equal(told, "num_classes")
    if told:
        return next(iter(told.values())), True
    if label is None or not is_integer(label.dtype) or not facts[-1].outputs:
        return 0, False
    logits, of_label = tuple(facts[-1].outputs[0][0]), tuple(label.shape)
    guess = 0
    if logits[:-1] == of_label:
        guess = logits[-1]
    elif len(logits) == len(of_label) + 1 and (*logits[:1], *logits[2:]) == of_label:
        guess = logits[1]
    return (guess if guess > 1 else 0), False
