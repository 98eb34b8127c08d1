"""How the exchanges of a boundary are timed: what the two ledgers of a boundary (ledger.py) agree on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class StepEnd(Enum):
    """What becomes of the exchanges that reach beyond the end of a step."""

    CLOSE = auto()
    """They carry only gradients and take place now: the step ends with nothing in flight (policy `wait`)."""
    AHEAD = auto()
    """Their receives stay posted between steps, so that a stall of this stage does not hold up the previous one."""
    HOLD = auto()
    """They are posted when the next step begins. For NCCL, where a posted receive is work of the GPU: a synchronize
    before a barrier would wait for ever for the next step."""


@dataclass(frozen=True)
class Rules:
    """How the exchanges of a boundary are timed; both sides go by the same.

    Args: lag: microbatches between an activation and the true gradient that travels beside it.
          window: how many exchanges the lower stage may have posted beyond its last forward, 1 to lag.
          behind: microbatches that go forward on the lower stage before it answers one, 0 to lag - 1.
    """

    lag: int
    window: int
    step_end: StepEnd
    behind: int = 0

    @classmethod
    def choose(cls, lag: int, *, closes: bool, occupies_gpu: bool, ahead: bool | None = None, behind: int = 0) -> Rules:
        """closes: the policy is `wait`. occupies_gpu: of the boundary. ahead: whether receives stay posted between
        steps; None: where that occupies no GPU."""
        window = max(1, lag - 1) if occupies_gpu else lag
        if closes:
            return cls(lag, window, StepEnd.CLOSE)
        ahead = not occupies_gpu if ahead is None else ahead
        return cls(lag, window, StepEnd.AHEAD if ahead else StepEnd.HOLD, behind)
