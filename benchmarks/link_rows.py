"""A measured link as a row of a file, and the table of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.table import marked, said, size


@dataclass(frozen=True)
class LinkRow:
    """From one rank to another.

    Fields: carrier: "nccl" or "gloo" (of all ranks), "group" or "direct" (this project's boundaries). latency_us: one
            way, 8 bytes. activation_ms: of activation_bytes, of sends in a row. gb_s: 1e9 bytes a second, one way.
            intact: what arrived is what was sent. refused: why there is no such link; then the rest is None.
    """

    device: str
    card: str
    carrier: str
    sender: int
    receiver: int
    latency_us: float | None
    activation_bytes: int
    activation_ms: float | None
    activation_gb_s: float | None
    large_bytes: int
    large_gb_s: float | None
    intact: bool
    refused: str | None


def markdown(rows: Sequence[LinkRow]) -> str:
    """GitHub's markdown, below a heading of the third level. Raises: ValueError: no rows."""
    if not rows:
        raise ValueError("markdown() got no rows: measure at least one link")
    first = rows[0]
    title = f"{first.device}, {first.card}: from rank to rank, nothing beside it"
    headings = [
        "carrier",
        "pair",
        "latency us",
        f"{size(first.activation_bytes)} ms",
        "GB/s",
        f"{size(first.large_bytes)} GB/s",
    ]
    lines = [[row.carrier, f"{row.sender}-{row.receiver}", *_numbers(row)] for row in rows]
    reasons = dict.fromkeys(row.refused for row in rows if row.refused)
    return marked(title, headings, lines) + "".join(f"\nrefused: `` {reason} ``\n" for reason in reasons)


def _numbers(row: LinkRow) -> list[str]:
    if row.refused is not None:
        return ["refused", "", "", ""]
    return [
        said(row.latency_us, ".1f"),
        said(row.activation_ms, ".3f"),
        said(row.activation_gb_s, ".1f"),
        said(row.large_gb_s, ".1f"),
    ]
