"""Facts of made-up stages, and what they lead to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dnipipe.interface import TensorMeta
from dnipipe.schedule.agreement import Agreement, agree
from dnipipe.schedule.facts import Facts
from dnipipe.schedule.policy import Policy

B, T, D, C, V = 4, 6, 8, 3, 10
FLOAT, LONG = torch.float32, torch.int64
ROW, ROWS, TOKENS = (B, D), (B,), (B, T)


def label_meta(shape: Sequence[int] = ROWS, dtype: torch.dtype = LONG) -> TensorMeta:
    return TensorMeta(tuple(shape), dtype)


def stages(
    told: str = "TTT", label: TensorMeta | None = None, hidden: Any = (ROW,), logits: Any = (B, V), **common: Any
) -> list[Facts]:
    """Facts of len(told) stages. told: per stage, T: passes a target, F: has a label_fn, B: both, -: neither.

    hidden: shapes of the outputs of all stages but the last, each of which needs a gradient. Ranks are 10, 11, ...
    """
    last = len(told) - 1
    values: dict[str, Any] = {
        "num_microbatches": 2,
        "policy": Policy("wait:200,synthetic"),
        "labels": "auto",
        "interfaces": (),
        "num_classes": None,
        "check_every_steps": 100,
        "fall_back": True,
        **common,
    }
    return [
        Facts(
            rank=10 + stage,
            stage=stage,
            has_label_fn=has in "FB",
            has_target=has in "TB",
            label=(label or label_meta()) if has != "-" else None,
            outputs=tuple((torch.Size(shape), FLOAT) for shape in ((logits,) if stage == last else hidden)),
            inputs_needing_grad=(True,) * len(hidden) if stage > 0 else (),
            **values,
        )
        for stage, has in enumerate(told)
    ]


def changed(facts: list[Facts], stage: int, **values: Any) -> list[Facts]:
    return [dataclasses.replace(fact, **values) if fact.stage == stage else fact for fact in facts]


def agree_all(facts: list[Facts]) -> list[Agreement]:
    return [agree(facts, stage) for stage in range(len(facts))]


def refusal(facts: list[Facts]) -> str:
    """The message of the ValueError, which must be the same on every stage."""
    messages = set()
    for stage in range(len(facts)):
        with pytest.raises(ValueError) as caught:
            agree(facts, stage)
        messages.add(str(caught.value))
    assert len(messages) == 1
    return messages.pop()
