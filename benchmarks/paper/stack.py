"""E models of one shape trained at once, whatever their methods, seeds, learning rates and chances to update.

Every step goes from the last layer down. Each layer's own backward gives the true gradient at its input, that is, true
to the gradient that the layer itself was given; at each cut every model then takes the one that its method names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dnipipe.interface.base import RMS_DECAY, RMS_FLOOR

from .models import PREDICTED, STALE, ZERO, Model, Shape
from .plain import build
from .stacked import Adam, Layer, Predictor


class Cut:
    """The place between two layers, in all models: their interfaces, averages, and which of them goes by what.

    Args:    sources: of each model. predictor: the interfaces; None: no model has one.
    """

    def __init__(
        self, sources: Sequence[str], models: Sequence[Model], predictor: Predictor | None, shape: Shape, like: Tensor
    ) -> None:
        if PREDICTED in sources and predictor is None:
            raise ValueError("dni and cdni need interfaces, but num_hidden = None: give the shape 0, 1 or 2")
        self.predictor, self.normalise = predictor, shape.normalise
        self.kinds = set(sources)
        self.is_of = {kind: _column([source == kind for source in sources], like).bool() for kind in self.kinds}
        self.kept = _column([model.decay for model in models], like)
        self.average = like.new_zeros(len(models), shape.width, 1)
        self.rms = like.new_full((len(models), 1, 1), 0.0 if shape.normalise else 1.0)
        self.adam = None
        if predictor is not None:
            rates = _column([model.predictor_rate for model in models], like).flatten()
            self.adam = Adam(predictor.parameters, rates)

    def predict(self, h: Tensor, one_hot: Tensor) -> Tensor | None:
        """(E, D, B) in units of rms, with a graph to learn by; None where nobody predicts."""
        return None if self.predictor is None else self.predictor(h.detach(), one_hot)

    @torch.no_grad()
    def learn(self, prediction: Tensor, true: Tensor, moves: Tensor | None) -> None:
        """As Regressed.learn, an optimizer step, and end_step."""
        assert self.predictor is not None and self.adam is not None
        own = true.square().mean((1, 2), keepdim=True).sqrt()
        if self.normalise:
            scale = torch.where(self.rms > 0, self.rms, own).clamp_min(RMS_FLOOR)
            loss_grad = (prediction - true / scale) * (2 / true[0].numel())
        else:
            loss_grad = (prediction - true) * (2 / true.shape[-1])
        self.adam.step(torch.autograd.grad(prediction, self.predictor.parameters, loss_grad), moves)
        if self.normalise:
            rms = torch.where(self.rms > 0, RMS_DECAY * self.rms + (1 - RMS_DECAY) * own, own)
            self.rms.copy_(rms if moves is None else torch.where(moves.view(-1, 1, 1) > 0, rms, self.rms))

    @torch.no_grad()
    def choose(self, true: Tensor, synthetic: Tensor | None) -> Tensor:
        """What each model's layer below the cut learns from, (E, D, B)."""
        chosen = true
        if synthetic is not None and PREDICTED in self.kinds:
            chosen = torch.where(self.is_of[PREDICTED], synthetic, chosen)
        if ZERO in self.kinds:
            chosen = chosen.masked_fill(self.is_of[ZERO], 0.0)
        if STALE in self.kinds:
            chosen = torch.where(self.is_of[STALE], self.average, chosen)
            self.average.lerp_(true.mean(-1, keepdim=True), 1 - self.kept)
        return chosen

    def state(self) -> list[Tensor]:
        learned = (
            [] if self.predictor is None or self.adam is None else [*self.predictor.parameters, *self.adam.state()]
        )
        return [self.average, self.rms, *learned]


class Stack:
    """Trains all models on the same or on different batches.

    Args:    dtype: of everything; float64 for comparisons.
    Raises:  ValueError: no model; a position that the shape lacks; dni or cdni without interfaces.
    """

    def __init__(
        self, shape: Shape, models: Sequence[Model], device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if not models:
            raise ValueError("models is empty: a stack needs one or more")
        self.shape, self.models = shape, list(models)
        like = torch.zeros((), device=device, dtype=dtype)
        sources = list(zip(*(model.sources(shape.layers) for model in models), strict=True))
        layers, interfaces = zip(*(build(shape, model) for model in models), strict=True)
        rates = _column([model.learning_rate for model in models], like).flatten()
        self.layers = [Layer([module.to(like) for module in modules]) for modules in zip(*layers, strict=True)]
        self.adams = [Adam(layer.parameters, rates) for layer in self.layers]
        predictors: list[Predictor | None] = [None] * (shape.layers - 1)
        if shape.num_hidden is not None:
            at_cuts = zip(*interfaces, strict=True)
            predictors = [Predictor([module.to(like) for module in each], shape.num_classes) for each in at_cuts]
        self.cuts = [Cut(kinds, models, each, shape, like) for kinds, each in zip(sources, predictors, strict=True)]
        self.conditional = _column([model.method == "cdni" for model in models], like)
        self.is_sparse = any(model.p_update < 1 for model in models)
        self.seen: list[tuple[Tensor | None, Tensor]] = []
        """Of the last step, from the last cut down: what was predicted, and what came home; (E, D, B)."""

    def step(self, x: Tensor, label: Tensor, fires: Tensor | None = None, order: Tensor | None = None) -> None:
        """One step of all models.

        Args:    fires: (E, L) of 1 and 0, which layers go backward and are updated; None: all, in no order, since all
                 interfaces are asked before any learns. order: (E, L), a rank for each layer, no two alike in a model.
        Shapes:  x (features, B) with label (B,), the same for all, or (E, features, B) with (E, B).
        """
        answer = self._one_hot(label)
        one_hot = answer * self.conditional
        inputs, outputs = self._forward(x)
        guesses = [cut.predict(h, one_hot) for cut, h in zip(self.cuts, outputs, strict=False)]
        gradient = (outputs[-1].detach().softmax(1) - answer) / x.shape[-1]
        self.seen = []
        for number in reversed(range(len(self.layers))):
            moves = None if fires is None else fires[:, number]
            leaves = [*self.layers[number].parameters, *inputs[number : number + 1 if number else number]]
            gradients = torch.autograd.grad(outputs[number], leaves, gradient)
            self.adams[number].step(gradients[: len(self.layers[number].parameters)], moves)
            if number > 0:
                first = None if order is None else order[:, number] < order[:, number - 1]
                gradient = self._cross(number - 1, outputs[number - 1], one_hot, guesses, gradients[-1], moves, first)

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        """Logits (E, C, N) for images (features, N), by the running statistics."""
        for layer in self.layers:
            x = layer.evaluate(x)
        return x

    def scale_rates(self, factor: float) -> None:
        """Both learning rates of each model become `factor` times what the model names, where they lie."""
        rates = torch.tensor([(m.learning_rate, m.predictor_rate) for m in self.models], dtype=torch.float64) * factor
        for adam in self.adams:
            adam.learning_rate.copy_(rates[:, 0])
        for adam in (cut.adam for cut in self.cuts if cut.adam is not None):
            adam.learning_rate.copy_(rates[:, 1])

    def state(self) -> list[Tensor]:
        """All that training changes, live, in a fixed order."""
        parts = [each for layer in self.layers for each in (*layer.parameters, *layer.statistics)]
        parts += [each for adam in self.adams for each in adam.state()]
        return parts + [each for cut in self.cuts for each in cut.state()]

    @torch.no_grad()
    def load(self, state: Sequence[Tensor]) -> None:
        """Takes over what state() gave, by copies."""
        for own, saved in zip(self.state(), state, strict=True):
            own.copy_(saved)

    def _forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        for layer in self.layers:
            inputs.append(x.detach().requires_grad_() if outputs else x)
            outputs.append(layer.train(inputs[-1]))
            x = outputs[-1]
        return inputs, outputs

    def _cross(
        self,
        cut: int,
        h: Tensor,
        one_hot: Tensor,
        guesses: list[Any],
        true: Tensor,
        moves: Tensor | None,
        above_first: Tensor | None,
    ) -> Tensor:
        """From the gradient at the input of a layer to that at the output of the one below."""
        place, guess = self.cuts[cut], guesses[cut]
        if guess is None:
            self.seen.append((None, true))
            return place.choose(true, None)
        synthetic = guess.detach() * place.rms
        self.seen.append((synthetic, true))
        place.learn(guess, true, moves)
        if above_first is not None:  # who comes after the layer above meets an interface that has just learned
            assert place.predictor is not None
            with torch.no_grad():
                newer = place.predictor(h, one_hot) * place.rms
            synthetic = torch.where(above_first.view(-1, 1, 1), newer, synthetic)
        return place.choose(true, synthetic)

    def _one_hot(self, label: Tensor) -> Tensor:
        """Label (B,) or (E, B) -> (C, B) or (E, C, B)."""
        classes = torch.arange(self.shape.num_classes, device=label.device).unsqueeze(-1)
        return (label.unsqueeze(-2) == classes).to(self.conditional.dtype)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """(E, 1, 1)."""
    return torch.tensor([float(value) for value in values], device=like.device, dtype=like.dtype).view(-1, 1, 1)
