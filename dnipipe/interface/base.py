"""An interface guesses the loss gradient at a stage's output before the true one is known, and learns from that.

Source: Jaderberg et al. 2016, Decoupled Neural Interfaces using Synthetic Gradients (section 2.1).

    activation h, label ──> synthetic_grad ──> the stage backpropagates at once
    the true gradient, later ──> learn (adds to .grad) ──> the owner averages, steps the optimizer ──> end_step

Units everywhere: the gradient of the mean loss of one microbatch, without loss scaling.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .precision import as_factor, full_precision, own_view, precision_of, square_sum

RMS_DECAY = 0.98
"""What the running RMS of the true gradient keeps of itself at each step."""

RMS_FLOOR = torch.finfo(torch.float32).tiny ** 0.5
"""The square of a smaller gradient underflows in float32, so its RMS reads 0 and must not divide it."""

LayerT = TypeVar("LayerT", bound=nn.Module)


class Rates(NamedTuple):
    """Learning rates of an Adam: for a target in units of its RMS, and for the true gradient as it is.

    Each cut's target is made by the next cut's interface, so lags add up and an interface must learn faster than the
    network. A step of Adam moves a prediction by about the rate times the features that it is made of, and a target by
    its own size: about 1, or about a thousandth.
    """

    scaled: float
    as_is: float


LINEAR = Rates(3e-2, 1e-4)
UNKNOWN = Rates(1e-3, 1e-5)
"""For a predictor of which nothing was measured: slow, but safe."""


def hidden_rates(features: int) -> Rates:
    """Those of a predictor with hidden layers, which go to pieces if they learn faster: 1024 wide at 3e-3."""
    return Rates(scaled=min(3e-3, 1.5 / features), as_is=min(3e-5, 0.015 / features))


class Interface(nn.Module, ABC):
    """Predicts the loss gradient at a stage's output from that output and, if given, the label.

    Parameters are float32, whatever the dtype of the activation. Nothing here waits for the device.
    """

    @property
    def name(self) -> str:
        """What errors call it."""
        return type(self).__name__

    @property
    def learning_rate(self) -> float:
        """Of the Adam that trains it, where no other optimizer is given: what did well in docs/log.md."""
        return 1e-3

    @abstractmethod
    def synthetic_grad(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        """The predicted gradient at `h`: shape, dtype and device of `h`, contiguous, without a graph."""

    @abstractmethod
    def learn(self, h: Tensor, label: Tensor | None, true_grad: Tensor) -> Tensor:
        """Adds the gradient of the interface's own loss on one microbatch to its parameters' `.grad`.

        Never zeroes a gradient, never modifies an argument, and works under the caller's `torch.no_grad()` too.

        Args:    true_grad: the gradient that came home for `h`, of its shape.
        Returns: what synthetic_grad(h, label) would give now, from the same computation; for metrics.
        """

    def statistics(self) -> list[Tensor]:
        """Sums since the last end_step that data-parallel replicas must average: live tensors, to be written into."""
        return []

    def end_step(self, num_learned: int) -> None:
        """Folds the statistics, averaged by now, into the buffers and resets them; `num_learned` microbatches."""
        return

    def checked(self, gradient: Tensor, h: Tensor) -> Tensor:
        """`gradient` as the answer for `h`: detached, contiguous, in the dtype of `h`.

        Raises:  ValueError: its shape is not that of `h`.
        """
        if gradient.shape != h.shape:
            raise ValueError(
                f"interface {self.name} returned shape {tuple(gradient.shape)} for an activation of shape "
                f"{tuple(h.shape)}: a synthetic gradient must have the activation's shape"
            )
        return gradient.detach().to(h.dtype).contiguous()


class Regressed(Interface):
    """An interface whose regression target is the true gradient itself.

    A subclass writes `forward(h, label)`, in units of the running RMS of the true gradient: gradients shrink with the
    batch and change in size during training, and an optimizer with a fixed step should not see that. Its `h` is
    float32; if the activation is bfloat16 or float16, `h` is so too, under autocast to that dtype. Before the first
    end_step the RMS is 0, so is every synthetic gradient, and learn() scales each target by its own RMS.

    Args:    normalise: True: the loss is the mean squared error of the scaled target. False: the setting of the paper,
             no scale, the squared error summed over the features and averaged over the batch.
             rates: one of them is the learning_rate, by `normalise`.
    """

    rms: Tensor
    square_sum: Tensor
    count: Tensor

    def __init__(self, *, normalise: bool = True, rates: Rates = UNKNOWN) -> None:
        super().__init__()
        self.normalise, self.rates = normalise, rates
        self.register_buffer("rms", torch.tensor(0.0 if normalise else 1.0, dtype=torch.float32))
        # not persistent: empty between steps, which is when states are saved
        self.register_buffer("square_sum", torch.zeros((), dtype=torch.float32), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.float32), persistent=False)

    @property
    def learning_rate(self) -> float:
        return self.rates.scaled if self.normalise else self.rates.as_is

    @abstractmethod
    def forward(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        """The gradient at `h` in units of the running RMS, of the shape of `h`."""

    def synthetic_grad(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return self._synthetic(self._predict(h, label), h)

    def learn(self, h: Tensor, label: Tensor | None, true_grad: Tensor) -> Tensor:
        self._check_target(true_grad, h)
        with torch.enable_grad(), full_precision(h):
            prediction = self._predict(h, label)
            synthetic = self._synthetic(prediction, h)
            loss_grad = self._loss_grad(prediction, true_grad)
            if prediction.requires_grad:
                torch.autograd.backward(prediction, loss_grad)
        return synthetic

    def statistics(self) -> list[Tensor]:
        return [self.square_sum, self.count] if self.normalise else []

    @torch.no_grad()
    def end_step(self, num_learned: int) -> None:
        if not self.normalise or num_learned == 0:
            return
        now = (self.square_sum / self.count).sqrt()
        self.rms.copy_(torch.where(self.rms > 0, RMS_DECAY * self.rms + (1 - RMS_DECAY) * now, now))
        self.square_sum.zero_()
        self.count.zero_()

    def _check_target(self, true_grad: Tensor, h: Tensor) -> None:
        if true_grad.shape != h.shape:  # the difference would broadcast it
            raise ValueError(
                f"true_grad has shape {tuple(true_grad.shape)} for an activation of shape {tuple(h.shape)}: "
                f"a gradient has the activation's shape"
            )

    def _predict(self, h: Tensor, label: Tensor | None) -> Tensor:
        with precision_of(h):
            prediction: Tensor = self(own_view(h), label)
        return prediction

    def _synthetic(self, prediction: Tensor, h: Tensor) -> Tensor:
        """The prediction times the running RMS, as the answer for `h`."""
        return self.checked(prediction.detach() * as_factor(self.rms, prediction.dtype), h)

    def _loss_grad(self, prediction: Tensor, true_grad: Tensor) -> Tensor:
        """The gradient of the loss at the prediction, 2 / n times the difference; counts the true gradient.

        Written out, because autograd would pass over tensors as large as the activation for each term of the loss.
        """
        prediction, true_grad = prediction.detach(), true_grad.detach()
        if self.normalise:
            own = square_sum(true_grad)
            self.square_sum += own
            self.count += true_grad.numel()
            scale = torch.where(self.rms > 0, self.rms, (own / true_grad.numel()).sqrt()).clamp_min(RMS_FLOOR)
            difference = torch.addcdiv(prediction, true_grad, as_factor(scale, prediction.dtype), value=-1)
        else:
            difference = prediction - true_grad
        n = prediction.numel() if self.normalise else prediction.shape[0]
        return difference.mul_(2 / max(1, n)).to(prediction.dtype)


class Custom(Regressed):
    """A predictor of your own: any module called as `module(h, label)`, with `h` in float32.

    Args:    module: returns the shape of `h`; must not modify `h` in place; its parameters become float32.
             normalise: as in Regressed.
    Shapes:  any h, any label -> the shape of h.
    """

    def __init__(self, module: nn.Module, *, normalise: bool = True) -> None:
        super().__init__(normalise=normalise)
        self.module = module.float()

    @property
    def name(self) -> str:
        return type(self.module).__name__

    def forward(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        # float32: much that a module may call, such as torch.fft and torch.linalg, knows no half precision
        prediction: Tensor = self.module(h.float(), label)
        return prediction


def relu_layers(sizes: Sequence[int], batch_norm: bool) -> nn.Sequential:
    """What comes after a first layer of sizes[0] features: ReLU and a linear layer to each of the next sizes.

    Args: batch_norm: normalise before each ReLU by the statistics of the microbatch alone.
    """
    layers = nn.Sequential()
    for size, next_size in zip(sizes, sizes[1:], strict=False):
        if batch_norm:
            # no running statistics: predictions are wanted in training only, and leave no state behind then
            layers.append(nn.BatchNorm1d(size, track_running_stats=False))
        layers.extend([nn.ReLU(), nn.Linear(size, next_size)])
    return layers


def start_at_zero(layer: LayerT) -> LayerT:
    """Zeroes a last layer, so that an untrained interface moves no weight (Jaderberg et al. 2016)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def check_num_hidden(name: str, num_hidden: int) -> None:
    """Raises ValueError unless 0 <= num_hidden <= 2, the range of the paper."""
    if num_hidden not in (0, 1, 2):
        raise ValueError(
            f"num_hidden = {num_hidden}: {name} takes 0, 1 or 2 hidden layers; for more, wrap your own in Custom"
        )
