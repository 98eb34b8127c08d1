"""Where a stage stands: as numbers for a log, and in words for whoever must find out why it waits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .flow import Flow

NOT_STARTED: dict[str, float | int | str] = {
    "step": 0, "policy": "wait", "loss": math.nan, "loss_step": -1, "in_flight": 0, "wait_s": 0.0, "cosine": math.nan,
    "r2": math.nan, "early_starts": 0, "early_in_step": "", "input_r2": math.nan,
}  # fmt: skip
"""metrics() before there is a flow."""


def metrics(flow: Flow) -> dict[str, float | int | str]:
    """As ScheduleDNI.metrics says; all names always."""
    loss_step, loss = flow.news.tolist()
    sides = [side for side in (flow.up, flow.down) if side is not None]
    return {
        "step": flow.step,
        "policy": flow.phase,
        "loss": loss,
        "loss_step": -1 if math.isnan(loss_step) else int(loss_step),
        "in_flight": len(flow.down.pending) if flow.down is not None else 0,
        "wait_s": sum(side.wait_s for side in sides),
        **(flow.learner.metrics() if flow.learner is not None else {"cosine": math.nan, "r2": math.nan}),
        "early_starts": 0,
        "early_in_step": "",
        "input_r2": math.nan,
    }


def describe(flow: Flow) -> str:
    pending = [entry.microbatch for entry in flow.down.pending] if flow.down is not None else []
    sides = {"previous": flow.up, "next": flow.down}
    under_way = "; ".join(
        f"exchanges under way with the {name} stage {side.under_way}, waited {side.wait_s:.1f} s"
        for name, side in sides.items()
        if side is not None
    )
    return (
        f"step {flow.step} ({flow.phase}), microbatch {flow._forwarded} forward, {flow._answered} backward; "
        f"pending true gradients {pending}; {under_way}"
    )
