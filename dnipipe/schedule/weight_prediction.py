"""Weights some updates ahead, for microbatches whose gradient will join a later update.

    w(t + l) is about w(t) + d(l) (w(t) - w(t - 1))        l: updates from the forward to the backward

With d(l) = l a gradient that is l updates late is one at about the weights that it moves. Optimizers with momentum move
the weights much the same way for some updates, so the newest update foretells the next ones, whatever the optimizer is.

A larger distance goes further than the weights will: a gradient from there says earlier that a direction is used up,
as Nesterov's does. With one d for all l, 0 among them, all gradients of an update are from the same weights.

Sources: Chen et al. 2018, SpecTrain; Guan et al. 2019, XPipe, which predict by the optimizer's moments instead.

Price, in sets of weights: the present ones once more (in float32 where there are masters), and one for each d that
occurs, which lives as long as a graph uses it: each update makes new ones while those before may still be in use.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..plan.late_weights import Distance
from .old_weights import OldWeights

AT_ONCE = 16

Masters: TypeAlias = Mapping[nn.Parameter, Tensor]
"""What the optimizer moves, by parameter, where that is not the parameter itself: float32 copies of half precision."""


class WeightPrediction:
    """The weights of one stage as foretold.

    Args: module: the stage. masters: of parameters in half precision, in which an update may be lost. distance: d;
          None: d(l) = l.
    """

    def __init__(self, module: nn.Module, masters: Masters | None = None, distance: Distance | None = None) -> None:
        self._module, self._masters, self._distance = module, masters or {}, distance or Distance()
        self._before: dict[nn.Parameter, Tensor] = {}  # the weights of this update; while _asked, of the last
        self._made: dict[int, OldWeights] = {}
        self._asked: list[int] | None = None  # by begin_update(), and not made yet
        self._left: list[tuple[int, int]] | None = None  # the gradients at the last end_update()
        self._is_off = False

    def begin_update(self, lates: Iterable[int]) -> None:
        """Call it after each update of the weights, which then stay as they are until end_update().

        What is foretold is computed when it is first asked for: by then a GPU has the step's first microbatch to do.

        Args: lates: the numbers of updates that the microbatches until the next one are late.
        """
        if self._left is not None and self._left == self._gradients() and not self._is_off:
            self._is_off = True
            warnings.warn(
                "late_weights='predicted' takes each step() for an update of the weights, but the gradients of the "
                "last one are still there, so it goes on as 'old': say after how many step() the optimizer steps "
                "(steps_per_update=), or take late_weights='old'",
                stacklevel=2,
            )
        self._made, self._asked = {}, sorted({late for late in lates if self._distance.foretells(late)})

    def _make(self) -> None:
        """Once for each update."""
        if self._asked is None:
            return
        lates, self._asked = self._asked, None
        values = self._values()
        # layers that were frozen or unfrozen meanwhile have no update to go by
        knows = values.keys() == self._before.keys()
        distances = {late: self._distance(late) for late in lates} if knows and not self._is_off else {}
        made = {distance: self._foretold(distance, values) for distance in dict.fromkeys(distances.values())}
        self._made = {late: made[distance] for late, distance in distances.items()}
        if not knows:
            self._before = {parameter: value.clone() for parameter, value in values.items()}
        elif values:
            torch._foreach_copy_([self._before[parameter] for parameter in values], list(values.values()))

    def _foretold(self, distance: float, values: dict[nn.Parameter, Tensor]) -> OldWeights:
        # one pass, few launches: beyond its end, a line from the weights before to the present ones
        ahead: list[Tensor] = []
        parameters, present = list(values), list(values.values())
        for first in range(0, len(present), AT_ONCE):  # in float32 no more than so many at a time
            part = slice(first, first + AT_ONCE)
            before = [self._before[parameter] for parameter in parameters[part]]
            made = torch._foreach_lerp(before, present[part], 1.0 + distance)
            ahead += [each.to(parameter.dtype) for parameter, each in zip(parameters[part], made, strict=True)]
        return OldWeights(self._module, ahead)

    def end_update(self) -> None:
        """Call it before each update, when its gradients are complete."""
        self._make()
        self._left = self._gradients()

    def forget(self) -> None:
        """Keeps no weights until begin_update() is called again, for which this is as if it were new."""
        self._before, self._made, self._asked, self._left = {}, {}, None, None

    def ahead(self, updates: int) -> OldWeights | None:
        """The weights of a microbatch so many updates late; None where nothing is foretold for it, and before the first
        update."""
        if self._distance.foretells(updates):
            self._make()
        return self._made.get(updates)

    def _gradients(self) -> list[tuple[int, int]] | None:
        """Another value after each write to a gradient that torch counts; None where there is none."""
        grads = [parameter.grad for parameter in self._module.parameters() if parameter.grad is not None]
        return [(grad.data_ptr(), grad._version) for grad in grads] or None

    @torch.no_grad()
    def _values(self) -> dict[nn.Parameter, Tensor]:
        trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        return {parameter: self._masters.get(parameter, parameter).detach() for parameter in trained}

    def state_dict(self) -> list[Tensor]:
        """The weights that the next ones are compared with. Made between updates, it is all there is to know."""
        self._make()
        return [value.clone() for value in self._before.values()]

    def load_state_dict(self, state: Sequence[Tensor]) -> None:
        """[] or another cut's begins anew: without a prediction until the second update."""
        values, self._made, self._asked = self._values(), {}, None
        fits = [value.shape for value in values.values()] == [value.shape for value in state]
        pairs = zip(values.items(), state, strict=True) if fits else ()
        self._before = {parameter: old.to(own.device, own.dtype, copy=True) for (parameter, own), old in pairs}
