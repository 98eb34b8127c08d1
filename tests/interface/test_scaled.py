"""The scale against the regression written out, and two replicas against one learner fed with both."""

import pytest
import torch
from torch import Tensor

from dnipipe.interface import Interface, Learner, LocalHead, Scaled, build_interface
from dnipipe.interface.scaled import SCALE_DECAY


class Twice(Interface):
    """Predicts 2 h, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[int] = []

    def synthetic_grad(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        return self.checked(2 * h, h)

    def learn(self, h: Tensor, label: Tensor | None, true_grad: Tensor) -> Tensor:
        return self.synthetic_grad(h, label)

    def end_step(self, num_learned: int) -> None:
        self.ended.append(num_learned)


def test_the_scale_is_the_regression_coefficient_over_decayed_sums() -> None:
    torch.manual_seed(0)
    scaled, product, square = Scaled(Twice()), 0.0, 0.0
    learner = Learner([scaled])
    for num_microbatches in (1, 3, 2):
        product, square = SCALE_DECAY * product, SCALE_DECAY * square
        for _ in range(num_microbatches):
            h = torch.randn(4, 3)
            true = 3 * h + 0.5 * torch.randn(4, 3)
            before = scaled.scale.clone()
            learner.learn([h], None, [true])
            assert torch.equal(scaled.scale, before), "within a step all predictions have one scale"
            product, square = product + (2 * h * true).sum().item(), square + (4 * h * h).sum().item()
        learner.end_step()
        assert scaled.scale.item() == pytest.approx(product / square, rel=1e-5)
        torch.testing.assert_close(scaled.synthetic_grad(h), scaled.scale * 2 * h)
    assert 1.2 < scaled.scale.item() < 1.8
    assert scaled.interface.ended == [1, 3, 2]


@pytest.mark.parametrize("factor, scale", [(-1.0, 0.0), (1.0, 0.5), (100.0, 2.0)])
def test_the_scale_stays_from_0_to_2(factor: float, scale: float) -> None:
    scaled, h = Scaled(Twice()), torch.randn(4, 3)
    scaled.learn(h, None, factor * h)
    scaled.end_step(1)
    assert scaled.scale.item() == pytest.approx(scale)


def test_before_the_first_true_gradient_and_while_nothing_is_predicted_it_is_0() -> None:
    h = torch.randn(4, 3)
    scaled = Scaled(Twice())
    assert torch.equal(scaled.synthetic_grad(h), torch.zeros(4, 3))
    scaled.end_step(0)
    assert torch.equal(scaled.scale, torch.tensor(0.0))
    scaled.learn(torch.zeros(4, 3), None, h)
    scaled.end_step(1)
    assert torch.equal(scaled.scale, torch.tensor(0.0)), "0 / 0 is no scale"


def test_replicas_share_one_scale() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3), torch.randn(4, 3)) for _ in range(2)]
    replicas, whole = [Scaled(Twice()), Scaled(Twice())], Scaled(Twice())
    for replica, (h, true) in zip(replicas, batches, strict=True):
        replica.learn(h, None, true + h)
        whole.learn(h, None, true + h)
    whole.end_step(2)
    mean = torch.stack([replica.statistics()[0] for replica in replicas]).mean(0)
    for replica in replicas:
        replica.statistics()[0].copy_(mean)  # as Learner does
        replica.end_step(1)
        torch.testing.assert_close(replica.scale, whole.scale)


def test_the_head_within_learns_as_if_it_were_alone() -> None:
    torch.manual_seed(0)
    alone, within = LocalHead(6, 7), Scaled(LocalHead(6, 7))
    within.interface.load_state_dict(alone.state_dict())
    h, label, true = torch.randn(5, 6), torch.randint(7, (5,)), torch.randn(5, 6)
    alone.learn(h, label, true)
    within.learn(h, label, true)
    for mine, expected in zip(within.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine.grad, expected.grad)


def test_a_true_gradient_that_would_broadcast_is_refused() -> None:
    with pytest.raises(ValueError, match=r"true_grad has shape \(3,\) for an activation of shape \(4, 3\)"):
        Scaled(Twice()).learn(torch.randn(4, 3), None, torch.randn(3))


def test_options_of_the_name_are_those_of_the_head() -> None:
    made = build_interface("scaled_head", torch.randn(4, 3, 8), num_classes=9, rank=2)
    assert isinstance(made, Scaled) and isinstance(made.interface, LocalHead)
    assert made.interface.classify.in_features == 2
    with pytest.raises(ValueError, match="rank = 0 must be at least 1"):
        build_interface("scaled_head", torch.randn(4, 3, 8), num_classes=9, rank=0)


@pytest.mark.parametrize(
    "features, num_classes, rank, samples", [(8, 9, 8, 9), (768, 50_000, 128, 1024)], ids=["small", "large"]
)
def test_a_sampled_head_is_cheap_where_the_vocabulary_is_large(
    features: int, num_classes: int, rank: int, samples: int
) -> None:
    made = build_interface("sampled_head", torch.empty(4, 3, features), num_classes=num_classes)
    assert isinstance(made, Scaled) and isinstance(made.interface, LocalHead) and made.interface.sampled is not None
    assert made.interface.classify.in_features == rank and made.interface.sampled.num_samples == samples
    other = build_interface("sampled_head", torch.empty(4, 3, features), num_classes=num_classes, samples=5)
    assert isinstance(other, Scaled) and isinstance(other.interface, LocalHead) and other.interface.sampled is not None
    assert other.interface.classify.in_features == rank and other.interface.sampled.num_samples == 5
