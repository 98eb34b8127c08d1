"""A small convolutional network as the interface of convolutional layers: the image keeps its resolution.

Source: Jaderberg et al. 2016: 5x5 convolutions without pooling; the label enters as constant one-hot channels.
"""

import torch
from torch import Tensor, nn

from .base import Rates, Regressed, check_num_hidden, start_at_zero
from .conditional import one_hot, one_hot_channels, require_label


class Conv(Regressed):
    """Predicts the loss gradient at a stage's output by num_hidden ReLU convolutions and a last one, zero at first.

    Args:    channels: C. num_classes: 0 ignores the label, more than 0 makes it conditional (cDNI).
             num_hidden: 0 to 2. width: channels of the hidden layers; None = C. kernel_size: odd.
             batch_norm: normalise the hidden layers by the statistics of the microbatch. normalise: as in Regressed.
             label_at: (H, W), for images of one size: each class also adds a gradient of its own at every place, which
             filters, the same at all places, cannot. Where a linear layer reads the image, that is what a label says.
    Shapes:  h (B, C, H, W) with label (B,) -> (B, C, H, W).
    Raises:  ValueError: an even kernel_size; num_hidden outside 0 to 2; num_classes > 0 and no label of shape (B,);
             label_at without num_classes, or h of another size.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int = 0,
        *,
        num_hidden: int = 1,
        width: int | None = None,
        kernel_size: int = 5,
        batch_norm: bool = False,
        normalise: bool = True,
        label_at: tuple[int, int] | None = None,
    ) -> None:
        check_num_hidden(type(self).__name__, num_hidden)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size = {kernel_size}: only an odd kernel keeps height and width; take {kernel_size + 1}"
            )
        if label_at is not None and num_classes == 0:
            raise ValueError(f"label_at = {label_at}, but num_classes = 0: say how many classes there are, or leave it")
        super().__init__(normalise=normalise, rates=_rates(kernel_size**2 * channels))
        self.num_classes = num_classes
        sizes = [channels + num_classes] + [width or channels] * num_hidden + [channels]
        self.layers = nn.Sequential()
        for size, next_size in zip(sizes, sizes[1:], strict=False):
            if len(self.layers) > 0:
                if batch_norm:
                    # no running statistics: predictions are wanted in training only, and leave no state behind then
                    self.layers.append(nn.BatchNorm2d(size, track_running_stats=False))
                self.layers.append(nn.ReLU())
            self.layers.append(nn.Conv2d(size, next_size, kernel_size, padding=kernel_size // 2))
        start_at_zero(self.layers[-1])
        self.label_at = label_at
        self.of_class: nn.Parameter | None = None
        """(num_classes, C H W)."""
        if label_at is not None:
            self.of_class = nn.Parameter(torch.zeros(num_classes, channels * label_at[0] * label_at[1]))

    def forward(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        if self.num_classes == 0:
            gradient: Tensor = self.layers(h)
            return gradient
        batch, _, height, width = h.shape
        label = require_label(type(self).__name__, self.num_classes, label, (batch,))
        gradient = self.layers(torch.cat([h, one_hot_channels(label, self.num_classes, height, width, h.dtype)], dim=1))
        if self.of_class is None:
            return gradient
        if self.label_at != (height, width):
            raise ValueError(f"label_at = {self.label_at}, but the activation is {height} x {width}: give its size")
        return gradient + (one_hot(label, self.num_classes).to(h.dtype) @ self.of_class).view_as(gradient)


def _rates(num_inputs: int) -> Rates:
    """A step of Adam moves a prediction by the rate times what it is made of: many pixels, much like each other.

    With 16 and 48 channels, 5 x 5, 1e-3 and 3e-4 did well; 1e-2 and 1e-3 left a cut without a prediction (docs/log.md).
    """
    return Rates(scaled=min(1e-3, 0.4 / num_inputs), as_is=min(5e-6, 2e-3 / num_inputs))
