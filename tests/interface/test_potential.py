"""That a potential's prediction is the gradient of a scalar, shrinks as its activation grows, and learns a teacher."""

import pytest
import torch
from torch import Tensor, nn

from dnipipe.interface import Learner, LocalHead, Potential

D, CLASSES = 6, 5


def arbitrary(num_classes: int = CLASSES, *, width: int = 7) -> Potential:
    """One whose every weight matters: one that starts at zero would hide most mistakes."""
    torch.manual_seed(0)
    made = Potential(D, num_classes, width=width)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    made.rms.fill_(1.0)
    return made


def phi(made: Potential, h: Tensor, label: Tensor) -> Tensor:
    """The scalar, with the antiderivative of GELU: with z * cdf(z) integrated by parts."""
    z = made.inner(nn.functional.layer_norm(h, (D,)), label)
    normal = torch.distributions.Normal(z.new_zeros(()), z.new_ones(()))
    antiderivative = (z.square() - 1) / 2 * normal.cdf(z) + z / 2 * normal.log_prob(z).exp()
    return (made.slopes(label) * antiderivative).sum()


def test_it_is_the_gradient_of_its_scalar() -> None:
    made, label = arbitrary().double(), torch.tensor([[0, 4, -100], [2, 1, 1]])
    h = (3 * torch.randn(2, 3, D) + 1).double().requires_grad_()
    (expected,) = torch.autograd.grad(phi(made, h, label), h)
    # forward alone: synthetic_grad computes in float32
    close = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(made.float()(h.float(), label).double(), expected, rtol=0, atol=close)


@pytest.mark.parametrize("num_classes", [0, CLASSES])
def test_its_jacobian_is_symmetric(num_classes: int) -> None:
    made = arbitrary(num_classes)
    label = torch.tensor([3]) if num_classes else None
    jacobian = torch.autograd.functional.jacobian(lambda h: made(h[None], label)[0], torch.randn(D))
    assert jacobian.abs().max() > 0.1
    torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-5 * jacobian.abs().max().item())


def test_it_shrinks_as_the_activation_grows_and_never_points_along_it() -> None:
    made, label = arbitrary(), torch.tensor([0, 4, 2])
    h = torch.randn(3, D)
    h = h - h.mean(-1, keepdim=True)
    one, ten = made.synthetic_grad(h, label), made.synthetic_grad(10 * h, label)
    torch.testing.assert_close(10 * ten, one, rtol=1e-3, atol=1e-3 * one.abs().max().item())
    torch.testing.assert_close((one * h).sum(-1), torch.zeros(3), rtol=0, atol=1e-3 * one.abs().max().item())


def test_it_learns_the_gradient_of_a_loss_behind_a_layer_norm() -> None:
    torch.manual_seed(0)
    teacher = LocalHead(16, CLASSES)
    nn.init.normal_(teacher.classify.weight)
    learner = Learner([Potential(16, CLASSES)], lambda parameters: torch.optim.Adam(parameters, lr=5e-3))
    for _ in range(300):
        h, label = 2 * torch.randn(64, 16), torch.randint(CLASSES, (64,))
        learner.learn([h], label, [teacher.synthetic_grad(h, label)])
        learner.end_step()
    assert learner.metrics()["cosine"] > 0.9
