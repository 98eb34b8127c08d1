"""The same on GPUs, over NCCL and by direct copies; skipped where there is none.

Several ranks may share one card (tests/ranks.py).
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from dnipipe import ScheduleDNI
from dnipipe.observe.trace import Trace
from dnipipe.schedule.policy import LATE, Policy
from tests.ranks import run_ranks, start_ranks
from tests.schedule import models
from tests.schedule.harness import Case, Oracle, Pipeline, relative_difference

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(240),
]

STEPS = 10
every_transport = pytest.mark.parametrize("transport", ["group", "direct"])


def _equal(rank: int, world: int, transport: str) -> dict[str, float]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    worst = {}
    for case in (
        Case("mlp", "mlp", m=1, policy="wait"),
        Case("sequence", "linear", m=4, policy="wait"),
        Case("mlp", "mlp", m=1, lag=2, options={"check_every_steps": 3}),
        Case("sequence", "local_head", m=4, lag=2, unlock_after_steps=3),
        Case("sequence", "transformer", m=2, lag=3, labels="relay"),
        Case("mlp", "linear", m=8, lag=1, labels="none"),
        Case("mlp", "mlp", m=2, policy="wait:2,stale:4,synthetic:2,corrected", in_flight=2 * world - 1),
        Case("sequence", "linear", m=1, policy="corrected:6,wait:2,stale", labels="relay"),
    ):
        case = replace(case, options={**case.options, "transport": transport})
        pipeline, oracle = Pipeline(rank, world, case, device="cuda"), Oracle(world, case, device="cuda")
        for step in range(STEPS):
            pipeline.step(step)
            oracle.step(step)
            if step == 5:  # neither an evaluation nor a saved state changes a number
                pipeline.schedule.eval(*pipeline.arguments(90)[0])
                pipeline.schedule.state_dict()
                if Policy(case.policy).at(step) in LATE:
                    oracle.reference.complete()
        worst[str(case)] = relative_difference(pipeline, oracle)
        pipeline.schedule.flush()
    return worst


@every_transport
@pytest.mark.parametrize("world", [2, 4])
def test_gpus_equal_the_oracle(world: int, transport: str) -> None:
    for worst in run_ranks(world, _equal, transport, timeout_s=200, backend="nccl"):
        print(worst)
        assert max(worst.values()) < 1e-4, worst


def _late(rank: int, world: int, transport: str, device: str = "cuda") -> dict[str, float]:
    """Two step() to an update. Fused AdamW moves weights without telling torch: old ones must not pass for current."""
    torch.backends.cuda.matmul.allow_tf32 = False
    worst = {}
    for case in (
        Case("sequence", "linear", 1, "stale", labels="none", optimizer="adamw", late_weights="old"),
        Case("mlp", "linear", 2, "stale", labels="none", optimizer="adamw", late_weights="new"),
        Case("sequence", "local_head", 4, "corrected", unlock_after_steps=2, late_weights="old"),
        Case("sequence", "linear", 1, "stale", labels="none", optimizer="adamw", steps_per_update=2),
        Case("sequence", "local_head", 2, "corrected", steps_per_update=2, late_weights="predicted@3"),
    ):
        case = replace(case, options={"transport": transport})
        pipeline, oracle = Pipeline(rank, world, case, device=device), Oracle(world, case, device=device)
        for step in range(6):
            pipeline.step(step, optimize=step % 2 == 1)
            oracle.step(step, optimize=step % 2 == 1)
        worst[str(case)] = relative_difference(pipeline, oracle)
        pipeline.schedule.flush()
    return worst


@every_transport
@pytest.mark.parametrize("world", [2, 4])
def test_late_gradients_equal_the_oracles(world: int, transport: str) -> None:
    for worst in run_ranks(world, _late, transport, timeout_s=200, backend="nccl"):
        assert max(worst.values()) < 1e-4, worst


def _synchronizing(rank: int, world: int, transport: str) -> float:
    """As benchmarks do: synchronize and barrier between steps, and leave without flush()."""
    pipeline = Pipeline(rank, world, Case(m=1, lag=3, options={"transport": transport}), device="cuda")
    for step in range(6):
        pipeline.step(step)
        torch.cuda.synchronize()
        torch.distributed.barrier()
    return float(pipeline.schedule.metrics["loss"])


@every_transport
def test_synchronize_and_barrier_between_steps_and_no_flush_at_the_end(transport: str) -> None:
    losses = run_ranks(2, _synchronizing, transport, backend="nccl")
    assert all(0.0 < loss < 10.0 for loss in losses)


class Wide(nn.Module):
    """A stage whose activations weigh more than its parameters: (B, 256) -> (B, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*[each for _ in range(4) for each in (nn.Linear(256, 256), nn.GELU())])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def _peak_bytes(rank: int, world: int, transport: str) -> list[int]:
    rows, peaks = 4096, []
    for m in (4, 32):
        torch.cuda.empty_cache()
        module = Wide().cuda()
        schedule = ScheduleDNI(
            PipelineStage(module, rank, world, torch.device("cuda")),
            m,
            lambda output, target: (output - target).square().mean(),
            interface="mlp" if rank < world - 1 else None,
            policy="synthetic",
            labels="none",
            transport=transport,
        )
        x = torch.randn(rows * m, 256, device="cuda")
        for step in range(4):
            if step == 2:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            # the batch itself grows with M, and is the caller's
            args = (x,) if rank == 0 else ()
            schedule.step(*args, **({"target": x} if rank == world - 1 else {}), return_outputs=False)
        batch = x.nbytes
        peaks.append(torch.cuda.max_memory_allocated() - batch)
        schedule.flush()
        del module, schedule, x
    return peaks


@every_transport
def test_peak_memory_does_not_depend_on_the_number_of_microbatches(transport: str) -> None:
    # direct: how many slots its messages take depends on how far the hosts lead, 2 lag + 1 at most
    slots = 5 * 4096 * 256 * 4 if transport == "direct" else 0
    for at_4, at_32 in run_ranks(2, _peak_bytes, transport, backend="nccl"):
        print(f"peak bytes beside the batch: M=4 {at_4}, M=32 {at_32}, ratio {at_32 / at_4:.4f}")
        assert abs(at_32 - at_4) < 0.02 * at_4 + slots


def _compiled(rank: int, world: int) -> float:
    case = Case(m=2)
    pipeline = Pipeline(rank, world, case, wrap=torch.compile, device="cuda")
    oracle = Oracle(world, case, device="cuda")
    for step in range(4):
        pipeline.step(step)
        oracle.step(step)
    return relative_difference(pipeline, oracle)


def test_compiled_stages_on_a_gpu() -> None:
    assert max(run_ranks(2, _compiled, timeout_s=200, backend="nccl")) < 1e-3


def _traced(rank: int, world: int) -> list[str]:
    trace = Trace(rank, rank, "cuda")
    pipeline = Pipeline(rank, world, Case(m=2, options={"trace": trace}), device="cuda")
    for step in range(3):
        pipeline.step(step)
    spans = trace.export()
    assert all(span.end_s >= span.start_s for span in spans)
    assert 0 < max(span.end_s for span in spans) - min(span.start_s for span in spans) < 60
    return sorted({span.name for span in spans})


def test_spans_are_measured_on_the_device() -> None:
    first, last = run_ranks(2, _traced, backend="nccl")
    assert first == ["backward", "forward", "learn", "predict", "wait"]
    assert last == ["backward", "forward", "wait"]


def _until_lost(rank: int, world: int, timeout_s: float, transport: str) -> tuple[str, float]:
    module = models.build("mlp", world)[rank].cuda()
    schedule = ScheduleDNI(
        PipelineStage(module, rank, world, torch.device("cuda")),
        2,
        models.loss_fn,
        policy="synthetic",
        timeout_s=timeout_s,
        transport=transport,
        check_every_steps=0,  # else the agreement may be what notices the loss
    )
    start = time.perf_counter()
    try:
        for step in range(100_000):
            x, y = (each.cuda() for each in models.batch("mlp", step % 50, 8))
            start = time.perf_counter()
            schedule.step(*((x,) if rank == 0 else ()), target=y)
            time.sleep(0.02)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}", time.perf_counter() - start
    return "nothing was lost", 0.0


@every_transport
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_peer_is_named(sig: signal.Signals, transport: str, capfd: Any) -> None:
    timeout_s = 8.0
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
    processes, out = start_ranks(2, _until_lost, timeout_s, transport, backend="nccl")
    try:
        time.sleep(12.0)
        os.kill(processes[1].pid, sig)
        start = time.perf_counter()
        rank, error, result = out.get(timeout=timeout_s + 30)
        seconds = time.perf_counter() - start
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert rank == 0 and error is None, error
    result = pickle.loads(result)
    print(result, f"{seconds:.1f} s after the loss")
    lost = r"rank 1 \(stage 1\) at microbatch \d+"
    assert re.match(rf"BoundaryError: rank 0 \(stage 0\) waited \d+\.\d s, at most 8 s, for {lost}", result[0]), result
    assert seconds < timeout_s + 5


def _allocations(rank: int, world: int, transport: str) -> list[int]:
    """How often the caching allocator asked CUDA for memory, by the end of each step."""
    pipeline = Pipeline(rank, world, Case("sequence", "linear", m=6, options={"transport": transport}), device="cuda")
    counts = []
    for step in range(30):
        pipeline.step(step)
        counts.append(torch.cuda.memory_stats()["num_device_alloc"])
    return counts


@every_transport
def test_a_running_pipeline_allocates_nothing(transport: str) -> None:
    for counts in run_ranks(2, _allocations, transport, backend="nccl"):
        assert counts[9] == counts[-1], counts
