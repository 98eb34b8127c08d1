"""Recomputing changes what is kept, and nothing else."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dnipipe.partition.recompute import recompute
from launch.gpt import byte_gpt


def _kept_bytes(model: nn.Module, tokens: Tensor) -> tuple[int, Tensor]:
    """What the graph of a forward keeps, parameters left out, and its output."""
    parameters = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(tokens)
    return sum(kept.values()), output


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = byte_gpt(seq_len=32, width=32, depth=4, heads=2)
    model.insert(3, nn.Dropout(0.5))
    return model


def test_outputs_and_gradients_are_the_same_and_less_is_kept() -> None:
    plain = _model()
    other = recompute(copy.deepcopy(plain))
    tokens = torch.randint(256, (2, 32))
    results = []
    for model in (plain, other):
        torch.manual_seed(1)  # of the dropout, which must fall alike when it runs again
        kept, output = _kept_bytes(model, tokens)
        output.square().mean().backward()
        results.append((kept, output, {name: each.grad for name, each in model.named_parameters()}))
    (kept, output, grads), (less, same, again) = results
    assert torch.equal(output, same)
    assert grads.keys() == again.keys() and all(torch.equal(grads[name], again[name]) for name in grads)
    assert less < kept / 5, (less, kept)


def test_an_evaluation_runs_each_layer_once() -> None:
    model, calls = recompute(_model()).eval(), []
    for layer in model:
        layer.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randint(256, (1, 8))).sum().backward()
    assert len(calls) == len(model)
