"""Every interface and layout that the contract's tests run on, and what they do to each."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from dnipipe.interface import (
    MLP,
    Conv,
    Custom,
    Interface,
    Learner,
    Linear,
    LocalHead,
    Potential,
    Scaled,
    TensorMeta,
    Transformer,
    build_synthetic_input,
)

CLASSES = 5
B, T, D, C, H, W = 6, 5, 24, 3, 6, 4


class Free(nn.Module):
    """A user's predictor that does not start at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, h: Tensor, label: Tensor | None) -> Tensor:
        return self.linear(h)


def synthetic_input(*shape: int, label: tuple[int, ...] = (B,), **options: int) -> Interface:
    """Of activations that are shaped as the net's input, as these tests have it; test_synthetic_input.py has others."""
    meta = TensorMeta(shape, torch.float32)
    return build_synthetic_input(meta, meta, label=TensorMeta(label, torch.int64), **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """An interface, and the shapes of the activation and the label it is tried on."""

    name: str
    build: Callable[[], Interface]
    shape: tuple[int, ...]
    label_shape: tuple[int, ...] | None = None


CASES = (
    Case("linear", lambda: Linear(D), (B, D)),
    Case("linear-label", lambda: Linear(D, CLASSES), (B, D), (B,)),
    Case("linear-tokens", lambda: Linear(D, CLASSES), (B, T, D), (B, T)),
    Case("linear-paper", lambda: Linear(D, CLASSES, normalise=False), (B, D), (B,)),
    Case("mlp-0", lambda: MLP(D, CLASSES, num_hidden=0), (B, D), (B,)),
    Case("mlp-1", lambda: MLP(D), (B, D)),
    Case("mlp-2-paper", lambda: MLP(D, CLASSES, num_hidden=2, batch_norm=True, normalise=False), (B, D), (B,)),
    Case("mlp-tokens", lambda: MLP(D, CLASSES, batch_norm=True), (B, T, D), (B, T)),
    Case("mlp-sequence-label", lambda: MLP(D, CLASSES), (B, T, D), (B,)),
    Case("conv-0", lambda: Conv(C, num_hidden=0), (B, C, H, W)),
    Case("conv-1", lambda: Conv(C, CLASSES, width=8), (B, C, H, W), (B,)),
    Case("conv-places", lambda: Conv(C, CLASSES, label_at=(H, W)), (B, C, H, W), (B,)),
    Case("conv-2", lambda: Conv(C, num_hidden=2, kernel_size=3, width=8, batch_norm=True), (B, C, H, W)),
    Case("local-head", lambda: LocalHead(D, CLASSES), (B, D), (B,)),
    Case("local-head-tokens", lambda: LocalHead(D, CLASSES), (B, T, D), (B, T)),
    Case("local-head-sequence", lambda: LocalHead(D, CLASSES), (B, T, D), (B,)),
    Case("low-rank-head", lambda: LocalHead(D, CLASSES, rank=2), (B, D), (B,)),
    Case("sampled-head", lambda: LocalHead(D, CLASSES, samples=2), (B, T, D), (B, T)),
    Case("sampled-head-sequence", lambda: LocalHead(D, CLASSES, samples=3, rank=4), (B, T, D), (B,)),
    Case("scaled-head", lambda: Scaled(LocalHead(D, CLASSES)), (B, D), (B,)),
    Case("scaled-head-tokens", lambda: Scaled(LocalHead(D, CLASSES, samples=2)), (B, T, D), (B, T)),
    Case("scaled-transformer", lambda: Scaled(Transformer(D, CLASSES)), (B, T, D), (B, T)),
    Case("potential", lambda: Potential(D), (B, D)),
    Case("potential-tokens", lambda: Potential(D, CLASSES), (B, T, D), (B, T)),
    Case("potential-sequence", lambda: Potential(D, CLASSES, width=8), (B, T, D), (B,)),
    Case("transformer", lambda: Transformer(D), (B, T, D)),
    Case("transformer-tokens", lambda: Transformer(D, CLASSES), (B, T, D), (B, T)),
    Case("custom", lambda: Custom(Free()), (B, D)),
    Case("synthetic-input", lambda: synthetic_input(B, D), (B, D)),
    Case("synthetic-input-linear", lambda: synthetic_input(B, C, H, W, num_hidden=0), (B, C, H, W)),
    Case("synthetic-input-label", lambda: synthetic_input(B, D, num_classes=CLASSES, num_hidden=2), (B, D), (B,)),
)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def fresh(case: Case, seed: int = 0) -> Interface:
    torch.manual_seed(seed)
    return case.build()


def data(case: Case, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None, Tensor]:
    """An activation, its label (some missing: -100) and a true gradient of the usual small size."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(case.shape, generator=generator).to(dtype)
    label = None
    if case.label_shape is not None:
        label = torch.randint(CLASSES, case.label_shape, generator=generator)
        label[-1] = -100
    return h, label, (1e-4 * torch.randn(case.shape, generator=generator)).to(dtype)


def teach(interface: Interface, case: Case, steps: int = 3) -> Learner:
    learner = Learner([interface], lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
    for step in range(steps):
        h, label, true_grad = data(case, seed=step)
        learner.learn([h], label, [true_grad])
        learner.end_step()
    if isinstance(interface, Scaled):
        interface.scale.fill_(0.5)  # what noise teaches it may be 0
    return learner
