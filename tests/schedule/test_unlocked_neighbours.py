"""Forward-unlocked stages among others: replicas with other starts, neighbours that fall silent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

from dnipipe import ScheduleDNI
from dnipipe.boundary import BoundaryError
from dnipipe.schedule import ForwardUnlocked
from dnipipe.schedule.unlocked_flow import UnlockedFlow
from tests.ranks import run_ranks
from tests.schedule import models
from tests.schedule.unlocked import UnlockedCase, UnlockedPipeline, input_model

M, ROWS, STEPS = 2, 3, 6
ROOT = Path(__file__).resolve().parents[2]


def _replicated(rank: int, world: int) -> dict[str, Any]:
    """Two stages of two replicas, of which each starts other microbatches early."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage_index, replica = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    module = DistributedDataParallel(models.build("mlp", 2)[stage_index], process_group=mesh["dp"].get_group())
    late = [(1, step, replica) for step in range(2, STEPS)]
    schedule = ScheduleDNI(
        PipelineStage(module, stage_index, 2, torch.device("cpu"), group=mesh["pp"].get_group()),
        M,
        models.loss_fn,
        policy="wait:1,synthetic",
        forward_unlocked=ForwardUnlocked(
            window=3, late=late, model=input_model("mlp").module, optimizer=models.interface_optimizer
        ),
        timeout_s=20.0,
    )
    optimizer = models.optimizer(module)
    for step in range(STEPS):
        x, y = models.batch("mlp", step, 2 * ROWS * M)
        x, y = (each.view(2, M * ROWS, *each.shape[1:])[replica] for each in (x, y))
        schedule.step(x, target=y)
        optimizer.step()
        optimizer.zero_grad()
    schedule.flush()
    flow = schedule._flow
    assert isinstance(flow, UnlockedFlow)
    learner = flow.input_learner
    return {
        "stage": stage_index,
        "starts": schedule.early_starts,
        "parameters": [p.detach().numpy() for p in module.parameters()],
        "inputs": [] if learner is None else [p.detach().numpy() for p in learner.interfaces.parameters()],
    }


def test_replicas_that_start_other_microbatches_early_stay_equal() -> None:
    ranks = run_ranks(4, _replicated)
    for stage in range(2):
        first, second = (each for each in ranks if each["stage"] == stage)
        assert bool(first["inputs"]) == (stage == 1)
        assert (first["starts"] != second["starts"]) == (stage == 1)
        for name in ("parameters", "inputs"):
            assert all((a == b).all() for a, b in zip(first[name], second[name], strict=True)), name


TIMEOUT_S, SILENT_FROM, WINDOW = 2.0, 3, 5


def _silent(rank: int, world: int) -> tuple[str, float, int]:
    """Stage 0 stops after a few steps. What the next stage says, after how long, and how far it came without."""
    case = UnlockedCase(m=1, window=WINDOW, patience_s=0.0, late=None, options={"timeout_s": TIMEOUT_S})
    pipeline = UnlockedPipeline(rank, world, case)
    if rank == 0:
        for step in range(SILENT_FROM):
            pipeline.step(step)
        time.sleep(2 * TIMEOUT_S)
        return "", 0.0, 0
    step, start = 0, time.perf_counter()
    try:
        while step < 100:
            start = time.perf_counter()
            pipeline.step(step)
            step += 1
    except BoundaryError as error:
        return str(error), time.perf_counter() - start, step
    return "it never noticed", 0.0, step


def test_a_neighbour_that_falls_silent_is_named_once_the_window_is_used_up() -> None:
    _, (message, seconds, steps) = run_ranks(2, _silent)
    assert message.startswith(f"rank 1 (stage 1) waited {TIMEOUT_S:.1f}"), message
    assert f"for rank 0 (stage 0) at microbatch {SILENT_FROM}" in message
    assert steps == SILENT_FROM + WINDOW, "as many steps of one microbatch were possible without"
    assert TIMEOUT_S <= seconds < TIMEOUT_S + 1.5


SCRIPT = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from dnipipe import ScheduleDNI
from dnipipe.schedule import ForwardUnlocked
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
stage = PipelineStage(nn.Linear(8, 8), rank, 2, torch.device("cpu"))
schedule = ScheduleDNI(stage, 2, nn.MSELoss(), policy="synthetic", forward_unlocked=ForwardUnlocked(window=4))
for _ in range(4):
    x = torch.randn(8, 8)
    schedule.step(x, target=x)
"""


def test_a_script_that_just_ends_ends_well(tmp_path: Path) -> None:
    """With transfers under way, and no destroy_process_group()."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / "store")], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=90) for rank in ranks] == [0, 0]
