r"""Whether a pipeline over real processes computes what the one-process oracle computes, under each policy.

python -m benchmarks.multi_gpu_check --device cuda --ranks 4 --json runs/check/check.json

A small GPT in float32, one block a stage, trained by ScheduleDNI over each transport, and in each process by
schedule/reference.py or late_reference.py. Compared: parameters, predictors, losses. On a CPU they must be equal bit
for bit; on GPUs, where sums of the same numbers may be taken in another order, within TOLERANCE of the largest value.
The exit code is 1 where they are not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from benchmarks.machine import card, largest
from benchmarks.options import check_device, check_least
from benchmarks.ranks import run_ranks
from benchmarks.rows import read_rows_of, write_rows
from benchmarks.table import marked, said
from benchmarks.workload import Workload, token_loss
from dnipipe import ScheduleDNI
from dnipipe.interface import Interface, Learner, TensorMeta, build_interface
from dnipipe.schedule.late_reference import LateReference
from dnipipe.schedule.policy import Policy
from dnipipe.schedule.reference import Reference

NAME = "benchmarks.multi_gpu_check"
TIMEOUT_S = 60.0
TOLERANCE = 1e-4
STEPS = 8
EPS = 1e-3  # of Adam: else a gradient that is rounding alone, as of a key's bias, becomes a whole step
CASES = (
    ("wait", 4, "local_head"),
    ("synthetic", 1, "linear"),
    ("synthetic", 4, "local_head"),
    ("stale", 1, None),
    ("stale", 4, None),
    ("corrected", 2, "local_head"),
    ("wait:2,stale:3,synthetic:2,corrected", 2, "local_head"),
)
"""Policy, microbatches, interface."""


@dataclass(frozen=True)
class CheckRow:
    """One policy over one transport.

    Fields: worst: max |difference| / max |value| over all that is compared, on the worst rank. allowed: at most.
            refused: why it could not run; then worst is None.
    """

    device: str
    card: str
    ranks: int
    transport: str
    policy: str
    microbatches: int
    interface: str | None
    steps: int
    worst: float | None
    allowed: float
    refused: str | None = None

    @property
    def is_right(self) -> bool:
        """Never for nan."""
        return self.refused is not None or (self.worst is not None and self.worst <= self.allowed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where something differs, 2 with one line on stderr for a value that cannot be."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {NAME}", description="Each policy against the one-process oracle."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="one process per stage")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--json", type=Path, default=Path("runs/check/check.json"), metavar="FILE", help="the rows")
    options = parser.parse_args(arguments)
    try:
        check_least("ranks", options.ranks, 2)
        check_device(options.device)
    except ValueError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    run_ranks(options.ranks, options.device, TIMEOUT_S, check_all, options.json)
    rows = read_rows_of(CheckRow, options.json)
    options.json.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))
    wrong = [row for row in rows if not row.is_right]
    for row in wrong:
        where = f"{row.policy}, M = {row.microbatches}, {row.transport}"
        print(f"{NAME}: {where}: {row.worst} from the oracle, at most {row.allowed}", file=sys.stderr)
    return 1 if wrong else 0


def check_all(rank: int, device: torch.device, path: Path) -> None:
    """Every rank must call it; rank 0 writes the rows."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows = []
    for transport in ("group", "direct") if device.type == "cuda" else ("group",):
        for policy, m, interface in CASES:
            worst, refused = None, None
            try:
                worst = largest(difference(device, transport, policy, m, interface))
            except ValueError as error:  # on all ranks alike: some GPUs cannot reach each other's memory
                if transport != "direct":
                    raise
                refused = str(error).splitlines()[0]
            rows.append(
                CheckRow(
                    device=device.type,
                    card=card(device),
                    ranks=dist.get_world_size(),
                    transport=transport,
                    policy=policy,
                    microbatches=m,
                    interface=interface,
                    steps=STEPS,
                    worst=worst,
                    allowed=TOLERANCE if device.type == "cuda" else 0.0,
                    refused=refused,
                )
            )
            if rank == 0:
                write_rows(rows, path)


def difference(device: torch.device, transport: str, policy: str, m: int, interface: str | None) -> float:
    """Trains both; the largest relative difference on this rank. Every rank must call it."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    workload = Workload(num_ranks, 1, 64, 16, 64, 2, torch.float32)
    every = list(range(num_ranks))
    module, modules = (workload.chunks(each, num_ranks, device) for each in ([rank], every))
    predictors = [_interface(workload, interface, device) for _ in every[:-1]]
    schedule = ScheduleDNI(
        PipelineStage(module[0], rank, num_ranks, device),
        m,
        loss_fn=token_loss,
        interface=_interface(workload, interface, device) if rank < num_ranks - 1 else None,
        interface_optimizer=_adam,
        policy=policy,
        labels="local" if interface else "none",
        num_classes=workload.vocab_size,
        transport=transport,
        timeout_s=TIMEOUT_S,
    )
    learners = [Learner([each], _adam) if each is not None else None for each in predictors]
    kind = LateReference if Policy(policy).late else Reference
    oracle = kind(modules, [*learners, None], token_loss, num_microbatches=m, policy=Policy(policy))
    own, theirs = _adamw(module[0]), [_adamw(each) for each in modules]
    losses: list[Tensor] = []
    expected: list[Tensor] = []
    tokens = workload.batch(m, device)
    for step in range(STEPS):
        batch = (tokens + step) % workload.vocab_size
        of_step: list[Tensor] = []
        schedule.step(*((batch,) if rank == 0 else ()), target=batch, losses=of_step)
        losses += of_step
        expected += oracle.step(batch, batch, batch if interface else None)
        for optimizer in (own, *theirs):
            optimizer.step()
            optimizer.zero_grad()
    learner = schedule._flow.learner if schedule._flow is not None else None
    pairs = _parameters(module[0], learner, modules[rank], oracle.learners[rank])
    if rank == num_ranks - 1:
        pairs += zip([loss.detach() for loss in losses], expected, strict=True)
    worst = max(_relative(a, b) for a, b in pairs)
    schedule.flush()
    return worst


def _interface(workload: Workload, name: str | None, device: torch.device) -> Interface | None:
    """The same in every process; not zero, so that the first predictions matter too."""
    if name is None:
        return None
    torch.manual_seed(1)
    size = (workload.microbatch_size, workload.seq_len)
    activation, label = TensorMeta((*size, workload.width), workload.dtype), TensorMeta(size, torch.int64)
    with device:
        built = build_interface(name, activation, num_classes=workload.vocab_size, label=label).to(device)
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return built


def _adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, eps=EPS)  # type: ignore[arg-type]


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    """Fused, for on a GPU that moves weights without telling torch, which old weights must bear."""
    return torch.optim.AdamW(module.parameters(), lr=1e-3, eps=EPS, fused=True)


def _parameters(
    module: nn.Module, learner: Learner | None, reference: nn.Module, their_learner: Learner | None
) -> list[tuple[Tensor, Tensor]]:
    """Of a stage and its predictor: ours beside the oracle's."""
    own, theirs = [*module.parameters()], [*reference.parameters()]
    if learner is not None and their_learner is not None:
        own += learner.interfaces.parameters()
        theirs += their_learner.interfaces.parameters()
    return list(zip(own, theirs, strict=True))


def _relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).detach())


def markdown(rows: Sequence[CheckRow]) -> str:
    """GitHub's markdown, below a heading of the third level. Raises: ValueError: no rows."""
    if not rows:
        raise ValueError("markdown() got no rows: check at least one policy")
    title = f"{rows[0].device}, {rows[0].card}: {rows[0].ranks} ranks against one process, {rows[0].steps} steps"
    headings = ["policy", "interface", "M", "transport", "worst difference", "allowed", ""]
    lines = [
        [
            row.policy,
            row.interface or "none",
            str(row.microbatches),
            row.transport,
            said(row.worst, ".1e"),
            f"{row.allowed:g}",
            row.refused or ("right" if row.is_right else "WRONG"),
        ]
        for row in rows
    ]
    return marked(title, headings, lines)


if __name__ == "__main__":
    sys.exit(main())
