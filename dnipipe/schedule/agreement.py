"""What all stages settle once, at the first training step: labels, interfaces, and whether synthetic gradients are
possible.

Each rank tells what it knows; every rank then draws the same conclusions from the same facts, by a pure function. So a
contradiction raises the same error everywhere, and no rank is left waiting for one that has given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..interface import TensorMeta, check_interface, choose_interface, is_integer
from .choose import resolve
from .facts import GIVEN, Facts, agree_on_labels, agree_on_num_classes, check_equal
from .forward_unlocked import check_inputs_known, missing
from .policy import AUTO, Policy


@dataclass(frozen=True)
class Agreement:
    """labels: local | relay | none. needs_grad: per output of this stage. interfaces: their names, () on the last
    stage.

    policy: as asked for, or what `auto` has come to. stays_at_wait: why no synthetic gradient is possible; None where
    it is. every_rank_has_target: a changed target shape is seen by all.
    """

    num_stages: int
    policy: Policy
    labels: str
    label: TensorMeta | None
    num_classes: int
    num_classes_told: bool
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
    alike = "num_microbatches", "policy", "labels", "check_every_steps", "fall_back", "optimizer", "forward_unlocked"
    for name in alike:
        check_equal({fact.rank: getattr(fact, name) for fact in facts}, name)
    asked = facts[0].policy
    policy, why = _choose(facts) if asked.name == AUTO else (asked, "")
    if policy.predicts:
        labels, label = agree_on_labels(facts)
    else:
        labels, label = "none", None
    _check_unlocked(facts, labels)
    num_classes, told = agree_on_num_classes(facts, label)
    cuts = range(len(facts) - 1)
    chosen = [_interfaces(facts, upper, label, num_classes) if policy.predicts else () for upper in cuts]
    problem = next((names for names in chosen if isinstance(names, str)), None)
    if problem is not None and policy.needs_predictor:
        if asked.name != AUTO:
            raise ValueError(f"policy {policy.name!r} {problem}")
        policy, why = asked.chosen("wait"), f"it stays at policy wait, because it {problem}"
    names = [names for names in chosen if not isinstance(names, str)]
    last = stage == len(facts) - 1
    return Agreement(
        num_stages=len(facts),
        policy=policy,
        labels=labels,
        label=label,
        num_classes=num_classes,
        num_classes_told=told,
        needs_grad=() if last else facts[stage + 1].inputs_needing_grad,
        interfaces=() if last or problem is not None else names[stage],
        stays_at_wait=problem,
        every_rank_has_target=all(fact.has_target for fact in facts),
        summary=_summary(facts, policy, why, labels, _classes(facts, label, num_classes, told), names),
    )


def _check_unlocked(facts: Sequence[Facts], labels: str) -> None:
    """Raises: ValueError where stages shall start before their input is there, and cannot."""
    unlocked, lower = facts[0].forward_unlocked, facts[1:]
    if unlocked is None:
        return
    if facts[0].net_input is None:  # by keyword, where no stage would look for it
        raise ValueError(missing(facts[0].rank, 0))
    if labels == "relay":
        raise ValueError(
            "under forward_unlocked labels do not travel with activations, which may be late: pass target= on every "
            "rank, or labels='none'"
        )
    sent = [[TensorMeta(tuple(shape), dtype) for shape, dtype in fact.outputs] for fact in facts[:-1]]
    net_inputs, given = ([getattr(fact, name) for fact in lower] for name in ("net_input", "has_input_model"))
    check_inputs_known([fact.rank for fact in lower], net_inputs, sent, unlocked.num_tokens, given)


def _choose(facts: Sequence[Facts]) -> tuple[Policy, str]:
    """What `auto` comes to, and why."""
    unable = next((fact for fact in facts if fact.no_graphs is not None), None)
    return resolve(
        facts[0].policy,
        len(facts),
        facts[0].num_microbatches,
        facts[0].optimizer,
        interface_on=next((fact.stage for fact in facts if fact.interfaces), None),
        no_graphs=f"stage {unable.stage} holds no graphs: {unable.no_graphs}" if unable is not None else None,
    )


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
        _check_asked(upper, asked, needing, num_classes)
        return asked
    names = [choose_interface(meta, label, num_classes) for meta in needing]
    for name, meta in zip(names, needing, strict=True):
        if name is None:
            return (
                f"knows no interface for stage {upper}'s activation of shape {tuple(meta.shape)} without integer "
                f"labels and their number: pass target= on every rank, or label_fn= on the first stage (with "
                f"num_classes= if it is not the last stage's last axis), or interface= (docs/guide.md, Interfaces)"
            )
    return tuple(str(name) for name in names)


def _check_asked(stage: int, asked: Sequence[str], needing: Sequence[TensorMeta], num_classes: int) -> None:
    """Here and not where it is built, so that every rank refuses and none waits for one that has."""
    for name, meta in zip(asked, needing, strict=True):
        try:
            if not name.startswith(GIVEN):
                check_interface(name, meta, num_classes=num_classes)
        except ValueError as error:
            raise ValueError(f"stage {stage}: {error}") from None


def _classes(facts: Sequence[Facts], label: TensorMeta | None, num_classes: int, told: bool) -> str:
    """What interfaces are told of the label's classes, and why nothing where that may surprise."""
    if num_classes:
        return f", {num_classes} classes"
    are_given = all(name.startswith(GIVEN) for fact in facts[:-1] for name in fact.interfaces or ("auto",))
    if told or are_given or label is None or not is_integer(label.dtype) or not facts[-1].outputs:
        return ""
    target, output = tuple(label.shape), tuple(facts[-1].outputs[0][0])
    return f", no classes known by a target of shape {target} and an output of {output}: pass num_classes="


def _summary(
    facts: Sequence[Facts], policy: Policy, why: str, labels: str, classes: str, names: list[tuple[str, ...]]
) -> str:
    num_stages, num_microbatches = len(facts), facts[0].num_microbatches
    phases = [phase.policy + (f" for {phase.num_steps} steps" if phase.num_steps else "") for phase in policy.phases]
    when = "policy " + ", then ".join(phases)
    if any(phase.policy == "synthetic" for phase in policy.phases):
        when += f", lag {policy.lag}"
    if policy.late:
        held = "as measured" if policy.in_flight == AUTO else ", ".join(map(str, policy.held(num_stages)))
        when += f", in flight by stage {held}"
        when += f", {policy.late_weights} weights" if policy.late_weights != Policy.late_weights else ""
    unlocked = facts[0].forward_unlocked
    if unlocked is not None:
        when += f", window {unlocked.window}"
        when += f", patience {unlocked.patience_s:g} s" if unlocked.late is None else f", late {len(unlocked.late)}"
    chosen = f". Chosen by auto: {why}" if why else ""
    plural = "es" if num_microbatches > 1 else ""
    conditioned = f"labels {labels}{classes}"
    if policy.predicts and labels == "none" and facts[0].labels == "auto" and facts[0].label is not None:
        target, activation = tuple(facts[0].label.shape), tuple(facts[0].outputs[0][0])
        conditioned += f", for a target of shape {target} has no row for each of the activation's {activation}"
    interfaces = ", ".join("+".join(each) or "none" for each in names) or "none"
    return (
        f"DNI over {num_stages} stages, {num_microbatches} microbatch{plural}: {when}; "
        f"interfaces by stage: {interfaces} ({conditioned}){chosen}"
    )
