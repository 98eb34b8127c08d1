"""One stage's part in the algorithm where it need not wait for its input either (forward_unlocked.py)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..boundary import BoundaryError, comes_true
from ..interface import Learner
from .early_inputs import EarlyUpward
from .flow import Flow
from .forward_unlocked import ForwardUnlocked, Start

KEPT_STARTS = 1 << 16
"""Of a run that never ends some are forgotten: so many take 10 MB here, and 1.5 MB of a saved state."""


@dataclass
class _Input:
    """A microbatch that has started and whose real activation has not trained the model of the inputs yet."""

    microbatch: int
    net_input: Tensor


class UnlockedFlow(Flow):
    """Args:   unlocked: the settings. The rest as in Flow; `up` is an EarlyUpward, None on the first stage.
    Fields: input_learner: the models of this stage's inputs, set once these are known.
            early_starts: (stage, step() call, microbatch of it) that this stage began from a synthetic input, the
            newest KEPT_STARTS. num_early_starts: of all of them.
    """

    def __init__(self, *, unlocked: ForwardUnlocked, **flow: Any) -> None:
        super().__init__(**flow)
        self.unlocked = unlocked
        self.input_learner: Learner | None = None
        self.early_starts: deque[Start] = deque(maxlen=KEPT_STARTS)
        self.num_early_starts = 0
        self._inputs: deque[_Input] = deque()
        self._before: torch.cuda.Event | None = None
        self._has_rehearsed = False

    @property
    def _early(self) -> EarlyUpward:
        assert isinstance(self.up, EarlyUpward), "the first stage has its input"
        return self.up

    def receive(self, net_input: Tensor | None = None) -> list[Tensor]:
        """The next activation, or a synthetic one; net_input: of this microbatch, which is seen on every rank."""
        assert net_input is not None and self.input_learner is not None, "Preparation has seen to it"
        microbatch = self._forwarded
        # a copy: it is still needed when the caller may have reused the memory
        net_input = net_input.detach().to(self.device, copy=True)
        self._inputs.append(_Input(microbatch, net_input))
        self._rehearse(net_input)
        self.forward_span = "forward"
        if self.waits:
            received = super().receive()
            self._learn_inputs(microbatch)
            return received
        self._learn_inputs(microbatch - self.unlocked.window)
        start = self.stage, self.step, microbatch - self.microbatch
        if not self._is_late(start):
            return super().receive()
        self.early_starts.append(start)
        self.num_early_starts += 1
        self.forward_span = "early forward"
        with self._span("predict", microbatch):
            return self._synthetic(net_input)

    def _rehearse(self, net_input: Tensor) -> None:
        """On a GPU, once: copies of the models of the inputs predict and learn, so that all kernels for it are loaded.

        The driver loads a kernel when it is first launched, and waits for all that stands on the GPU to do so. Under
        NCCL a receive does, which a neighbour that stalls does not meet: just then this stage would wait, too.
        """
        if self._has_rehearsed or self.device.type != "cuda":
            return
        self._has_rehearsed = True
        assert self.input_learner is not None
        with torch.random.fork_rng([self.device]):
            twin = self.input_learner.twin()
            net_inputs = [net_input] * len(twin.interfaces)
            twin.learn(net_inputs, None, twin.predict(net_inputs, None))
            twin.end_step()

    def _synthetic(self, net_input: Tensor) -> list[Tensor]:
        assert self.input_learner is not None
        return list(self.input_learner.predict([net_input] * len(self.input_learner.interfaces), None))

    def _is_late(self, start: Start) -> bool:
        if self.unlocked.late is not None:
            return start in self.unlocked.late
        with self._span("wait", self._forwarded):
            self._keep_pace()
            return not self._early.is_here(self._forwarded, self.unlocked.patience_s)

    def _keep_pace(self) -> None:
        """On a GPU: the host waits until all but the newest microbatch is done there. It wants to start when the GPU
        does, and not when it could give the order."""
        if self.device.type != "cuda":
            return
        before, self._before = self._before, torch.cuda.Event()
        self._before.record(torch.cuda.current_stream(self.device))
        if before is not None and not comes_true(before.query, self._early.boundary.timeout_s):
            late = TimeoutError("the GPU did not finish the microbatch before the last")
            boundary = self._early.boundary
            raise BoundaryError(boundary.describe_failure(self._forwarded, boundary.timeout_s, late))

    def _learn_inputs(self, due: int) -> None:
        """From the real activations up to that of microbatch `due`, which are waited for."""
        while self._inputs and self._inputs[0].microbatch <= due:
            entry = self._inputs.popleft()
            with self._span("wait", entry.microbatch):
                received = self._early.take(entry.microbatch)
            assert self.input_learner is not None
            with self._span("learn", entry.microbatch):
                self.input_learner.learn([entry.net_input] * len(received), None, received)

    def end_step(self) -> None:
        super().end_step()
        if self.input_learner is not None:
            self.input_learner.end_step()

    def flush(self) -> None:
        """As Flow; the models of the inputs learn from all that was outstanding, too."""
        super().flush()
        self._learn_inputs(self.microbatch)
        if self.input_learner is not None:
            self.input_learner.end_step()

    def metrics(self) -> dict[str, float | int | str]:
        newest = islice(reversed(self.early_starts), self.num_microbatches)
        in_step = [microbatch for _, step, microbatch in newest if step == self.step - 1]
        metrics = {**super().metrics(), "early_starts": self.num_early_starts}
        metrics["early_in_step"] = " ".join(map(str, reversed(in_step)))
        if self.input_learner is not None:
            metrics["input_r2"] = self.input_learner.metrics()["r2"]
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """As Flow, with the models of the inputs, the real ones that they have not seen, and early_starts."""
        state = super().state_dict()
        inputs = []
        for entry in self._inputs:
            received = self._early.receive(entry.microbatch)  # drained, so it is here
            inputs.append({"microbatch": entry.microbatch, "net_input": entry.net_input, "received": received})
        learner = self.input_learner.state_dict() if self.input_learner is not None else None
        starts = torch.tensor(list(self.early_starts), dtype=torch.int64).view(-1, 3)
        state |= {"early_starts": starts, "num_early_starts": self.num_early_starts}
        return {**state, "inputs": inputs, "input_learner": learner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "input_learner" not in state:
            return  # saved before inputs were unlocked: nothing is known of their models
        starts = [(stage, step, microbatch) for stage, step, microbatch in state["early_starts"].tolist()]
        self.early_starts = deque(starts, KEPT_STARTS)
        self.num_early_starts = state.get("num_early_starts", len(starts))  # older states hold them all
        for each in state["inputs"]:
            self._inputs.append(_Input(each["microbatch"], each["net_input"].to(self.device, copy=True)))
            self._early.put_back(each["microbatch"], [tensor.to(self.device) for tensor in each["received"]])
        if self.input_learner is not None and state["input_learner"] is not None:
            self.input_learner.load_state_dict(state["input_learner"])
