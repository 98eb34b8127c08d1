"""One stage's part in the algorithm, for any engine that can run a microbatch forward and backward.

    begin_step
      per microbatch   receive -> (forward) -> send -> output_grads -> (backward) -> give -> settle
    end_step

`output_grads` is where `wait` and `synthetic` differ: the predicted gradient at once, or the true one when it is here.
`settle` lets the predictors learn from the true gradients that are due. torch's stages (dni.py) drive it. Where graphs
are held, under `stale` and `corrected`, LateFlow (late.py) says when a microbatch goes backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..interface import Learner
from ..observe.trace import Trace
from . import scale, standing
from .announce import Metas
from .ledger import Downward, Rules, Upward, empty, own
from .pending import Pending
from .policy import LATE, Policy, lag_of_wait


class Flow:
    """Counts microbatches, chooses gradients, keeps the two boundaries of a stage in step.

    Args:   stage, num_stages, num_microbatches: of the pipeline. up, down: the boundaries (None at its ends).
    Fields: learner: the predictors of this stage's outputs, set once they are known; None: only `wait` is possible.
            step: step() calls so far. microbatch: training microbatches of all complete steps.
            forward_span: what the next forward is called in a trace.
            grad_scale: what gradients here are multiplied by at present, more than 0; None: by nothing (scale.py).
    """

    def __init__(
        self,
        *,
        stage: int,
        num_stages: int,
        num_microbatches: int,
        policy: Policy,
        up: Upward | None,
        down: Downward | None,
        device: torch.device,
        trace: Trace,
    ) -> None:
        self.trace = trace
        self.stage, self.num_stages, self.num_microbatches = stage, num_stages, num_microbatches
        self.policy, self.up, self.down, self.device = policy, up, down, device
        self.learner: Learner | None = None
        self.forward_span = "forward"
        self.grad_scale: Callable[[], float] | None = None
        self.step = self.microbatch = 0
        self.fell_back = False
        self._phase: str | None = None  # the policy that the boundaries are set for; None: for none yet
        self._entry: Pending | None = None
        self._forwarded = self._answered = 0
        self._loss_sum: Tensor | None = None
        self._loss_news = torch.full((2,), float("nan"), dtype=torch.float64, device=device)

    @property
    def phase(self) -> str:
        """The policy of the current step: wait, synthetic, stale or corrected."""
        return "wait" if self.fell_back else self.policy.at(self.step)

    @property
    def waits(self) -> bool:
        """Whether the current step uses true gradients in time only."""
        return self.phase == "wait"

    @property
    def delay(self) -> int:
        """Microbatches that go forward before the first goes backward."""
        return lag_of_wait(self.stage, self.num_stages) if self.waits else 0

    @property
    def news(self) -> Tensor:
        """(step, its mean loss), the newest known here; nan before the first."""
        return self._loss_news if self.down is None else self.down.news[1:3]

    def begin_step(self) -> None:
        if self._phase != self.phase:
            self.flush()  # a phase begins with nothing under way
            self._begin_phase(self.phase)
        if self.up is not None:
            self.up.open(self.microbatch + self.num_microbatches)
        self._forwarded = self._answered = self.microbatch
        self._loss_sum = None

    def _begin_phase(self, phase: str | None) -> None:
        """Sets the boundaries, on which nothing is under way, for a policy."""
        self._phase = phase
        for side, upper in ((self.up, self.stage - 1), (self.down, self.stage)):
            if side is not None and phase is not None:
                side.restart(self.microbatch, self._rules(phase, upper, side.boundary.occupies_gpu))

    def _rules(self, phase: str, upper: int, occupies_gpu: bool) -> Rules:
        if phase == "wait":
            return Rules.choose(lag_of_wait(upper, self.num_stages), closes=True, occupies_gpu=occupies_gpu)
        lag, behind = self.policy.lag, 0
        if phase in LATE:
            lag, behind = (self.policy.delay(stage, self.num_stages) for stage in (upper, upper + 1))
        ahead = self.policy.post_ahead
        return Rules.choose(lag, closes=False, occupies_gpu=occupies_gpu, ahead=ahead, behind=behind)

    def forward_weights(self) -> AbstractContextManager[None]:
        """Within, the stage's module has the weights that a forward shall use."""
        return nullcontext()

    def step_weights(self) -> AbstractContextManager[None]:
        """Within, the parameters are what all microbatches of a step go forward and backward with."""
        return nullcontext()

    def receive(self, net_input: Tensor | None = None) -> list[Tensor]:
        """The next activation (and its label, last, where labels are relayed). net_input: see UnlockedFlow."""
        assert self.up is not None, "the first stage receives nothing"
        with self._span("wait", self._forwarded):
            return self.up.receive(self._forwarded)

    def send(self, outputs: Sequence[Tensor], needs_grad: Sequence[bool], label: Tensor | None, relayed: bool) -> None:
        """Sends the outputs of the microbatch just run forward; remembers those that need a gradient, and the label."""
        microbatch, self._forwarded = self._forwarded, self._forwarded + 1
        if self.up is not None:
            self.up.after_forward(microbatch)
        if self.down is None:
            return
        # Sent as they are kept: NCCL and gloo read the memory later, and the predictor learns from the same tensors.
        outputs = [own(output) for output in outputs]
        kept = tuple(output for output, needed in zip(outputs, needs_grad, strict=True) if needed)
        if relayed:
            assert label is not None, "a relayed label is there"
            outputs.append(label.contiguous())
        self.down.send(outputs, Pending(microbatch, kept, label))

    def send_nothing(self) -> None:
        """Under `wait`, after the last activation of a step: only gradients are left to come."""
        if self.down is not None:
            self.down.send([])

    def output_grads(self) -> tuple[Tensor, ...]:
        """The gradients to use for the oldest microbatch that has not gone backward, one per output that needs one."""
        assert self.down is not None, "the last stage has a loss"
        if self.waits:
            self._entry = self._arrive()
            return scale.true_grads(self._entry, self.grad_scale)
        newest = self.down.pending[-1]
        if not newest.activations:  # a frozen stage
            return ()
        assert self.learner is not None, "without an interface the policy stays at wait"
        with self._span("predict", newest.microbatch):
            return scale.predict(self.learner, newest, self.grad_scale)

    def _arrive(self) -> Pending:
        assert self.down is not None
        with self._span("wait", self.down.pending[0].microbatch):
            return self.down.arrive()

    def _span(self, name: str, microbatch: int) -> AbstractContextManager[None]:
        return self.trace.span(name, microbatch=microbatch % self.num_microbatches)

    def report_loss(self, loss: Tensor) -> None:
        """The loss of the microbatch just run forward, on the last stage."""
        loss = loss.detach().double()
        self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss
        if self._forwarded == self.microbatch + self.num_microbatches:
            mean = self._loss_sum / self.num_microbatches
            self._loss_news = torch.stack([torch.full_like(mean, self.step), mean])

    def give(self, grads: Sequence[Tensor]) -> None:
        """Returns the gradients of the received tensors that need one, for the microbatch that went backward."""
        answer = self._answer(grads)
        if self.up is not None:
            self.up.give(answer[:-1], answer[-1])

    def _answer(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """What goes up for the oldest microbatch not answered yet: its gradients, and news."""
        microbatch, self._answered = self._answered, self._answered + 1
        if self.up is None:
            return []
        first, factor = self.news[:1], 1.0 if self.grad_scale is None else self.grad_scale()
        news = torch.cat([torch.full_like(first, microbatch), self.news, torch.full_like(first, factor)])
        return [*(grad.contiguous() for grad in grads), news]

    def settle(self) -> None:
        """Learns from the true gradients that are due after the microbatch that went backward."""
        if self.down is None:
            return
        if self._entry is not None:
            self._learn(self._entry)
            self._entry = None
            return
        due = self._answered - 1 - self.policy.lag
        while self.down.pending and self.down.pending[0].microbatch <= due:
            self._learn(self._arrive())

    def _learn(self, entry: Pending) -> None:
        if self.learner is not None and (self.waits or self.policy.learns(self.step)):
            with self._span("learn", entry.microbatch):
                scale.learn(self.learner, entry, self.grad_scale)

    def join(self, divide_by: int = 1) -> None:
        """Adds to the parameters' gradients what flush() has left for the next update, divided."""

    def end_step(self) -> None:
        """The predictors take their step, once for all true gradients that arrived."""
        self.microbatch += self.num_microbatches
        if self.waits:
            self._drain_up()
            if self.down is not None:
                self.down.restart(self.microbatch)
        if self.learner is not None:
            self.learner.end_step()
        self.step += 1

    def _drain_up(self) -> None:
        if self.up is not None:
            self.up.drain(self.microbatch)

    def drain(self) -> None:
        """Nothing is on the wire afterwards. Every rank must call it at the same step; it changes no number."""
        if self.down is not None:
            self.down.drain()
        self._drain_up()

    def flush(self) -> None:
        """Drains, and lets the predictors learn from all that was outstanding. Every rank must call it."""
        self.drain()
        if self.down is not None:
            while self.down.pending:
                self._learn(self._arrive())
        if self.learner is not None:
            self.learner.end_step()

    def confirm(self) -> None:
        """On a GPU: the host waits until all that was received is there, so that a lost neighbour is noticed here.

        It does not wait for the last backward, so the GPU stays busy.
        """
        for side in (self.up, self.down):
            if side is not None:
                side.boundary.confirm()

    def pass_receive(self, metas: Metas) -> list[Tensor]:
        """Evaluation: the next activation, on every stage but the first."""
        assert self.up is not None, "the first stage receives nothing"
        received = empty(metas, self.device)
        self.up.boundary.exchange([], received, microbatch=self.microbatch).wait()
        return received

    def pass_down(self, outputs: Sequence[Tensor]) -> Callable[[], None]:
        """Evaluation: sends outputs without expecting anything back. Returns the wait for it."""
        if self.down is None:
            return lambda: None
        outputs = [own(output) for output in outputs]
        return self.down.boundary.exchange(outputs, [], microbatch=self.microbatch).wait

    def metrics(self) -> dict[str, float | int | str]:
        """As ScheduleDNI.metrics says; all names always."""
        return standing.metrics(self)

    def describe(self) -> str:
        """Where this stage stands, in words."""
        return standing.describe(self)

    def state_dict(self) -> dict[str, Any]:
        """Counters, what is pending with its gradient, predictors and their optimizer. Drains first."""
        self.drain()
        return {
            "step": self.step,
            "microbatch": self.microbatch,
            "num_microbatches": self.num_microbatches,
            "fell_back": self.fell_back,
            "phase": self._phase,
            "news": self.news.clone(),
            "pending": [entry.state_dict() for entry in (self.down.pending if self.down is not None else ())],
            "learner": self.learner.state_dict() if self.learner is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state` was made. Every rank must call it, before its next step."""
        count = state["num_microbatches"]
        if count != self.num_microbatches:
            own_count = f"this schedule has {self.num_microbatches}: build it with n_microbatches={count}"
            raise ValueError(f"the state counts steps of {count} microbatches, {own_count}")
        self.flush()
        self.step, self.microbatch, self.fell_back = state["step"], state["microbatch"], state["fell_back"]
        self._begin_phase(state.get("phase", "synthetic"))
        if self.down is None:
            self._loss_news = state["news"].to(self.device)
            return
        self.down.news[1:3] = state["news"]
        self.down.pending.extend(Pending.from_state(entry, self.device) for entry in state["pending"])
        if state["learner"] is not None and self.learner is not None:
            self.learner.load_state_dict(state["learner"])
