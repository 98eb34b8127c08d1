"""Which policy a run goes by at which step, as one text: wait:200,synthetic:800,stale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PREDICTING = ("synthetic", "corrected")  # they use a predicted gradient
LATE = ("stale", "corrected")  # they hold graphs until the true gradient is here
POLICIES = ("wait", "synthetic", *LATE)
AUTO = "auto"


@dataclass(frozen=True)
class Phase:
    """policy: its name. num_steps: how long it lasts, at least 1; None: to the end of the run."""

    policy: str
    num_steps: int | None = None

    def __str__(self) -> str:
        return self.policy if self.num_steps is None else f"{self.policy}:{self.num_steps}"


def parse_phases(text: str) -> tuple[Phase, ...]:
    """The phases of a policy that is not `auto`: one name, or name:steps for all but the last, between commas.

    Raises: ValueError: an unknown name, a phase with no step, one without end before the last, or a last with an end.
    """
    if not isinstance(text, str):
        raise ValueError(f"a policy is written as text, as in 'wait:200,synthetic:800,stale', got {text!r}")
    *others, last = [_parse(each.strip(), text) for each in text.split(",")]
    for phase in others:
        if phase.num_steps is None:
            raise ValueError(
                f"policy {text!r}: only the last phase has no end: say for how many steps {phase.policy!r} holds, as "
                f"in {phase.policy}:200"
            )
    if last.num_steps is not None:
        raise ValueError(
            f"policy {text!r}: the last phase has no end: leave out its steps, as in {last.policy!r}, or add what "
            f"comes after them"
        )
    return (*others, last)


def _parse(phase: str, text: str) -> Phase:
    name, colon, steps = (part.strip() for part in phase.partition(":"))
    where = "" if phase == text else f" in {text!r}"
    if name == AUTO:
        raise ValueError(f"policy {text!r}: {AUTO} chooses all phases: write it alone, or the phases in its place")
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}{where}: choose one of {', '.join(sorted((*POLICIES, AUTO)))}")
    if not colon:
        return Phase(name)
    if not steps.isdecimal() or int(steps) < 1:
        raise ValueError(
            f"policy {text!r}: {name!r} must hold for a whole number of steps, at least 1, got {steps!r}: write "
            f"{name}:200, or leave the phase out"
        )
    return Phase(name, int(steps))


def text_of(phases: Sequence[Phase], *, times: int = 1) -> str:
    """What parse_phases() takes. times: what each number of steps is multiplied by."""
    longer = (Phase(phase.policy, phase.num_steps and phase.num_steps * times) for phase in phases)
    return ",".join(map(str, longer))
