"""What every interface promises, whatever it computes: one test for each promise, run on every interface and layout."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dnipipe.interface import (
    MLP,
    Conv,
    Custom,
    Interface,
    Learner,
    Linear,
    LocalHead,
    Potential,
    Regressed,
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


def gradients(interface: Interface) -> list[Tensor]:
    return [p.grad.clone() for p in interface.parameters() if p.grad is not None]


@every_case
def test_an_untrained_interface_predicts_zero(case: Case) -> None:
    interface = fresh(case)
    h, label, _ = data(case)
    assert torch.equal(interface.synthetic_grad(h, label), torch.zeros(case.shape))
    if isinstance(interface, Regressed) and not isinstance(interface, Custom):
        interface.rms.fill_(1.0)  # zero by its last layer, not only for want of a scale
        assert torch.equal(interface.synthetic_grad(h, label), torch.zeros(case.shape))


@every_case
def test_a_trained_interface_predicts_something(case: Case) -> None:
    interface = fresh(case)
    teach(interface, case)
    h, label, _ = data(case)
    assert interface.synthetic_grad(h, label).abs().max() > 0


# a synthetic input has the dtype of its activation, whatever that of its own input
ANSWERING_ALIKE = [case for case in CASES if "synthetic-input" not in case.name]


@pytest.mark.parametrize("case", ANSWERING_ALIKE, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_answer_has_the_form_of_the_activation(case: Case, dtype: torch.dtype) -> None:
    interface = fresh(case)
    teach(interface, case)
    h, label, true_grad = data(case, dtype=dtype)
    scattered = h.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    assert not scattered.is_contiguous()
    for answer in (interface.synthetic_grad(scattered, label), interface.learn(scattered, label, true_grad)):
        assert (answer.shape, answer.dtype, answer.device) == (h.shape, dtype, h.device)
        assert answer.is_contiguous() and not answer.requires_grad
        assert answer.isfinite().all()
    assert scattered.grad is None
    assert all(p.dtype == torch.float32 for p in interface.parameters())
    close = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(
        interface.synthetic_grad(scattered, label).float(),
        interface.synthetic_grad(h.float(), label),
        rtol=0,
        atol=close * interface.synthetic_grad(h.float(), label).abs().max().item(),
    )


@every_case
def test_learn_returns_what_synthetic_grad_would_give(case: Case) -> None:
    interface = fresh(case)
    teach(interface, case)
    h, label, true_grad = data(case)
    expected = interface.synthetic_grad(h, label)
    torch.testing.assert_close(interface.learn(h, label, true_grad), expected, rtol=1e-5, atol=1e-9)


@every_case
def test_learn_adds_to_the_gradient_and_never_zeroes_it(case: Case) -> None:
    interface = fresh(case)
    teach(interface, case)
    h, label, true_grad = data(case)
    interface.learn(h, label, true_grad)
    once = gradients(interface)
    assert any(gradient.abs().max() > 0 for gradient in once)
    before = [torch.randn_like(p) for p in interface.parameters()]
    for parameter, gradient in zip(interface.parameters(), before, strict=True):
        parameter.grad = gradient.clone()
    interface.learn(h, label, true_grad)
    for now, was, added in zip(gradients(interface), before, once, strict=True):
        assert torch.equal(now, was + added)


@every_case
def test_nothing_of_the_callers_changes(case: Case) -> None:
    interface = fresh(case)
    teach(interface, case)
    h, label, true_grad = data(case)
    kept = [None if t is None else t.clone() for t in (h, label, true_grad)]
    h.requires_grad_()
    with torch.no_grad():
        interface.synthetic_grad(h, label)
        answer = interface.learn(h, label, true_grad)
    answer.fill_(7.0)
    for now, was in zip((h, label, true_grad), kept, strict=True):
        assert (now is None and was is None) or torch.equal(now, was)
    assert h.grad is None and true_grad.grad is None


@every_case
def test_no_grad_of_the_caller_does_not_stop_learning(case: Case) -> None:
    h, label, true_grad = data(case)
    expected, interface = fresh(case), fresh(case)
    expected.learn(h, label, true_grad)
    with torch.no_grad():
        interface.learn(h, label, true_grad)
    for now, want in zip(gradients(interface), gradients(expected), strict=True):
        assert torch.equal(now, want)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_of_the_caller_changes_nothing(case: Case, dtype: torch.dtype) -> None:
    h, label, true_grad = data(case, dtype=dtype)
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1e-2)  # noqa: E731
    outside, inside = Learner([fresh(case)], optimizer), Learner([fresh(case)], optimizer)
    for _ in range(2):
        outside.learn([h], label, [true_grad])
        outside.end_step()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            inside.learn([h], label, [true_grad])
            inside.end_step()
        answer = inside.predict([h], label)[0]
    assert torch.equal(answer, outside.predict([h], label)[0])


@every_case
def test_the_same_seed_gives_the_same_bits(case: Case) -> None:
    first, second = fresh(case), fresh(case)
    teach(first, case)
    teach(second, case)
    h, label, _ = data(case)
    assert torch.equal(first.synthetic_grad(h, label), second.synthetic_grad(h, label))


@every_case
def test_a_state_dict_carries_everything(case: Case) -> None:
    first, second = fresh(case), fresh(case, seed=9)
    teach(first, case)
    second.load_state_dict(first.state_dict())
    h, label, _ = data(case)
    assert torch.equal(first.synthetic_grad(h, label), second.synthetic_grad(h, label))


# a potential's gradient is that of a scalar, which a linear map at random is not: test_potential.py
REGRESSED = [case for case in CASES if isinstance(case.build(), Regressed) and "potential" not in case.name]


@pytest.mark.parametrize("case", REGRESSED, ids=lambda case: case.name)
def test_a_regressed_interface_learns_a_linear_teacher(case: Case) -> None:
    """The teacher: a fixed linear map of the features plus, where there are labels, a fixed row for each class."""
    dim = 1 if len(case.shape) == 4 else -1
    width = case.shape[dim]
    generator = torch.Generator().manual_seed(0)
    matrix, rows = (torch.randn(n, width, generator=generator) for n in (width, CLASSES))

    def teacher(h: Tensor, label: Tensor | None) -> Tensor:
        grad = h.movedim(dim, -1) @ matrix
        if label is not None:
            grad = grad + rows[label].reshape(*label.shape, *[1] * (h.ndim - 1 - label.ndim), width)
        return grad.movedim(-1, dim)

    size = 1.0 if not fresh(case).normalise else 1e-6
    learner = Learner([fresh(case)], lambda parameters: torch.optim.Adam(parameters, lr=0.02))
    for _ in range(200):
        h = torch.randn(8 * B, *case.shape[1:], generator=generator)
        label = case.label_shape and torch.randint(CLASSES, (8 * B, *case.label_shape[1:]), generator=generator)
        learner.learn([h], label, [size * teacher(h, label)])
        learner.end_step()
    assert learner.metrics()["cosine"] > 0.9


@contextmanager
def no_look_at_values() -> Iterator[None]:
    """Fails on every operation that would make a GPU's host wait for a value."""
    waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func not in waits, f"{func} waits for the device"
            return func(*args, **(kwargs or {}))

    with Mode():
        yield


@every_case
def test_nothing_waits_for_the_device(case: Case) -> None:
    h, label, true_grad = data(case)
    # SGD: Adam on a CPU reads its own step counter, which lives on the CPU on every device
    learner = Learner([fresh(case)], lambda parameters: torch.optim.SGD(parameters, lr=0.1), average=lambda flat: None)
    with no_look_at_values():
        for _ in range(2):
            learner.predict([h], label)
            learner.learn([h], label, [true_grad])
            learner.end_step()
        with pytest.raises(AssertionError, match="waits for the device"):
            h.sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_case
def test_nothing_waits_for_a_gpu(case: Case) -> None:
    h, label, true_grad = (None if t is None else t.cuda() for t in data(case, dtype=torch.bfloat16))
    learner = Learner([fresh(case).cuda()], average=lambda flat: None)
    learner.learn([h], label, [true_grad])  # the first call may load kernels and libraries
    learner.predict([h], label)
    learner.end_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            learner.predict([h], label)
            learner.learn([h], label, [true_grad])
            learner.end_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert learner.predict([h], label)[0].isfinite().all()
