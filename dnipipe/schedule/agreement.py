"""What all stages settle once, at the first training step: labels, interfaces, and whether synthetic gradients are
possible.

Each rank tells what it knows; every rank then draws the same conclusions from the same facts, by a pure function. So a
contradiction raises the same error everywhere, and no rank is left waiting for one that has given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..interface import TensorMeta, choose_interface
from .ledger import Metas
from .policy import Policy

GIVEN = "given: "  # prefix of the name of an interface that is an object of the caller's

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Facts:
    """What one stage knows. label: of one microbatch, where this rank has one. interfaces: asked for, () = choose."""

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


@dataclass(frozen=True)
class Agreement:
    """labels: local | relay | none. needs_grad: per output of this stage. interfaces: their names, () on the last
    stage.

    stays_at_wait: why no synthetic gradient is possible; None where it is. every_rank_has_target: a changed target
    shape is seen by all.
    """

    num_stages: int
    labels: str
    label: TensorMeta | None
    num_classes: int
    needs_grad: tuple[bool, ...]
    interfaces: tuple[str, ...]
    stays_at_wait: str | None
    every_rank_has_target: bool
    summary: str

    def relays_label_to(self, stage: int) -> bool:
        """Whether a label comes with each activation that `stage` receives. The last stage predicts nothing."""
        return self.labels == "relay" and 0 < stage < self.num_stages - 1


def agree(facts: Sequence[Facts], stage: int) -> Agreement:
    """The conclusions for `stage` from the facts of all stages in order. Raises: ValueError naming ranks and values."""
    for name in ("num_microbatches", "policy", "labels"):
        _check_equal(facts, name)
    labels, label = _labels(facts)
    num_classes = _num_classes(facts, label)
    chosen = [_interfaces(facts, upper, label, num_classes) for upper in range(len(facts) - 1)]
    problem = next((names for names in chosen if isinstance(names, str)), None)
    if problem is not None and facts[0].policy.name == "synthetic":
        raise ValueError(f"policy 'synthetic' {problem}")
    names = [names for names in chosen if not isinstance(names, str)]
    last = stage == len(facts) - 1
    return Agreement(
        num_stages=len(facts),
        labels=labels,
        label=label,
        num_classes=num_classes,
        needs_grad=() if last else facts[stage + 1].inputs_needing_grad,
        interfaces=() if last or problem is not None else names[stage],
        stays_at_wait=problem,
        every_rank_has_target=all(fact.has_target for fact in facts),
        summary=_summary(facts, labels, num_classes, names, problem),
    )


def _check_equal(facts: Sequence[Facts], name: str) -> None:
    values = {fact.rank: getattr(fact, name) for fact in facts}
    if len(set(values.values())) > 1:
        listed = ", ".join(f"rank {rank}: {value}" for rank, value in values.items())
        raise ValueError(f"{name} must be the same on every rank, got {listed}")


def _labels(facts: Sequence[Facts]) -> tuple[str, TensorMeta | None]:
    """How labels reach the predictors, and what one looks like. The last stage needs none for a predictor."""
    mode, upper = facts[0].labels, facts[:-1]
    without = [fact.rank for fact in upper if fact.label is None]
    if not upper:
        return "none", None
    if mode == "auto" and (upper[0].label is None):
        mode = "none"
    elif mode == "auto":
        mode = "relay" if without or upper[0].has_label_fn else "local"
    if mode == "local" and without:
        raise ValueError(
            f"labels='local' needs target= on every rank but the last, and ranks {without} passed none: pass it there, "
            f"or labels='relay' with target= or label_fn= on the first stage"
        )
    if mode == "relay" and facts[0].label is None:
        raise ValueError("labels='relay' needs target= or label_fn= on the first stage, which passed neither")
    if mode == "none":
        return "none", None
    label = facts[0].label
    assert label is not None
    _check_rows(upper if mode == "local" else upper[:1], mode)
    return mode, label


def _check_rows(facts: Sequence[Facts], mode: str) -> None:
    for fact in facts:
        rows, due = (fact.label.shape or (0,))[0] if fact.label else 0, (fact.outputs[0][0] or (0,))[0]
        if rows != due:
            raise ValueError(
                f"rank {fact.rank}: the label has {rows} rows per microbatch, the activation has {due}: target= must "
                f"hold one row for each row of the input, or pass labels='none'"
            )


def _num_classes(facts: Sequence[Facts], label: TensorMeta | None) -> int:
    """As told, else read off the last stage's output: one more axis than the label, as cross-entropy takes it."""
    told = [fact.num_classes for fact in facts if fact.num_classes is not None]
    if told:
        return max(told)
    if label is None or label.dtype not in INTEGERS or not facts[-1].outputs:
        return 0
    logits, of_label = tuple(facts[-1].outputs[0][0]), tuple(label.shape)
    if logits[:-1] == of_label:
        return logits[-1]
    if len(logits) == len(of_label) + 1 and (*logits[:1], *logits[2:]) == of_label:
        return logits[1]
    return 0


def _interfaces(
    facts: Sequence[Facts], upper: int, label: TensorMeta | None, num_classes: int
) -> tuple[str, ...] | str:
    """The names of the interfaces below stage `upper`, one per output that needs a gradient; or what prevents them."""
    pairs = zip(facts[upper].outputs, facts[upper + 1].inputs_needing_grad, strict=True)
    needing = [TensorMeta(tuple(shape), dtype) for (shape, dtype), needed in pairs if needed]
    asked = facts[upper].interfaces
    if len(asked) == 1 and not asked[0].startswith(GIVEN):
        asked = asked * len(needing)
    if asked and len(asked) != len(needing):
        raise ValueError(
            f"stage {upper} has {len(needing)} outputs that need a gradient, interface= gives {len(asked)} "
            f"({', '.join(asked)}): give one per output"
        )
    if asked:
        return asked
    integer_label = label if label is not None and label.dtype in INTEGERS else None
    names = [choose_interface(meta, integer_label, num_classes) for meta in needing]
    for name, meta in zip(names, needing, strict=True):
        if name is None:
            return (
                f"knows no interface for stage {upper}'s activation of shape {tuple(meta.shape)} without integer "
                f"labels and their number: pass target= on every rank, or label_fn= on the first stage (with "
                f"num_classes= if it is not the last stage's last axis), or interface= (docs/guide.md, Interfaces)"
            )
    return tuple(str(name) for name in names)


def _summary(
    facts: Sequence[Facts], labels: str, num_classes: int, names: list[tuple[str, ...]], problem: str | None
) -> str:
    policy = facts[0].policy
    pipeline = f"DNI over {len(facts)} stages, {facts[0].num_microbatches} microbatches"
    if problem is not None:
        return f"{pipeline}: stays at policy wait, because auto {problem}"
    interfaces = ", ".join("+".join(each) or "none" for each in names)
    conditioned = f"labels {labels}" + (f", {num_classes} classes" if num_classes else "")
    if policy.unlock_step is None:
        when = "true gradients only (policy wait)"
    elif policy.unlock_step:
        when = f"true gradients for {policy.unlock_step} steps, then synthetic, lag {policy.lag}"
    else:
        when = f"synthetic gradients from the first step, lag {policy.lag}"
    return f"{pipeline}: {when}; interfaces by stage: {interfaces or 'none'} ({conditioned})"
