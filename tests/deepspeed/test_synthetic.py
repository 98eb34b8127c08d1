"""Under synthetic: it learns, no collective of a batch spans stages, and a stage that sleeps holds up nobody."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dnipipe.interface import Learner, Linear
from tests.deepspeed import jobs
from tests.deepspeed.jobs import CLIP_AND_RATE, Job
from tests.ranks import run_ranks

RATE = {"optimizer": {"type": "Adam", "params": {"lr": 2e-3, "torch_adam": True}}}
COLLECTIVES = (
    "allreduce allreduce_coalesced broadcast reduce allgather allgather_coalesced _allgather_base gather scatter "
    "allgather_into_tensor_coalesced reduce_scatter reduce_scatter_tensor_coalesced _reduce_scatter_base "
    "alltoall alltoall_base barrier monitored_barrier"
).split()
P2P = ["send", "recv", "recv_anysource"]


@contextmanager
def _tracing() -> Iterator[list[tuple[str, Any]]]:
    """Each operation that goes to any process group of this rank, with the group: below torch's and DeepSpeed's
    functions, so that none is missed."""
    calls: list[tuple[str, Any]] = []

    def traced(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append((name, group))
            return original(group, *args, **kwargs)

        return call

    # from the class's __dict__, because a method of pybind's that getattr gave no longer binds when it is put back
    originals = {name: vars(dist.ProcessGroup)[name] for name in COLLECTIVES + P2P if name in vars(dist.ProcessGroup)}
    for name in originals:
        setattr(dist.ProcessGroup, name, traced(name, getattr(dist.ProcessGroup, name)))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)


def _locks(engine: Any, calls: list[tuple[str, Any]]) -> list[str]:
    """The collectives that span stages, and messages that go elsewhere than over dnipipe's own boundaries."""
    own = [side.boundary.group for side in (engine.flow.up, engine.flow.down) if side is not None]
    own += [end.boundary.group for end in engine._ties._ends]
    found = set()
    for name, group in calls:
        ranks = dist.get_process_group_ranks(group)
        stages = {engine.grid._topo.get_coord(rank).pipe for rank in ranks}
        if len(stages) > 1 and not (name in P2P and any(group is each for each in own)):
            found.add(f"{name} over ranks {ranks}")
    return sorted(found)


def _trace(rank: int, world: int, cases: list[Job]) -> list[tuple[list[str], int]]:
    jobs.start()
    results = []
    for job in cases:
        engine = jobs.build(job)
        data = jobs.data_of(engine)
        jobs.train(engine, 1, data)
        with _tracing() as calls:
            jobs.train(engine, 3, data)
        results.append((_locks(engine, calls), len(calls)))
    return results


SYNTHETIC = {"policy": "synthetic", "check_every_steps": 0}
BF16 = {"bf16": {"enabled": True}}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("num_stages, world", [(2, 2), (3, 3), (2, 4)])
def test_no_collective_of_a_batch_spans_stages(num_stages: int, world: int) -> None:
    cases = [
        Job(num_stages, zero, 2, SYNTHETIC, options={**CLIP_AND_RATE, **dtype})
        for zero in (0, 1)
        for dtype in ({}, BF16)
    ]
    if num_stages == 2:  # otherwise the middle stage is not tied
        cases.append(Job(num_stages, 0, 2, SYNTHETIC, options=CLIP_AND_RATE, tied=True))
    for result in run_ranks(world, _trace, cases, timeout_s=220):
        assert all(locks == [] and num_calls > 0 for locks, num_calls in result), result


@pytest.mark.parametrize("key, value", [("clip", "global"), ("loss", "sync"), ("tied", "sync")])
def test_each_key_that_locks_is_seen_by_the_trace(key: str, value: str) -> None:
    """So that an empty trace above means something."""
    job = Job(2, 0, 2, {**SYNTHETIC, key: value}, options={"gradient_clipping": 0.5}, tied=True)
    assert all(locks for ((locks, _),) in run_ranks(2, _trace, [job]))


def _worst_batch(rank: int, world: int, block: dict[str, Any]) -> float:
    """Seconds of the slowest of 30 batches, while the last stage sleeps for one before one of them."""
    jobs.start()
    engine = jobs.build(Job(2, 1, 1, block))
    data, worst = jobs.data_of(engine), 0.0
    jobs.train(engine, 5, data)
    for batch in range(30):
        if batch == 10 and engine.is_last_stage():
            time.sleep(1.0)
        start = time.perf_counter()
        jobs.train(engine, 1, data)
        worst = max(worst, time.perf_counter() - start)
    return worst


def test_a_last_stage_that_sleeps_leaves_the_first_unlocked() -> None:
    unlocked = run_ranks(2, _worst_batch, {**SYNTHETIC, "lag": 64})[0]
    locked = run_ranks(2, _worst_batch, {**SYNTHETIC, "lag": 64, "loss": "sync"})[0]
    print(f"worst batch of stage 0: {unlocked:.3f} s, with one lock {locked:.3f} s")
    assert unlocked < 0.5 and locked > 0.8


def _learn(rank: int, world: int, job: Job) -> tuple[float, float]:
    """Mean training loss, as the last stage knows it, of the first and of the last 10 batches."""
    jobs.start()
    losses = jobs.train(jobs.build(job), 300)
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


@pytest.mark.parametrize(
    "num_stages, block",
    [(2, {"policy": "synthetic"}), (3, {"policy": "auto", "unlock_after_steps": 50})],
)
def test_it_learns(num_stages: int, block: dict[str, Any]) -> None:
    block = {**block, "interface_learning_rate": 5e-3}
    plain = run_ranks(num_stages, _learn, Job(num_stages, 1, 4, options=RATE))[-1]
    ours = run_ranks(num_stages, _learn, Job(num_stages, 1, 4, block, options=RATE))[-1]
    print(f"{num_stages} stages: loss {plain[0]:.3f} to {plain[1]:.3f} plain, {ours[0]:.3f} to {ours[1]:.3f} ours")
    assert ours[1] < 0.7 * ours[0]


def _rates(rank: int, world: int, given: float | None) -> list[float]:
    jobs.start()
    block = {"policy": "synthetic", "interface": "linear", "interface_learning_rate": given}
    engine = jobs.build(Job(2, 0, 1, block))
    jobs.train(engine, 1)
    learner = engine.flow.learner
    return [] if learner is None else [group["lr"] for group in learner.optimizer.param_groups]


@pytest.mark.parametrize("given", [None, 0.004])
def test_predictors_learn_at_the_rate_of_the_block_or_else_at_their_own(given: float | None) -> None:
    own = Linear(jobs.WIDTH).learning_rate
    assert run_ranks(2, _rates, given) == [[own if given is None else given], []]


def _fates(rank: int, world: int) -> dict[str, Any]:
    jobs.start()
    engine = jobs.build(Job(3, 0, 1, {"policy": "synthetic", "lag": 3}))
    losses = jobs.train(engine, 12)
    labels, batch = engine._flowing.agreed.labels, engine.loss_batch
    newest = [engine.flow.step - 1 - batch, losses[-1], losses[-1 - (engine.flow.step - 1 - batch)]]
    return {"labels": labels, "first": losses[0], "age": newest[0], "last": newest[1], "losses": losses}


def test_labels_travel_and_the_loss_comes_home() -> None:
    """Middle stages have no iterator; every stage learns the true loss of an earlier batch, and says of which."""
    first, middle, last = run_ranks(3, _fates)
    assert {rank["labels"] for rank in (first, middle, last)} == {"relay"}
    # lag 3 at each boundary, and a stage returns a gradient before it takes in what is due after it
    assert last["age"] == 0 and middle["age"] == 3 and first["age"] == 7
    assert first["first"] != first["first"], "nan before the first has arrived"
    for rank in (first, middle):
        assert rank["last"] == pytest.approx(last["losses"][-1 - rank["age"]], rel=1e-6)


def _tied(rank: int, world: int, job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    jobs.start()
    engine = jobs.build(job)
    ((weight, _),) = engine.module.get_tied_weights_and_groups()
    before = weight.detach().clone()
    jobs.train(engine, 20)
    return before, weight.detach().clone()


@pytest.mark.parametrize("zero, options", [(0, {"gradient_clipping": 0.5}), (1, {"gradient_clipping": 0.0})])
def test_tied_copies_stay_equal_and_move(zero: int, options: dict[str, Any]) -> None:
    block = {"policy": "auto", "unlock_after_steps": 5}
    first, last = run_ranks(2, _tied, Job(2, zero, 2, block, options, tied=True))
    assert torch.equal(first[1], last[1]) and not torch.equal(first[0], first[1])


def test_travelling_clip_trains() -> None:
    block = {"policy": "synthetic", "clip": "travelling", "interface_learning_rate": 5e-3}
    first, last = run_ranks(2, _learn, Job(2, 0, 4, block, {**RATE, "gradient_clipping": 0.5}))[-1]
    assert last < 0.8 * first


def _first_taught(rank: int, world: int, counts: list[int]) -> list[Tensor]:
    """For each number of microbatches, the first true gradient that a predictor of the first stage was taught."""
    jobs.start()
    taught: list[Tensor] = []
    learn = Learner.learn

    def learned(self: Learner, hs: Any, label: Any, true_grads: Any) -> None:
        taught.append(true_grads[0].clone())
        learn(self, hs, label, true_grads)

    Learner.learn = learned  # type: ignore[method-assign]
    firsts = []
    for num_microbatches in counts:
        taught.clear()
        engine = jobs.build(Job(2, 0, num_microbatches, {"policy": "synthetic", "lag": 1}))
        jobs.train(engine, 4)
        firsts += taught[:1]
    return firsts


def test_predictors_learn_the_gradient_of_one_microbatch_whatever_the_accumulation() -> None:
    """DeepSpeed divides the loss by the number of microbatches, and so all gradients that cross."""
    one, four = run_ranks(2, _first_taught, [1, 4])[0]
    assert one.abs().max() > 0
    torch.testing.assert_close(four, one, rtol=1e-5, atol=1e-9)
