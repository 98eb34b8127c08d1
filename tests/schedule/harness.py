"""Runs a pipeline and its oracle side by side on one rank, and says in what they differ."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from dnipipe import ScheduleDNI
from dnipipe.schedule.late import LateFlow
from dnipipe.schedule.policy import Policy
from tests.schedule import models


@dataclass
class Case:
    """One setting. labels: how they reach the predictors; rows: per microbatch; gives_interface: or leaves it to the
    schedule."""

    kind: str = "mlp"
    interface: str = "mlp"
    m: int = 4
    policy: str = "synthetic"
    lag: int = 2
    unlock_after_steps: int | None = None
    labels: str = "local"
    rows: int = 3
    optimizer: str = "optimizer"
    in_flight: int | tuple[int, ...] | str | None = None
    late_weights: str = "predicted"
    steps_per_update: int = 1
    gives_interface: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def conditional(self) -> bool:
        return self.labels != "none"


class Pipeline:
    """One rank's stage under ScheduleDNI, with an optimizer; records losses and every true gradient learned from."""

    def __init__(
        self,
        rank: int,
        world: int,
        case: Case,
        wrap: Callable[[nn.Module], nn.Module] = lambda m: m,
        device: str = "cpu",
    ) -> None:
        self.rank, self.world, self.case, self.device = rank, world, case, torch.device(device)
        self.module = wrap(models.build(case.kind, world)[rank].to(self.device))
        self.stage = PipelineStage(self.module, rank, world, self.device)
        last = rank == world - 1
        self.schedule = ScheduleDNI(
            self.stage,
            n_microbatches=case.m,
            loss_fn=models.loss_fn,
            interface=None
            if last or not case.gives_interface
            else models.interface(case.kind, case.interface, case.conditional),
            interface_optimizer=models.interface_optimizer,
            policy=case.policy,
            lag=case.lag,
            unlock_after_steps=case.unlock_after_steps,
            in_flight=case.in_flight,
            late_weights=case.late_weights,
            steps_per_update=case.steps_per_update,
            labels=case.labels,
            **{"timeout_s": 20.0, **case.options},
        )
        self.optimizer = getattr(models, case.optimizer)(self.module)
        self.losses: list[Tensor] = []
        self.true_grads: list[tuple[int, tuple[Tensor, ...]]] = []
        self.most_held: list[int] = []

    def arguments(self, step: int, length: int = models.T) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        batch = models.batch(self.case.kind, step, self.case.rows * self.case.m, length)
        x, y = (each.to(self.device) for each in batch)
        told = {"local": True, "relay": self.rank == 0, "none": False}[self.case.labels]
        target = {"target": y} if told or self.rank == self.world - 1 else {}
        return ((x,) if self.rank == 0 else ()), target

    def step(self, step: int, length: int = models.T, optimize: bool = True) -> None:
        args, kwargs = self.arguments(step, length)
        losses: list[Tensor] = []
        self.schedule.step(*args, **kwargs, losses=losses)
        self.losses += [loss.detach() for loss in losses]
        if optimize:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.record()

    def record(self) -> None:
        """Hooks the flow, once it exists, to see each true gradient that a predictor learns from."""
        flow = self.schedule._flow
        if flow is None or getattr(flow, "recorded", False):
            return
        learn = flow._learn

        def recording(entry: Any) -> None:
            self.true_grads.append((entry.microbatch, tuple(grad.clone() for grad in entry.true_grads)))
            learn(entry)

        flow._learn, flow.recorded = recording, True  # type: ignore[method-assign, attr-defined]
        if isinstance(flow, LateFlow):
            go_backward = flow._go_backward

            def counting(give: Any) -> Any:
                self.most_held.append(len(flow._graphs))
                return go_backward(give)

            flow._go_backward = counting  # type: ignore[method-assign]

    def state(self) -> list[Tensor]:
        """Parameters of the stage and of its predictor."""
        tensors = list(self.module.parameters())
        flow = self.schedule._flow
        if flow is not None and flow.learner is not None:
            tensors += list(flow.learner.interfaces.parameters())
        return [tensor.detach().clone() for tensor in tensors]


class Oracle:
    """The same in one process."""

    def __init__(self, world: int, case: Case, device: str = "cpu") -> None:
        self.case, self.device = case, torch.device(device)
        policy = Policy(
            case.policy,
            case.lag,
            case.unlock_after_steps,
            in_flight=case.in_flight,
            late_weights=case.late_weights,
            steps_per_update=case.steps_per_update,
        )
        self.reference = models.oracle(case.kind, world, case.interface, case.conditional, case.m, policy)
        for module in (*self.reference.stages, *(each.interfaces for each in self.reference.learners if each)):
            module.to(self.device)
        self.optimizers = [getattr(models, case.optimizer)(stage) for stage in self.reference.stages]
        self.losses: list[Tensor] = []

    def step(self, step: int, length: int = models.T, optimize: bool = True) -> None:
        batch = models.batch(self.case.kind, step, self.case.rows * self.case.m, length)
        x, y = (each.to(self.device) for each in batch)
        self.losses += self.reference.step(x, y, y if self.case.conditional else None)
        if optimize:
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()


def relative_difference(pipeline: Pipeline, oracle: Oracle) -> float:
    """max |difference| / max |value| over parameters, predictors, losses and true gradients of one rank."""
    rank, reference = pipeline.rank, oracle.reference
    learner, theirs = reference.learners[rank], dict(reference.true_grads[rank])
    expected = [*reference.stages[rank].parameters(), *(learner.interfaces.parameters() if learner else ())]
    pairs = list(zip(pipeline.state(), expected, strict=True))
    if pipeline.losses:
        pairs.append((torch.stack(pipeline.losses), torch.stack(oracle.losses)))
    for microbatch, grads in pipeline.true_grads:
        pairs += zip(grads, theirs[microbatch], strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)


def fall_back(pipeline: Pipeline, oracle: Oracle, steps: int, at: int) -> list[str]:
    """Both train for `steps` steps, and from step `at` on both have fallen back to `wait`. In what they differ then."""
    for step in range(steps):
        if step == at:
            assert pipeline.schedule._flow is not None
            pipeline.schedule._flow.fell_back = oracle.reference.fell_back = True
        pipeline.step(step)
        oracle.step(step)
    return [f"{pipeline.case}: {each}" for each in differences(pipeline, oracle)]


LENGTHS = (models.T, models.T, 3, 3, 8, models.T)
"""Of the sequences in steps whose shapes change."""


def disturb(pipeline: Pipeline, oracle: Oracle, evaluations: Sequence[int] = (0,) * len(LENGTHS)) -> list[str]:
    """Both train a step of each of LENGTHS, after which the pipeline evaluates so often. In what they differ then."""
    for step, (length, times) in enumerate(zip(LENGTHS, evaluations, strict=True)):
        pipeline.step(step, length)
        oracle.step(step, length)
        for _ in range(times):
            args, kwargs = pipeline.arguments(step, length)
            pipeline.schedule.eval(*args, **kwargs)
    return [f"{pipeline.case}: {each}" for each in differences(pipeline, oracle)]


def differences(pipeline: Pipeline, oracle: Oracle) -> list[str]:
    """In what one rank differs from the oracle, bit for bit; empty if in nothing."""
    rank, reference = pipeline.rank, oracle.reference
    wrong = []
    expected = list(reference.stages[rank].parameters())
    learner = reference.learners[rank]
    if learner is not None:
        expected += list(learner.interfaces.parameters())
    if not all(torch.equal(a, b) for a, b in zip(pipeline.state(), expected, strict=True)):
        wrong.append("parameters")
    if pipeline.losses and [float(a) for a in pipeline.losses] != [float(b) for b in oracle.losses]:
        wrong.append("losses")
    # the first step's are learned before the recorder can be put in place
    theirs = dict(reference.true_grads[rank])
    for microbatch, grads in pipeline.true_grads:
        if not all(torch.equal(a, b) for a, b in zip(grads, theirs[microbatch], strict=True)):
            wrong.append(f"true gradient of microbatch {microbatch}")
    if [m for m, _ in pipeline.true_grads] != sorted(theirs)[-len(pipeline.true_grads) or len(theirs) :]:
        wrong.append("the order of the true gradients")
    return wrong


def train_until_lost(
    schedule: ScheduleDNI, rank: int, started: Path, *, at: int, pause_s: float = 0.0
) -> tuple[str, float]:
    """Trains on mlp batches until a neighbour is lost; returns what was said, and after how many seconds of a step.

    Args: started: the file that rank 0 makes after step `at`. pause_s: between two steps.
    """
    start = time.perf_counter()
    try:
        for step in range(10_000):
            x, y = models.batch("mlp", step, 8)
            start = time.perf_counter()
            schedule.step(*((x,) if rank == 0 else ()), target=y)
            if step == at and rank == 0:
                started.touch()
            time.sleep(pause_s)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}", time.perf_counter() - start
    return "nothing was lost", 0.0
