"""What a stage remembers of a microbatch between its forward and the use of its true gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Pending:
    """A microbatch sent down whose true gradient has not been used yet.

    activations: the outputs that need a gradient, detached. true_grads: of the same shapes, to be read once `arrived`.
    scale: (), what the next stage's gradients were multiplied by when it sent these; None before they arrive.
    """

    microbatch: int
    activations: tuple[Tensor, ...]
    label: Tensor | None
    true_grads: list[Tensor] = field(default_factory=list)
    news: Tensor | None = None
    scale: Tensor | None = None
    arrived: bool = False

    def state_dict(self) -> dict[str, Any]:
        """Only once it has arrived."""
        assert self.arrived, f"the gradient of microbatch {self.microbatch} is still under way"
        return {
            "microbatch": self.microbatch,
            "activations": list(self.activations),
            "label": self.label,
            "true_grads": list(self.true_grads),
            "scale": self.scale,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Pending:
        """What state_dict() gave, on `device`."""
        activations, true_grads = ([each.to(device) for each in state[key]] for key in ("activations", "true_grads"))
        label, scale = (None if each is None else each.to(device) for each in (state["label"], state.get("scale")))
        return cls(state["microbatch"], tuple(activations), label, true_grads, scale=scale, arrived=True)
