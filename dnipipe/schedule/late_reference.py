"""The policies `stale` and `corrected` in one process: the oracle of late.py.

Old weights are deep copies of each stage, so nothing here shares memory with what the optimizer moves; with
late_weights "new" the parameters of that copy share theirs, and follow every update; "predicted" moves them on. Time
goes by slots: in slot t microbatch t goes forward through all stages, and each stage goes backward with that of `delay`
slots ago, from the last stage to the first.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .policy import LATE
from .reference import Reference


@dataclass
class _Held:
    """A microbatch on one stage. true: the gradient of its outputs; empty before the next stage has gone backward."""

    microbatch: int
    old: nn.Module
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    label: Tensor | None
    true: list[Tensor] = field(default_factory=list)
    predicted: Sequence[Tensor] | None = None


class LateReference(Reference):
    """As Reference, for any policy."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._held: list[list[_Held]] = [[] for _ in self.stages]
        self._carried: list[dict[str, Tensor]] = [{} for _ in self.stages]
        self._old: list[dict[int, nn.Module]] = [{} for _ in self.stages]
        self._newest: list[list[Tensor]] = []
        self._before: list[list[Tensor]] = []
        self._first = self._since = 0

    def _begin_step(self) -> None:
        self._first = self.microbatch
        if self.step_count % self.policy.steps_per_update == 0:
            self._since, self._before = self.microbatch, self._newest
            self._newest = [[each.detach().clone() for each in stage.parameters()] for stage in self.stages]
        self._old = [{} for _ in self.stages]

    def _weights_for(self, index: int) -> nn.Module:
        """The stage with which the present microbatch goes forward and backward."""
        ahead, distance = 0, self.policy.prediction if self._before else None
        if distance is not None:
            place = (index, len(self.stages), self.microbatch - self._since, self.num_microbatches)
            ahead = self.policy.updates_late(*place)
        if ahead not in self._old[index]:
            kept = self._old[index][ahead] = self._kept(self.stages[index])
            if distance is not None and (ahead or distance.alike):
                weight = 1.0 + distance(ahead)
                for each, now, before in zip(kept.parameters(), self._newest[index], self._before[index], strict=True):
                    each.data = torch.lerp(before, now, weight)
        return self._old[index][ahead]

    def _kept(self, stage: nn.Module) -> nn.Module:
        """What the backwards of this step go through."""
        kept = copy.deepcopy(stage)
        if self.policy.late_weights == "new":
            for parameter, trained in zip(kept.parameters(), stage.parameters(), strict=True):
                parameter.data = trained.data
        return kept

    def _microbatch(self, x: Tensor, target: Tensor, label: Tensor | None) -> Tensor:
        if self.phase not in LATE:
            return super()._microbatch(x, target, label)
        weights = [self._weights_for(index) for index in range(len(self.stages))]
        trained, self.stages = self.stages, weights
        inputs, outputs = self._forward(x)
        self.stages = trained
        for index, old in enumerate(weights):
            kept = [output for output in outputs[index] if output.requires_grad]
            received = [leaf for leaf in inputs[index] if leaf.requires_grad]
            self._held[index].append(_Held(self.microbatch, old, received, kept, label))
        last = self._held[-1][-1]
        loss = self.loss_fn(outputs[-1][0] if len(outputs[-1]) == 1 else outputs[-1], target)
        last.outputs, last.true = [loss], [torch.ones_like(loss)]
        for index in reversed(range(len(self.stages))):
            delay = self.policy.delay(index, len(self.stages))
            newest = self._held[index][-1]
            if self.phase == "corrected" and newest.microbatch - self._first + delay >= self.num_microbatches:
                newest.predicted = self._learner(index).predict([each.detach() for each in newest.outputs], label)
                self._backward(index, newest, newest.predicted, self._grads(index))
            if self._held[index][0].microbatch == self.microbatch - delay:
                self._answer(index, self._grads(index))
        return loss.detach()

    def _grads(self, index: int) -> dict[str, Tensor]:
        """The gradients of a stage's parameters, by name."""
        return {name: each.grad for name, each in self.stages[index].named_parameters() if each.grad is not None}

    def _answer(self, index: int, sums: dict[str, Tensor]) -> None:
        """The oldest microbatch that a stage holds goes backward; what its input gets is the stage before's."""
        held = self._held[index].pop(0)
        use = held.true
        if held.predicted is not None:
            use = [true - predicted for true, predicted in zip(held.true, held.predicted, strict=True)]
        self._backward(index, held, use, sums)
        if index > 0:
            above = next(each for each in self._held[index - 1] if each.microbatch == held.microbatch)
            above.true = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in held.inputs]
        if index < len(self.stages) - 1:
            self.true_grads[index].append((held.microbatch, tuple(held.true)))
            learner = self.learners[index]
            if learner is not None and self._learns:
                learner.learn([each.detach() for each in held.outputs], held.label, held.true)

    def _backward(self, index: int, held: _Held, grads: Sequence[Tensor], sums: dict[str, Tensor]) -> None:
        """Through the old weights, into `sums`: those of the stage's parameters, or others."""
        torch.autograd.backward(list(held.outputs), list(grads), retain_graph=True)
        for (name, old), parameter in zip(held.old.named_parameters(), self.stages[index].parameters(), strict=True):
            if old.grad is not None:
                sums[name] = old.grad if name not in sums else sums[name] + old.grad
                old.grad = None
                if sums is not self._carried[index]:
                    parameter.grad = sums[name]

    def complete(self) -> None:
        for index in reversed(range(len(self.stages))):
            while self._held[index]:
                self._answer(index, self._carried[index])
        super().complete()

    def _join(self, divide_by: int) -> None:
        for stage, carried in zip(self.stages, self._carried, strict=True):
            for name, parameter in stage.named_parameters():
                if name in carried:
                    own, more = parameter.grad, carried[name] / divide_by
                    parameter.grad = more if own is None else own + more
            carried.clear()
