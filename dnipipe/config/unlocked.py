"""Settings of stages that need not wait for their input: pipeline.forward_unlocked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .section import Section


@dataclass(frozen=True, kw_only=True)
class ForwardUnlockedConfig(Section):
    """When a stage starts from a synthetic input, and what predicts it. See dnipipe/schedule/forward_unlocked.py."""

    section: ClassVar[str] = "pipeline.forward_unlocked"

    window: int = 8
    """Micro-batches that a stage may run ahead of its input; at least 1. Each costs the memory of an input activation
    and of the tokens."""
    patience_s: float = 0.01
    """Seconds that a stage waits for its input before it starts without; at least 0."""
    late: list[list[int]] | None = None
    """Which microbatches start from synthetic inputs, and no other, whatever the timing: [stage, pass, microbatch],
    each from 0, of passes pipeline.accumulate to an optimizer step. null: those whose input is late."""
    num_tokens: int | None = None
    """Tokens that the model of the inputs knows; at least those of the data. null: those of the data."""
    model: str | None = None
    """A function that makes the model of a stage's inputs, an nn.Module, as "module:function"; called as model(tokens,
    None), it returns the activation that the stage receives. null: one hidden layer, token by token."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that function."""
    learning_rate: float = 1e-3
    """Step size of the models of the inputs, by Adam, without a warm-up; above 0."""

    def _check(self) -> None:
        self._require("window", self.window >= 1, "at least 1: at 0 nothing is unlocked, for which take null instead")
        self._require("patience_s", self.patience_s >= 0, "at least 0")
        starts = [] if self.late is None else self.late
        good = all(len(start) == 3 and min(start) >= 0 for start in starts)
        self._require("late", good, "null, or lists of three numbers from 0: stage, pass, microbatch")
        self._require("num_tokens", self.num_tokens is None or self.num_tokens >= 1, "at least 1, or null")
        self._require("options", self.model is not None or not self.options, "empty where there is no model to take it")
        self._require("learning_rate", self.learning_rate > 0, "above 0")
