"""The policies `stale` and `corrected`: a stage goes on forward and goes backward when the true gradient is here.

    stage 0 of 3   F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 ...    1F1B that never flushes, across the steps: `delay` microbatches
    stage 1        F0 F1 B0 F2 B1 F3 B2 F4 B3 ...       go forward before the first goes backward (Policy.delay)
    stage 2        F0 B0 F1 B1 F2 B2 F3 B3 ...

A backward that falls into a later step than its forward runs through the graph of its forward. The weights of both are
those of the forward's step (old_weights.py), or foretold for the backward's (weight_prediction.py); with late_weights
"new" the backward sees those of its own step. Its weight gradients join the update of the step in which it falls. Until
the first gradient is back, upper stages have nothing to update: their parameters' .grad stays None.

Under `corrected` a microbatch whose backward falls into a later step goes backward at once against the predicted
gradient, too, and then against true - predicted. Both together are the true gradient; where the forward and the
backward are in one step, it alone is used. What goes up to the previous stage is always the true gradient: under
`corrected` the sum of both backwards, when the second is done. So no stage's "true" gradient is bootstrapped.

Graphs cannot be saved. flush() and state_dict() therefore complete all backwards that are under way, from the last
stage to the first; what they give is carried to the update of the next step, in the run that saves and in the one that
goes on from what it saved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import scale
from .flow import Flow
from .old_weights import OldWeights
from .policy import LATE
from .replicas import average_grads, averager, replica_groups
from .weight_prediction import Masters, WeightPrediction

_T = TypeVar("_T")


@dataclass
class _Graph:
    """A microbatch between its forward and its last backward.

    outputs: that need a gradient. inputs: received, that need one. predicted: what it went backward against at once;
    None: nothing yet.
    """

    microbatch: int
    weights: OldWeights
    outputs: Sequence[Tensor]
    inputs: Sequence[Tensor]
    predicted: Sequence[Tensor] | None = None
    input_grads: list[Tensor] = field(default_factory=list)

    def backward(self, grads: Sequence[Tensor], *, again: bool = False) -> None:
        """Adds to the gradients of the parameters and to input_grads. again: this was not the last time."""
        pairs = [each for each in zip(self.outputs, grads, strict=True) if each[0].requires_grad]
        if pairs:
            outputs, grads = zip(*pairs, strict=True)
            self.weights.backward(outputs, grads, retain_graph=again)
        new = [torch.zeros_like(each) if each.grad is None else each.grad for each in self.inputs]
        self.input_grads = [a + b for a, b in zip(self.input_grads, new, strict=True)] if self.input_grads else new
        for each in self.inputs:  # not left there to add up: torch clears some of them when the next step begins
            each.grad = None


class LateFlow(Flow):
    """Args: module: the stage's, whose weights the graphs keep. masters: of WeightPrediction. The rest as in Flow."""

    def __init__(self, *, module: nn.Module, masters: Masters | None = None, **flow: Any) -> None:
        super().__init__(**flow)
        self.module = module
        self._graphs: deque[_Graph] = deque()
        self._weights: OldWeights | None = None  # of this step
        self._used: OldWeights | None = None  # of the newest forward
        self._prediction = WeightPrediction(module, masters, self.policy.prediction)
        # what completed backwards leave to the next update, one per parameter; () where there is nothing
        self._carried: Sequence[Tensor | None] = ()
        # DDP's own reduction hangs on the parameters, where late backwards do not come
        self._average = averager(replica_groups(module)) if isinstance(module, DistributedDataParallel) else None

    @property
    def late(self) -> bool:
        """Whether this stage holds graphs in the current step. The last stage has its loss at once."""
        return self.phase in LATE and self.down is not None

    def begin_step(self) -> None:
        super().begin_step()
        if self._graphs:
            self._answered = self._graphs[0].microbatch
        if not self.late:
            self._weights = None
        elif self._weights is None or not self._weights.current:
            self._weights = OldWeights(self.module)
        if not self._foretells:
            self._prediction.forget()
        elif self.step % self.policy.steps_per_update == 0:
            self._prediction.begin_update(self._lates)

    def forward_weights(self) -> AbstractContextManager[None]:
        self._used = self._weights
        if self._used is None:
            return super().forward_weights()
        first = self.microbatch - self.step % self.policy.steps_per_update * self.num_microbatches
        self._used = self._prediction.ahead(self._updates_late(self._forwarded - first)) or self._used
        return self._used.in_place()

    def step_weights(self) -> AbstractContextManager[None]:
        """Of the last stage, which goes backward at once: where all microbatches have foretold weights, its own too."""
        ahead = self._prediction.ahead(0) if self.down is None and self.phase in LATE else None
        return super().step_weights() if ahead is None else ahead.exchanged()

    def _updates_late(self, microbatch: int) -> int:
        """microbatch: since the last update."""
        return self.policy.updates_late(self.stage, self.num_stages, microbatch, self.num_microbatches)

    @property
    def _lates(self) -> Iterator[int]:
        """The numbers of updates that the microbatches of one update are late."""
        return map(self._updates_late, range(self.num_microbatches * self.policy.steps_per_update))

    @property
    def _foretells(self) -> bool:
        """Whether weights are foretold: in a phase that holds graphs and, to know the newest update, shortly before."""
        prediction = self.policy.prediction
        is_ever_late = self.down is not None
        if prediction is None or self.fell_back or not (is_ever_late or prediction.alike):
            return False
        soon = range(self.step, self.step + 2 * self.policy.steps_per_update)
        return any(self.policy.at(step) in LATE for step in soon)

    def hold(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """After a forward and send(): keeps its graph, and goes backward with what is due.

        Args: outputs: that need a gradient. inputs: received, that need one.
        """
        assert self._used is not None and self.down is not None, "only where late"
        newest = self.down.pending[-1]
        graph = _Graph(newest.microbatch, self._used, outputs, inputs)
        self._graphs.append(graph)
        delay = self.policy.delay(self.stage, self.num_stages)
        is_late = graph.microbatch + delay >= self.microbatch + self.num_microbatches
        if self.phase == "corrected" and is_late and newest.activations:
            assert self.learner is not None, "the stages agreed on interfaces"
            with self._span("predict", graph.microbatch):
                graph.predicted = scale.predict(self.learner, newest, self.grad_scale)
            with self._span("backward", graph.microbatch):
                graph.backward(graph.predicted, again=True)
        while self._graphs and self._graphs[0].microbatch <= graph.microbatch - delay:
            self._go_backward(self.give)

    def _go_backward(self, give: Callable[[Sequence[Tensor]], _T]) -> _T:
        """The oldest graph, whose true gradient is waited for. Returns what give() does of the gradients that go up."""
        graph, entry = self._graphs.popleft(), self._arrive()
        assert graph.microbatch == entry.microbatch, "graphs and gradients come in the same order"
        grads: Sequence[Tensor] = scale.true_grads(entry, self.grad_scale)
        if graph.predicted is not None:
            grads = [true - predicted for true, predicted in zip(grads, graph.predicted, strict=True)]
        with self._span("backward", graph.microbatch):
            graph.backward(grads)
        answer = give(graph.input_grads)
        self._learn(entry)
        return answer

    def flush(self) -> None:
        """As Flow, and completes the backwards under way: what they give is carried to the next update."""
        if self._phase not in LATE:
            super().flush()
            return
        self.drain()
        if self.down is not None:
            self.down.collect()
        with self._aside():
            answers = [self._go_backward(self._answer) for _ in range(len(self._graphs))]
        if self.up is not None:
            self.up.answer(answers, self.microbatch)
        super().flush()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Within, parameters gather what is carried; afterwards their own gradients are back."""
        parameters = list(self.module.parameters())
        own = [parameter.grad for parameter in parameters]
        for parameter, carried in zip(parameters, self._carried or [None] * len(own), strict=True):
            parameter.grad = carried
        yield
        self._carried = [parameter.grad for parameter in parameters]
        for parameter, grad in zip(parameters, own, strict=True):
            parameter.grad = grad

    def join(self, divide_by: int = 1) -> None:
        """As Flow; where DDP is around the module, averages all that late backwards gave."""
        is_late = self._weights is not None or any(carried is not None for carried in self._carried)
        for parameter, carried in zip(self.module.parameters(), self._carried, strict=False):
            if carried is not None:
                carried.div_(divide_by)
                parameter.grad = carried if parameter.grad is None else parameter.grad.add_(carried)
        self._carried = ()
        if is_late and self._average is not None:
            average_grads(self.module, self._average)

    def end_step(self) -> None:
        super().end_step()
        if self.step % self.policy.steps_per_update:  # super() has counted this step
            return  # no update comes now
        self._prediction.end_update()
        kept = self._weights if self.policy.late_weights != "new" else None
        if kept is not None and any(graph.weights is kept for graph in self._graphs):
            kept.part()

    def state_dict(self) -> dict[str, Any]:
        """As Flow, with what is carried. Completes the backwards under way, here too."""
        if self._phase in LATE:
            self.flush()
        carried = [None if grad is None else grad.clone() for grad in self._carried]
        return {**super().state_dict(), "carried": carried, "before": self._prediction.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._prediction.load_state_dict(state.get("before", []))
        carried: list[Tensor | None] = state.get("carried", [])
        self._carried = [None if grad is None else grad.to(self.device, copy=True) for grad in carried]
