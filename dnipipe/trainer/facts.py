"""What each rank says of itself in a beat, and the line of metrics that all of it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from .layout import Layout

NAN = math.nan


@dataclass(frozen=True)
class Facts:
    """Of one rank; nan: it has none.

    Fields: loss, loss_step: newest mean loss of a step, and that step; of last stages. cosine, r2: of what it predicts
            for its output. wait_s: seconds waited for neighbours so far. bubble: idle share of the newest step that was
            traced. memory_mb: most memory so far, of the device's allocator, or of the process on a CPU.
            grad_norm: of its stage, before clipping. early_starts, input_r2: microbatches so far that began from
            synthetic inputs, and how well these are predicted; where inputs are unlocked.
    """

    loss: float = NAN
    loss_step: float = NAN
    cosine: float = NAN
    r2: float = NAN
    wait_s: float = NAN
    bubble: float = NAN
    memory_mb: float = NAN
    grad_norm: float = NAN
    early_starts: float = NAN
    input_r2: float = NAN

    def row(self) -> list[float]:
        return list(astuple(self))


NUM_FACTS = len(fields(Facts))


def record_of(rows: Sequence[Sequence[float]], layout: Layout) -> dict[str, Any]:
    """The numbers of all ranks under the names of metrics.jsonl; without a value: None. Of synthetic inputs only where
    there are some.

    Lists by rank are of all ranks, those by stage and boundary of the first replica, whose copies are the same. The
    loss is the mean over replicas.
    """
    ranks = [Facts(*row) for row in rows]
    stages = ranks[: layout.num_stages]
    last = [rank for rank in ranks[layout.num_stages - 1 :: layout.num_stages]]
    losses = [rank.loss for rank in last if math.isfinite(rank.loss)]
    known = len(losses) == len(last)
    unlocked = {
        "early_starts_by_rank": [_known(rank.early_starts) for rank in ranks],
        "input_r2_by_boundary": [_known(stage.input_r2) for stage in stages[1:]],
    }
    return {
        "loss": sum(losses) / len(last) if known else None,
        "loss_step": int(last[0].loss_step) if known else None,
        "cosine": _known(stages[0].cosine),
        "cosine_by_boundary": [_known(stage.cosine) for stage in stages[:-1]],
        "r2_by_boundary": [_known(stage.r2) for stage in stages[:-1]],
        "grad_norm_by_stage": [_known(stage.grad_norm) for stage in stages],
        "wait_s_by_rank": [_known(rank.wait_s) for rank in ranks],
        "bubble_by_rank": [_known(rank.bubble) for rank in ranks],
        "peak_memory_mb_by_rank": [_known(rank.memory_mb) for rank in ranks],
        **(unlocked if math.isfinite(ranks[0].early_starts) else {}),
    }


def _known(number: float) -> float | None:
    return number if math.isfinite(number) else None
