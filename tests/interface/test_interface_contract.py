"""What every interface promises, whatever it computes: one test for each promise, run on every interface and layout."""

import pytest
import torch
from torch import Tensor

from dnipipe.interface import Custom, Interface, Learner, Regressed
from tests.interface.cases import CASES, CLASSES, B, Case, data, every_case, fresh, teach


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
