"""The policies in one process, as fast as a GPU allows: microbatches equally late go through the model together.

Which microbatches are late, on which stage and by how many steps, follows from (S, M, in_flight) alone, so a step has
few groups of microbatches, mostly one large and some small:

    S = 4, M = 8     microbatch          0 1 2 3 4   5   6   7
                     steps late, stage 0 0 0 0 0 0   1   1   1
                                 stage 1 0 0 0 0 0   0   1   1
                                 stage 2 0 0 0 0 0   0   0   1

The same algorithm as dnipipe/schedule/late_reference.py, which it is tested against: only sums are taken in another
order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dnipipe.interface import Learner
from dnipipe.plan.phases import PREDICTING
from dnipipe.schedule.old_weights import OldWeights
from dnipipe.schedule.policy import LATE, Policy
from dnipipe.schedule.weight_prediction import Masters, WeightPrediction


@dataclass(frozen=True)
class Group:
    """Microbatches first .. first + count - 1 of a step. late: optimizer steps from forward to backward, by stage."""

    first: int
    count: int
    late: tuple[int, ...]


def groups(policy: Policy, num_stages: int, num_microbatches: int, *, step: int) -> list[Group]:
    """The microbatches of one step, in order."""
    holds = policy.at(step) in LATE
    found: list[Group] = []
    for microbatch in range(num_microbatches):
        delays = [policy.delay(stage, num_stages) if holds else 0 for stage in range(num_stages)]
        late = tuple((microbatch + delay) // num_microbatches for delay in delays)
        if found and found[-1].late == late:
            found[-1] = Group(found[-1].first, found[-1].count + 1, late)
        else:
            found.append(Group(microbatch, 1, late))
    return found


@dataclass
class _Held:
    """A group between its forward and its last backward. inputs, outputs, weights, predicted: by stage.

    next: the stage to go backward next, from the last to the first. corrected: it went backward against
    what was predicted, and does so again.
    """

    born: int
    group: Group
    inputs: list[Tensor]
    outputs: list[Tensor]
    labels: tuple[Tensor, ...]
    weights: list[OldWeights | None]
    next: int
    predicted: dict[int, Tensor] = field(default_factory=dict)
    corrected: bool = False


class Grouped:
    """step() leaves in .grad the sums over the M microbatches of what Reference leaves with scale_grads=False.

    Args: stages: modules of one tensor each. learners: one per stage, None for the last. loss_fn: (output, target) ->
          mean loss. policy: with steps_per_update 1. masters: as of WeightPrediction.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        learners: Sequence[Learner | None],
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        *,
        num_microbatches: int,
        policy: Policy,
        masters: Masters | None = None,
    ) -> None:
        self.stages, self.learners, self.loss_fn = list(stages), list(learners), loss_fn
        self.num_microbatches, self.policy = num_microbatches, policy
        self.step_count = 0
        distance = policy.prediction if policy.late else None
        self._predictions = [WeightPrediction(stage, masters, distance) for stage in stages] if distance else []
        self._held: list[_Held] = []
        self._lessons: dict[int, list[tuple[int, Tensor, Tensor, Tensor]]] = defaultdict(list)

    def step(self, x: Tensor, target: Tensor) -> Tensor:
        """Returns the mean loss, (), detached."""
        last, losses = len(self.stages) - 1, []
        phase = self.policy.at(self.step_count)
        holds, predicts = phase in LATE, phase in PREDICTING
        self._current = [OldWeights(stage) for stage in self.stages] if holds else []
        of_step = groups(self.policy, last + 1, self.num_microbatches, step=self.step_count)
        for stage, prediction in enumerate(self._predictions):
            prediction.begin_update(group.late[stage] for group in of_step)
        size = len(x) // self.num_microbatches
        for group in of_step:
            rows = slice(group.first * size, (group.first + group.count) * size)
            held = self._forward(x[rows], target[rows], group)
            losses.append(held.outputs[-1].detach())
            for stage in range(last if predicts else 0):
                if group.late[stage] or not holds:
                    self._predict(held, stage, is_corrected=holds)
        for held in self._held:
            while held.next >= 0 and held.born + held.group.late[held.next] <= self.step_count:
                self._go_backward(held)
        self._held = [held for held in self._held if held.next >= 0]
        self._end_step()
        return torch.stack(losses).sum() / self.num_microbatches

    def _forward(self, x: Tensor, target: Tensor, group: Group) -> _Held:
        weights: list[OldWeights | None] = []
        inputs, outputs, leaf = [], [], x
        for index, stage in enumerate(self.stages):
            own = self._weights(index, group.late[index])
            weights.append(own)
            with nullcontext() if own is None else own.in_place():
                output = stage(leaf)
            inputs.append(leaf)
            outputs.append(output)
            leaf = output.detach().requires_grad_()
        outputs[-1] = self.loss_fn(outputs[-1], target) * group.count  # so gradients are those of each one's own mean
        labels = target.chunk(group.count)
        held = _Held(self.step_count, group, inputs, outputs, labels, weights, len(self.stages) - 1)
        self._held.append(held)
        return held

    def _weights(self, stage: int, late: int) -> OldWeights | None:
        if not self._current:
            return None
        ahead = self._predictions[stage].ahead(late) if self._predictions else None
        return ahead or self._current[stage]

    def _predict(self, held: _Held, stage: int, *, is_corrected: bool) -> None:
        """Remembers what the predictor says; under `corrected` the group goes backward against it at once."""
        learner = self.learners[stage]
        assert learner is not None, "a predictor per stage but the last"
        parts = zip(held.outputs[stage].detach().chunk(held.group.count), held.labels, strict=True)
        predicted = torch.cat([learner.predict([part], label)[0] for part, label in parts])
        held.predicted[stage] = predicted
        if is_corrected:
            held.corrected = True
            self._backward(held, stage, predicted, again=True)

    def _go_backward(self, held: _Held) -> None:
        stage, held.next = held.next, held.next - 1
        if stage == len(self.stages) - 1:
            self._backward(held, stage, torch.ones_like(held.outputs[-1]))
            return
        true = held.inputs[stage + 1].grad
        assert true is not None, "the next stage has gone backward"
        predicted = held.predicted.get(stage)
        if predicted is None:
            self._backward(held, stage, true)
        elif held.corrected:
            self._backward(held, stage, true - predicted)
        else:
            self._backward(held, stage, predicted)
        self._remember_lessons(held, stage, true)

    def _backward(self, held: _Held, stage: int, grad: Tensor, *, again: bool = False) -> None:
        weights, output = held.weights[stage], held.outputs[stage]
        if weights is None:
            torch.autograd.backward(output, grad, retain_graph=again)
        else:
            weights.backward([output], [grad], retain_graph=again)

    def _remember_lessons(self, held: _Held, stage: int, true: Tensor) -> None:
        """When a predictor learns: at once, or where it was used in place of the true gradient, `lag` later."""
        if self.learners[stage] is None:
            return
        synthetic = stage in held.predicted and not held.corrected
        count = held.group.count
        parts = zip(held.outputs[stage].detach().chunk(count), held.labels, true.chunk(count), strict=True)
        for microbatch, (activation, label, part) in enumerate(parts, held.group.first):
            later = (microbatch + self.policy.lag) // self.num_microbatches if synthetic else 0
            self._lessons[self.step_count + later].append((stage, activation, label, part))

    def _end_step(self) -> None:
        for stage, activation, label, true in self._lessons.pop(self.step_count, []):
            learner = self.learners[stage]
            assert learner is not None, "_remember_lessons() has looked"
            learner.learn([activation], label, [true])
        for learner in self.learners:
            if learner is not None:
                learner.end_step()
        for prediction in self._predictions:
            prediction.end_update()
        if self.policy.late_weights != "new":
            for stage, weights in enumerate(self._current):
                if any(held.weights[stage] is weights and held.next >= stage for held in self._held):
                    weights.part()
        self.step_count += 1
