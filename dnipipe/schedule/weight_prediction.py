"""Weights some updates ahead, for microbatches whose gradient will join a later update.

    w(t + l) is about w(t) + l (w(t) - w(t - 1))        l: updates from the forward to the backward

A gradient that is l updates late is then one at about the weights that it moves. Optimizers with momentum move the
weights much the same way for some updates, so the newest update foretells the next ones, whatever the optimizer is.

Sources: Chen et al. 2018, SpecTrain; Guan et al. 2019, XPipe, which predict by the optimizer's moments instead.

Price: the weights of the step before, and in place of one copy for each update that falls between a forward and its
backward, one for each number of updates that occurs in a step: at most one more.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .old_weights import OldWeights

Masters: TypeAlias = Mapping[nn.Parameter, Tensor]
"""What the optimizer moves, by parameter, where that is not the parameter itself: float32 copies of half precision."""


class WeightPrediction:
    """The weights of one stage, this step's and those foretold.

    Args: module: the stage. masters: of parameters in half precision, in which an update may be lost.
    """

    def __init__(self, module: nn.Module, masters: Masters | None = None) -> None:
        self._module, self._masters = module, masters or {}
        self._newest: list[Tensor] = []  # the present weights
        self._before: list[Tensor] = []  # those before the newest update
        self._made: dict[int, OldWeights] = {}
        self._left: list[tuple[int, ...]] | None = None  # the gradients at the end of the last step before an update

    def begin_update(self) -> None:
        """Call it after each update, so that the newest is known when the first prediction is wanted."""
        if self._left is not None and self._left == self._gradients():
            warnings.warn(
                "late_weights='predicted' takes each step() for an update of the weights, but the gradients of the "
                "last one are still there: say after how many step() the optimizer steps (steps_per_update=), or take "
                "late_weights='old'",
                stacklevel=2,
            )
        self._before, self._newest = self._newest, [value.clone() for value in self._values()]
        self._made = {}

    def end_update(self) -> None:
        """Call it before each update, when its gradients are complete."""
        self._left = self._gradients()

    def _gradients(self) -> list[tuple[int, ...]] | None:
        """Another value after each write to a gradient that torch counts; None where there is none."""
        grads = [parameter.grad for parameter in self._trained() if parameter.grad is not None]
        return [(grad.data_ptr(), grad._version) for grad in grads] or None

    def ahead(self, updates: int) -> OldWeights | None:
        """The weights foretold for so many updates from now; None for 0, and before the first update."""
        if not updates or not self._before:
            return None
        if updates not in self._made:
            values = zip(self._trained(), self._newest, self._before, strict=True)
            # one pass: beyond its end, a line from the weights before to the present ones
            ahead = [torch.lerp(before, now, 1.0 + updates).to(parameter.dtype) for parameter, now, before in values]
            self._made[updates] = OldWeights(self._module, ahead)
        return self._made[updates]

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._module.parameters() if parameter.requires_grad]

    def _values(self) -> list[Tensor]:
        return [self._masters.get(parameter, parameter).detach() for parameter in self._trained()]

    def state_dict(self) -> list[Tensor]:
        """The weights before the newest update and after it, one list after the other."""
        return [value.clone() for value in (*self._before, *self._newest)]

    def load_state_dict(self, state: Sequence[Tensor]) -> None:
        """[] or another cut's begins anew: without a prediction until the next update."""
        values, self._made = self._values(), {}
        parts = [state[at : at + len(values)] for at in range(0, len(state), max(1, len(values)))]
        fits = all([old.shape for old in part] == [own.shape for own in values] for part in parts)
        kept = [
            [old.to(own.device, own.dtype, copy=True) for old, own in zip(part, values, strict=True)]
            for part in (parts if fits else ())
        ]
        self._newest = kept[-1] if kept else []
        self._before = kept[0] if len(kept) == 2 else []
