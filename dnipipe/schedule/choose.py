"""What `auto` does: the phases, and the late weights, that are best as far as is measured, by stages, microbatches and
optimizer.

What counts is how late gradients are. Under `stale` and `corrected` a microbatch of stage i of S goes backward, on
average, (S - 1 - i) / M updates after its forward: on the first stage (S - 1) / M, where M counts the microbatches of
all step() calls of an update. AdamW bears less of that than Muon, and gains by weights foretold far ahead, which cost
Muon as much as they bring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..plan.phases import AUTO, LATE, PREDICTING, parse_phases, text_of
from .policy import Policy

OPTIMIZERS = ("AdamW", "Muon")


@dataclass(frozen=True)
class Row:
    """Up to `most_late` updates, (S - 1) / M, the phases `policy` are best with `optimizer`, None: with one that nobody
    has named. why: what is measured."""

    optimizer: str | None
    most_late: float
    policy: str
    why: str


# The first that fits counts. Each optimizer's last row takes any lateness. Measured: docs/policies.md.
TABLE = (
    Row("AdamW", 0.75, "wait:300,stale", "late true gradients end within .7 % of backprop's loss, predicted ones 8 %"),
    Row("AdamW", 1.75, "wait:300,stale", "late true gradients end within 2.5 % of backprop's loss, predicted ones 8 %"),
    Row("AdamW", 3.0, "wait:300,stale", "late true gradients end within 7 % of backprop's loss, predicted ones 8 %"),
    Row(
        "AdamW", math.inf, "wait:300,synthetic", "true gradients so late may ruin a run with it, predicted ones do not"
    ),
    Row("Muon", 0.75, "wait:100,stale", "late true gradients end within 0.3 % of backprop's loss"),
    Row("Muon", math.inf, "wait:300,stale", "late true gradients end within 1.5 % of backprop's loss"),
    # AdamW's again, but by weights foretold only as far as gradients are late: an optimizer that nobody has named may
    # bear no more (plain SGD diverges at a seventh of its largest learning rate where weights are foretold by three)
    Row(None, 0.75, "wait:300,stale", "with AdamW late true gradients end within 1.5 % of backprop's loss"),
    Row(None, 1.75, "wait:300,stale", "with AdamW late true gradients end within 6 % of backprop's loss"),
    Row(None, math.inf, "wait:300,synthetic", "with AdamW true gradients so late ruin a run, predicted ones do not"),
)
LATE_WEIGHTS = {"AdamW": "predicted@3"}  # of others: Policy's, as far as gradients are late
WITHOUT_GRAPHS = "wait:200,synthetic"  # where a stage cannot hold graphs until their gradients are here


def choose_policy(num_stages: int, num_microbatches: int, optimizer: str | None) -> tuple[str, str]:
    """(phases, as parse_phases() takes them; the reason, in words).

    Args:   num_microbatches: of an update. optimizer: AdamW, Muon, or None for another.
    Raises: ValueError for another name.
    """
    check_optimizer(optimizer)
    late = (num_stages - 1) / num_microbatches
    row = next(row for row in TABLE if row.optimizer == optimizer and late <= row.most_late)
    named = optimizer or "an optimizer not named"
    return row.policy, f"{row.why}; stage 0's true ones would be {late:.3g} updates late on average, with {named}"


def choose_late_weights(asked: str, optimizer: str | None) -> str:
    """Policy.late_weights as `asked`, or what `auto` means with an optimizer: AdamW, Muon, or None for another."""
    return LATE_WEIGHTS.get(optimizer or "", Policy.late_weights) if asked == AUTO else asked


def resolve(
    asked: Policy,
    num_stages: int,
    num_microbatches: int,
    optimizer: str | None,
    *,
    interface_on: int | None = None,
    no_graphs: str | None = None,
) -> tuple[Policy, str]:
    """What `auto` becomes, its phases in step() calls, and why.

    Args: interface_on: a stage that was given an interface, so that gradients are to be predicted; None: there is none.
          no_graphs: which stage cannot hold graphs, and why; None: all can.
    """
    calls = asked.steps_per_update
    name, why = choose_policy(num_stages, num_microbatches * calls, optimizer)
    chosen = parse_phases(name)
    if no_graphs is not None:
        late = any(phase.policy in LATE for phase in chosen)
        name, why = WITHOUT_GRAPHS, f"{name} is not possible, {no_graphs}" if late else why
    elif interface_on is not None and not any(phase.policy in PREDICTING for phase in chosen):
        name, why = (
            WITHOUT_GRAPHS,
            f"stage {interface_on} was given an interface; without one it would be {name}, for {why}",
        )
    return asked.chosen(text_of(parse_phases(name), times=calls)), why


def check_optimizer(optimizer: str | None) -> None:
    """Raises: ValueError for a name that the table does not know."""
    if optimizer is not None and optimizer not in OPTIMIZERS:
        raise ValueError(
            f"unknown optimizer {optimizer!r}: name {' or '.join(OPTIMIZERS)}, or leave it out if it is another"
        )
