"""What a network of the paper is, and where each of its layers has its gradient from."""

from __future__ import annotations

from dataclasses import dataclass

TRUE, ZERO, STALE, PREDICTED = "true", "zero", "stale", "predicted"
METHODS = {"bprop": TRUE, "no_bprop": ZERO, "stale": STALE, "dni": PREDICTED, "cdni": PREDICTED}
"""Of each method the gradient that a layer learns from.

true: backpropagated. zero: none, so the layer stays as it was drawn, and only what is above it learns. stale: the same
for every example, an exponential average over past steps of the true gradient's mean over the batch. predicted: an
interface's.
"""


@dataclass(frozen=True)
class Shape:
    """What is alike in all models of a stack.

    Fields:
        features: of an image. num_classes: C. layers: L, that is L - 1 hidden ones and the output layer.
        width: of a hidden layer. num_hidden: of an interface, 0 to 2; None: no interfaces. predictor_width: of its
            hidden layers. normalise: as in dnipipe.interface.Regressed. identity: hidden layers that are as wide as
            the one below begin as the identity before their batch norm, not as torch draws them.
    """

    features: int
    num_classes: int
    layers: int
    width: int = 256
    num_hidden: int | None = None
    predictor_width: int = 1024
    normalise: bool = False
    identity: bool = False

    def __post_init__(self) -> None:
        if self.layers < 2:
            raise ValueError(f"layers = {self.layers}: a network has a hidden and an output layer, so give 2 or more")

    @property
    def sizes(self) -> list[int]:
        return [self.features, *[self.width] * (self.layers - 1), self.num_classes]

    def at(self, cut: int) -> tuple[int, ...]:
        """The shape of what comes out of `cut` hidden layers for one image."""
        return (self.sizes[cut],)


@dataclass(frozen=True)
class Model:
    """One model of a stack.

    Fields:
        method: see METHODS; cdni is dni whose interfaces see the label.
        position: the hidden layer, from 1, after which the method is used, while all others backpropagate; None: after
            each of them.
        p_update: the chance of each layer, at each step, to go backward and be updated, in random order. Below 1 only
            for dni and cdni at every layer.
        decay: of stale: what the average keeps of itself at each step.
        weight_decay: of the network's weights, not of its norms and biases: at each step they lose so many times the
            learning rate of themselves, as in torch.optim.AdamW.
        synthetic_inputs: layers start from synthetic inputs in training, too (unlocked_stack.py). Only for dni and cdni
            at every layer.
        last_rate: of an interface's last layer; None: predictor_rate, as its hidden layers.
    Raises:  ValueError: no such method or position; p_update or decay out of range.
    """

    method: str
    seed: int = 0
    learning_rate: float = 3e-5
    predictor_rate: float = 3e-5
    position: int | None = None
    p_update: float = 1.0
    decay: float = 0.0
    synthetic_inputs: bool = False
    weight_decay: float = 0.0
    last_rate: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is none of {', '.join(METHODS)}")
        if not 0 < self.p_update <= 1:
            raise ValueError(f"p_update = {self.p_update} must be above 0 and at most 1: at 0 nothing would learn")
        if self.p_update < 1 and (METHODS[self.method] != PREDICTED or self.position is not None):
            raise ValueError(
                f"p_update = {self.p_update} with {self.method} at position {self.position}: a true gradient is there "
                f"only if the layer above went backward, so take dni or cdni at every layer"
            )
        if self.synthetic_inputs and (METHODS[self.method] != PREDICTED or self.position is not None):
            raise ValueError(
                f"synthetic_inputs with {self.method} at position {self.position}: they unlock layers that do not wait "
                f"for gradients either, so take dni or cdni at every layer"
            )
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay = {self.decay} must be at least 0 and below 1")
        if self.weight_decay < 0 or (self.weight_decay > 0 and METHODS[self.method] == ZERO):
            raise ValueError(
                f"weight_decay = {self.weight_decay} with {self.method}: must be 0 or more, and 0 for no_bprop, whose "
                f"lower layers stay as they were drawn"
            )

    @property
    def rate_of_last(self) -> float:
        """Of an interface's last layer."""
        return self.predictor_rate if self.last_rate is None else self.last_rate

    def sources(self, layers: int) -> tuple[str, ...]:
        """Where the gradient at the output of each hidden layer comes from: L - 1 of TRUE, ZERO, STALE, PREDICTED."""
        if self.position is None:
            return (METHODS[self.method],) * (layers - 1)
        if not 1 <= self.position < layers:
            raise ValueError(f"position = {self.position} must be from 1 to {layers - 1}, the hidden layers")
        return tuple(METHODS[self.method] if cut == self.position else TRUE for cut in range(1, layers))
