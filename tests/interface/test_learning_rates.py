"""Which learning rate holds where nobody gave one: each interface's own, and that it is a good one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

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
    Transformer,
    build_interface,
)

B, D, CLASSES = 32, 64, 5
SHAPES = {"conv": (B, 4, 6, 6), "transformer": (B, 3, D)}
REGRESSED = ("linear", "mlp", "conv", "transformer", "potential")
HEADS = ("local_head", "scaled_head", "sampled_head")


def built(name: str, **options: Any) -> Interface:
    torch.manual_seed(0)
    return build_interface(name, torch.zeros(SHAPES.get(name, (B, D))), num_classes=CLASSES, **options)


@pytest.mark.parametrize("name", HEADS)
def test_heads_learn_from_labels_as_a_classifier_does(name: str) -> None:
    label = torch.zeros(B, dtype=torch.int64)
    assert built(name, label=label).learning_rate == 1e-3


def test_a_scaled_interface_has_the_rate_of_what_it_scales() -> None:
    assert Scaled(Linear(D)).learning_rate == Linear(D).learning_rate != LocalHead(D, CLASSES).learning_rate


@pytest.mark.parametrize("normalise", [True, False])
def test_hidden_layers_learn_more_slowly_and_without_any_an_mlp_is_linear(normalise: bool) -> None:
    straight, one, two = (built("mlp", num_hidden=n, normalise=normalise).learning_rate for n in (0, 1, 2))
    assert one == two < straight == built("linear", normalise=normalise).learning_rate


@pytest.mark.parametrize("kind", [MLP, Potential, Transformer])
def test_wide_hidden_layers_learn_the_more_slowly_the_wider(kind: Any) -> None:
    narrow, middle, wide, wider = (kind(features).learning_rate for features in (32, 500, 1000, 2000))
    assert narrow == middle == pytest.approx(3e-3) and wide == middle / 2 and wider == wide / 2


def test_a_convolution_learns_the_more_slowly_the_more_it_sums_over() -> None:
    rates = [Conv(channels, kernel_size=size).learning_rate for channels, size in ((1, 1), (16, 5), (48, 5), (48, 7))]
    assert rates == sorted(rates, reverse=True) and rates[1] == pytest.approx(1e-3)
    assert rates[1] / rates[2] == pytest.approx(48 / 16) and rates[2] / rates[3] == pytest.approx(49 / 25)


@pytest.mark.parametrize("name", REGRESSED)
def test_the_gradient_as_it_is_takes_a_far_lower_rate(name: str) -> None:
    assert 0 < built(name, normalise=False).learning_rate <= 1e-2 * built(name).learning_rate


def test_a_module_of_which_nothing_is_known_learns_slowly() -> None:
    assert Custom(nn.Linear(D, D)).learning_rate <= min(built(name).learning_rate for name in REGRESSED)


def _r2_after(num_steps: int, name: str, rate: float | None, size: float, normalise: bool) -> float:
    """How well the interface knows a gradient that is a linear function of the activation, of RMS `size`."""
    optimizer = None if rate is None else lambda parameters: torch.optim.Adam(parameters, lr=rate)
    learner = Learner([built(name, normalise=normalise)], optimizer)
    generator = torch.Generator().manual_seed(1)
    teacher = size * torch.randn(D, D, generator=generator) / D**0.5
    for _ in range(num_steps):
        h = torch.randn(B, D, generator=generator)
        learner.learn([h], None, [h @ teacher])
        learner.end_step()
    return learner.metrics()["r2"]


def test_a_linear_interface_knows_a_linear_gradient_soon_at_its_own_rate_and_not_at_that_of_a_network() -> None:
    assert _r2_after(100, "linear", None, 1.0, True) > 0.95
    assert _r2_after(100, "linear", 1e-3, 1.0, True) < 0.6


def test_a_gradient_as_it_is_is_small_and_its_rate_is_too() -> None:
    own = built("linear", normalise=False).learning_rate
    assert _r2_after(100, "linear", own, 3e-3, False) > 0.95
    assert _r2_after(100, "linear", built("linear").learning_rate, 3e-3, False) < 0


def test_each_interface_of_a_learner_has_its_own_and_a_given_optimizer_wins() -> None:
    shared = built("linear")
    interfaces = [shared, built("local_head"), shared]  # one that serves two outputs, which is one parameter each
    optimizer = Learner(interfaces).optimizer
    assert optimizer is not None
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {id(p): each.learning_rate for each in interfaces for p in each.parameters()}
    assert len(set(rates.values())) == 2
    given = Learner(interfaces, lambda parameters: torch.optim.SGD(parameters, lr=0.5)).optimizer
    assert isinstance(given, torch.optim.SGD) and [group["lr"] for group in given.param_groups] == [0.5]


def test_a_state_of_another_optimizer_is_refused_with_the_cure() -> None:
    interfaces = [built("linear"), built("local_head")]
    saved = Learner(interfaces, torch.optim.Adam).state_dict()
    with pytest.raises(
        ValueError, match=r"holds 1 parameter groups .* here has 2: give .* interface_optimizer=; where"
    ):
        Learner(interfaces).load_state_dict(saved)
