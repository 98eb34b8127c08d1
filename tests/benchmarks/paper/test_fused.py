"""The kernels by Triton's interpreter, which needs no GPU, and what happens without them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.paper import fused

COMPARISON = """
import torch
from benchmarks.paper import fused, kernels

torch.manual_seed(0)
for shape in ((3, 10, 16), (2, 7, 12)):
    x, norm = torch.randn(shape, requires_grad=True), torch.randn(shape[0], 2, shape[1], requires_grad=True)
    running, other = ([torch.zeros(shape[:2]), torch.ones(shape[:2])] for _ in range(2))
    grad = torch.randn(shape)
    out = fused.norm_relu(x, norm, running)
    reference = out, *running, *torch.autograd.grad(out, (x, norm), grad)
    x, norm = x.detach(), norm.detach()
    own, mean, inverse = kernels.norm_relu(x, norm, other, fused.EPS, fused.MOMENTUM)
    results = own, *other, *kernels.norm_relu_back(grad, x, norm, mean, inverse)
    for one, its in zip(results, reference, strict=True):
        torch.testing.assert_close(one, its.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(own, kernels.norm_relu(x, norm, (), fused.EPS, fused.MOMENTUM)[0])

own = [torch.randn(3, 5, 7), *torch.zeros(2, 3, 5, 7)]
other = [each.clone() for each in own]
count, rate, decay = torch.zeros(3), torch.tensor([1e-2, 1e-3, 1e-1]), torch.tensor([0.0, 1.0, 3.0])
for step in range(5):
    gradient, moves = torch.randn(3, 5, 7), torch.tensor([1.0, step % 2, 1.0])
    count += moves
    of_model = count, rate, moves, decay
    fused.adam(own[0], gradient, (own[1], own[2]), of_model)
    kernels.adam(other[0], gradient, (other[1], other[2]), of_model, fused._CONSTANTS)
for one, its in zip(own, other, strict=True):
    torch.testing.assert_close(one, its, rtol=1e-4, atol=1e-6)
print("alike")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch for CPUs comes without Triton")
def test_the_kernels_give_what_torchs_operations_give() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", COMPARISON], env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout == "alike\n", run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="here they can be built")
def test_where_kernels_cannot_be_built_there_is_a_warning_and_torch_does_it() -> None:
    fused._kernels.cache_clear()
    with pytest.warns(UserWarning, match="training will be slower"):
        assert fused._kernels() is None
