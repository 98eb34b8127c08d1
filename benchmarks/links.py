r"""How fast tensors get from one rank to another: latency and bandwidth of each pair, with nothing beside it.

python -m benchmarks.links --device cuda --ranks 4 --json runs/links/links.json

    nccl, gloo    sends of the process group of all ranks: what torch's schedules use
    group         this project's boundary between neighbours, over a group of two, on NCCL with one block
    direct        this project's copies between GPUs of one host, on each pair that can reach each other

Latency: half of a round trip of 8 bytes, launches of the host included. Bandwidth: one way, sends in a row. What
arrives is compared with what was sent; the exit code is 1 where it differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.link_rows import LinkRow, markdown
from benchmarks.machine import card, facts, of_all
from benchmarks.options import check_device, check_least
from benchmarks.ranks import run_ranks
from benchmarks.reference import boundary_to, neighbours
from benchmarks.rows import read_rows_of, write_rows
from benchmarks.wires import BoundaryWire, GroupWire, Wire, stream_s, trip_s

NAME = "benchmarks.links"
TIMEOUT_S = 60.0
SMALL_BYTES = 8
TRIPS, SENDS = 50, 10
DEPTH = 64  # of direct copies: more than are ever under way


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 for wrong bytes, 2 with one line on stderr for a value that cannot be."""
    options = _parser().parse_args(arguments)
    try:
        check_least("ranks", options.ranks, 2)
        check_least("activation-bytes", options.activation_bytes, SMALL_BYTES)
        check_least("large-bytes", options.large_bytes, SMALL_BYTES)
        check_device(options.device)
    except ValueError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    options.json.parent.mkdir(parents=True, exist_ok=True)
    sizes = (options.activation_bytes, options.large_bytes)
    run_ranks(options.ranks, options.device, TIMEOUT_S, measure_links, sizes, options.json)
    rows, machine = read_rows_of(LinkRow, options.json), facts(options.device)
    options.json.with_name("machine.json").write_text(json.dumps(machine, indent=1) + "\n", encoding="utf-8")
    options.json.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))
    wrong = [row for row in rows if not row.intact]
    for row in wrong:
        print(
            f"{NAME}: rank {row.receiver} got other bytes than rank {row.sender} sent by {row.carrier}", file=sys.stderr
        )
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {NAME}", description="Latency and bandwidth of each pair of ranks."
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="one process per rank; several may share a GPU")
    add("--ranks", type=int, default=2, metavar="N", help="(default: 2)")
    add("--activation-bytes", type=int, default=16 << 20, metavar="B", help="of an activation (default: 16 MiB)")
    add("--large-bytes", type=int, default=256 << 20, metavar="B", help="(default: 256 MiB)")
    add("--json", type=Path, default=Path("runs/links/links.json"), metavar="FILE", help="the rows")
    return parser


def measure_links(rank: int, device: torch.device, sizes: tuple[int, int], path: Path) -> None:
    """Every rank must call it; rank 0 writes the rows."""
    num_ranks, rows = dist.get_world_size(), list[LinkRow]()
    wire: Wire | None
    pairs = [(one, other) for one in range(num_ranks) for other in range(one + 1, num_ranks)]
    dist.all_reduce(torch.zeros(1, device=device))  # opens the communicator of all ranks, which all must do together
    group = "nccl" if device.type == "cuda" else "gloo"
    for pair in pairs:
        wire = GroupWire(_other(pair, rank)) if rank in pair else None
        rows.append(_measure(pair, group, wire, sizes, device))
    boundaries = {boundary.peer: boundary for boundary in neighbours(device, "group", DEPTH)}
    for pair in zip(range(num_ranks - 1), range(1, num_ranks), strict=True):
        wire = BoundaryWire(boundaries[_other(pair, rank)]) if rank in pair else None
        rows.append(_measure(pair, "group", wire, sizes, device))
    for pair in pairs if device.type == "cuda" else []:
        wire, why = _direct(pair, rank, device)
        refusals = [each for each in of_all(why) if each]
        rows.append(
            _refused(pair, refusals[0], sizes, device) if refusals else _measure(pair, "direct", wire, sizes, device)
        )
    if rank == 0:
        write_rows(rows, path)


def _other(pair: tuple[int, int], rank: int) -> int:
    return pair[1] if rank == pair[0] else pair[0]


def _direct(pair: tuple[int, int], rank: int, device: torch.device) -> tuple[Wire | None, str | None]:
    """The wire, or why there is none."""
    group = dist.new_group(list(pair), backend="gloo")
    if rank not in pair:
        return None, None
    assert isinstance(group, dist.ProcessGroup)
    try:
        return BoundaryWire(boundary_to(_other(pair, rank), group, device, "direct", DEPTH)), None
    except RuntimeError as error:
        return None, str(error).splitlines()[0]


def _measure(
    pair: tuple[int, int], carrier: str, wire: Wire | None, sizes: tuple[int, int], device: torch.device
) -> LinkRow:
    """Of the way from the first of the pair to the second. wire: None on the ranks that are not of it."""
    rank, small = dist.get_rank(), torch.zeros(SMALL_BYTES, dtype=torch.uint8, device=device)
    is_first, seconds, intact = rank == pair[0], [0.0, 0.0, 0.0], True
    dist.barrier()
    if wire is not None:
        seconds[0] = trip_s(wire, is_first, small, TRIPS)
        for number, num_bytes in enumerate(sizes, start=1):
            data = (
                _pattern(num_bytes, pair, device)
                if is_first
                else torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            )
            seconds[number] = stream_s(wire, is_first, data, SENDS)
            intact = intact and torch.equal(data, _pattern(num_bytes, pair, device))
    ranks = of_all((seconds, intact))
    trip, activation, large = (max(each[number] for each, _ in ranks) for number in range(3))
    return LinkRow(
        device=device.type,
        card=card(device),
        carrier=carrier,
        sender=pair[0],
        receiver=pair[1],
        latency_us=trip * 1e6,
        activation_bytes=sizes[0],
        activation_ms=activation * 1e3,
        activation_gb_s=sizes[0] / activation / 1e9,
        large_bytes=sizes[1],
        large_gb_s=sizes[1] / large / 1e9,
        intact=all(each for _, each in ranks),
        refused=None,
    )


def _pattern(num_bytes: int, pair: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Bytes that no other pair sends."""
    return (torch.arange(num_bytes, device=device) * 7 + 16 * pair[0] + pair[1] + 1).to(torch.uint8)


def _refused(pair: tuple[int, int], why: str, sizes: tuple[int, int], device: torch.device) -> LinkRow:
    none = dict.fromkeys(("latency_us", "activation_ms", "activation_gb_s", "large_gb_s"))
    place = {"device": device.type, "card": card(device), "carrier": "direct", "sender": pair[0], "receiver": pair[1]}
    return LinkRow(**place, **none, activation_bytes=sizes[0], large_bytes=sizes[1], intact=True, refused=why)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
