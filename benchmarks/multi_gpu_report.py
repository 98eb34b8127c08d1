r"""The page of a run of launch/bench_multi_gpu.sh, and whether its numbers can be right.

python -m benchmarks.multi_gpu_report FOLDER --microbatches 1,2,4,8,12

Reads links.json, machine.json, check.json and throughput.json of the folder, as far as they are there; writes report.md
and planned.png. The exit code is 1, with a line on stderr for each, where something is missing or wrong: bytes that
arrived changed, a difference from the oracle, a schedule that failed (for want of memory it may), impossible numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import claims, link_rows, multi_gpu_check, planned, table
from benchmarks.failures import is_memory
from benchmarks.link_rows import LinkRow
from benchmarks.multi_gpu_check import CheckRow
from benchmarks.options import numbers
from benchmarks.rows import Row, read_rows, read_rows_of

NAME = "benchmarks.multi_gpu_report"
SLACK = 1.15  # measured utilisation by bound: a GPU that idles now and then runs at a higher clock
FAILED = "failed with"
Kind = TypeVar("Kind")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where a check fails, 2 with one line on stderr for a value that cannot be."""
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}", description="Tables of a run, and whether it went well.")
    parser.add_argument("folder", type=Path, help="of the results")
    parser.add_argument("--microbatches", required=True, metavar="M,...", help="that must be there")
    options = parser.parse_args(arguments)
    try:
        counts = numbers("--microbatches", options.microbatches)
    except ValueError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    folder: Path = options.folder
    links = _read(folder / "links.json", lambda path: read_rows_of(LinkRow, path))
    checks = _read(folder / "check.json", lambda path: read_rows_of(CheckRow, path))
    rows = _read(folder / "throughput.json", read_rows)
    (folder / "report.md").write_text(page(folder, links, checks, rows), encoding="utf-8")
    if planned.points(rows):
        planned.draw_points(rows, folder / "planned.png")
    print(claims.markdown(rows))
    found = wrong_links(links) + wrong_checks(checks) + wrong_rows(rows, counts)
    for each in found:
        print(f"{NAME}: {each}", file=sys.stderr)
    return 1 if found else 0


def _read(path: Path, read: Callable[[Path], list[Kind]]) -> list[Kind]:
    return read(path) if path.exists() else []


def wrong_links(links: Sequence[LinkRow]) -> list[str]:
    """One line for each fault; none: all is well."""
    if not links:
        return ["links: nothing was measured"]
    return [f"links: {row.sender}-{row.receiver} by {row.carrier} changed bytes" for row in links if not row.intact]


def wrong_checks(checks: Sequence[CheckRow]) -> list[str]:
    """One line for each fault; none: all is well."""
    if not checks:
        return ["correctness: nothing was checked"]
    due = len(multi_gpu_check.CASES) * (2 if checks[0].device == "cuda" else 1)  # transports
    lines = [] if len(checks) >= due else [f"correctness: only {len(checks)} cases of {due} were checked"]
    return lines + [
        f"correctness: {row.policy}, M = {row.microbatches}, {row.transport} differs by {row.worst}"
        for row in checks
        if not row.is_right
    ]


def wrong_rows(rows: Sequence[Row], counts: Sequence[int]) -> list[str]:
    """One line for each fault; none: all is well."""
    if not rows:
        return ["throughput: nothing was measured"]
    there = {row.microbatches for row in rows}
    lines = [f"throughput: M = {count} is missing" for count in counts if count not in there]
    return lines + [f"throughput: {row.label}, M = {row.microbatches}: {why}" for row in rows for why in _faults(row)]


def _faults(row: Row) -> list[str]:
    if row.refused is not None:
        is_fault = row.refused.startswith(FAILED) or (row.schedule == "DNI" and not is_memory(row.refused))
        return [row.refused] if is_fault else []
    faults = []
    if row.step_ms is None or not math.isfinite(row.step_ms) or row.step_ms <= 0:
        faults.append(f"a step of {row.step_ms} ms")
    if row.device != "cuda":
        return faults  # where cores are shared with other work, and memory is not counted
    if row.utilisation is not None and row.bound is not None and row.utilisation > SLACK * row.bound:
        faults.append(f"utilisation {row.utilisation:.3f} is above what theory allows, {row.bound:.3f}")
    if row.peak_bytes_by_rank is None or len(row.peak_bytes_by_rank) != row.stages:
        faults.append(f"peak memory of {row.stages} ranks is {row.peak_bytes_by_rank}")
    if row.activation_bytes is None or row.activation_bytes <= 0:
        faults.append(f"activations of {row.activation_bytes} bytes")
    return faults


def page(folder: Path, links: Sequence[LinkRow], checks: Sequence[CheckRow], rows: Sequence[Row]) -> str:
    """All of it as GitHub's markdown."""
    parts = ["# Several GPUs\n", _machine(folder / "machine.json"), claims.markdown(rows)]
    parts += [link_rows.markdown(links)] if links else []
    parts += [multi_gpu_check.markdown(checks)] if checks else []
    if rows:
        parts += [table.markdown(rows), memory(rows), planned.markdown(rows)]
    pictures = sorted(path.name for path in folder.glob("throughput*.png"))
    parts.append("\n".join(f"![{name}]({name})\n" for name in [*pictures, *(["planned.png"] if rows else [])]))
    return "\n".join(parts)


def _machine(path: Path) -> str:
    if not path.exists():
        return ""
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    topology = facts.pop("topology", None)
    lines = [f"- {name}: {value}" for name, value in facts.items() if value]
    return "\n".join([*lines, *(["", "```", topology, "```"] if topology else []), ""])


def memory(rows: Sequence[Row]) -> str:
    """Peak of each rank, and the activations of the first stage beside 1F1B's."""
    rivals = {row.microbatches: row.activation_bytes for row in rows if row.schedule == "1F1B"}
    lines = []
    for row in rows:
        if row.peak_bytes_by_rank and row.activation_bytes:
            rival = rivals.get(row.microbatches)
            share = table.said(row.activation_bytes / rival if rival else None, ".2f")
            peaks = " ".join(f"{each / 1e9:.2f}" for each in row.peak_bytes_by_rank)
            lines.append([row.label, str(row.microbatches), peaks, table.size(row.activation_bytes), share])
    headings = ["schedule", "M", "peak by rank GB", "activations, first stage", "of 1F1B's"]
    return table.marked("Memory", headings, lines) if lines else ""


if __name__ == "__main__":
    sys.exit(main())
