"""Several training steps of a stack in one call; on a GPU a captured graph, so that no kernel waits for Python."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from .batches import Batches
from .stack import Stack

WARM_UP = 3
Draw = Callable[[int], tuple[Tensor, ...]]


def largest_divisor(number: int, most: int) -> int:
    """The largest one of `number` that is no more than `most`."""
    return max(each for each in range(1, most + 1) if number % each == 0)


class Steps:
    """Steps step .. step + count - 1 at each call, on the stream that is the current one then and at the making.

    Args:    draw: of a step, on the CPU: which layers go backward and in which order, as Stack.step takes them; or
             nothing. count: steps of a call. capture: False runs them one by one, as on a CPU.
    """

    def __init__(self, stack: Stack, batches: Batches, draw: Draw, count: int, *, capture: bool) -> None:
        self.stack, self.batches, self.draw, self.count = stack, batches, draw, count
        self.graph: torch.cuda.CUDAGraph | None = None
        if capture:
            self._inputs = self._inputs_of(0)
            self._capture()

    def __call__(self, step: int) -> None:
        """Waits for nothing."""
        inputs = self._inputs_of(step)
        if self.graph is None:
            return self._run(inputs)
        for own, new in zip(self._inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()

    def _inputs_of(self, step: int) -> list[Tensor]:
        """Indices (count, S, B), and what is drawn, (count, E, L) each."""
        drawn = [torch.stack(each) for each in zip(*(self.draw(step + n) for n in range(self.count)), strict=True)]
        device = self.batches.images.device
        return [self.batches.indices(step, self.count).clone(), *(each.to(device) for each in drawn)]

    def _run(self, inputs: list[Tensor], count: int | None = None) -> None:
        for number in range(self.count if count is None else count):
            indices, *drawn = (each[number] for each in inputs)
            self.stack.step(*self.batches.take(indices), *drawn)

    def _capture(self) -> None:
        """Libraries and kernels get ready by steps that are undone; the captured ones are not run."""
        before = [each.detach().clone() for each in self.stack.state()]
        for _ in range(WARM_UP):
            self._run(self._inputs, 1)
        self.stack.load(before)
        torch.cuda.current_stream().synchronize()
        gc.collect()  # trainings that have ended are rings of objects: their memory, and nothing to collect meanwhile
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            self._run(self._inputs)
