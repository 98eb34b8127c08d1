"""Any interface, its prediction multiplied by the one number that brings it closest to the true gradient.

    scale = sum(true * predicted) / sum(predicted ** 2)      the coefficient of a regression through the origin

Why: a local head learns from the label alone, so nothing fits the size of its gradient to that of the true one. Where
the two hardly agree, the scale is near 0 and little is left to correct.
"""

import torch
from torch import Tensor

from .base import Interface
from .local_head import LocalHead
from .precision import as_factor, product_sum, square_sum

SCALE_DECAY = 0.95
"""What the sums behind the scale keep of themselves at each step: a memory of about 20 steps."""

LARGEST_SCALE = 2.0


class Scaled(Interface):
    """Multiplies what another interface predicts by its regression coefficient on the true gradients, within [0, 2].

    Before the first true gradient the scale is 0: under `corrected` a prediction of 0 is the late true gradient alone,
    and under `synthetic` a stage stands still for `lag` microbatches. A negative coefficient counts as 0.

    Args:    interface: predicts and learns as if it were alone.
    Shapes, Units, Raises: those of `interface`; ValueError for a true gradient of another shape.
    """

    scale: Tensor
    sums: Tensor
    new: Tensor

    def __init__(self, interface: Interface) -> None:
        super().__init__()
        self.interface = interface
        self.register_buffer("scale", torch.zeros((), dtype=torch.float32))
        # of true * predicted and of predicted ** 2: decayed, and since the last end_step
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float32))
        # not persistent: empty between steps, which is when states are saved
        self.register_buffer("new", torch.zeros(2, dtype=torch.float32), persistent=False)

    @property
    def name(self) -> str:
        return self.interface.name

    @property
    def learning_rate(self) -> float:
        return self.interface.learning_rate

    def synthetic_grad(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        return self._scaled(self.interface.synthetic_grad(h, label), h)

    @torch.no_grad()
    def learn(self, h: Tensor, label: Tensor | None, true_grad: Tensor) -> Tensor:
        predicted = self.interface.learn(h, label, true_grad)
        if true_grad.shape != h.shape:  # the product would broadcast it
            raise ValueError(
                f"true_grad has shape {tuple(true_grad.shape)} for an activation of shape {tuple(h.shape)}: "
                f"a gradient has the activation's shape"
            )
        self.new += torch.stack([product_sum(predicted, true_grad), square_sum(predicted)])
        return self._scaled(predicted, h)

    def statistics(self) -> list[Tensor]:
        return [self.new, *self.interface.statistics()]

    @torch.no_grad()
    def end_step(self, num_learned: int) -> None:
        self.interface.end_step(num_learned)
        if num_learned == 0:
            return
        self.sums.mul_(SCALE_DECAY).add_(self.new)
        self.new.zero_()
        product, square = self.sums.unbind()
        # an untrained head predicts 0, and 0 / 0 is no scale
        self.scale.copy_(torch.where(square > 0, product / square, 0.0).clamp(0.0, LARGEST_SCALE))

    @torch.no_grad()
    def _scaled(self, predicted: Tensor, h: Tensor) -> Tensor:
        return self.checked(predicted * as_factor(self.scale, predicted.dtype), h)


def scaled_head(features: int, num_classes: int, **options: int) -> Scaled:
    """A local head that is scaled; arguments and errors as LocalHead's."""
    return Scaled(LocalHead(features, num_classes, **options))


def sampled_head(features: int, num_classes: int, **options: int) -> Scaled:
    """The same for a large vocabulary: of rank 128, with 1024 classes drawn, or all where there are fewer.

    At 50 000 classes and D = 768 it takes 4.5 % of a stage of 4 blocks, where the full head takes 214 % (docs/log.md):
    with 2048 tokens in a microbatch. Each label of a microbatch is a class there, so its share grows with the tokens.
    """
    cheap = {"rank": min(128, features), "samples": min(1024, max(1, num_classes))}
    return scaled_head(features, num_classes, **{**cheap, **options})
