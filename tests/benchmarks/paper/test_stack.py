"""Many models trained at once are each what it is alone: plain modules, torch's Adam, dnipipe's interfaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.paper.convolutions import ConvShape
from benchmarks.paper.models import Model, Shape
from benchmarks.paper.plain import PlainModel
from benchmarks.paper.stack import Stack

STEPS, BATCH, FEATURES, CLASSES = 6, 16, 12, 5
IMAGE = (2, 29, 27)
RATES = {"learning_rate": 1e-2, "predictor_rate": 3e-2}


@pytest.fixture(autouse=True)
def _interfaces_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnipipe.interface.base.own_view", Tensor.detach)


def _shape(num_hidden: int | None, *, layers: int = 4, normalise: bool = False) -> Shape:
    return Shape(FEATURES, CLASSES, layers, width=10, num_hidden=num_hidden, predictor_width=14, normalise=normalise)


def _conv_shape(num_hidden: int | None, *, normalise: bool = False, label_at_places: bool = False) -> ConvShape:
    sizes = {"width": 4, "num_hidden": num_hidden, "predictor_width": 6}
    shared = {"image": IMAGE, "normalise": normalise, "label_at_places": label_at_places}
    return ConvShape(math.prod(IMAGE), CLASSES, 4, **sizes, **shared)  # type: ignore[arg-type]


def _batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(BATCH, FEATURES, generator=random, dtype=torch.float64),
            torch.randint(CLASSES, (BATCH,), generator=random),
        )
        for _ in range(STEPS)
    ]


def _images(seed: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(BATCH, *IMAGE, generator=random).double(), label) for _, label in _batches(seed)]


def _for_stack(xs: Sequence[Tensor]) -> Tensor:
    """(E, features, B), or (B, E, C, H, W)."""
    return torch.stack([x.T for x in xs]) if xs[0].ndim == 2 else torch.stack(list(xs), 1)


def _assert_alike(stack: Stack, plain: list[PlainModel], *, rtol: float = 1e-7) -> None:
    x = (_images if isinstance(stack.shape, ConvShape) else _batches)(99)[0][0]
    together = stack.evaluate(_for_stack([x]))
    for number, model in enumerate(plain):
        torch.testing.assert_close(together[number].T, model.evaluate(x), rtol=rtol, atol=rtol)
        weights = [
            (next(layer.parameters()), own.parameters[0][number])
            for layer, own in zip(model.layers, stack.layers, strict=True)
        ]
        for own, other in weights:
            torch.testing.assert_close(other, own, rtol=rtol, atol=rtol)


def _train_both(shape: Shape, models: list[Model], *, rtol: float = 1e-7) -> None:
    stack = Stack(shape, models, dtype=torch.float64)
    plain = [PlainModel(shape, model, torch.float64) for model in models]
    # the layer below the position: below a batch norm a stale mean gradient is 0, so it is the last hidden one
    watched = [
        each.layers[model.position - 1 if model.position else -2][0] for each, model in zip(plain, models, strict=True)
    ]
    first = [layer.weight.detach().clone() for layer in watched]
    make = _images if isinstance(shape, ConvShape) else _batches
    batches = [make(number) for number in range(len(models))]
    for step in range(STEPS):
        xs, labels = zip(*(each[step] for each in batches), strict=True)
        stack.step(_for_stack(xs), torch.stack(labels))
        for model, x, label in zip(plain, xs, labels, strict=True):
            model.step(x, label)
    _assert_alike(stack, plain, rtol=rtol)
    for model, layer, was in zip(models, watched, first, strict=True):
        stands = model.method == "no_bprop"
        assert torch.equal(layer.weight, was) == stands, f"{model.method}: does the layer learn?"


def test_every_method_without_interfaces_in_one_stack() -> None:
    _train_both(
        _shape(None),
        [
            Model("bprop", seed=0, **RATES),
            Model("no_bprop", seed=1, **RATES),
            Model("no_bprop", seed=2, position=2, **RATES),
            Model("stale", seed=3, decay=0.5, **RATES),
            Model("stale", seed=4, learning_rate=1e-3, weight_decay=5.0),
        ],
    )


@pytest.mark.parametrize("num_hidden", [0, 1, 2])
@pytest.mark.parametrize("normalise", [False, True])
def test_every_method_with_interfaces_in_one_stack(num_hidden: int, normalise: bool) -> None:
    models = [
        Model("dni", seed=0, **RATES),
        Model("cdni", seed=1, **RATES),
        Model("cdni", seed=1, learning_rate=3e-3, predictor_rate=1e-2, weight_decay=2.0),
        Model("dni", seed=2, position=2, **RATES),
        Model("cdni", seed=3, position=1, **RATES),
        Model("bprop", seed=4, **RATES),
        Model("stale", seed=5, decay=0.9, **RATES),
        Model("cdni", seed=6, learning_rate=1e-2, predictor_rate=3e-2, last_rate=1e-3),
    ]
    # dnipipe's running RMS is float32
    _train_both(_shape(num_hidden, normalise=normalise), models, rtol=1e-5 if normalise else 1e-7)


def test_convolutions_without_interfaces_in_one_stack() -> None:
    _train_both(
        _conv_shape(None),
        [
            Model("bprop", seed=0, **RATES),
            Model("no_bprop", seed=1, **RATES),
            Model("stale", seed=3, decay=0.5, **RATES),
        ],
    )


@pytest.mark.parametrize("num_hidden", [0, 1, 2])
@pytest.mark.parametrize("normalise", [False, True])
def test_convolutions_with_interfaces_in_one_stack(num_hidden: int, normalise: bool) -> None:
    models = [
        Model("dni", seed=0, **RATES),
        Model("cdni", seed=1, **RATES),
        Model("cdni", seed=3, position=1, learning_rate=3e-3),
        Model("cdni", seed=6, learning_rate=1e-2, predictor_rate=3e-2, last_rate=1e-3),
        Model("bprop", seed=4, **RATES),
        Model("stale", seed=5, decay=0.9, **RATES),
    ]
    shape = _conv_shape(num_hidden, normalise=normalise, label_at_places=num_hidden != 1)
    _train_both(shape, models, rtol=1e-5 if normalise else 1e-7)


@pytest.mark.parametrize("method", ["no_bprop", "dni", "cdni", "bprop"])
def test_a_stack_of_one_method_skips_what_it_does_not_need(method: str) -> None:
    models = [Model(method, seed, **RATES) for seed in (0, 1)]
    for shape in (_shape(1), _conv_shape(1)):
        _train_both(shape, models)


@pytest.mark.parametrize("normalise", [False, True])
def test_sparse_updates_are_those_of_layers_that_come_one_after_the_other(normalise: bool) -> None:
    shape = _shape(1, normalise=normalise)
    models = [
        Model(method, seed, p_update=p, weight_decay=3.0 * seed, **RATES)
        for method in ("dni", "cdni")
        for seed, p in ((0, 0.5), (1, 0.8))
    ]
    stack = Stack(shape, models, dtype=torch.float64)
    plain = [PlainModel(shape, model, torch.float64) for model in models]
    random = torch.Generator().manual_seed(0)
    for x, label in _batches(0) + _batches(1):
        fires = torch.rand(len(models), shape.layers, generator=random) < 0.6
        order = torch.rand(len(models), shape.layers, generator=random)
        stack.step(x.T.contiguous(), label, fires.double(), order)
        for model, own, rank in zip(plain, fires, order, strict=True):
            model.sparse_step(x, label, own.tolist(), rank.argsort().tolist())
    _assert_alike(stack, plain, rtol=1e-5 if normalise else 1e-7)


@pytest.mark.parametrize("shape, make", [(_shape(1), _batches), (_conv_shape(1), _images)])
def test_a_batch_for_some_is_that_batch_for_each(shape: Shape, make: Any) -> None:
    models = [Model(method, seed, **RATES) for seed in (0, 1) for method in ("cdni", "dni")]
    each, two, all_alike, one = (Stack(shape, models, dtype=torch.float64) for _ in range(4))
    for (x, label), (other, other_label) in zip(make(0), make(1), strict=True):
        labels = torch.stack([label, other_label])
        each.step(_for_stack([x, x, other, other]), labels.repeat_interleave(2, 0))
        two.step(_for_stack([x, other]), labels)
        all_alike.step(_for_stack([x] * 4), label.expand(4, -1))
        one.step(_for_stack([x]) if x.ndim == 4 else x.T, label)
    for first, second in ((each, two), (all_alike, one)):
        for own, its in zip(first.state(), second.state(), strict=True):
            torch.testing.assert_close(own, its, rtol=1e-7, atol=1e-7)


def test_layers_that_begin_as_the_identity() -> None:
    shape = replace(_shape(0), identity=True)
    drawn, stack = Stack(_shape(0), [Model("cdni")]), Stack(shape, [Model("cdni")])
    first, *middle, last = (layer.parameters[0][0] for layer in stack.layers)
    assert torch.equal(first, drawn.layers[0].parameters[0][0]) and torch.equal(last, drawn.layers[-1].parameters[0][0])
    assert len(middle) == 2 and all(torch.equal(weight, torch.eye(10)) for weight in middle)


def test_interfaces_are_only_where_they_are_asked() -> None:
    stack = Stack(_shape(1), [Model("dni", position=2), Model("cdni", position=2), Model("bprop")])
    assert [cut.predictor is not None for cut in stack.cuts] == [False, True, False]


def test_scaled_rates_are_those_of_models_that_name_them() -> None:
    shape = _shape(1)
    scaled = Stack(shape, [Model("cdni", learning_rate=1e-2, predictor_rate=4e-2)], dtype=torch.float64)
    named = Stack(shape, [Model("cdni", learning_rate=0.25e-2, predictor_rate=1e-2)], dtype=torch.float64)
    scaled.scale_rates(0.5)
    scaled.scale_rates(0.25)  # of what the model names, not of what it was
    for x, label in _batches(0):
        scaled.step(x.T.contiguous(), label)
        named.step(x.T.contiguous(), label)
    assert all(torch.equal(one, other) for one, other in zip(scaled.state(), named.state(), strict=True))


def assert_goes_on_alike(first: Stack, second: Stack, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """The second one from where the first is after three steps."""
    for x, label in batches[:3]:
        first.step(x, label)
    second.load([each.clone() for each in first.state()])
    for x, label in batches[3:]:
        first.step(x, label)
        second.step(x, label)
    assert all(torch.equal(one, other) for one, other in zip(first.state(), second.state(), strict=True))


def test_a_loaded_state_goes_on_as_the_saved_one() -> None:
    shape, models = _shape(0, normalise=True), [Model("cdni", seed=0, **RATES), Model("stale", decay=0.5, **RATES)]
    first, second = Stack(shape, models), Stack(shape, [Model("cdni", seed=7, **RATES), models[1]])
    assert_goes_on_alike(first, second, [(x.T.float().contiguous(), label) for x, label in _batches(0)])


@pytest.mark.parametrize(
    "options, cure",
    [
        ({"method": "backprop"}, "none of bprop"),
        ({"method": "dni", "p_update": 0.0}, "at 0 nothing would learn"),
        ({"method": "bprop", "p_update": 0.5}, "take dni or cdni"),
        ({"method": "stale", "decay": 1.0}, "below 1"),
    ],
)
def test_a_model_that_cannot_be_is_refused(options: dict[str, object], cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        Model(**options)  # type: ignore[arg-type]


def test_a_stack_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="num_hidden = None"):
        Stack(_shape(None), [Model("dni")])
    with pytest.raises(ValueError, match="position = 4 must be from 1 to 3"):
        Stack(_shape(None), [Model("no_bprop", position=4)])
    with pytest.raises(ValueError, match="models is empty"):
        Stack(_shape(None), [])
    with pytest.raises(ValueError, match="4 poolings leave nothing of 29 x 27"):
        ConvShape(12, CLASSES, 5, image=IMAGE)
    with pytest.raises(ValueError, match="layers = 1"):
        _shape(None, layers=1)
