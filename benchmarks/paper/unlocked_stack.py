"""Stacks whose layers start from synthetic inputs, too: complete unlock.

    x ──> a model of the input of layer 2, 3, ..., each by itself   ──> every layer can run at once
    the output of layer n, when it has run                          ──> trains the model of the input of layer n + 1

The gradient at a synthetic input is what the layer below is told of its output, as in dnipipe's forward-unlocked
schedule. A net is tested as a net: its layers on real inputs, one after the other.

Of Stack this file takes layers, cuts and their learning as they are; it has no say in how they are computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dnipipe.interface import SyntheticInput, TensorMeta
from dnipipe.interface.base import RMS_DECAY, RMS_FLOOR
from dnipipe.interface.synthetic_input import FromRows

from .models import Model, Shape
from .stack import Stack
from .stacked import Adam

EPS = 1e-5  # of nn.BatchNorm1d
RATE = 3.0
"""Of the models of the inputs: times the network's learning rate, since they follow layers that move by it."""
NUM_HIDDEN = 1
"""Of the models of the inputs; ReLU, batch-normalised before it, as wide as the interfaces' hidden layers."""


def build_inputs(shape: Shape, model: Model) -> list[SyntheticInput]:
    """One for each layer but the first, as the model's seed draws them; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed + 1_000_003)
        return [
            SyntheticInput(
                FromRows(
                    shape.features,
                    (shape.width,),
                    num_hidden=NUM_HIDDEN,
                    width=shape.predictor_width,
                    batch_norm=True,
                ),
                TensorMeta((1, shape.width), torch.float32),
                normalise=shape.normalise,
            )
            for _ in range(shape.layers - 1)
        ]


class InputModels:
    """E models of the input of one layer, which start from the weights of `modules`.

    Shapes:  x (features, B), or (S, features, B), each for E / S neighbours -> (E, D, B), in units of rms.
    """

    def __init__(self, modules: Sequence[SyntheticInput], learning_rate: Tensor, normalise: bool) -> None:
        rows = [each.module for each in modules]
        parts = [[each.first.linear, *(part for part in each.rest if not isinstance(part, nn.ReLU))] for each in rows]  # type: ignore[union-attr]
        self.parameters = [
            torch.stack([getattr(part, name).detach().to(learning_rate) for part in alike])
            for alike in zip(*parts, strict=True)
            for name in ("weight", "bias")
        ]
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.normalise, self.adam = normalise, Adam(self.parameters, learning_rate)
        self.rms = learning_rate.new_full((len(modules), 1, 1), 0.0 if normalise else 1.0)

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias, *rest = self.parameters
        if x.ndim == 3:
            x = x.unsqueeze(1).expand(-1, len(weight) // len(x), -1, -1).flatten(0, 1)
        out = weight @ x + bias.unsqueeze(-1)
        for gamma, beta, weight, bias in zip(*(rest[number::4] for number in range(4)), strict=True):
            normal = torch.native_layer_norm(out, out.shape[-1:], None, None, EPS)[0]
            hidden = torch.relu(torch.addcmul(beta.unsqueeze(-1), normal, gamma.unsqueeze(-1)))
            out = torch.baddbmm(bias.unsqueeze(-1), weight, hidden)
        return out

    @torch.no_grad()
    def learn(self, prediction: Tensor, activation: Tensor, moves: Tensor | None) -> None:
        """As SyntheticInput.learn, an optimizer step, and end_step. moves: (E,); None: all move."""
        own = activation.square().mean((1, 2), keepdim=True).sqrt()
        if self.normalise:
            scale = torch.where(self.rms > 0, self.rms, own).clamp_min(RMS_FLOOR)
            difference = (prediction - activation / scale) * (2 / activation[0].numel())
        else:
            difference = (prediction - activation) * (2 / activation.shape[-1])
        self.adam.step(torch.autograd.grad(prediction, self.parameters, difference), moves)
        if self.normalise:
            rms = torch.where(self.rms > 0, RMS_DECAY * self.rms + (1 - RMS_DECAY) * own, own)
            self.rms.copy_(rms if moves is None else torch.where(moves.view(-1, 1, 1) > 0, rms, self.rms))

    def state(self) -> list[Tensor]:
        return [self.rms, *self.parameters, *self.adam.state()]


class UnlockedStack(Stack):
    """Models with synthetic_inputs, and others beside them, which start from real ones.

    Raises:  ValueError: as Stack; a network that is not fully connected.
    """

    def __init__(
        self, shape: Shape, models: Sequence[Model], device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if type(shape) is not Shape:
            raise ValueError("synthetic_inputs are for fully connected networks: leave them out for others")
        super().__init__(shape, models, device, dtype)
        like = torch.zeros((), device=device, dtype=dtype)
        rates = like.new_tensor([RATE * model.learning_rate for model in models])
        self.is_unlocked = torch.tensor([model.synthetic_inputs for model in models], device=device).view(-1, 1, 1)
        of_each = zip(*(build_inputs(shape, model) for model in models), strict=True)
        self.inputs = [InputModels(alike, rates, shape.normalise) for alike in of_each]
        self.named_rates += [(place.adam, place.adam.learning_rate.clone()) for place in self.inputs]
        self._ran: tuple[list[Tensor], list[Tensor]] = [], []

    def step(self, x: Tensor, label: Tensor, fires: Tensor | None = None, order: Tensor | None = None) -> None:
        """As Stack. The model of a layer's input learns when the layer below fires, which gives the real one."""
        super().step(x, label, fires, order)
        guesses, outputs = self._ran
        for number, (place, guess, real) in enumerate(zip(self.inputs, guesses, outputs, strict=False)):
            place.learn(guess, real.detach(), None if fires is None else fires[:, number])
        self._ran = [], []

    def state(self) -> list[Tensor]:
        return [*super().state(), *(each for place in self.inputs for each in place.state())]

    def _forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        guesses = [place(x) for place in self.inputs]
        inputs, outputs = [x], [self.layers[0].train(x)]
        for place, guess, layer in zip(self.inputs, guesses, self.layers[1:], strict=True):
            started = torch.where(self.is_unlocked, guess * place.rms, outputs[-1])
            inputs.append(started.detach().requires_grad_())
            outputs.append(layer.train(inputs[-1]))
        self._ran = guesses, outputs
        return inputs, outputs


def stack_of(shape: Shape, models: Sequence[Model], device: str = "cpu") -> Stack:
    """What trains these models."""
    unlocked = any(model.synthetic_inputs for model in models)
    return (UnlockedStack if unlocked else Stack)(shape, models, device)
