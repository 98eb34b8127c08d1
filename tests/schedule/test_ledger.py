"""The ledger without torch's stages: two threads run scripts of steps and drains, and every tensor carries its number.

Activation n is n + 0.25, its label 1000 + n, its true gradient -n - 0.5, the loss in the news beside it 2 n, its
scale n / 2.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from dnipipe.boundary import BoundaryError, local_pair
from dnipipe.boundary.local import LocalBoundary
from dnipipe.schedule.ledger import Downward, Pending, Rules, StepEnd, Upward

CPU = torch.device("cpu")
METAS = ((torch.Size([2]), torch.float32), (torch.Size([]), torch.int64))

# One word per action: step, drain, flush (drain and use all that is pending).
SCRIPTS = (
    "step step step step step",
    "drain step drain step step",
    "step drain drain step step drain",
    "drain drain step flush step step flush flush step",
    "step step drain step drain drain step step drain",
)
every_lag = pytest.mark.parametrize("lag", [1, 2, 3, 4])
every_window = pytest.mark.parametrize("lag, window", [(1, 1), (2, 2), (3, 3), (4, 4), (2, 1), (3, 2), (4, 3), (4, 1)])
every_m = pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
every_step_end = pytest.mark.parametrize("step_end", StepEnd, ids=lambda each: each.name)


def _activation(n: int) -> Tensor:
    return torch.full((2,), n + 0.25)


def _gradient(n: int) -> Tensor:
    return torch.full((2,), -n - 0.5)


def _news(n: int) -> Tensor:
    return torch.tensor([n, 0, 2 * n, 0.5 * n], dtype=torch.float64)


def _pending(n: int) -> Pending:
    return Pending(n, (_activation(n),), torch.tensor(1000 + n))


def _sides(timeout_s: float = 5.0) -> tuple[Downward, Upward]:
    upper, lower = local_pair(timeout_s=timeout_s)
    down, up = Downward(upper, CPU), Upward(lower, CPU)
    down.metas = up.metas = METAS
    return down, up


class Upper:
    """The upper stage, as a flow drives it. answered: what the lower stage has given so far."""

    def __init__(self, down: Downward, m: int, answered: list[int]) -> None:
        self.down, self.m, self.answered, self.sent = down, m, answered, 0
        self.learned: list[tuple[int, Tensor]] = []
        self.lead = 0

    def phase(self, rules: Rules) -> None:
        self.down.restart(self.sent, rules)

    def step(self) -> None:
        closes, lag = self.down.rules.step_end is StepEnd.CLOSE, self.down.rules.lag
        for slot in range(self.m + (lag if closes else 0)):
            if slot < self.m:
                entry = _pending(self.sent)
                self.down.send([entry.activations[0], torch.tensor(1000 + self.sent)], entry)
                self.sent += 1
            else:
                self.down.send([])
            due = slot >= lag if closes else self.down.pending[0].microbatch <= self.sent - 1 - lag
            if due:
                self.learn()
            self.lead = max(self.lead, self.sent - len(self.answered))
            assert len(self.down.pending) <= lag
        if closes:
            self.phase(self.down.rules)

    def learn(self) -> None:
        entry = self.down.arrive()
        assert entry.label is not None and int(entry.label) == 1000 + entry.microbatch
        assert torch.equal(entry.activations[0], _activation(entry.microbatch))
        newest = int(self.down.news[0])
        assert newest >= entry.microbatch and torch.equal(self.down.news, _news(newest))
        assert entry.scale is not None and float(entry.scale) == 0.5 * entry.microbatch
        self.learned.append((entry.microbatch, entry.true_grads[0]))

    def drain(self) -> None:
        self.down.drain()
        assert self.down.idle
        assert all(entry.arrived for entry in self.down.pending)

    def flush(self) -> None:
        self.drain()
        while self.down.pending:
            self.learn()


class Lower:
    """The lower stage: the last one, or under CLOSE one with stages below it that answer late."""

    def __init__(self, up: Upward, m: int, answered: list[int], pause: random.Random) -> None:
        self.up, self.m, self.answered, self.pause = up, m, answered, pause
        self.received: list[tuple[Tensor, Tensor]] = []
        self.microbatch = 0

    def phase(self, rules: Rules) -> None:
        self.up.restart(self.microbatch, rules)

    def step(self) -> None:
        first, self.microbatch = self.microbatch, self.microbatch + self.m
        closes = self.up.rules.step_end is StepEnd.CLOSE
        delay = self.up.rules.lag - 1 if closes else 0
        self.up.open(self.microbatch)
        for slot in range(self.m + delay):
            if self.pause.random() < 0.1:
                time.sleep(0.001)
            if slot < self.m:
                activation, label = self.up.receive(first + slot)
                self.received.append((activation, label))
                self.up.after_forward(first + slot)
            if slot >= delay:
                answer = first + slot - delay
                self.answered.append(answer)
                self.up.give([_gradient(answer)], _news(answer))
        if closes:
            self.drain()

    def drain(self) -> None:
        self.up.drain(self.microbatch)
        assert self.up.idle

    flush = drain


def _expected(script: str, m: int, lag: int, step_end: StepEnd) -> tuple[int, int]:
    """How many microbatches are sent, and how many of them learned from, by counting alone."""
    sent = learned = 0
    for word in script.split():
        sent += m if word == "step" else 0
        all_of_them = word == "flush" or step_end is StepEnd.CLOSE
        learned = sent if all_of_them else max(learned, sent - lag)
    return sent, learned


def _play(m: int, phases: Sequence[tuple[Rules, str]], seed: int = 0) -> tuple[Upper, Lower]:
    """Both stages, each on its thread, through phases of (rules, script), each after a flush."""
    down, up = _sides()
    answered: list[int] = []
    upper, lower = Upper(down, m, answered), Lower(up, m, answered, random.Random(seed))

    def run(stage: Upper | Lower) -> None:
        for number, (rules, script) in enumerate(phases):
            if number > 0:
                stage.flush()
            stage.phase(rules)
            for word in script.split():
                getattr(stage, word)()

    with ThreadPoolExecutor(2) as pool:
        for result in [pool.submit(run, stage) for stage in (upper, lower)]:
            result.result()
    return upper, lower


def _check(upper: Upper, lower: Lower, sent: int, learned: int) -> None:
    """Everything arrived, in order, as itself; what is still pending is the rest."""
    assert len(lower.received) == sent
    for n, (activation, label) in enumerate(lower.received):
        assert torch.equal(activation, _activation(n)) and int(label) == 1000 + n
    assert [n for n, _ in upper.learned] == list(range(learned))
    assert all(torch.equal(grad, _gradient(n)) for n, grad in upper.learned)
    assert [entry.microbatch for entry in upper.down.pending] == list(range(learned, sent))
    for entry in upper.down.pending:
        assert not entry.arrived or torch.equal(entry.true_grads[0], _gradient(entry.microbatch))


@every_step_end
@every_window
@every_m
def test_every_true_gradient_comes_home_to_its_microbatch_through_steps_and_drains(
    lag: int, window: int, m: int, step_end: StepEnd
) -> None:
    for seed, script in enumerate(SCRIPTS):
        upper, lower = _play(m, [(Rules(lag, window, step_end), script)], seed)
        _check(upper, lower, *_expected(script, m, lag, step_end))
        assert upper.lead <= lag, "how far the upper stage was ahead of the answers"


@every_step_end
@every_window
@every_m
def test_after_a_drain_nothing_is_on_the_wire(lag: int, window: int, m: int, step_end: StepEnd) -> None:
    for script in ("drain", *(f"{script} drain" for script in SCRIPTS)):
        upper, lower = _play(m, [(Rules(lag, window, step_end), script)])
        first, second = upper.down.boundary, lower.up.boundary
        assert isinstance(first, LocalBoundary) and isinstance(second, LocalBoundary)
        assert first._posted == second._posted, "every exchange has met its other side"
        assert first._inbox.empty() and second._inbox.empty()
        assert upper.down.under_way == lower.up.under_way == []
        upper.flush()  # needs no peer, which has left
        sent, _ = _expected(script, m, lag, step_end)
        _check(upper, lower, sent, learned=sent)


@every_m
def test_phases_follow_each_other_whatever_their_lag_and_step_end(m: int) -> None:
    phases = [
        (Rules(3, 2, StepEnd.CLOSE), "step step"),
        (Rules(2, 2, StepEnd.AHEAD), "step step drain step"),
        (Rules(1, 1, StepEnd.CLOSE), "step drain step"),
        (Rules(4, 1, StepEnd.HOLD), "step step step"),
        (Rules(1, 1, StepEnd.AHEAD), "step"),
    ]
    sent = m * sum(script.split().count("step") for *_, script in phases)
    upper, lower = _play(m, phases)
    _check(upper, lower, sent, learned=sent - 1)


@every_lag
def test_a_stage_leads_the_next_by_lag_microbatches_and_no_more(lag: int) -> None:
    down, _ = _sides(timeout_s=0.1)
    down.restart(0, Rules(lag, lag, StepEnd.AHEAD))
    for n in range(lag + 1):
        down.send([_activation(n), torch.tensor(1000 + n)], _pending(n))
    assert down.under_way == list(range(lag + 1))
    with pytest.raises(BoundaryError, match="at microbatch 0: "):
        down.arrive()


@every_window
@every_m
def test_between_steps_only_ahead_keeps_receives_posted(lag: int, window: int, m: int) -> None:
    for step_end in StepEnd:
        _, lower = _play(m, [(Rules(lag, window, step_end), "step step step")])
        due = list(range(3 * m, 3 * m + window)) if step_end is StepEnd.AHEAD else []
        assert lower.up.under_way == due


WRONG = (
    r"^rank 0 \(stage 0\) got the gradient of microbatch 7 where that of 0 was due: the ranks do not "
    r"run the same steps$"
)


@pytest.mark.parametrize("take", [Downward.arrive, Downward.drain])
def test_the_gradient_of_another_microbatch_is_an_error_that_names_both(take: Callable[[Downward], object]) -> None:
    down, up = _sides(timeout_s=0.5)
    for side in (down, up):
        side.restart(0, Rules(1, 1, StepEnd.HOLD))
    up.open(3)
    for n in (0, 1):
        down.send([_activation(n), torch.tensor(1000 + n)], _pending(n))
        up.receive(n)
        up.after_forward(n)
        up.give([_gradient(n)], _news(7 if n == 0 else n))
    with pytest.raises(RuntimeError, match=WRONG):
        take(down)


def test_a_restart_with_exchanges_under_way_is_refused() -> None:
    down, _ = _sides()
    down.restart(0, Rules(2, 2, StepEnd.HOLD))
    down.send([_activation(0), torch.tensor(1000)], _pending(0))
    with pytest.raises(AssertionError, match="restart with exchanges under way"):
        down.restart(1)
