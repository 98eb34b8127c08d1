"""The tables of a race: one line per contender, its runs for several purposes side by side."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from .loss_rows import EQUAL_STEPS, EQUAL_TIME, LossRow, best_run, soonest, work
from .rows import grouped
from .table import drawn, marked, ms, print_whole, said, size

HEADINGS = (
    "schedule", "M", "learning\nrate", "step ms", "before, after", "bits/byte\nequal steps", "to\n1F1B",
    "bits/byte\nequal time", "to\n1F1B", "s to loss at\n50 %", "75 %", "100 %", "steps\nfor it", "x time\nof 1F1B",
    "of best\nof torch", "peak",
)  # fmt: skip


def print_tables(console: Console, rows: Sequence[LossRow]) -> None:
    """One table for each seed."""
    for alike in races(rows):
        lines = _lines(alike)
        table = drawn(title(alike), HEADINGS, lines, [False] * len(lines))
        table.caption = Text("\n".join(_refusals(alike))) if _refusals(alike) else None
        print_whole(console, table)


def markdown(rows: Sequence[LossRow]) -> str:
    """The same as GitHub's markdown."""
    parts = [marked(title(alike), HEADINGS, _lines(alike)) for alike in races(rows)]
    refusals = [[f"\n{line}\n" for line in _refusals(alike)] for alike in races(rows)]
    return "\n".join(part + "".join(said) for part, said in zip(parts, refusals, strict=True))


def races(rows: Sequence[LossRow]) -> list[list[LossRow]]:
    """The rows of one model, device, optimizer and seed together."""
    return grouped(rows, lambda row: (row.device, row.card, work([row]), row.seed, row.measured))


def title(rows: Sequence[LossRow]) -> str:
    """What it ran on, and the work, in words."""
    row = rows[0]
    return f"{row.device}, {row.card}: {work(rows)}, seed {row.seed}" + ("" if row.measured else ", simulated")


def contenders(rows: Sequence[LossRow]) -> list[list[LossRow]]:
    """The rows of each contender that was not refused together."""
    return grouped([row for row in rows if row.refused is None], lambda row: row.contender)


def _lines(rows: Sequence[LossRow]) -> list[list[str]]:
    of_1f1b = next((runs for runs in contenders(rows) if runs[0].schedule == "1F1B"), [])
    baseline = best_run(of_1f1b, EQUAL_STEPS)
    return [_line(runs, baseline) for runs in contenders(rows)]


def _line(runs: Sequence[LossRow], baseline: LossRow | None) -> list[str]:
    equal_steps, equal_time, first = best_run(runs, EQUAL_STEPS), best_run(runs, EQUAL_TIME), soonest(runs)
    shown = first or equal_steps or runs[0]
    main = equal_steps or runs[0]
    return [
        main.label,
        f"{main.microbatches}",
        said(main.learning_rate, "g"),
        ms(main.step_ms, main.step_ms),
        f"{ms(main.before_ms, main.before_ms)}, {ms(main.after_ms, main.after_ms)}",
        *_loss(equal_steps, baseline),
        *_loss(equal_time, baseline),
        *(said(seconds, ".1f") for seconds in (shown.seconds_to_50, shown.seconds_to_75, shown.seconds_to_100)),
        said(shown.steps if first else None, "d"),
        said(shown.time_to_1f1b_ratio, ".2f"),
        said(shown.time_to_best_ratio, ".2f"),
        size(main.peak_bytes),
    ]


def _loss(run: LossRow | None, baseline: LossRow | None) -> tuple[str, str]:
    """Final loss, and how far it is from 1F1B's."""
    loss = None if run is None else run.final_bpb
    if loss is None or baseline is None or baseline.final_bpb is None:
        return said(loss, ".4f"), said(None, "")
    return said(loss, ".4f"), f"{loss / baseline.final_bpb - 1:+.1%}"


def _refusals(rows: Sequence[LossRow]) -> list[str]:
    return [
        f"{row.label}, M = {row.microbatches}, refused: {' '.join(row.refused.split())}"
        for row in rows
        if row.refused is not None
    ]
