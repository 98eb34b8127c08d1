"""What is in flight on the two boundaries of a stage: which exchange carries what.

Exchange t of a boundary takes activation t down and, beside it, the true gradient of microbatch t - lag up:

    stage k    F0 E0  F1 E1  F2 E2  F3 E3  ...      E2 = {h2 down, g0 up},  E3 = {h3 down, g1 up}   (lag 2)
    stage k+1  E0 E1  F0 B0 E2  F1 B1 E3  ...       posted as soon as the gradient is ready, waited for at F2, F3

The upper stage posts E(t) once activation t exists and waits for it when it wants gradient t - lag; the lower stage
posts E(t) once gradient t - lag exists and waits for it when it wants activation t. So a stage leads its successor by
at most `lag` microbatches, and nobody polls: the same numbers come out whatever the timing.

Over NCCL the lower stage posts one microbatch later, after a forward: E1 F0 E2 B0. A posted receive of NCCL is a kernel
that holds a multiprocessor until it is met, and slows the computation meanwhile; posted after the forward, beside the
upper stage's send of the next activation, it is met at once. The upper stage leads by one microbatch less.

Where shapes differ from one microbatch to the next (announce.py), the lower stage posts E(t) when it wants activation
t, and its predecessor leads by one microbatch whatever the lag.

No deadlock: stage k needs, for microbatch t, its own t - 1, activation t of stage k - 1 and gradient t - lag of stage
k + 1. The potential 2 t + k is smaller for all three as long as lag >= 1, so there is no circle of waits.

The policy `wait` is the same ledger with lag = num_stages - 1 - k: exactly the microbatches that 1F1B has in flight.

Under `stale` and `corrected` the lower stage itself is `behind`: it answers a microbatch only after that many more have
gone forward, also beyond the end of a step. A drain leaves these unanswered; they come at their turn, or by
collect() and answer(). The gradient given in slot t is then that of t - behind and travels on exchange
t - behind + lag, so the argument above holds as long as lag > behind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ..boundary import Boundary, Exchange
from .announce import Announcer, Metas
from .pending import Pending
from .rules import Rules as Rules
from .rules import StepEnd as StepEnd

# What goes up beside each gradient: its microbatch, the newest step whose mean loss is known, that loss, and what the
# gradient is multiplied by. float64 holds each exactly.
NEWS_SIZE = 4


def empty(metas: Metas, device: torch.device) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in metas]


def own(output: Tensor) -> Tensor:
    """The output's values in memory that nobody else will write to: not the caller's input, nor a parameter."""
    base = output._base if output._base is not None else output
    return output.detach().clone() if base.grad_fn is None else output.detach().contiguous()


class _Side(ABC):
    """What both sides of a boundary keep. metas: of the tensors that go down with each exchange. announcer: where these
    may differ from one exchange to the next, what says it; needs rules that hold no receive over the end of a step."""

    def __init__(self, boundary: Boundary, device: torch.device, announcer: Announcer | None = None) -> None:
        self.boundary, self.device, self.announcer = boundary, device, announcer
        self.metas: Metas = ()
        self.rules = Rules(lag=1, window=1, step_end=StepEnd.CLOSE)
        self._next = self._restart = self._owed = 0

    def restart(self, microbatch: int, rules: Rules | None = None) -> None:
        """The next exchange is that of `microbatch`, with nothing under way: the first `lag` carry no gradient."""
        self._go_on(microbatch, microbatch)
        self.rules = rules or self.rules
        assert self.announcer is None or self.rules.step_end is not StepEnd.AHEAD, "nobody announces a void"

    def _go_on(self, microbatch: int, owed: int) -> None:
        """The next exchange is that of `microbatch`; the first gradient to come up on one is that of `owed`."""
        assert self.idle, "restart with exchanges under way"
        self._next = self._restart = microbatch
        self._owed = owed

    def _unanswered(self, end: int) -> int:
        """The first microbatch that the lower stage has not answered when `end` is the next to go forward."""
        return max(self._owed, end - self.rules.behind)

    @property
    def wait_s(self) -> float:
        """Seconds of host time that this side has waited so far."""
        return self.boundary.wait_s + (self.announcer.boundary.wait_s if self.announcer is not None else 0.0)

    @property
    def idle(self) -> bool:
        return not self.under_way

    @property
    @abstractmethod
    def under_way(self) -> list[int]:
        """The microbatches whose exchange is posted and not waited for."""


class Downward(_Side):
    """The boundary to the next stage, seen from the upper side: sends activations, owns what is pending."""

    def __init__(self, boundary: Boundary, device: torch.device, announcer: Announcer | None = None) -> None:
        super().__init__(boundary, device, announcer)
        self.pending: deque[Pending] = deque()
        self.news = torch.full((NEWS_SIZE,), float("nan"), dtype=torch.float64, device=device)
        self._under_way: deque[tuple[int, Exchange]] = deque()

    @property
    def under_way(self) -> list[int]:
        return list(dict.fromkeys(number for number, _ in self._under_way))

    def send(self, outputs: Sequence[Tensor], pending: Pending | None = None) -> None:
        """Posts the next exchange: `outputs` down and, where one is due, the true gradient of `lag` microbatches ago
        up.

        outputs: contiguous; empty when no activation is left to send. pending: what to remember of them.
        """
        number, receive = self._next, self._gradient_buffers(self._next - self.rules.lag)
        if outputs and self.announcer is not None:
            self._under_way.append((number, self.announcer.tell(outputs, microbatch=number)))
        if outputs or receive:
            self._under_way.append((number, self.boundary.exchange(outputs, receive, microbatch=number)))
        if pending is not None:
            self.pending.append(pending)
        self._next += 1

    def _gradient_buffers(self, microbatch: int) -> list[Tensor]:
        if microbatch < self._owed:
            return []
        entry = next(entry for entry in self.pending if entry.microbatch == microbatch)
        entry.true_grads = [torch.empty_like(activation) for activation in entry.activations]
        entry.news = torch.empty_like(self.news)
        return [*entry.true_grads, entry.news]

    def arrive(self) -> Pending:
        """Waits for the true gradient of the oldest pending microbatch and takes it off the ledger."""
        entry = self.pending.popleft()
        if not entry.arrived:
            self._wait_up_to(entry.microbatch + self.rules.lag)
            self._read_news(entry)
        return entry

    def _wait_up_to(self, number: int) -> None:
        while self._under_way and self._under_way[0][0] <= number:
            self._under_way.popleft()[1].wait()

    def _read_news(self, entry: Pending) -> None:
        entry.arrived = True
        assert entry.news is not None, "an exchange for this gradient was posted"
        # Only on the CPU: reading a number from a GPU makes the host wait.
        if entry.news.device.type == "cpu" and int(entry.news[0]) != entry.microbatch:
            raise RuntimeError(
                f"rank {self.boundary.rank} (stage {self.boundary.stage}) got the gradient of microbatch "
                f"{int(entry.news[0])} where that of {entry.microbatch} was due: the ranks do not run the same steps"
            )
        self.news, entry.scale = entry.news, entry.news[3]

    def drain(self) -> None:
        """Completes the outstanding exchanges: every true gradient that the next stage has given is here, and none has
        been used."""
        end = self._next
        if end == self._restart:
            return
        # The next stage may have posted its receives already: they must be met, if only by tensors without a meaning.
        num_void = self.rules.window if self.rules.step_end is StepEnd.AHEAD else 0
        unanswered = self._unanswered(end)
        for ahead in range(unanswered + self.rules.lag - end):
            self.send(empty(self.metas, self.device) if ahead < num_void else [])
        self._wait_up_to(self._next)
        for entry in self.pending:
            if not entry.arrived and entry.microbatch < unanswered:
                self._read_news(entry)
        self._go_on(end, unanswered)

    def collect(self) -> None:
        """After a drain: receives the gradients that the next stage still owes, as it answers them out of turn."""
        end = self._next
        for entry in self.pending:
            if not entry.arrived:
                exchange = self.boundary.exchange([], self._gradient_buffers(entry.microbatch), microbatch=end)
                self._under_way.append((end, exchange))
        self._wait_up_to(end)
        for entry in self.pending:
            if not entry.arrived:
                self._read_news(entry)
        self.restart(end)


class Upward(_Side):
    """The boundary to the previous stage, seen from the lower side: receives activations, returns gradients."""

    def __init__(self, boundary: Boundary, device: torch.device, announcer: Announcer | None = None) -> None:
        super().__init__(boundary, device, announcer)
        self._limit = self._forwarded = self._announced = 0
        self._unsent: deque[list[Tensor]] = deque()
        self._under_way: deque[tuple[int, Exchange, list[Tensor]]] = deque()

    @property
    def under_way(self) -> list[int]:
        return [number for number, *_ in self._under_way]

    def restart(self, microbatch: int, rules: Rules | None = None) -> None:
        super().restart(microbatch, rules)
        self._forwarded = microbatch

    def open(self, limit: int) -> None:
        """A step begins: posts what may be posted of the exchanges before `limit`, the next step's first microbatch."""
        self._limit = limit
        self._post_due()

    def receive(self, microbatch: int) -> list[Tensor]:
        """Waits for the activation of `microbatch` (and its label, last, where labels are relayed)."""
        if self.announcer is not None:
            self.metas = self.announcer.hear(microbatch=microbatch)
            self._announced = microbatch + 1
            self._post_due()
        number, exchange, received = self._under_way.popleft()
        assert number == microbatch, f"activation {microbatch} is due, {number} comes first"
        exchange.wait()
        return received

    def after_forward(self, microbatch: int) -> None:
        """`microbatch` has gone forward: over NCCL, the next exchange is posted now."""
        self._forwarded = microbatch + 1
        self._post_due()

    def give(self, grads: Sequence[Tensor], news: Tensor) -> None:
        """Returns the gradient of the oldest microbatch not answered yet, as soon as an exchange may carry it."""
        self._unsent.append([*grads, news])
        self._post_due()

    def _post_due(self) -> None:
        """Posts the exchanges whose gradient is there, or that carry none, as far as they are allowed."""
        while True:
            receive = self._may_receive()
            carries_gradient = self._next >= self._owed + self.rules.lag
            if carries_gradient and self._unsent and (receive or self._closes):
                self._post(self._unsent.popleft(), receive=receive)
            elif not carries_gradient and receive:
                self._post([], receive=True)
            else:
                return

    def _may_receive(self) -> bool:
        if self.announcer is not None and self._next >= self._announced:
            return False
        in_step = self.rules.step_end is StepEnd.AHEAD or self._next < self._limit
        return in_step and self._next < self._forwarded + self.rules.window

    @property
    def _closes(self) -> bool:
        """Whether the next exchange carries only a gradient, for no activation is left in this step."""
        return self.rules.step_end is StepEnd.CLOSE and self._next >= self._limit

    def _post(self, send: Sequence[Tensor], *, receive: bool) -> None:
        received = empty(self.metas, self.device) if receive else []
        exchange = self.boundary.exchange(send, received, microbatch=self._next)
        self._under_way.append((self._next, exchange, received))
        self._next += 1

    def drain(self, end: int) -> None:
        """Completes the outstanding exchanges; `end` is the next microbatch to come."""
        while self._unsent:
            self._post(self._unsent.popleft(), receive=False)
        self._wait_for_all()
        self._go_on(end, self._unanswered(end))

    def _wait_for_all(self) -> None:
        while self._under_way:
            self._under_way.popleft()[1].wait()

    def answer(self, answers: Sequence[Sequence[Tensor]], end: int) -> None:
        """After a drain: returns the gradients (and news) that are still owed, out of turn; nothing is owed then."""
        for each in answers:
            self._post(each, receive=False)
        self._wait_for_all()
        self.restart(end)
