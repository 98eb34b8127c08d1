"""The interfaces of one stage and their optimizer: predict at once, learn as true gradients come, step once a step.

predict, predict, learn, predict, learn, ..., end_step     any number of learns; end_step makes one optimizer step
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .base import Interface
from .precision import product_sum, square_sum

METRICS_DECAY = 0.9
"""What the sums behind the metrics keep of themselves at each step: a memory of about 10 steps."""


class Learner:
    """Holds one interface for each output of a stage that needs a gradient.

    Args:    interfaces: in the order of the outputs. optimizer: called with their parameters; None = Adam, each
             interface at its own learning_rate.
             average: averages a flat float32 tensor in place over the data-parallel replicas; called exactly once in
             each end_step that learned something, so in any step all replicas must learn something, or none.
    """

    def __init__(
        self,
        interfaces: Sequence[Interface],
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        average: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.interfaces = nn.ModuleList(interfaces)
        self.average = average
        self._parameters = [p for p in self.interfaces.parameters() if p.requires_grad]
        self.optimizer: Optimizer | None = None
        if self._parameters:
            self.optimizer = optimizer(self._parameters) if optimizer is not None else self._own_adam()
        self._num_learned = 0
        self._sums: Tensor | None = None  # of synthetic * true, synthetic ** 2, true ** 2

    def predict(self, hs: Sequence[Tensor], label: Tensor | None) -> tuple[Tensor, ...]:
        """One synthetic gradient for each output: its shape, dtype and device, contiguous, without a graph."""
        return tuple(interface.synthetic_grad(h, label) for interface, h in self._with_each(hs))

    def learn(self, hs: Sequence[Tensor], label: Tensor | None, true_grads: Sequence[Tensor]) -> None:
        """Learns from the true gradients of one microbatch; parameters move at end_step."""
        for (interface, h), true_grad in zip(self._with_each(hs), true_grads, strict=True):
            self._measure(interface.learn(h, label, true_grad), true_grad)
        self._num_learned += 1

    @torch.no_grad()
    def end_step(self) -> None:
        """Averages over the microbatches learned since the last call, and over the replicas, and steps the optimizer.

        Without any, nothing happens.
        """
        if self._num_learned == 0:
            return
        count = self._average_over_replicas() if self.average is not None else self._num_learned
        if isinstance(count, Tensor) or count > 1:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad /= count
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        for interface in self._each():
            interface.end_step(self._num_learned)
        self._num_learned = 0
        if self._sums is not None:
            self._sums *= METRICS_DECAY

    def metrics(self) -> dict[str, float]:
        """How well the true gradients of about the last 10 steps were predicted; waits for the device.

        Returns: "cosine" of prediction and true gradient, and "r2" = 1 - |true - prediction|^2 / |true|^2, at most 1;
                 over all outputs together; both 0 for a prediction of 0, nan before the first true gradient.
        """
        product, synthetic, true = self._sums.tolist() if self._sums is not None else (0.0, 0.0, 0.0)
        if true == 0.0:
            return {"cosine": float("nan"), "r2": float("nan")}
        norms = (synthetic * true) ** 0.5
        return {"cosine": product / norms if norms > 0.0 else 0.0, "r2": (2 * product - synthetic) / true}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later Learner of the same interfaces needs to go on; only between steps."""
        assert self._num_learned == 0, (
            f"state_dict() between steps only: {self._num_learned} microbatches are under way"
        )
        return {
            "interfaces": self.interfaces.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "sums": self._sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what state_dict() gave; only between steps."""
        assert self._num_learned == 0, (
            f"load_state_dict() between steps only: {self._num_learned} microbatches under way"
        )
        self.interfaces.load_state_dict(state["interfaces"])
        if self.optimizer is not None:
            try:
                # a copy: an optimizer keeps the tensors that it is given, and two learners would share their moments
                self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
            except ValueError as error:
                groups = len(state["optimizer"]["param_groups"])
                raise ValueError(
                    f"the state holds {groups} parameter groups of the interfaces' optimizer, which here has "
                    f"{len(self.optimizer.param_groups)}: give the optimizer that it was saved with, as "
                    f"interface_optimizer=; where none was given it was Adam at 1e-3 for all, now it has a group "
                    f"for each rate ({error})"
                ) from error
        self._sums = state["sums"]

    def twin(self) -> "Learner":
        """Copies of the interfaces, by an Adam of their own and without replicas: what it learns stays in it."""
        return Learner(copy.deepcopy(list(self._each())))

    @property
    def own_rates(self) -> str:
        """At which learning rates the interfaces begin where no optimizer was given, in words; a state that is loaded
        brings its own."""
        return ", ".join(f"{each.name} at {each.learning_rate:g}" for each in self._each())

    def _own_adam(self) -> Optimizer:
        """One group for each rate, and not for each interface: two outputs may share one."""
        rates = {parameter: each.learning_rate for each in self._each() for parameter in each.parameters()}
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter in self._parameters:
            groups.setdefault(rates[parameter], []).append(parameter)
        return torch.optim.Adam([{"params": members, "lr": rate} for rate, members in groups.items()])

    def _each(self) -> Iterable[Interface]:
        for interface in self.interfaces:
            assert isinstance(interface, Interface)
            yield interface

    def _with_each(self, hs: Sequence[Tensor]) -> Iterable[tuple[Interface, Tensor]]:
        if len(hs) != len(self.interfaces):
            raise ValueError(f"{len(hs)} outputs for {len(self.interfaces)} interfaces: each output needs exactly one")
        return zip(self._each(), hs, strict=True)

    @torch.no_grad()
    def _measure(self, synthetic: Tensor, true: Tensor) -> None:
        new = torch.stack([product_sum(synthetic, true), square_sum(synthetic), square_sum(true)])
        self._sums = new if self._sums is None else self._sums.to(new.device) + new

    def _average_over_replicas(self) -> Tensor:
        """One flat tensor for one collective: gradients, statistics and the count; returns the averaged count."""
        assert self.average is not None and self._sums is not None
        for parameter in self._parameters:
            if parameter.grad is None:  # the replicas' flat tensors must be alike
                parameter.grad = torch.zeros_like(parameter)
        tensors = [p.grad for p in self._parameters if p.grad is not None]
        tensors += [statistic for interface in self._each() for statistic in interface.statistics()]
        tensors.append(torch.full((), self._num_learned, dtype=torch.float32, device=self._sums.device))
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        self.average(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
        return tensors[-1]
