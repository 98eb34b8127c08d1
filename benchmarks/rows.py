"""One measured schedule is one row; rows are kept in a file, set against each other, and sorted into fair comparisons.

Two comparisons are fair: all schedules at one number of microbatches, or one batch that each cuts up as suits it best.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Row:
    """One schedule at one number of microbatches; in a file, a flat JSON object.

    Fields:
        device: "cpu" or "cuda". card: name of the processor or GPU.
        schedule: "GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble" or "DNI".
        interface, policy: of DNI alone, as "linear" and "synthetic".
        transport: what carries activations and gradients: "gloo", "nccl", or DNI's "direct" copies on one GPU.
        microbatch_size: sequences. seq_len: tokens.
        refused: what torch said when it refused this schedule; then all that would have been measured is None.
        step_ms, spread_ms: median and interquartile range over the rounds.
        utilisation: 0 to 1. Time of the same work without a pipeline, all ranks busy, by step time; median over rounds.
        bound: the utilisation that theory allows, with no transfer and no predictor.
        predicted_ms: the planner's step time from measured parts.
        ratio_to_gpipe, ratio_to_1f1b: throughput by theirs on the same microbatches. None: there is none of theirs.
        bound_to_gpipe, bound_to_1f1b: what theory allows these two: bound by their bound.
        peak_bytes: of memory, largest over ranks. None on a CPU. peak_bytes_by_rank: of each.
        activation_bytes: what autograd keeps on the first rank at its most, but for weights (benchmarks/memory.py).
        in_flight: microbatches whose graph is alive, largest over ranks and time. None: not counted.
        given_in_flight: of late policies, where the command line says how many the first stage holds.
        interface_cost_share: of DNI alone, 0 to 1: predict and learn by the stage's time.
        forward_ms, backward_ms, transfer_ms: of one microbatch, alone: of the dearest stage, and of an activation over
            this row's transport. optimizer_ms: of a step.
    """

    device: str
    card: str
    schedule: str
    interface: str | None
    policy: str | None
    transport: str
    stages: int
    microbatches: int
    microbatch_size: int
    seq_len: int
    width: int
    blocks_per_stage: int
    vocab_size: int
    dtype: str
    refused: str | None
    step_ms: float | None
    spread_ms: float | None
    tokens_per_s: float | None
    utilisation: float | None
    bound: float | None
    predicted_ms: float | None
    ratio_to_gpipe: float | None
    ratio_to_1f1b: float | None
    peak_bytes: int | None
    in_flight: float | None
    interface_cost_share: float | None
    commit: str
    torch: str
    date: str
    # what rows of earlier versions have not
    bound_to_gpipe: float | None = None
    bound_to_1f1b: float | None = None
    peak_bytes_by_rank: list[int] | None = None
    activation_bytes: int | None = None
    given_in_flight: int | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    transfer_ms: float | None = None
    optimizer_ms: float | None = None

    @property
    def batch(self) -> int:
        """Sequences of one optimizer step."""
        return self.microbatches * self.microbatch_size

    @property
    def label(self) -> str:
        """The schedule as a reader tells it from others: "1F1B", "DNI linear"."""
        policy = None if self.policy == "synthetic" else self.policy
        transport = self.transport if self.transport == "direct" else None
        held = f"{self.given_in_flight} in flight" if self.given_in_flight is not None else None
        return " ".join(part for part in (self.schedule, self.interface, policy, transport, held) if part)


def write_rows(rows: Iterable[Any], path: str | Path) -> None:
    """Writes the rows, dataclasses of one kind, as a JSON list of flat objects, which read_rows() or read_rows_of()
    reads back exactly; makes the folder.

    Raises: ValueError: a number is infinite or nan; the file is left as it was.
    """
    text = json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False) + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def read_rows(path: str | Path) -> list[Row]:
    """Reads what write_rows() wrote.

    Raises: ValueError: not a JSON list of objects, or one with a field too many or too few; it names file and field.
    """
    return read_rows_of(Row, path)


def read_rows_of(kind: type[Kind], path: str | Path) -> list[Kind]:
    """The same for rows of another kind of dataclass."""
    return [_row(kind, each, f"{path}, row {number}") for number, each in enumerate(read_objects(path))]


def read_objects(path: str | Path) -> list[dict[str, Any]]:
    """The rows of any kind, as they are. Raises: ValueError: not a JSON list of objects; it names file and row."""
    try:
        loaded = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(loaded, list):
        raise ValueError(f"{path} holds a JSON {type(loaded).__name__}, not a list of rows")
    for number, each in enumerate(loaded):
        if not isinstance(each, dict):
            raise ValueError(f"{path}, row {number} is a JSON {type(each).__name__}, not an object")
    return loaded


def _row(kind: type[Kind], loaded: dict[str, Any], place: str) -> Kind:
    known = {field.name: field for field in fields(cast(Any, kind))}
    needed = {name for name, field in known.items() if field.default is MISSING}
    for fault, names in (("unknown", loaded.keys() - known.keys()), ("missing", needed - loaded.keys())):
        if names:
            raise ValueError(f"{place}: {fault} field {', '.join(sorted(names))}")
    return kind(**loaded)


def _model(row: Row) -> tuple[Hashable, ...]:
    return (
        row.device, row.card, row.stages, row.seq_len, row.width, row.blocks_per_stage, row.vocab_size, row.dtype
    )  # fmt: skip


def same_microbatches(row: Row) -> Hashable:
    """Equal for rows of one model on one device that cut the same batch into the same microbatches."""
    return (*_model(row), row.microbatches, row.microbatch_size)


def same_batch(row: Row) -> Hashable:
    """Equal for rows of one model on one device that train on the same batch, however it is cut."""
    return (*_model(row), row.batch)


def grouped(rows: Iterable[Kind], key: Callable[[Kind], Hashable]) -> list[list[Kind]]:
    """The rows of equal key together; groups and rows in the order in which they first came."""
    groups: dict[Hashable, list[Kind]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def with_ratios(rows: Sequence[Row], key: Callable[[Row], Hashable] = same_microbatches) -> list[Row]:
    """The rows with both ratios filled in from tokens_per_s, and the bounds of both, against the GPipe and the 1F1B
    row of equal key.

    A ratio is None where either was refused or is not among the rows. Of several such rows the last counts.
    """
    rivals = {(key(row), row.schedule): row for row in rows if row.schedule in ("GPipe", "1F1B")}

    def ratio(row: Row, name: str, to: str) -> float | None:
        rival = rivals.get((key(row), to))
        own, theirs = getattr(row, name), getattr(rival, name, None)
        return own / theirs if own is not None and theirs else None

    return [
        replace(
            row,
            ratio_to_gpipe=ratio(row, "tokens_per_s", "GPipe"),
            ratio_to_1f1b=ratio(row, "tokens_per_s", "1F1B"),
            bound_to_gpipe=ratio(row, "bound", "GPipe"),
            bound_to_1f1b=ratio(row, "bound", "1F1B"),
        )
        for row in rows
    ]


def best_of(rows: Iterable[Row]) -> list[Row]:
    """Every schedule at its own best number of microbatches: of the rows of one batch, its row of most tokens_per_s.

    One that was refused at every number stays in, refused. The ratios stay those at the same microbatches.
    """
    rivals = grouped(rows, lambda row: (same_batch(row), row.schedule, row.interface, row.policy))
    return [max(group, key=lambda row: row.tokens_per_s or 0.0) for group in rivals]


def side_by_side(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows sorted into workloads, each by its number of microbatches.

    A workload is one model on one device. Its rows share the size of a microbatch or that of the batch, whichever
    makes fewer workloads.
    """
    workloads: list[list[Row]] = []
    for alike in grouped(rows, _model):
        by_size = grouped(alike, lambda row: row.microbatch_size)
        by_batch = grouped(alike, lambda row: row.batch)
        workloads += by_batch if len(by_batch) < len(by_size) else by_size
    return [sorted(workload, key=lambda row: row.microbatches) for workload in workloads]


def place(row: Row) -> str:
    """What it ran on, in words."""
    return f"{row.device}, {row.card}"


def work(workload: Sequence[Row]) -> str:
    """What all rows of a workload had to do, in words."""
    row, sizes = workload[0], {row.microbatch_size for row in workload}
    cut = f"microbatches of {row.microbatch_size}" if len(sizes) == 1 else f"batches of {row.batch}"
    model = f"{many(row.stages, 'stage')} of {many(row.blocks_per_stage, 'block')}, width {row.width}"
    return f"{model}, vocabulary {row.vocab_size}, {row.dtype}, {cut} x {row.seq_len} tokens"


def many(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"
