"""Synthetic inputs where the net's input and the activation differ: layouts, dtypes, refusals, and the sums by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnipipe.interface import Learner, SyntheticInput, TensorMeta, build_synthetic_input

B, T, D, V, CLASSES = 6, 4, 10, 9, 3
ROWS, TOKENS = TensorMeta((B, 2, 7), torch.float32), TensorMeta((B, T), torch.int64)
LAYOUTS = {
    "rows": (ROWS, (B, D), {}),
    "rows-to-maps": (ROWS, (B, 3, 4, 2), {"num_hidden": 2}),
    "rows-label": (ROWS, (B, D), {"num_classes": CLASSES, "label": TensorMeta((B,), torch.int64)}),
    "tokens": (TOKENS, (B, T, D), {"num_tokens": V}),
    "tokens-label": (
        TOKENS,
        (B, T, D),
        {"num_tokens": V, "num_classes": CLASSES, "label": TensorMeta((B, T), torch.int64), "num_hidden": 0},
    ),
    "tokens-sequence-label": (
        TOKENS,
        (B, T, D),
        {"num_tokens": V, "num_classes": CLASSES, "label": TensorMeta((B,), torch.int64)},
    ),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def build(layout: str, dtype: torch.dtype = torch.float32) -> SyntheticInput:
    net_input, shape, options = LAYOUTS[layout]
    torch.manual_seed(0)
    return build_synthetic_input(net_input, TensorMeta(shape, dtype), **options)


def data(layout: str, seed: int, rows: int = B) -> tuple[Tensor, Tensor | None, Tensor]:
    """The net's input, a label or None, and an activation that depends on both."""
    net_input, shape, options = LAYOUTS[layout]
    random = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    size = (rows, *net_input.shape[1:])
    is_tokens = net_input.dtype == torch.int64
    x = torch.randint(V, size, generator=random) if is_tokens else torch.randn(size, generator=random)
    features = F.one_hot(x, V).float() if is_tokens else x.flatten(1)
    out = shape[-1] if is_tokens else int(torch.Size(shape[1:]).numel())
    activation = features @ torch.randn(features.shape[-1], out, generator=fixed)
    label = None
    if "label" in options:
        label = torch.randint(CLASSES, (rows, *options["label"].shape[1:]), generator=random)
        table = torch.randn(CLASSES, out, generator=fixed)[label]
        activation = activation + (table if table.ndim == activation.ndim else table.unsqueeze(1))
    return x, label, activation.view(rows, *shape[1:])


def adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)  # type: ignore[arg-type]


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02)  # type: ignore[arg-type]


@every_layout
def test_it_learns_what_the_input_and_the_label_tell_of_the_activation(layout: str) -> None:
    learner = Learner([build(layout)], adam)
    for step in range(200):
        x, label, activation = data(layout, step, rows=8 * B)
        learner.learn([x], label, [activation])
        learner.end_step()
    x, label, activation = data(layout, 1000, rows=3)
    (predicted,) = learner.predict([x], label)
    assert F.cosine_similarity(predicted.flatten(), activation.flatten(), dim=0) > 0.95
    assert learner.metrics()["r2"] > 0.9


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_answer_has_the_form_of_the_activation_and_not_of_the_input(layout: str, dtype: torch.dtype) -> None:
    model = build(layout, dtype)
    x, label, activation = data(layout, 0, rows=2)
    learned = model.learn(x, label, activation.to(dtype))
    model.end_step(1)
    for answer in (learned, model.synthetic_grad(x, label)):
        assert (answer.shape, answer.dtype) == (activation.shape, dtype)
        assert answer.is_contiguous() and not answer.requires_grad and answer.isfinite().all()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_step_is_that_of_the_squared_error_of_the_scaled_activation(normalise: bool) -> None:
    """Against the loss written down, torch's autograd, and SGD, which sees its size."""
    torch.manual_seed(0)
    model = SyntheticInput(_Affine(), TensorMeta((B, 3), torch.float32), normalise=normalise)
    own = copy.deepcopy(model.module)
    optimizer, learner, rms = sgd(own.parameters()), Learner([model], sgd), None
    for step in range(4):
        random = torch.Generator().manual_seed(step)
        x, activation = torch.randn(B, 5, generator=random), 7 * torch.randn(B, 3, generator=random)
        learner.learn([x], None, [activation])
        learner.end_step()
        now = activation.square().mean().sqrt()
        target = activation / (now if rms is None else rms) if normalise else activation
        error = (own(x, None) - target).square()
        (error.mean() if normalise else error.sum(1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        rms = now if rms is None else 0.98 * rms + 0.02 * now
    scale = rms if normalise else 1.0
    torch.testing.assert_close(model.synthetic_grad(x), own(x, None).detach() * scale, rtol=1e-5, atol=1e-5)


class _Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize(
    "net_input, activation, cure",
    [
        (TOKENS, TensorMeta((B, T, D), torch.float32), "num_tokens = 0: an input of integers"),
        (
            TensorMeta((B, 5), torch.int64),
            TensorMeta((B, D), torch.float32),
            "need their number, at least 1, and",
        ),
        (ROWS, TensorMeta((B, D), torch.int64), "floating-point activations with one row for each row"),
        (ROWS, TensorMeta((B + 1, D), torch.float32), "one row for each row of the net's input"),
    ],
)
def test_what_cannot_be_predicted_is_refused(net_input: TensorMeta, activation: TensorMeta, cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        build_synthetic_input(net_input, activation)


def test_images_of_integers_are_no_tokens() -> None:
    """A model of one's own makes rows with two axes of them."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 28)

        def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
            rows: Tensor = self.linear(x.flatten(1).float())
            return rows.unflatten(1, (7, 4))

    model = SyntheticInput(Own(), TensorMeta((2, 7, 4), torch.float32))
    x = torch.randint(255, (2, 3, 2, 2), dtype=torch.uint8)
    learner = Learner([model], lambda own: torch.optim.SGD(own, 0.1))
    learner.predict([x], None)
    learner.learn([x], None, [torch.randn(2, 7, 4)])


def test_a_module_with_another_shape_is_named() -> None:
    model = SyntheticInput(_Affine(), TensorMeta((B, 4), torch.float32))
    with pytest.raises(ValueError, match=r"_Affine returned shape \(6, 3\) .* must have the activation's, \(6, 4\)"):
        model.synthetic_grad(torch.randn(B, 5))
    with pytest.raises(ValueError, match=r"the activation has shape \(6, 3\) .* \(6, 4\) was due"):
        model.learn(torch.randn(B, 5), None, torch.randn(B, 3))
