"""Forward-unlocked stages in one process: the oracle of forward_unlocked.py, which replays who started early."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..interface import Learner
from .forward_unlocked import Start
from .reference import Reference


class UnlockedReference(Reference):
    """As Reference. Args: input_learners: one per stage, None for the first. window, late: as of ForwardUnlocked."""

    def __init__(
        self,
        *args: Any,
        input_learners: Sequence[Learner | None],
        window: int,
        late: Collection[Start],
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.input_learners, self.window, self.late = list(input_learners), window, set(late)
        self._first = 0
        self._net_input = torch.empty(0)
        self._unseen: list[deque[tuple[int, Tensor, list[Tensor]]]] = [deque() for _ in self.stages]

    def _begin_step(self) -> None:
        self._first = self.microbatch

    def _forward(self, x: Tensor) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
        self._net_input = x
        return super()._forward(x)

    def _start(self, index: int, real: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        learner = self.input_learners[index]
        if learner is None:
            return real
        self._unseen[index].append((self.microbatch, self._net_input, [each.detach() for each in real]))
        self._learn_inputs(index, self.microbatch - (0 if self.phase == "wait" else self.window))
        if (index, self.step_count, self.microbatch - self._first) not in self.late:
            return real
        synthetic = learner.predict([self._net_input] * len(real), None)
        return tuple(own.requires_grad_(each.requires_grad) for own, each in zip(synthetic, real, strict=True))

    def _learn_inputs(self, index: int, due: int) -> None:
        learner, unseen = self.input_learners[index], self._unseen[index]
        while learner is not None and unseen and unseen[0][0] <= due:
            _, x, real = unseen.popleft()
            learner.learn([x] * len(real), None, real)

    def _end_step(self) -> None:
        super()._end_step()
        for learner in self.input_learners:
            if learner is not None:
                learner.end_step()

    def complete(self) -> None:
        for index in range(len(self.stages)):
            self._learn_inputs(index, self.microbatch)
        super().complete()
