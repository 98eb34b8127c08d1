"""Forward-unlocked stages on GPUs, over NCCL and by direct copies; skipped where there is none."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from dnipipe.schedule.forward_unlocked import Start
from tests.ranks import run_ranks
from tests.schedule.harness import relative_difference
from tests.schedule.unlocked import UnlockedCase, UnlockedOracle, UnlockedPipeline

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(240),
]
every_transport = pytest.mark.parametrize("transport", ["group", "direct"])
STEPS = 10


def _forced(rank: int, world: int, transport: str, device: str = "cuda") -> dict[str, float]:
    """With an evaluation and a saved state in between, which change no number."""
    torch.backends.cuda.matmul.allow_tf32 = False
    worst = {}
    for kind, m, lag, window in (("mlp", 1, 2, 3), ("mlp", 4, 1, 6), ("sequence", 2, 3, 2)):
        late = tuple((s, step, (step + s) % m) for s in range(1, world) for step in range(STEPS) if (step + s) % 3)
        case = UnlockedCase(kind, "local_head", m, lag=lag, optimizer="adamw", window=window, late=late)
        case.options = {"transport": transport}
        pipeline = UnlockedPipeline(rank, world, case, device=device)
        oracle = UnlockedOracle(world, case, device=device)
        for step in range(STEPS):
            pipeline.step(step)
            oracle.step(step)
            if step == 5:
                pipeline.schedule.eval(*pipeline.arguments(90)[0])
                pipeline.schedule.state_dict()
        worst[str(case)] = relative_difference(pipeline, oracle)
        pipeline.schedule.flush()
    return worst


@every_transport
@pytest.mark.parametrize("world", [2, 4])
def test_forced_starts_equal_the_oracles(world: int, transport: str) -> None:
    for worst in run_ranks(world, _forced, transport, timeout_s=200, backend="nccl"):
        assert max(worst.values()) < 1e-4, worst


def _stalled(rank: int, world: int, transport: str, device: str = "cuda") -> tuple[float, int, float]:
    """Stage 0 sleeps for a second. The longest step, the early starts, and how far from the oracle that replays."""
    torch.backends.cuda.matmul.allow_tf32 = False
    case = UnlockedCase("mlp", "local_head", 2, optimizer="adamw", window=12, patience_s=0.05, late=None)
    case.options = {"transport": transport}
    pipeline, seconds = UnlockedPipeline(rank, world, case, device=device), []
    for step in range(STEPS):
        time.sleep(1.0 if rank == 0 and step == 5 else 0.0)
        start = time.perf_counter()
        pipeline.step(step)
        seconds.append(time.perf_counter() - start)
    told: list[tuple[Start, ...]] = [()] * world
    dist.all_gather_object(told, pipeline.schedule.early_starts)
    oracle = UnlockedOracle(world, case, late={start for starts in told for start in starts}, device=device)
    for step in range(STEPS):
        oracle.step(step)
    return max(seconds[3:]), len(told[rank]), relative_difference(pipeline, oracle)


@every_transport
def test_a_stage_goes_on_while_the_one_before_stalls(transport: str) -> None:
    first, second = run_ranks(2, _stalled, transport, timeout_s=200, backend="nccl")
    assert second[0] < 0.7, "4 steps of 2 microbatches are left, and the window is 12"
    assert first[1] == 0 and second[1] >= 6
    assert max(first[2], second[2]) < 1e-4
