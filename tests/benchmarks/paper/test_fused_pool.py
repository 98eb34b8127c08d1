"""Normalisation, ReLU and pooling in one: the kernels, by Triton's interpreter, against torch in float64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.paper import fused_pool

COMPARISON = """
import sys

import torch
from benchmarks.paper import fused_pool, max_pool_kernels, mean_pool_kernels, statistics_kernels

KIND = sys.argv[1]
KERNELS, REFERENCE = {
    "max": (max_pool_kernels, fused_pool.norm_relu_max_pool),
    "mean": (mean_pool_kernels, fused_pool.norm_relu_mean_pool),
}[KIND]
LAST = torch.channels_last
torch.manual_seed(0)
# (B, E, C, H, W) and size: sides cut to 27, 27 x 27 and 30, more channels than a block has, no pooling, one of all
CASES = [(1, 2, 5, 28, 28, 3), (2, 1, 4, 29, 27, 3), (1, 2, 33, 32, 32, 3), (3, 2, 6, 9, 10, 1), (1, 1, 1, 3, 3, 3)]

def outputs(go, x, norm, running, grad, size):
    x, norm = x.requires_grad_(), norm.requires_grad_()
    out = go(x, norm, running, size)
    return [out.detach(), *running, *torch.autograd.grad(out, (x, norm), grad)]

def own(x, norm, running, size):
    return fused_pool._NormReluPool.apply(x.flatten(1, 2), norm, running, size, KERNELS).unflatten(1, x.shape[1:3])

for number, (batch, models, width, *sides, size) in enumerate(CASES):
    statistics_kernels.PARTS = 4 if number % 2 else 512  # parts of several blocks, and of one
    max_pool_kernels.CELLS = 8 if number % 2 else 64
    # no two of a cell are alike, so one place is right, but for the channel scaled by 0, where it is the first
    x = 3 * torch.randn(batch, models * width, *sides) + torch.linspace(-50, 50, models * width).view(-1, 1, 1)
    norm = torch.randn(models, 2, width)
    norm[-1, :, -1], norm[0, :, 0] = torch.tensor([0.0, 0.5]), torch.tensor([-1.5, 0.1])
    grad = torch.randn(batch, models, width, sides[0] // size, sides[1] // size)
    statistics = torch.randn(models, width), torch.rand(models, width)
    for memory, running in ((torch.contiguous_format, ()), (LAST, statistics)):
        given = x.contiguous(memory_format=memory).unflatten(1, (models, width))
        results = outputs(own, given.clone(), norm.clone(), [each.clone() for each in running], grad, size)
        doubles = given.double(), norm.double(), [each.double() for each in running], grad.double()
        for one, its in zip(results, outputs(REFERENCE, *doubles, size), strict=True):
            torch.testing.assert_close(one.double(), its, rtol=1e-4, atol=2e-5)
    assert results[3].flatten(1, 2).is_contiguous(memory_format=LAST)

x = torch.randn(2, 1, 4, 7, 7)
x[1, 0, 2, 6, 6] = torch.nan  # dropped, but it is in the statistics
assert own(x, torch.ones(1, 2, 4), (), 3).isnan().any((0, 1, 3, 4)).tolist() == [False, False, True, False]
print("alike")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch for CPUs comes without Triton")
@pytest.mark.parametrize("kind", ["max", "mean"])
def test_the_kernels_give_what_torchs_operations_give(kind: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", COMPARISON, kind], env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout == "alike\n", run.stderr


@pytest.mark.parametrize(
    "go, pool", [(fused_pool.norm_relu_max_pool, nn.MaxPool2d), (fused_pool.norm_relu_mean_pool, nn.AvgPool2d)]
)
@pytest.mark.parametrize("size", [3, 1])
def test_torchs_operations_are_its_modules(go: Callable[..., Tensor], pool: type[nn.Module], size: int) -> None:
    """Of one model: BatchNorm2d, ReLU and a pooling, one after the other."""
    torch.manual_seed(0)
    modules = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), pool(size)).double()
    nn.init.normal_(modules[0].weight)
    norm = torch.stack([modules[0].weight, modules[0].bias]).detach().unsqueeze(0)
    running = [modules[0].running_mean.clone().unsqueeze(0), modules[0].running_var.clone().unsqueeze(0)]
    x = torch.randn(4, 5, 8, 10, dtype=torch.float64)
    assert torch.equal(go(x.unsqueeze(1), norm, running, size).squeeze(1), modules(x))
    assert torch.equal(running[0][0], modules[0].running_mean) and torch.equal(running[1][0], modules[0].running_var)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here they can be built")
def test_where_kernels_cannot_be_built_there_is_a_warning() -> None:
    fused_pool._kernels.cache_clear()
    with pytest.warns(UserWarning, match="training will be slower"):
        assert fused_pool._kernels() is None
