"""Models with synthetic inputs, trained at once, are each what they are alone: plain modules and dnipipe's Learner."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.paper.models import Model, Shape
from benchmarks.paper.plain import PlainModel
from benchmarks.paper.stack import Stack
from benchmarks.paper.unlocked_stack import RATE, UnlockedStack, build_inputs, stack_of
from dnipipe.interface import Learner
from tests.benchmarks.paper.test_stack import assert_goes_on_alike

STEPS, BATCH, FEATURES, CLASSES = 6, 16, 12, 5
RATES = {"learning_rate": 1e-2, "predictor_rate": 3e-2}


class UnlockedPlainModel(PlainModel):
    """One model the slow way: every layer starts from its synthetic input, if the model has such."""

    def __init__(self, shape: Shape, model: Model, dtype: torch.dtype) -> None:
        super().__init__(shape, model, dtype)
        self.is_unlocked = model.synthetic_inputs
        inputs = [each.to(dtype) for each in build_inputs(shape, model)]
        rate = RATE * model.learning_rate
        self.input_learners = [Learner([each], lambda own: torch.optim.Adam(own, lr=rate)) for each in inputs]
        for each in inputs:
            each.dtype = dtype
        self._x, self._real = torch.empty(0), [torch.empty(0)]

    def _forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        if not self.is_unlocked:
            return super()._forward(x)
        inputs, outputs = [], []
        for number, layer in enumerate(self.layers):
            start = x if number == 0 else self.input_learners[number - 1].predict([x], None)[0]
            inputs.append(start.detach().requires_grad_())
            outputs.append(layer(inputs[-1]))
        self._x, self._real = x, [output.detach() for output in outputs]
        return inputs, outputs

    def step(self, x: Tensor, label: Tensor) -> None:
        super().step(x, label)
        self._learn_inputs([True] * len(self.layers))

    def sparse_step(self, x: Tensor, label: Tensor, fires: Sequence[bool], order: Sequence[int]) -> None:
        super().sparse_step(x, label, fires, order)
        self._learn_inputs(fires)

    def _learn(self, cut: int, h: Tensor, label: Tensor) -> None:
        """What comes home is the gradient at the synthetic input; the layer below knows its own output."""
        if not self.is_unlocked:
            super()._learn(cut, h, label)
            return
        assert h.grad is not None
        self.learners[cut].learn([self._real[cut]], label, [h.grad])
        self.learners[cut].end_step()

    def _learn_inputs(self, fires: Sequence[bool]) -> None:
        if self.is_unlocked:
            for fired, learner, real in zip(fires, self.input_learners, self._real, strict=False):
                if fired:
                    learner.learn([self._x], None, [real])
                    learner.end_step()


@pytest.fixture(autouse=True)
def _in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """dnipipe's interfaces compute in float32 otherwise."""
    monkeypatch.setattr("dnipipe.interface.base.own_view", Tensor.detach)
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)


def _shape(normalise: bool, layers: int = 4) -> Shape:
    return Shape(FEATURES, CLASSES, layers, width=10, num_hidden=1, predictor_width=14, normalise=normalise)


def _batches(seed: int, count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(BATCH, FEATURES, generator=random, dtype=torch.float64),
            torch.randint(CLASSES, (BATCH,), generator=random),
        )
        for _ in range(count)
    ]


MODELS = [
    Model("dni", seed=0, synthetic_inputs=True, **RATES),
    Model("cdni", seed=1, synthetic_inputs=True, **RATES),
    Model("cdni", seed=1, **RATES),
    Model("bprop", seed=2, **RATES),
]


@torch.no_grad()
def _wake(stack: UnlockedStack, plain: Sequence[UnlockedPlainModel] = ()) -> None:
    """Models of the inputs that do not start at zero: from inputs that are all alike a batch norm makes rounding errors
    as large as anything else."""
    random = torch.Generator().manual_seed(7)
    for number, place in enumerate(stack.inputs):
        place.rms.fill_(1.0)
        for parameter in place.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=random, dtype=torch.float64), alpha=0.3)
        for at, model in enumerate(plain):
            interface = model.input_learners[number].interfaces[0]
            interface.rms.fill_(1.0)
            for own, parameter in zip(interface.parameters(), place.parameters, strict=True):
                own.copy_(parameter[at])


def _assert_alike(stack: Stack, plain: Sequence[PlainModel], rtol: float) -> None:
    x = _batches(99)[0][0]
    together = stack.evaluate(x.T.contiguous())
    for number, model in enumerate(plain):
        torch.testing.assert_close(together[number].T, model.evaluate(x), rtol=rtol, atol=rtol)
        for layer, own in zip(model.layers, stack.layers, strict=True):
            torch.testing.assert_close(layer[0].weight, own.parameters[0][number], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("normalise", [False, True])
def test_models_with_and_without_synthetic_inputs_in_one_stack(normalise: bool) -> None:
    shape, rtol = _shape(normalise), 1e-5 if normalise else 1e-7  # dnipipe's running RMS is float32
    stack = UnlockedStack(shape, MODELS, dtype=torch.float64)
    plain = [UnlockedPlainModel(shape, model, torch.float64) for model in MODELS]
    _wake(stack, plain)
    for x, label in _batches(0):
        stack.step(x.T.contiguous(), label)
        for model in plain:
            model.step(x, label)
    _assert_alike(stack, plain, rtol)
    for place, learners in zip(stack.inputs, zip(*(each.input_learners for each in plain), strict=True), strict=True):
        weight = learners[0].interfaces[0].module.first.linear.weight
        torch.testing.assert_close(weight, place.parameters[0][0], rtol=rtol, atol=rtol)


def test_sparse_updates_train_the_model_of_an_input_when_the_layer_below_fires() -> None:
    shape = _shape(False)
    models = [Model(m, s, p_update=0.5, synthetic_inputs=True, **RATES) for m in ("dni", "cdni") for s in (0, 1)]
    stack = UnlockedStack(shape, models, dtype=torch.float64)
    plain = [UnlockedPlainModel(shape, model, torch.float64) for model in models]
    _wake(stack, plain)
    random = torch.Generator().manual_seed(0)
    for x, label in _batches(0, 12):
        fires = torch.rand(len(models), shape.layers, generator=random) < 0.6
        order = torch.rand(len(models), shape.layers, generator=random)
        stack.step(x.T.contiguous(), label, fires.double(), order)
        for model, own, rank in zip(plain, fires, order, strict=True):
            model.sparse_step(x, label, own.tolist(), rank.argsort().tolist())
    _assert_alike(stack, plain, 1e-7)


def test_batches_of_their_own_and_a_batch_for_all() -> None:
    shape = _shape(False)
    shared, own = (UnlockedStack(shape, MODELS, dtype=torch.float64) for _ in range(2))
    _wake(shared)
    _wake(own)
    for x, label in _batches(0):
        shared.step(x.T.contiguous(), label)
        own.step(x.T.expand(len(MODELS), -1, -1).contiguous(), label.expand(len(MODELS), -1))
    for one, other in zip(shared.state(), own.state(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


def test_a_loaded_state_goes_on_as_the_saved_one() -> None:
    shape = _shape(True)
    first, second = (UnlockedStack(shape, MODELS, dtype=torch.float64) for _ in range(2))
    assert_goes_on_alike(first, second, [(x.T.contiguous(), label) for x, label in _batches(0)])


def test_a_stack_is_unlocked_where_a_model_is() -> None:
    assert isinstance(stack_of(_shape(False), MODELS), UnlockedStack)
    assert type(stack_of(_shape(False), MODELS[2:])) is Stack


@pytest.mark.parametrize("options", [{"method": "bprop"}, {"method": "dni", "position": 1}])
def test_synthetic_inputs_for_layers_that_wait_for_gradients_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="take dni or cdni at every layer"):
        Model(synthetic_inputs=True, **options)  # type: ignore[arg-type]
