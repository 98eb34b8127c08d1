"""E models of one shape trained at once, whatever their methods, seeds, learning rates and chances to update.

Every step goes from the last layer down. Each layer's own backward gives the true gradient at its input, that is, true
to the gradient that the layer itself was given; at each cut every model then takes the one that its method names.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from dnipipe.interface import Conv
from dnipipe.interface.base import RMS_DECAY, RMS_FLOOR

from .convolutions import ConvShape
from .convolved import ConvLayer, ConvPredictor, Head
from .layout import LAYOUTS, Layout
from .models import PREDICTED, STALE, ZERO, Model, Shape
from .plain import build
from .stacked import Adam, Layer, Predictor, padded


class Cut:
    """The place between two layers, in all models: their interfaces, averages, and which of them goes by what.

    Args:    sources: of each model. predictor: the interfaces; None: no model has one. at: shape of an activation of
             one image. layout: of activations.
    """

    def __init__(
        self,
        sources: Sequence[str],
        models: Sequence[Model],
        predictor: Predictor | ConvPredictor | None,
        at: Sequence[int],
        layout: Layout,
        normalise: bool,
        like: Tensor,
    ) -> None:
        if PREDICTED in sources and predictor is None:
            raise ValueError("dni and cdni need interfaces, but num_hidden = None: give the shape 0, 1 or 2")
        self.predictor, self.normalise, self.layout = predictor, normalise, layout
        self.kinds = set(sources)
        is_of = {kind: [float(source == kind) for source in sources] for kind in self.kinds}
        self.is_of = {kind: layout.column(each, like).bool() for kind, each in is_of.items()}
        self.kept = layout.column([model.decay for model in models], like)
        self.average = layout.average(len(models), at, like)
        self.rms = layout.column([0.0 if normalise else 1.0] * len(models), like)
        self.adams: list[Adam] = []
        if predictor is not None:
            number = predictor.num_hidden_parameters
            hidden, last = predictor.parameters[:number], predictor.parameters[number:]
            rates, of_last = ([getattr(m, name) for m in models] for name in ("predictor_rate", "rate_of_last"))
            self.adams = [Adam(own, like.new_tensor(rate)) for own, rate in ((hidden, rates), (last, of_last)) if own]

    def predict(self, h: Tensor, one_hot: Tensor) -> Tensor | None:
        """Like h, in units of rms, with a graph to learn by; None where nobody predicts."""
        return None if self.predictor is None else self.predictor(h.detach(), one_hot)

    def scaled(self, prediction: Tensor) -> Tensor:
        """The gradient that is predicted."""
        return prediction * self.rms if self.normalise else prediction

    @torch.no_grad()
    def learn(self, prediction: Tensor, true: Tensor, moves: Tensor | None) -> None:
        """As Regressed.learn, an optimizer step, and end_step."""
        assert self.predictor is not None
        if self.normalise:
            numel = true.numel() // self.rms.numel()
            own = torch.linalg.vector_norm(true, dim=self.layout.of_one_model, keepdim=True) * numel**-0.5
            before = torch.where(self.rms > 0, self.rms, own)
            difference = torch.addcdiv(prediction, true, before.clamp_min(RMS_FLOOR), value=-1).mul_(2 / numel)
            rms = torch.lerp(before, own, 1 - RMS_DECAY)
            self.rms.copy_(rms if moves is None else torch.where(moves.view_as(rms) > 0, rms, self.rms))
        else:
            difference = (prediction - true).mul_(2 / true.shape[self.layout.batch])
        gradients = iter(torch.autograd.grad(prediction, self.predictor.parameters, difference))
        for adam in self.adams:
            adam.step(list(islice(gradients, len(adam.parameters))), moves)

    @torch.no_grad()
    def choose(self, true: Tensor, synthetic: Tensor | None) -> Tensor:
        """What each model's layer below the cut learns from, like `true`."""
        if synthetic is not None and self.kinds == {PREDICTED}:
            return synthetic
        chosen = true
        if synthetic is not None and PREDICTED in self.kinds:
            chosen = torch.where(self.is_of[PREDICTED], synthetic, chosen)
        if ZERO in self.kinds:
            chosen = chosen.masked_fill(self.is_of[ZERO], 0.0)
        if STALE in self.kinds:
            chosen = torch.where(self.is_of[STALE], self.average, chosen)
            self.average.lerp_(true.mean(self.layout.batch, keepdim=True), 1 - self.kept)
        return chosen

    def state(self) -> list[Tensor]:
        learned = [] if self.predictor is None else self.predictor.parameters
        return [self.average, self.rms, *learned, *(each for adam in self.adams for each in adam.state())]


class Stack:
    """Trains all models on the same or on different batches.

    Activations of fully connected networks are (E, D, B), of convolutional ones (B, E, C, H, W).

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
        self.layers = [part_of([module.to(like) for module in each]) for each in zip(*layers, strict=True)]
        rates = [like.new_tensor([model.learning_rate for model in models]) for _ in self.layers]
        decays = like.new_tensor([model.weight_decay for model in models])
        self.adams = [Adam(layer.parameters, each, decays) for layer, each in zip(self.layers, rates, strict=True)]
        self.conditional = like.new_tensor([float(model.method == "cdni") for model in models]).view(-1, 1, 1)
        classes = shape.num_classes if any(model.method == "cdni" for model in models) else 0
        self.classes = torch.arange(padded(shape.num_classes), device=device).unsqueeze(-1)
        layout = LAYOUTS[isinstance(shape, ConvShape)]
        self.cuts = []
        for cut, kinds in enumerate(sources):
            is_asked = bool(interfaces[0]) and PREDICTED in kinds  # who backpropagates there needs none
            predictor = predictor_of([each[cut].to(like) for each in interfaces], classes) if is_asked else None
            at = shape.at(cut + 1)
            self.cuts.append(Cut(kinds, models, predictor, at, layout, shape.normalise, like))
        all_adams = [*self.adams, *(adam for cut in self.cuts for adam in cut.adams)]
        self.named_rates = [(adam, adam.learning_rate.clone()) for adam in all_adams]
        self.is_sparse = any(model.p_update < 1 for model in models)
        self.seen: list[tuple[Tensor | None, Tensor]] = []
        """Of the last step, from the last cut down: what was predicted, and what came home, both like activations."""

    def step(self, x: Tensor, label: Tensor, fires: Tensor | None = None, order: Tensor | None = None) -> None:
        """One step of all models.

        Args:    fires: (E, L) of 1 and 0, which layers go backward and are updated; None: all, in no order, since all
                 interfaces are asked before any learns. order: (E, L), a rank for each layer, no two alike in a model.
        Shapes:  x (features, B) with label (B,), the same for all, or (S, features, B) with (S, B), each for E / S
                 neighbours; of convolutional networks x is (B, S, C, H, W).
        """
        answer, one_hot = self._one_hots(label)
        inputs, outputs = self._forward(x)
        guesses = [cut.predict(h, one_hot) for cut, h in zip(self.cuts, outputs, strict=False)]
        gradient = (outputs[-1].detach().softmax(1) - answer) / label.shape[-1]
        self.seen = []
        for number in reversed(range(len(self.layers))):
            moves = None if fires is None else fires[:, number]
            leaves = [*self.layers[number].parameters, *inputs[number : number + 1 if number else number]]
            gradients = torch.autograd.grad(outputs[number], leaves, gradient)
            self.adams[number].step(gradients[: len(self.layers[number].parameters)], moves)
            if number > 0 and self.cuts[number - 1].kinds == {ZERO}:
                break  # nothing below ever moves
            if number > 0:
                first = None if order is None else order[:, number] < order[:, number - 1]
                gradient = self._cross(number - 1, outputs[number - 1], one_hot, guesses, gradients[-1], moves, first)

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        """Logits (E, C, N) for images (features, N) or (N, 1, C, H, W), by the running statistics."""
        for layer in self.layers:
            x = layer.evaluate(x)
        return x

    def scale_rates(self, factor: float) -> None:
        """Both learning rates of each model become `factor` times what the model names, where they lie."""
        for adam, named in self.named_rates:
            torch.mul(named, factor, out=adam.learning_rate)  # on the device: a copy from here would wait for it

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
        synthetic = place.scaled(guess.detach())
        self.seen.append((synthetic, true))
        place.learn(guess, true, moves)
        if above_first is not None:  # who comes after the layer above meets an interface that has just learned
            assert place.predictor is not None
            with torch.no_grad():
                newer = place.scaled(place.predictor(h, one_hot))
            synthetic = torch.where(above_first.view_as(place.rms), newer, synthetic)
        return place.choose(true, synthetic)

    def _one_hots(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Label (B,) or (S, B) -> (C, B) or (E, C, B), and what interfaces see of it: (E, padded(C), B)."""
        if label.ndim == 2:
            label = label.unsqueeze(1).expand(-1, len(self.models) // len(label), -1).flatten(0, 1)
        wide = (label.unsqueeze(-2) == self.classes).to(self.conditional.dtype)
        return wide[..., : self.shape.num_classes, :], wide * self.conditional


def part_of(modules: Sequence[nn.Sequential]) -> Layer | ConvLayer | Head:
    """The layer of all models of that of each."""
    if isinstance(modules[0][0], nn.Conv2d):
        return ConvLayer(modules)
    return Head(modules) if isinstance(modules[0][0], nn.Flatten) else Layer(modules)


def predictor_of(interfaces: Sequence[nn.Module], num_classes: int) -> Predictor | ConvPredictor:
    """The interfaces of all models of that of each."""
    kind = ConvPredictor if isinstance(interfaces[0], Conv) else Predictor
    return kind(interfaces, num_classes)  # type: ignore[arg-type]
