"""The convolutional networks of the paper, one at a time, of torch's modules and dnipipe's interfaces.

Each hidden layer: 5x5 filters that keep the resolution, batch normalisation, ReLU, and 3x3 pooling, of the maximum in
the first layer and of the mean in the others. An interface: 0 to 2 hidden layers of such filters, then a last one,
the label as constant one-hot channels. So a reimplementation by others quotes the paper (github.com/eugenium/DGL,
dni_comparisons/cifar_cnn_dni.py), with 128 filters on CIFAR-10; pooling with stride 3 is as there, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dnipipe.interface import Conv

from .models import Shape

KERNEL, POOL = 5, 3


@dataclass(frozen=True)
class ConvShape(Shape):
    """width: filters of a layer. image: (channels, height, width). label_at_places: as label_at in dnipipe's Conv.

    Raises:  ValueError: so many layers pool an image away.
    """

    image: tuple[int, int, int] = (1, 28, 28)
    label_at_places: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.at(self.layers - 1)[1:]) < 1:
            raise ValueError(
                f"layers = {self.layers}: {self.layers - 1} poolings leave nothing of {self.image[1]} x {self.image[2]}"
                f" pixels, so take fewer layers"
            )

    def at(self, cut: int) -> tuple[int, ...]:
        """Channels, height and width."""
        channels, height, width = self.image
        return (self.width if cut else channels), height // POOL**cut, width // POOL**cut


def build_conv_layers(shape: ConvShape) -> list[nn.Sequential]:
    """The layers of one network, drawn as torch draws them."""
    layers: list[nn.Sequential] = []
    for cut in range(shape.layers - 1):
        filters = nn.Conv2d(shape.at(cut)[0], shape.width, KERNEL, padding=KERNEL // 2, bias=False)
        pool = nn.AvgPool2d(POOL) if cut else nn.MaxPool2d(POOL)
        layers.append(nn.Sequential(filters, nn.BatchNorm2d(shape.width), nn.ReLU(), pool))
    channels, height, width = shape.at(shape.layers - 1)
    return [*layers, nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, shape.num_classes))]


def build_conv_interfaces(shape: ConvShape, num_classes: int) -> list[Conv]:
    """One after each hidden layer, none if the shape has none; num_classes: 0 for those that do not see the label."""
    if shape.num_hidden is None:
        return []
    interfaces = []
    for cut in range(1, shape.layers):
        _, height, width = shape.at(cut)
        interfaces.append(
            Conv(
                shape.width,
                num_classes,
                num_hidden=shape.num_hidden,
                width=shape.predictor_width,
                kernel_size=KERNEL,
                batch_norm=True,
                normalise=shape.normalise,
                label_at=(height, width) if shape.label_at_places and num_classes else None,
            )
        )
    return interfaces
