"""One engine at one number of microbatches is one row; the table of them, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console

from .rows import grouped, many
from .table import drawn, marked, ms, print_whole, said, size

PLAIN, OURS = "plain", "dnipipe"
NAMES = {PLAIN: "plain PipelineEngine", OURS: "dnipipe.deepspeed"}


@dataclass(frozen=True)
class DeepSpeedRow:
    """In a file, a flat JSON object.

    Fields:
        engine: "plain", DeepSpeed's own PipelineEngine, or "dnipipe".
        policy, interface, lag: of dnipipe alone; policy as it was when the last turn ended.
        transport: what carries activations and gradients: "gloo", "nccl", or dnipipe's "direct" copies on one GPU.
        zero: stage of ZeRO. dtype: of the computation; under bfloat16 DeepSpeed keeps float32 weights beside.
        microbatch_size: sequences. seq_len: tokens.
        microbatch_ms: forward and backward of one microbatch, of the dearest stage, with no pipeline around it.
        step_ms, spread_ms: of train_batch(): median and interquartile range over the rounds.
        speedup: tokens_per_s by those of the plain engine at as many microbatches.
        peak_bytes: of tensors of this engine, largest over ranks. None on a CPU.
    """

    engine: str
    policy: str | None
    interface: str | None
    lag: int | None
    transport: str
    device: str
    card: str
    zero: int
    dtype: str
    stages: int
    microbatches: int
    microbatch_size: int
    seq_len: int
    width: int
    blocks_per_stage: int
    vocab_size: int
    microbatch_ms: float
    step_ms: float
    spread_ms: float
    tokens_per_s: float
    speedup: float
    peak_bytes: int | None
    commit: str
    torch: str
    deepspeed: str
    date: str

    @property
    def label(self) -> str:
        """As a reader tells it from others."""
        return " ".join(part for part in (NAMES[self.engine], self.policy, self.interface) if part)

    @property
    def bound(self) -> float:
        """The speedup of losing the bubble alone: 1F1B's is S - 1 microbatches of M + S - 1. Plain's sends block, too,
        so more than that can be won."""
        if self.engine == PLAIN:
            return 1.0
        return (self.microbatches + self.stages - 1) / self.microbatches


def title(row: DeepSpeedRow) -> str:
    """What it ran on, in words."""
    return f"{row.device}, {row.card}"


def work(row: DeepSpeedRow) -> str:
    """What both engines had to do, in words."""
    return (
        f"{many(row.stages, 'stage')} of {many(row.blocks_per_stage, 'block')}, width {row.width}, "
        f"vocabulary {row.vocab_size}, {row.dtype}, ZeRO {row.zero}, "
        f"microbatches of {row.microbatch_size} x {row.seq_len} tokens"
    )


def workloads(rows: Sequence[DeepSpeedRow]) -> list[list[DeepSpeedRow]]:
    """The rows of one device and one work together, by their number of microbatches."""
    return [sorted(alike, key=lambda row: row.microbatches) for alike in grouped(rows, lambda r: (title(r), work(r)))]


COLUMNS: Sequence[tuple[str, Callable[[DeepSpeedRow], str]]] = (
    ("engine", lambda row: row.label),
    ("M", lambda row: f"{row.microbatches}"),
    ("step ms\n± IQR", lambda row: f"{ms(row.step_ms, row.step_ms)} ± {ms(row.spread_ms, row.step_ms)}"),
    ("tokens/s", lambda row: said(row.tokens_per_s, ",.0f")),
    ("x\nplain", lambda row: said(row.speedup, ".2f")),
    ("without\nbubble", lambda row: said(row.bound, ".2f")),
    ("microbatch\nalone, ms", lambda row: ms(row.microbatch_ms, row.microbatch_ms)),
    ("transport", lambda row: row.transport),
    ("peak", lambda row: size(row.peak_bytes)),
)


def show(console: Console, rows: Sequence[DeepSpeedRow]) -> None:
    """Prints one table for each workload."""
    headings = [heading for heading, _ in COLUMNS]
    for alike in workloads(rows):
        ends = [after.microbatches != row.microbatches for row, after in zip(alike, alike[1:], strict=False)]
        name = f"{title(alike[0])}: {work(alike[0])}"
        print_whole(console, drawn(name, headings, [_cells(row) for row in alike], [*ends, False]))


def markdown(rows: Sequence[DeepSpeedRow]) -> str:
    """The same as GitHub's markdown."""
    headings = [heading for heading, _ in COLUMNS]
    return "\n".join(
        marked(f"{title(alike[0])}: {work(alike[0])}", headings, map(_cells, alike)) for alike in workloads(rows)
    )


def _cells(row: DeepSpeedRow) -> list[str]:
    return [cell(row) for _, cell in COLUMNS]
