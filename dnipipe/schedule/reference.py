"""The same algorithm in one process, without pipeline, messages or torch's stages: the oracle of the tests.

for each microbatch   forward through all stages; each stage backpropagates its gradient; what reaches a stage's input
                      is the true gradient of the stage before it, which learns from it `lag` microbatches later

The policies that hold graphs are in late_reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..interface import Learner
from .policy import Policy


class Reference:
    """Args: stages: modules, a stage's output (a tensor or a tuple) is the next one's input. learners: one per stage
    but the last. loss_fn: (output, target) -> scalar. Fields: true_grads: by stage, every (microbatch, gradients) in
    the order in which they come.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        learners: Sequence[Learner | None],
        loss_fn: Callable[[Any, Tensor], Tensor],
        *,
        num_microbatches: int,
        policy: Policy,
        scale_grads: bool = True,
    ) -> None:
        self.stages, self.learners, self.loss_fn = list(stages), list(learners), loss_fn
        self.num_microbatches, self.policy, self.scale_grads = num_microbatches, policy, scale_grads
        self.step_count = self.microbatch = 0
        self.fell_back = False
        self._phase: str | None = None
        self._pending: list[list[tuple[int, tuple[Tensor, ...], Tensor | None, tuple[Tensor, ...]]]] = [
            [] for _ in stages
        ]
        self.true_grads: list[list[tuple[int, tuple[Tensor, ...]]]] = [[] for _ in stages]

    def step(self, x: Tensor, target: Tensor, label: Tensor | None = None) -> list[Tensor]:
        """One training step. label: what the predictors are told (None: nothing). Returns each microbatch's loss."""
        if self._phase not in (None, self.phase):
            self.complete()
        self._phase = self.phase
        losses: list[Tensor] = []
        self._begin_step()
        labels = label.chunk(self.num_microbatches) if label is not None else [None] * self.num_microbatches
        chunks = zip(x.chunk(self.num_microbatches), target.chunk(self.num_microbatches), labels, strict=True)
        for x_mb, target_mb, label_mb in chunks:
            losses.append(self._microbatch(x_mb, target_mb, label_mb))
            self.microbatch += 1
        self._join(1)
        for stage in self.stages:
            for parameter in stage.parameters():
                if parameter.grad is not None and self.scale_grads:
                    parameter.grad.div_(self.num_microbatches)
        self._end_step()
        self.step_count += 1
        return losses

    @property
    def phase(self) -> str:
        """As Flow.phase."""
        return "wait" if self.fell_back else self.policy.at(self.step_count)

    def _begin_step(self) -> None:
        """Called before the first microbatch of a step."""

    def _join(self, divide_by: int) -> None:
        """Adds to the parameters' gradients what a flush has left for the next update."""

    def _microbatch(self, x: Tensor, target: Tensor, label: Tensor | None) -> Tensor:
        waits = self.phase == "wait"
        inputs, outputs = self._forward(x)
        loss = self.loss_fn(outputs[-1][0] if len(outputs[-1]) == 1 else outputs[-1], target)
        true: tuple[Tensor, ...] = ()
        for index in reversed(range(len(self.stages))):
            if index == len(self.stages) - 1:
                loss.backward()
            else:
                kept = [output for output in outputs[index] if output.requires_grad]
                activations = tuple(output.detach() for output in kept)
                grads = true if waits else self._learner(index).predict(activations, label)
                torch.autograd.backward(kept, list(grads))
                self._pending[index].append((self.microbatch, activations, label, true))
                due = self.microbatch if waits else self.microbatch - self.policy.lag
                self._learn(index, due)
            needing = [leaf for leaf in inputs[index] if leaf.requires_grad]
            true = tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in needing)
        return loss.detach()

    def _forward(self, x: Tensor) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
        inputs, outputs = [], []
        leaves: tuple[Tensor, ...] = (x,)
        for index, stage in enumerate(self.stages):
            leaves = self._start(index, leaves)
            inputs.append(leaves)
            output = stage(*leaves)
            outputs.append(output if isinstance(output, tuple) else (output,))
            leaves = tuple(out.detach().requires_grad_(out.requires_grad) for out in outputs[-1])
        return inputs, outputs

    def _start(self, index: int, real: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What a stage starts from, whose real input is there."""
        return real

    def _learner(self, index: int) -> Learner:
        learner = self.learners[index]
        assert learner is not None, f"stage {index} has no predictor"
        return learner

    @property
    def _learns(self) -> bool:
        return self.fell_back or self.policy.learns(self.step_count)

    def _learn(self, index: int, due: int) -> None:
        pending, learner = self._pending[index], self.learners[index]
        while pending and pending[0][0] <= due:
            microbatch, activations, label, true = pending.pop(0)
            self.true_grads[index].append((microbatch, true))
            if learner is not None and self._learns:
                learner.learn(activations, label, true)

    def _end_step(self) -> None:
        for learner in self.learners:
            if learner is not None:
                learner.end_step()

    def flush(self) -> None:
        """As ScheduleDNI.flush."""
        self.complete()
        self._join(self.num_microbatches if self.scale_grads else 1)

    def complete(self) -> None:
        """What Flow.flush does; also what saving does under the policies that hold graphs."""
        for index in range(len(self.stages) - 1):
            self._learn(index, self.microbatch)
        self._end_step()
