"""The running RMS, the two losses, the checks and Custom: what all regressed interfaces share."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dnipipe.interface import MLP, Conv, Custom, Linear, Regressed, Transformer


class Scaled(nn.Module):
    """Predicts weight * h: its loss and gradient can be written by hand."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, h: Tensor, label: Tensor | None) -> Tensor:
        return self.weight * h


class Cut(nn.Module):
    """Drops the last feature."""

    def forward(self, h: Tensor, label: Tensor | None) -> Tensor:
        return h[:, :-1]


def rms(*tensors: Tensor) -> float:
    values = [v for tensor in tensors for v in tensor.flatten().tolist()]
    return math.sqrt(sum(v * v for v in values) / len(values))


def test_the_running_rms_is_that_of_the_first_step_and_then_decays() -> None:
    torch.manual_seed(0)
    interface = Linear(3)
    first, second, third = torch.randn(2, 3), torch.randn(4, 3), 5 * torch.randn(2, 3)
    h = torch.randn(4, 3)
    assert interface.rms.item() == 0.0
    interface.learn(h[:2], None, first)
    interface.learn(h, None, second)
    assert interface.rms.item() == 0.0
    interface.end_step(2)
    assert interface.rms.item() == pytest.approx(rms(first, second), rel=1e-6)
    interface.learn(h[:2], None, third)
    interface.end_step(1)
    assert interface.rms.item() == pytest.approx(0.98 * rms(first, second) + 0.02 * rms(third), rel=1e-6)
    assert [s.item() for s in interface.statistics()] == [0.0, 0.0]


def test_a_step_without_a_true_gradient_leaves_the_rms_alone() -> None:
    interface = Linear(3)
    interface.learn(torch.randn(2, 3), None, torch.randn(2, 3))
    interface.end_step(1)
    before = interface.rms.item()
    interface.end_step(0)
    assert interface.rms.item() == before


def test_the_statistics_are_sums() -> None:
    interface = Linear(3)
    true_grads = [torch.randn(2, 3), torch.randn(5, 3)]
    for true_grad in true_grads:
        interface.learn(torch.randn_like(true_grad), None, true_grad)
    square_sum, count = interface.statistics()
    assert square_sum.item() == pytest.approx(sum(g.double().square().sum().item() for g in true_grads), rel=1e-6)
    assert count.item() == 21


def test_the_normalised_loss_is_the_mean_squared_error_in_units_of_the_rms() -> None:
    torch.manual_seed(0)
    interface = Custom(Scaled(0.5))
    h, true_grad = torch.randn(4, 3), 1e-3 * torch.randn(4, 3)

    def gradient_by_hand(scale: float) -> float:
        return (2 * (0.5 * h - true_grad / scale) * h).mean().item()

    interface.learn(h, None, true_grad)
    assert interface.module.weight.grad.item() == pytest.approx(gradient_by_hand(rms(true_grad)), rel=1e-5)
    interface.end_step(1)
    interface.rms.mul_(3.0)
    interface.module.weight.grad = None
    interface.learn(h, None, true_grad)
    assert interface.module.weight.grad.item() == pytest.approx(gradient_by_hand(3 * rms(true_grad)), rel=1e-5)
    torch.testing.assert_close(interface.synthetic_grad(h), 0.5 * h * 3 * rms(true_grad))


def test_the_papers_loss_sums_over_features_and_averages_over_the_batch() -> None:
    torch.manual_seed(0)
    interface = Custom(Scaled(0.5), normalise=False)
    h, true_grad = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    interface.learn(h, None, true_grad)
    interface.end_step(1)
    by_hand = sum((2 * (0.5 * h[b] - true_grad[b]) * h[b]).sum().item() for b in range(4)) / 4
    assert interface.module.weight.grad.item() == pytest.approx(by_hand, rel=1e-5)
    assert interface.rms.item() == 1.0 and interface.statistics() == []
    assert torch.equal(interface.synthetic_grad(h), 0.5 * h)


def test_gradients_of_zero_or_next_to_it_give_no_nan() -> None:
    for size in (0.0, 1e-30):
        interface = Custom(Scaled(0.5))
        for _ in range(2):
            interface.learn(torch.ones(2, 3), None, torch.full((2, 3), size))
            interface.end_step(1)
        # the target counts as nothing, so only the prediction pulls: twice 2 * mean(0.5 * h * h)
        assert interface.module.weight.grad.item() == pytest.approx(2.0)
        assert torch.equal(interface.synthetic_grad(torch.ones(2, 3)), torch.zeros(2, 3))


def test_custom_takes_a_module_without_parameters() -> None:
    class Decay(nn.Module):
        def forward(self, h: Tensor, label: Tensor | None) -> Tensor:
            return h

    interface = Custom(Decay())
    true_grad = torch.full((2, 3), 2.0)
    interface.learn(torch.ones(2, 3), None, true_grad)
    interface.end_step(1)
    assert torch.equal(interface.synthetic_grad(torch.ones(2, 3)), true_grad)


def test_custom_passes_the_label_on_and_turns_its_parameters_to_float32() -> None:
    class Pick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.arange(6.0).view(2, 3).bfloat16())

        def forward(self, h: Tensor, label: Tensor | None) -> Tensor:
            assert label is not None
            return self.rows[label]

    interface = Custom(Pick(), normalise=False)
    assert interface.module.rows.dtype == torch.float32
    expected = torch.tensor([[3.0, 4.0, 5.0], [0.0, 1.0, 2.0]])
    assert torch.equal(interface.synthetic_grad(torch.randn(2, 3), torch.tensor([1, 0])), expected)


def test_predicting_keeps_no_graph_in_memory() -> None:
    class Watch(nn.Module):
        def forward(self, h: Tensor, label: Tensor | None) -> Tensor:
            modes.append(torch.is_grad_enabled())
            return h

    modes: list[bool] = []
    interface = Custom(Watch())
    interface.synthetic_grad(torch.ones(2, 3))
    interface.learn(torch.ones(2, 3), None, torch.ones(2, 3))
    assert modes == [False, True]
    assert not interface.checked(torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)).requires_grad


def test_a_prediction_of_another_shape_is_refused() -> None:
    message = (
        "interface Cut returned shape (2, 3) for an activation of shape (2, 4): "
        "a synthetic gradient must have the activation's shape"
    )
    h = torch.randn(2, 4)
    with pytest.raises(ValueError) as predicting:
        Custom(Cut()).synthetic_grad(h)
    with pytest.raises(ValueError) as learning:
        Custom(Cut()).learn(h, None, torch.randn(2, 4))
    assert str(predicting.value) == str(learning.value) == message


def test_a_true_gradient_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError) as refused:
        Linear(4).learn(torch.randn(2, 4), None, torch.randn(1, 4))
    assert str(refused.value) == (
        "true_grad has shape (1, 4) for an activation of shape (2, 4): a gradient has the activation's shape"
    )


def test_sizes_that_make_no_interface_are_refused() -> None:
    for build, message in (
        (
            lambda: MLP(4, num_hidden=3),
            "num_hidden = 3: MLP takes 0, 1 or 2 hidden layers; for more, wrap your own in Custom",
        ),
        (
            lambda: Conv(4, num_hidden=-1),
            "num_hidden = -1: Conv takes 0, 1 or 2 hidden layers; for more, wrap your own in Custom",
        ),
        (lambda: Conv(4, kernel_size=4), "kernel_size = 4: only an odd kernel keeps height and width; take 5"),
        (
            lambda: Conv(4, label_at=(3, 3)),
            "label_at = (3, 3), but num_classes = 0: say how many classes there are, or leave it",
        ),
        (
            lambda: Transformer(4, width=30),
            "width = 30 must be a multiple of num_heads = 4: give another width, or None",
        ),
    ):
        with pytest.raises(ValueError) as refused:
            build()
        assert str(refused.value) == message


def test_default_widths_follow_the_activation() -> None:
    assert [MLP(d).first.linear.out_features for d in (8, 100, 4096)] == [64, 200, 1024]
    assert Conv(7, num_hidden=2).layers[0].out_channels == 7
    assert [Transformer(d).qkv.in_features for d in (8, 512)] == [32, 128]
    assert Transformer(512, num_heads=3).qkv.in_features == 129


def test_a_transformer_sees_the_tokens_after_its_own() -> None:
    torch.manual_seed(0)
    interface = Transformer(8, normalise=False)
    nn.init.normal_(interface.out.weight)
    h = torch.randn(1, 5, 8)
    changed = h.clone()
    changed[:, -1] = torch.randn(8)
    assert not torch.allclose(interface.synthetic_grad(h)[:, 0], interface.synthetic_grad(changed)[:, 0])


def awake(interface: Regressed, first: nn.Module, last: nn.Module) -> tuple[Regressed, nn.Module]:
    """The interface with a last layer that is not zero, so that its answers show what the layers before it do."""
    nn.init.normal_(last.weight)
    return interface, first


def mlp(**options: bool) -> tuple[Regressed, nn.Module]:
    made = MLP(4, num_hidden=1, normalise=False, **options)
    return awake(made, made.first.linear, made.rest[-1])


def conv(**options: bool) -> tuple[Regressed, nn.Module]:
    made = Conv(4, num_hidden=1, normalise=False, **options)
    return awake(made, made.layers[0], made.layers[-1])


@pytest.mark.parametrize("build, shape", [(mlp, (16, 4)), (conv, (16, 4, 3, 3))], ids=["mlp", "conv"])
def test_hidden_layers_are_not_linear(
    build: Callable[..., tuple[Regressed, nn.Module]], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    interface, _ = build()
    h = torch.randn(shape)
    up, down, middle = (interface.synthetic_grad(x) for x in (h, -h, torch.zeros(shape)))
    assert not torch.allclose(up + down, 2 * middle, atol=1e-3)


@pytest.mark.parametrize("build, shape", [(mlp, (16, 4)), (conv, (16, 4, 3, 3))], ids=["mlp", "conv"])
def test_batch_norm_normalises_and_leaves_no_state_behind(
    build: Callable[..., tuple[Regressed, nn.Module]], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    interface, first = build(batch_norm=True)
    h = torch.randn(shape)
    before = {name: value.clone() for name, value in interface.state_dict().items()}
    expected = interface.synthetic_grad(h)
    assert all(torch.equal(value, before[name]) for name, value in interface.state_dict().items())
    for parameter in first.parameters():
        parameter.data.mul_(100.0)
    torch.testing.assert_close(interface.synthetic_grad(h), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(interface.eval().synthetic_grad(h), expected, rtol=1e-2, atol=1e-2)


def test_only_with_label_at_a_class_says_what_it_does_at_every_place() -> None:
    """A linear layer behind the activation makes such gradients: another one for each class, channel and place."""
    label, h = torch.arange(60) % 5, torch.randn(60, 3, 4, 6)
    true_grad = torch.randn(5, 3, 4, 6)[label]
    left = {}
    for label_at in (None, (4, 6)):
        interface = Conv(3, 5, num_hidden=0, label_at=label_at)
        optimizer = torch.optim.Adam(interface.parameters(), lr=0.03)
        for _ in range(300):
            optimizer.zero_grad()
            interface.learn(h, label, true_grad)
            optimizer.step()
            interface.end_step(1)
        left[label_at] = float((interface.synthetic_grad(h, label) - true_grad).square().mean())
    assert left[4, 6] < 1e-4 < 0.1 < left[None], "zeros around the image tell filters a little of the place"
    with pytest.raises(ValueError, match=r"label_at = \(4, 6\), but the activation is 5 x 6: give its size"):
        interface.synthetic_grad(torch.randn(60, 3, 5, 6), label)
