"""The weights of a step, kept for backwards that come after the optimizer has moved on.

    step t    begins      copies q(t), which share the memory of the parameters p
              forward     with q(t) in the module's places
              ends        p moves to memory of its own, if a graph of this step is left; q(t) keeps the old values
    later     backward    through the graph of step t, with q(t) in the places; what q(t) gets is added to p.grad

An optimizer that steps in place then writes to memory that no graph knows. To put other memory under p itself
(`p.data = ...`) with p in the graph would be wrong: torch.nn.Linear saves a view and keeps the old values, LayerNorm,
RMSNorm and Conv save the leaf and would silently use the new ones.

A copy holds p's gradient during a backward, so gradients add up in p.grad in the order of the backwards, as ever, and
there is one gradient for each parameter, however many steps are kept. Frozen parameters are not copied: torch itself
complains when one is changed under a graph.

Price: one copy of the weights for each update that falls between a forward and its backward, made after the step. Made
before the forward it would be one more copy during the step. Where several steps are one update, the steps after the
first go on with its q, whose values are still p's.

Without part() old activations meet the new weights: q(t) shares the memory that the optimizer writes to. No price, but
the gradient is that of no weights at all: of Linear's, the input gradient is of the new weights, the weight gradient of
the old activations (PACI, arXiv 2606.07881).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


class _Place(NamedTuple):
    """Where a parameter is an attribute. table: of the owner, where writing there is all that setattr() would do."""

    owner: nn.Module
    table: dict[str, nn.Parameter | None] | None
    name: str
    parameter: nn.Parameter
    copy: nn.Parameter


class OldWeights:
    """The weights of one step.

    Args: module: its parameters must be attributes of it and its submodules, as nn.Module registers them.
          values: for the parameters that need a gradient, in order; None: their own memory.
    """

    def __init__(self, module: nn.Module, values: Sequence[Tensor] | None = None) -> None:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # of .data, which has a count of changes of its own: detach() would share p's, and torch would take the
        # optimizer's step for a change of what the graph saved
        own = [parameter.data for parameter in trained] if values is None else values
        copies = {parameter: nn.Parameter(value) for parameter, value in zip(trained, own, strict=True)}
        self._module, self._places = module, list[_Place]()
        for owner in module.modules():
            # an LSTM lists its weights a second time, and scripts keep theirs elsewhere: these want setattr(), which
            # takes a hundred times as long as the table that it would come to
            table = owner._parameters if type(owner).__setattr__ is nn.Module.__setattr__ else None
            for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
                if parameter in copies:
                    self._places.append(_Place(owner, table, name, parameter, copies[parameter]))
        self._copies = list(copies.items())
        self._parted: list[tuple[int, ...]] | None = None  # what was written when the parameters got other memory

    @property
    def current(self) -> bool:
        """Whether the parameters have these values still, so that the next step can go on with them.

        After part() that is so until a weight or a gradient is written or dropped, as far as torch counts that. It
        counts no weight that a fused optimizer moves: there zero_grad() tells.
        """
        trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        if [id(parameter) for parameter in trained] != [id(parameter) for parameter, _ in self._copies]:
            return False
        if self._parted is None:
            return all(parameter.data_ptr() == copy.data_ptr() for parameter, copy in self._copies)
        has_gradient = any(parameter.grad is not None for parameter in trained)
        return has_gradient and self._parted == [_writes(parameter) for parameter in trained]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, these are the module's parameters: for a forward, and for what a backward recomputes."""
        for owner, table, name, _, copy in self._places:
            if table is not None:
                table[name] = copy
            else:
                setattr(owner, name, copy)
        try:
            yield
        finally:
            for owner, table, name, parameter, _ in self._places:
                if table is not None:
                    table[name] = parameter
                else:
                    setattr(owner, name, parameter)

    def backward(self, outputs: Sequence[Tensor], grads: Sequence[Tensor], *, retain_graph: bool = False) -> None:
        """Through a graph that was made within in_place(). Adds to the .grad of the parameters, not of the copies.

        Args:   outputs: that need a gradient. grads: their shapes.
        Raises: ValueError: a parameter that the forward did not reach as an attribute of its module.
        """
        for parameter, copy in self._copies:
            copy.grad, parameter.grad = parameter.grad, None
        try:
            with self.in_place():
                torch.autograd.backward(list(outputs), list(grads), retain_graph=retain_graph)
            missed = [parameter for parameter, _ in self._copies if parameter.grad is not None]
        finally:
            for parameter, copy in self._copies:
                parameter.grad, copy.grad = copy.grad, None
        if missed:
            names = [name for name, parameter in self._module.named_parameters() if any(parameter is m for m in missed)]
            raise ValueError(
                f"the forward reached {', '.join(names)} by another way than as an attribute of a submodule (a list, a "
                f"closure), so not with the weights of its own step: reach it as an attribute, or use policy "
                f"'synthetic' or 'wait'"
            )

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Within, the parameters themselves have these values, for graphs that end here, too: forward and backward."""
        own = [parameter.data for parameter, _ in self._copies]
        for parameter, copy in self._copies:
            parameter.data = copy.data
        try:
            yield
        finally:
            for (parameter, _), data in zip(self._copies, own, strict=True):
                parameter.data = data

    def part(self) -> None:
        """The parameters get memory of their own, so that these weights stay when an optimizer steps in place.

        Call it when the step's gradients are complete. Again, it does nothing.
        """
        if self._parted is None:
            for parameter, _ in self._copies:
                parameter.data = parameter.data.clone()
        self._parted = [_writes(parameter) for parameter, _ in self._copies]


def _writes(parameter: nn.Parameter) -> tuple[int, ...]:
    """Another value after each write to a parameter or its gradient that torch counts."""
    counts = (parameter.data_ptr(), parameter._version)
    return counts if parameter.grad is None else (*counts, parameter.grad.data_ptr(), parameter.grad._version)


def check_possible(module: nn.Module, policy: str) -> None:
    """Raises: ValueError where something hangs on the parameters that would not see the copies' gradients.

    DDP around the whole module is well: its hooks have nothing to do, the flow itself averages.
    """
    why = (
        f"policy {policy!r} runs microbatches with copies of the weights of their own step, so hooks on the parameters "
        f"themselves are never called"
    )
    cure = "use policy 'synthetic' or 'wait'"
    for part in module.modules():
        if isinstance(part, FullyShardedDataParallel):
            raise ValueError(f"{why}, and {type(part).__name__} reduces gradients in such hooks: {cure}")
        if isinstance(part, DistributedDataParallel):
            _check_ddp(part, part is module, why, cure)
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(f"{why}, and {name!r} is sharded (FSDP2), which reduces gradients in such hooks: {cure}")
        # private, but torch has no other way to ask
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(f"{why}, and {name!r} has one: remove it, or {cure}")


def _check_ddp(ddp: DistributedDataParallel, is_whole: bool, why: str, cure: str) -> None:
    if not is_whole:
        raise ValueError(
            f"{why}, and DistributedDataParallel around a part of the stage reduces gradients in such hooks: wrap the "
            f"whole stage's module, or {cure}"
        )
    refused = {"static_graph=True": ddp.static_graph, "mixed_precision": ddp.mixed_precision is not None}
    refused["a communication hook"] = bool(ddp._comm_hooks)
    for option, is_set in refused.items():
        if is_set:
            raise ValueError(f"{why}, and DistributedDataParallel with {option} needs them: leave it out, or {cure}")
