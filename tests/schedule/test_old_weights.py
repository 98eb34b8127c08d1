"""A backward that comes some updates late gives what it would have given at once, bit for bit, for each layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from dnipipe.schedule.old_weights import OldWeights, check_possible
from tests.ranks import run_ranks

D = 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Recomputed(nn.Module):
    """Its forward runs again inside the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(D, D, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Listed(nn.Linear):
    """Keeps its weight in a list, too, and goes by that, as an LSTM does in some versions of torch."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.__dict__["listed"] = [value]
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.listed[0], self.bias)


def _floats() -> Tensor:
    return torch.randn(3, 4, D, requires_grad=True)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(D, D), _floats),
    "LayerNorm": (lambda: nn.LayerNorm(D), _floats),
    "RMSNorm": (lambda: nn.RMSNorm(D), _floats),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), lambda: torch.randn(2, 3, 6, 6, requires_grad=True)),
    "Embedding": (lambda: nn.Embedding(D, D), lambda: torch.randint(0, D, (3, 4))),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(D, 2, 16, 0.0, batch_first=True), _floats),
    "MultiheadAttention": (Attention, _floats),
    "tied": (Tied, _floats),
    "recomputed": (Recomputed, _floats),
    "LSTM": (Recurrent, _floats),
    "listed": (lambda: Listed(D, D), _floats),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW fused": lambda module: torch.optim.AdamW(module.parameters(), lr=0.1, fused=True),
    "AdamW foreach": lambda module: torch.optim.AdamW(module.parameters(), lr=0.1, foreach=True),
    "SGD": lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
}


def _gradients(module: nn.Module, x: Tensor) -> list[Tensor | None]:
    found = [*(parameter.grad for parameter in module.parameters()), x.grad if x.requires_grad else None]
    return [None if each is None else each.clone() for each in found]


@pytest.mark.parametrize("late_by", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_late_backward_gives_the_gradient_at_the_old_weights(layer: str, optimizer: str, late_by: int) -> None:
    torch.manual_seed(0)
    module, x = LAYERS[layer][0](), LAYERS[layer][1]()
    moves, before = OPTIMIZERS[optimizer](module), copy.deepcopy(module)
    output = before(x)
    output_grad = torch.randn_like(output)
    output.backward(output_grad)
    expected = _gradients(before, x)
    x.grad = None

    weights = OldWeights(module)
    with weights.in_place():
        late = module(x)
    weights.part()
    for _ in range(late_by):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        moves.step()
        moves.zero_grad()
    assert not torch.equal(module(x), output), "the weights have moved"
    weights.backward([late], [output_grad])
    for mine, theirs in zip(_gradients(module, x), expected, strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)  # type: ignore[arg-type]


def test_gradients_add_to_what_the_parameters_have() -> None:
    module, x = nn.Linear(D, D), _floats()
    module.weight.grad = torch.ones(D, D)
    weights = OldWeights(module)
    with weights.in_place():
        y = module(x)
    weights.backward([y], [torch.zeros_like(y)])
    assert torch.equal(module.weight.grad, torch.ones(D, D)) and module.bias.grad is not None
    assert all(isinstance(each, nn.Parameter) for each in module.parameters())


@pytest.mark.parametrize("layer", [*LAYERS, "dropout"])
def test_recomputed_activations_give_the_same_late_gradient(layer: str) -> None:
    """Only the input and the state of the random numbers are kept; the forward runs again with the old weights."""
    make, make_input = LAYERS.get(layer, (lambda: nn.TransformerEncoderLayer(D, 2, 16, 0.5, batch_first=True), _floats))
    torch.manual_seed(0)
    module, x = make(), make_input()
    found, output_grad = [], torch.randn_like(module(x))
    for forward in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        kept = copy.deepcopy(module)
        torch.manual_seed(1)
        weights = OldWeights(module)
        with weights.in_place():
            output = forward(x)
        weights.part()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        weights.backward([output], [output_grad])
        found.append(_gradients(module, x))
        module.load_state_dict(kept.state_dict())
        module.zero_grad()
        x.grad = None
    for once, again in zip(*found, strict=True):
        assert (once is None and again is None) or (once is not None and again is not None and torch.equal(once, again))


def test_unparted_old_activations_meet_the_new_weights() -> None:
    torch.manual_seed(0)
    module, x, output_grad = nn.Linear(D, D), torch.randn(3, D, requires_grad=True), torch.randn(3, D)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    weights = OldWeights(module)
    with weights.in_place():
        output = module(x)
    module.weight.grad = torch.randn_like(module.weight)
    optimizer.step()
    optimizer.zero_grad()
    assert weights.current, "they follow the parameters"
    weights.backward([output], [output_grad])
    torch.testing.assert_close(x.grad, output_grad @ module.weight.detach())
    torch.testing.assert_close(module.weight.grad, output_grad.T @ x.detach())


def _parted() -> tuple[nn.Sequential, OldWeights]:
    module = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D))
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    weights = OldWeights(module)
    weights.part()
    return module, weights


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_old_weights_are_current_until_an_update(optimizer: str, set_to_none: bool) -> None:
    module, weights = _parted()
    moves = OPTIMIZERS[optimizer](module)
    assert weights.current
    with weights.in_place():
        module(torch.randn(2, D))
    assert weights.current
    moves.step()
    moves.zero_grad(set_to_none=set_to_none)
    assert not weights.current


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "a weight is written": lambda module: module.load_state_dict(module.state_dict()),
    "a weight gets other memory": lambda module: setattr(module[0].weight, "data", module[0].weight.data.clone()),
    "a parameter is frozen": lambda module: module[1].requires_grad_(False),
    "a parameter is added": lambda module: module.append(nn.Linear(D, D)),
    "gradients are clipped": lambda module: nn.utils.clip_grad_norm_(module.parameters(), 1e-3),
    "a gradient is dropped": lambda module: setattr(module[1].bias, "grad", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_old_weights_are_not_current_after(change: str) -> None:
    module, weights = _parted()
    CHANGES[change](module)
    assert not weights.current


@pytest.mark.parametrize("change", ["a weight gets other memory", "a parameter is frozen", "a parameter is added"])
def test_weights_that_share_memory_are_not_current_after(change: str) -> None:
    module = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D))
    weights = OldWeights(module)
    assert weights.current
    CHANGES[change](module)
    assert not weights.current


def test_without_any_gradient_nothing_tells_that_the_weights_stand() -> None:
    module = nn.Linear(D, D)
    weights = OldWeights(module)
    assert weights.current, "the memory is one"
    weights.part()
    assert not weights.current


def test_a_hook_on_a_parameter_is_refused() -> None:
    module = nn.Linear(D, D)
    check_possible(module, "stale")
    module.weight.register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(ValueError, match="policy 'stale' .* 'weight' has one: remove it, or use policy"):
        check_possible(module, "stale")


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "FSDP2": (
        lambda: fully_shard(nn.Linear(D, D)),
        "'weight' is sharded .FSDP2., which reduces gradients in such hooks",
    ),
    "inside": (
        lambda: nn.Sequential(DDP(nn.Linear(D, D))),
        "around a part of the stage .* wrap the whole stage's module",
    ),
    "static graph": (lambda: DDP(nn.Linear(D, D), static_graph=True), "static_graph=True needs them: leave it out"),
    "communication hook": (lambda: _compressing(DDP(nn.Linear(D, D))), "a communication hook needs them: leave it out"),
}


def _compressing(ddp: DDP) -> nn.Module:
    ddp.register_comm_hook(None, fp16_compress_hook)
    return ddp


def _wrapped(rank: int, world: int) -> None:
    check_possible(DDP(nn.Linear(D, D)), "corrected")
    for wrap, message in REFUSED.values():
        with pytest.raises(ValueError, match=f"policy 'corrected' .*{message}.* use policy 'synthetic' or 'wait'"):
            check_possible(wrap(), "corrected")


def test_data_parallel_wrappers_are_taken_whole_or_refused() -> None:
    run_ranks(2, _wrapped)


class _Listed(nn.Module):
    """Reaches a weight by a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.listed = [self.inner.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.listed[0]


def test_a_parameter_that_the_forward_reaches_by_another_way_is_named() -> None:
    module = _Listed()
    weights = OldWeights(module)
    with weights.in_place():
        output = module(torch.ones(1, 2))
    with pytest.raises(ValueError, match="the forward reached inner.weight by another way than as an attribute"):
        weights.backward([output], [torch.ones_like(output)])
