"""Normalisation, ReLU and pooling in one: the kernels, by Triton's interpreter, against torch in float64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.paper import fused_pool

COMPARISON = """
import torch
from benchmarks.paper import fused_pool, pooled_kernels

fused_pool._kernels = lambda: pooled_kernels
LAST = torch.channels_last
torch.manual_seed(0)
# (B, E, C, H, W): sizes that pooling cuts to 27, 27 x 27 and 30, more channels than a block has, one of everything
CASES = (1, 2, 5, 28, 28), (2, 1, 4, 29, 27), (1, 2, 33, 32, 32), (1, 1, 1, 3, 3)

def outputs(go, x, norm, running, grad):
    x, norm = x.requires_grad_(), norm.requires_grad_()
    out = go(x, norm, running)
    return [out.detach(), *running, *torch.autograd.grad(out, (x, norm), grad)]

def own(x, norm, running):
    return fused_pool._NormReluMaxPool.apply(x.flatten(1, 2), norm, running, 3).unflatten(1, x.shape[1:3])

def reference(x, norm, running):
    return fused_pool.norm_relu_max_pool(x, norm, running, 3)

for number, (batch, models, width, *sides) in enumerate(CASES):
    pooled_kernels.PARTS = 4 if number % 2 else 512  # parts of several blocks, and of one
    pooled_kernels.CELLS = 8 if number % 2 else 64
    # no two of a cell are alike, so one place is right, but for the channel scaled by 0, where it is the first
    x = 3 * torch.randn(batch, models * width, *sides) + torch.linspace(-50, 50, models * width).view(-1, 1, 1)
    norm = torch.randn(models, 2, width)
    norm[-1, :, -1], norm[0, :, 0] = torch.tensor([0.0, 0.5]), torch.tensor([-1.5, 0.1])
    grad = torch.randn(batch, models, width, sides[0] // 3, sides[1] // 3)
    statistics = torch.randn(models, width), torch.rand(models, width)
    for memory, running in ((torch.contiguous_format, ()), (LAST, statistics)):
        given = x.contiguous(memory_format=memory).unflatten(1, (models, width))
        results = outputs(own, given.clone(), norm.clone(), [each.clone() for each in running], grad)
        doubles = given.double(), norm.double(), [each.double() for each in running], grad.double()
        for one, its in zip(results, outputs(reference, *doubles), strict=True):
            torch.testing.assert_close(one.double(), its, rtol=1e-4, atol=2e-5)
    assert results[3].flatten(1, 2).is_contiguous(memory_format=LAST)

x = torch.randn(2, 1, 4, 7, 7)
x[1, 0, 2, 6, 6] = torch.nan  # dropped, but it is in the statistics
assert own(x, torch.ones(1, 2, 4), ()).isnan().any((0, 1, 3, 4)).tolist() == [False, False, True, False]
print("alike")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch for CPUs comes without Triton")
def test_the_kernels_give_what_torchs_operations_give() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", COMPARISON], env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout == "alike\n", run.stderr


def test_torchs_operations_are_its_modules() -> None:
    """Of one model: BatchNorm2d, ReLU and MaxPool2d, one after the other."""
    torch.manual_seed(0)
    modules = torch.nn.Sequential(torch.nn.BatchNorm2d(5), torch.nn.ReLU(), torch.nn.MaxPool2d(3)).double()
    torch.nn.init.normal_(modules[0].weight)
    norm = torch.stack([modules[0].weight, modules[0].bias]).detach().unsqueeze(0)
    running = [modules[0].running_mean.clone().unsqueeze(0), modules[0].running_var.clone().unsqueeze(0)]
    x = torch.randn(4, 5, 8, 10, dtype=torch.float64)
    out = fused_pool.norm_relu_max_pool(x.unsqueeze(1), norm, running, 3)
    assert torch.equal(out.squeeze(1), modules(x))
    assert torch.equal(running[0][0], modules[0].running_mean) and torch.equal(running[1][0], modules[0].running_var)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here they can be built")
def test_where_kernels_cannot_be_built_there_is_a_warning() -> None:
    fused_pool._kernels.cache_clear()
    with pytest.warns(UserWarning, match="training will be slower"):
        assert fused_pool._kernels() is None
