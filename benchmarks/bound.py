"""What theory allows a schedule: no transfer costs anything, no predictor, and the backward takes its parts' time.

GPipe and 1F1B: M / (M + S - 1). Schedules of several stages per rank: their own lists of actions, simulated. DNI: 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.pipelining.schedules import PipelineScheduleMulti

WORK = ("F", "I", "W", "B")
"""Torch's letters for a forward, and a backward of the input, of the weights, of both."""


def bound(schedule: Any, num_stages: int, num_microbatches: int, forward_ms: float, backward_ms: float) -> float | None:
    """Utilisation, 0 to 1, for one microbatch of a rank's share of the model; the backward is split in halves."""
    if isinstance(schedule, PipelineScheduleMulti):
        orders = {
            rank: [action for action in actions if action is not None and _letter(action) in WORK]
            for rank, actions in schedule.pipeline_order.items()
        }
        each = len({action.stage_index for action in orders[0]})
        part_ms = {"F": forward_ms, "I": backward_ms / 2, "W": backward_ms / 2, "B": backward_ms}
        cost_ms = simulate(orders, {name: ms / each for name, ms in part_ms.items()})
        return num_microbatches * (forward_ms + backward_ms) / cost_ms
    return num_microbatches / (num_microbatches + num_stages - 1)


def simulate(orders: Mapping[int, Sequence[Any]], part_ms: Mapping[str, float]) -> float:
    """The time from the first start to the last end of the slowest rank; an action starts when its input is there.

    Raises: ValueError: the lists wait for each other.
    """
    last_stage = max(action.stage_index for actions in orders.values() for action in actions)
    ends: dict[tuple[str, int, int], float] = {}
    at, now = dict.fromkeys(orders, 0), dict.fromkeys(orders, 0.0)
    first: dict[int, float] = {}
    moved = True
    while moved:
        moved = False
        for rank, actions in orders.items():
            while at[rank] < len(actions):
                action = actions[at[rank]]
                kind, stage, microbatch = _letter(action), action.stage_index, action.microbatch_index
                needed = _needed(kind, stage, microbatch, last_stage)
                if needed is not None and needed not in ends:
                    break
                start = max(now[rank], ends[needed] if needed is not None else 0.0)
                first.setdefault(rank, start)
                now[rank] = start + part_ms[kind]
                ends["G" if kind in ("I", "B") else kind, stage, microbatch] = now[rank]
                at[rank] += 1
                moved = True
    if any(at[rank] < len(actions) for rank, actions in orders.items()):
        raise ValueError("the ranks' lists of actions wait for each other")
    return max(now[rank] - first[rank] for rank in orders)


def _letter(action: Any) -> str:
    kind = action.computation_type
    return kind.value if isinstance(kind.value, str) else str(kind)  # 2.11 numbers them, and prints the letter


def _needed(kind: str, stage: int, microbatch: int, last_stage: int) -> tuple[str, int, int] | None:
    """What must have ended before: the stage before for a forward, the stage after for a backward."""
    if kind == "F":
        return ("F", stage - 1, microbatch) if stage > 0 else None
    if kind == "W":
        return ("G", stage, microbatch)
    return ("G", stage + 1, microbatch) if stage < last_stage else ("F", stage, microbatch)
