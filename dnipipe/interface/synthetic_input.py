"""A synthetic input: what a stage guesses its input activation to be, from the input of the whole net.

    net's input x ──> synthetic_grad ──> the stage starts at once
    the real activation, later ──> learn

It is the regression that a synthetic gradient is, with another target, so it is an Interface with that one's names: `h`
is the net's input here, and the "true gradient" the activation. A Learner trains it like any other.

Source: Jaderberg et al. 2016, "complete unlock": models of the inputs, trained by the squared error of the real ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Rates, Regressed, check_num_hidden, relu_layers, start_at_zero
from .choose import TensorMeta
from .conditional import ConditionedLinear, is_integer, label_shapes
from .precision import HALF

ACTIVATION = Rates(1e-3, 1e-3)
"""Of a size about 1 either way, and the stage's real input: no lag adds up as it does for gradients."""


class SyntheticInput(Regressed):
    """Predicts a stage's input activation, by a module and in units of the activation's running RMS.

    Args:    module: called as module(x, label), x as the net gets it; returns the activation's shape; its parameters
             become float32. activation: of one microbatch. normalise: as in Regressed.
    Shapes:  any x, any label -> that of the activation. The first axis may be of any length, and for token ids (B, T)
             the second one, too.
    """

    def __init__(self, module: nn.Module, activation: TensorMeta, *, normalise: bool = True) -> None:
        super().__init__(normalise=normalise, rates=ACTIVATION)
        self.module = module.float()
        self.shape, self.dtype = tuple(activation.shape[1:]), activation.dtype

    def forward(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        out: Tensor = self.module(h, label)
        return out

    def checked(self, gradient: Tensor, h: Tensor) -> Tensor:
        """The predicted activation: detached, contiguous, in the activation's dtype.

        Raises:  ValueError: it has another shape than the activation.
        """
        if tuple(gradient.shape) != self._due(h):
            raise ValueError(
                f"synthetic input {type(self.module).__name__} returned shape {tuple(gradient.shape)} for an input of "
                f"shape {tuple(h.shape)}: it must have the activation's, {self._due(h)}"
            )
        return gradient.detach().to(self.dtype).contiguous()

    def _check_target(self, true_grad: Tensor, h: Tensor) -> None:
        if tuple(true_grad.shape) != self._due(h):
            raise ValueError(
                f"the activation has shape {tuple(true_grad.shape)} for an input of shape {tuple(h.shape)}, "
                f"{self._due(h)} was due: build another synthetic input where shapes change"
            )

    def _due(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the activation."""
        tokens = isinstance(self.module, FromTokens)  # bears sequences of other lengths
        return (*x.shape[:2], *self.shape[1:]) if tokens else (x.shape[0], *self.shape)

    def _predict(self, h: Tensor, label: Tensor | None) -> Tensor:
        low = self.dtype in HALF
        with torch.autocast(h.device.type, dtype=self.dtype if low else None, enabled=low, cache_enabled=False):
            prediction: Tensor = self(h.detach(), label)
        return prediction


class FromRows(nn.Module):
    """num_hidden ReLU layers and a last layer that starts at zero, over all of a row.

    Args:    features: of a row, all its axes together. shape: of the activation of a row. num_classes: 0 ignores the
             label. width: of the hidden layers; None = min(1024, max(64, 2 * D)), D the size of `shape`. batch_norm:
             normalise the hidden layers by the statistics of the microbatch; needs B > 1.
    Shapes:  x (B, ...) of any dtype, label (B,) -> (B, *shape).
    """

    def __init__(
        self,
        features: int,
        shape: tuple[int, ...],
        num_classes: int = 0,
        *,
        num_hidden: int = 1,
        width: int | None = None,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_num_hidden("a synthetic input", num_hidden)
        self.shape, out_features = shape, int(torch.Size(shape).numel())
        sizes = [width or min(1024, max(64, 2 * out_features))] * num_hidden + [out_features]
        self.first = ConditionedLinear(features, sizes[0], num_classes, name="a synthetic input")
        self.rest = relu_layers(sizes, batch_norm)
        start_at_zero(self.rest[-1] if num_hidden else self.first)

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        out: Tensor = self.rest(self.first(x.flatten(1).float(), label))
        return out.unflatten(1, self.shape)


class FromTokens(nn.Module):
    """The same token by token, each looked up in a table: it knows the token and not what came before it.

    Args:    num_tokens: of the vocabulary. features: D. The rest as in FromRows.
    Shapes:  x (B, T) integers, label (B, T) or (B,) -> (B, T, D).
    """

    def __init__(self, num_tokens: int, features: int, num_classes: int = 0, *, num_hidden: int, width: int | None):
        super().__init__()
        size = width or min(1024, max(64, 2 * features))
        self.table = nn.Embedding(num_tokens, size)
        self.rows = FromRows(size, (features,), num_classes, num_hidden=num_hidden, width=width)

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        if label is not None and label.shape != x.shape:
            label = label.unsqueeze(1).expand_as(x)
        out: Tensor = self.rows(self.table(x).flatten(0, 1), None if label is None else label.flatten())
        return out.unflatten(0, x.shape)


def build_synthetic_input(
    net_input: TensorMeta,
    activation: TensorMeta,
    *,
    num_classes: int = 0,
    label: TensorMeta | None = None,
    num_tokens: int = 0,
    num_hidden: int = 1,
    width: int | None = None,
    normalise: bool = True,
) -> SyntheticInput:
    """A fresh synthetic input on the CPU for a stage whose input is like `activation` where the net's is `net_input`.

    Args:    num_classes, label: conditional on the label where both are given and the label fits. A label can leak
             into the prediction, and later layers then learn to read it there.
             num_tokens: of the vocabulary, where the net's input is (B, T) token ids. num_hidden, width: of FromRows.
    Raises:  ValueError: as check_predictable and check_layout.
    """
    check_predictable(net_input, activation)
    check_layout(net_input, activation, num_tokens)
    shape = tuple(activation.shape)
    fits = label is not None and tuple(label.shape) in label_shapes(shape)
    options = {"num_classes": num_classes if fits else 0, "num_hidden": num_hidden, "width": width}
    if not is_integer(net_input.dtype):
        features = int(torch.Size(net_input.shape[1:]).numel())
        return SyntheticInput(FromRows(features, shape[1:], **options), activation, normalise=normalise)  # type: ignore[arg-type]
    module = FromTokens(num_tokens, shape[-1], **options)  # type: ignore[arg-type]
    return SyntheticInput(module, activation, normalise=normalise)


def check_predictable(net_input: TensorMeta, activation: TensorMeta) -> None:
    """Raises: ValueError: what is to be predicted is not floating point, or has other rows than the net's input."""
    shape = tuple(activation.shape)
    if not activation.dtype.is_floating_point or shape[:1] != tuple(net_input.shape[:1]):
        raise ValueError(
            f"a synthetic input predicts floating-point activations with one row for each row of the net's input, got "
            f"{activation.dtype} of shape {shape} for an input of shape {tuple(net_input.shape)}"
        )


def check_layout(net_input: TensorMeta, activation: TensorMeta, num_tokens: int) -> None:
    """Raises: ValueError: token ids without num_tokens, or for an activation that is not (B, T, D)."""
    shape = tuple(activation.shape)
    if not is_integer(net_input.dtype):
        return
    if num_tokens < 1 or len(shape) != 3 or shape[:2] != tuple(net_input.shape):
        raise ValueError(
            f"num_tokens = {num_tokens}: an input of integers of shape {tuple(net_input.shape)} is taken for token "
            f"ids, which need their number, at least 1, and an activation (B, T, D), got {shape}; or give a module of "
            f"your own"
        )
