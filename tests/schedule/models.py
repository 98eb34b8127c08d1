"""Small pipelines for the tests: stages, their data, and the one-process oracle of the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnipipe.interface import Learner, TensorMeta, build_interface
from dnipipe.optim import OptimizerName, StageOptimizer
from dnipipe.schedule.late_reference import LateReference
from dnipipe.schedule.policy import Policy
from dnipipe.schedule.reference import Reference

D, V, T = 12, 7, 5


class MLPStage(nn.Module):
    """(B, D) -> (B, D), the last (B, V)."""

    def __init__(self, stage: int, num_stages: int) -> None:
        super().__init__()
        out = V if stage == num_stages - 1 else D
        self.net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.LayerNorm(D), nn.Linear(D, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class SequenceStage(nn.Module):
    """Bytes (B, T) -> (B, T, D) -> ... -> (B, T, V); non-contiguous inside, so gradients are too."""

    def __init__(self, stage: int, num_stages: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D) if stage == 0 else None
        self.norm, self.mix = nn.LayerNorm(D), nn.Linear(D, D)
        self.head = nn.Linear(D, V) if stage == num_stages - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        x = x + self.mix(self.norm(x).transpose(0, 1)).transpose(0, 1)
        x = x.transpose(1, 2).transpose(1, 2) + x.cumsum(1) / 10
        return self.head(x) if self.head is not None else x


def _in_bfloat16(stage: int, num_stages: int) -> nn.Module:
    return SequenceStage(stage, num_stages).to(torch.bfloat16)


KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "mlp": MLPStage,
    "sequence": SequenceStage,
    "bfloat16": _in_bfloat16,
}


def build(kind: str, num_stages: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [KINDS[kind](stage, num_stages) for stage in range(num_stages)]


def batch(kind: str, step: int, rows: int, length: int = T) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    if kind == "mlp":
        return torch.randn(rows, D, generator=generator), torch.randint(0, V, (rows,), generator=generator)
    tokens = torch.randint(0, V, (rows, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.reshape(-1, V), target.reshape(-1))


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.01, fused=True)


def adamw_foreach(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.01, foreach=True)


class Counted:
    """A StageOptimizer, called as torch's are. Where parameters are bfloat16, it moves float32 copies of them."""

    def __init__(self, module: nn.Module, name: OptimizerName) -> None:
        self.steps = 0
        self.optimizer = StageOptimizer(
            module, name=name, learning_rate=lambda step: 0.01 / (1 + step), weight_decay=0.1, head=module.head
        )

    def step(self) -> None:
        self.optimizer.step(self.steps)
        self.steps += 1

    def zero_grad(self) -> None:
        """step() has dropped them."""


def stage_adamw(module: nn.Module) -> Counted:
    return Counted(module, "AdamW")


def muon(module: nn.Module) -> Counted:
    return Counted(module, "Muon")


def interface_optimizer(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)  # type: ignore[arg-type]


def interface(kind: str, name: str, conditional: bool) -> nn.Module:
    """Deterministic, so that the oracle and every rank build the same."""
    torch.manual_seed(1)
    shape, label = ((2, D), (2,)) if kind == "mlp" else ((2, T, D), (2, T))
    built = build_interface(
        name,
        TensorMeta(shape, torch.float32),
        num_classes=V if conditional else 0,
        label=TensorMeta(label, torch.int64) if conditional else None,
    )
    with torch.no_grad():  # not zero, so that the first predictions matter too
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return built


def oracle(kind: str, num_stages: int, name: str, conditional: bool, m: int, policy: Policy) -> Reference:
    learners: list[Learner | None] = [
        Learner([interface(kind, name, conditional)], interface_optimizer) if policy.predicts else None
        for _ in range(num_stages - 1)
    ]
    reference = LateReference if policy.late else Reference
    return reference(build(kind, num_stages), [*learners, None], loss_fn, num_microbatches=m, policy=policy)
