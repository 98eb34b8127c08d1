"""Forward-unlocked pipelines and their oracle: as harness.py, with the net's input on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dnipipe.interface import Learner, SyntheticInput, TensorMeta, build_synthetic_input
from dnipipe.schedule import ForwardUnlocked
from dnipipe.schedule.forward_unlocked import Start
from dnipipe.schedule.policy import Policy
from dnipipe.schedule.unlocked_flow import UnlockedFlow
from dnipipe.schedule.unlocked_reference import UnlockedReference
from tests.schedule import models
from tests.schedule.harness import Case, Oracle, Pipeline, differences


def input_model(kind: str) -> SyntheticInput:
    """Deterministic and not zero, so that the first synthetic inputs matter too."""
    rows = (2, models.D) if kind == "mlp" else (2, models.T, models.D)
    x = TensorMeta(rows, torch.float32) if kind == "mlp" else TensorMeta(rows[:2], torch.int64)
    torch.manual_seed(3)
    model = build_synthetic_input(x, TensorMeta(rows, torch.float32), num_tokens=models.V, num_hidden=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@dataclass
class UnlockedCase(Case):
    """window, patience_s, late: as of ForwardUnlocked."""

    window: int = 3
    patience_s: float = 0.01
    late: tuple[Start, ...] | None = ()

    def __str__(self) -> str:
        return f"{self.kind}, M {self.m}, lag {self.lag}, labels {self.labels}, window {self.window}, late {self.late}"

    def unlocked(self) -> ForwardUnlocked:
        return ForwardUnlocked(
            self.window, self.patience_s, self.late, input_model(self.kind).module, optimizer=models.interface_optimizer
        )


class UnlockedPipeline(Pipeline):
    def __init__(self, rank: int, world: int, case: UnlockedCase, **options: Any) -> None:
        case.options = {**case.options, "forward_unlocked": case.unlocked()}
        super().__init__(rank, world, case, **options)
        self._memory = torch.empty(0)

    def arguments(self, step: int, length: int = models.T) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """The input in memory that the next step reuses, as a loader's may be."""
        x, _ = models.batch(self.case.kind, step, self.case.rows * self.case.m, length)
        if self._memory.shape != x.shape:
            self._memory = torch.empty_like(x, device=self.device)
        return (self._memory.copy_(x),), super().arguments(step, length)[1]

    @property
    def flow(self) -> UnlockedFlow:
        assert isinstance(self.schedule._flow, UnlockedFlow)
        return self.schedule._flow


class UnlockedOracle(Oracle):
    """late: what it replays; None: the case's own."""

    def __init__(self, world: int, case: UnlockedCase, late: set[Start] | None = None, device: str = "cpu") -> None:
        super().__init__(world, case, device)
        plain = self.reference
        learners = [
            Learner([SyntheticInput(input_model(case.kind).module, _activation(case.kind))], models.interface_optimizer)
            for _ in range(world - 1)
        ]
        for learner in learners:
            learner.interfaces.to(self.device)
        self.reference = UnlockedReference(
            plain.stages,
            plain.learners,
            plain.loss_fn,
            num_microbatches=case.m,
            policy=Policy(case.policy, case.lag, case.unlock_after_steps),
            input_learners=[None, *learners],
            window=case.window,
            late=set(case.late or ()) if late is None else late,
        )


def _activation(kind: str) -> TensorMeta:
    return TensorMeta((2, models.D) if kind == "mlp" else (2, models.T, models.D), torch.float32)


def unlocked_differences(pipeline: UnlockedPipeline, oracle: UnlockedOracle) -> list[str]:
    """As differences(), with the models of the inputs."""
    wrong = differences(pipeline, oracle)
    reference = oracle.reference
    assert isinstance(reference, UnlockedReference)
    ours, theirs = pipeline.flow.input_learner, reference.input_learners[pipeline.rank]
    if (ours is None) != (theirs is None):
        wrong.append("whether there is a model of the inputs")
    elif ours is not None and theirs is not None:
        pairs = [list(_tensors(each.interfaces)) for each in (ours, theirs)]
        if not all(torch.equal(a, b) for a, b in zip(*pairs, strict=True)):
            wrong.append("the model of the inputs")
    return wrong


def _tensors(modules: nn.ModuleList) -> list[Tensor]:
    return [*modules.parameters(), *modules.buffers()]
