"""The tables of the page, as rows of texts; a column of which nothing is known is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .curves import Track, number
from .result import Result, verdict

LONGEST_START_S = 20.0
"""Seconds from start to first step that a run may take before the page complains."""
UNKNOWN = "–"


@dataclass(frozen=True)
class Rows:
    """A table: columns, and as many texts in each row. Columns after the first hold numbers, but for `words`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[str] = frozenset()


def merge(tracks: Sequence[Track], facts: Mapping[str, Any], unit: str) -> list[dict[str, Any]]:
    """One result per schedule, in the order in which they ran: as run.json has it, or as far as its lines go.

    The key "so_far" is True for a schedule that has not come to its end, or left no word of it.
    """
    ended = {each["schedule"]: each for each in items(facts, "results") if isinstance(each.get("schedule"), str)}
    by_track = {track.schedule: track for track in tracks}
    results = []
    for schedule in dict.fromkeys([*by_track, *ended]):
        seen = _as_seen(by_track[schedule]) if schedule in by_track else {}
        told = {key: value for key, value in ended.get(schedule, {}).items() if value is not None}
        results.append({"unit": unit, **seen, **told, "schedule": schedule, "so_far": schedule not in ended})
    return results


def _as_seen(track: Track) -> dict[str, Any]:
    """A result from lines alone."""
    return {
        "steps": track.newest_number("step"),
        "seconds": track.newest_number("elapsed_s"),
        "val_bits": track.newest_number("val_bits"),
        "tokens_per_s": track.middle("tokens_per_s"),
        "mfu": track.middle("mfu"),
        "peak_memory_mb": track.peaks("peak_memory_mb_by_rank"),
        "bubble": track.newest("bubble_by_rank"),
    }


def result_table(results: Sequence[Mapping[str, Any]], unit: str) -> Rows:
    """How each schedule did. Memory is that of the rank with the most, the bubble the mean of all ranks."""
    numbers: dict[str, list[str]] = {
        "steps": [_text(each.get("steps"), ",.0f") for each in results],
        "seconds": [_text(each.get("seconds"), ",.1f") for each in results],
        f"{unit}s / s": [_text(each.get("tokens_per_s"), ",.0f") for each in results],
        "MFU": [_text(each.get("mfu"), ".1%") for each in results],
        f"validation bits per {unit}": [_text(each.get("val_bits"), ".3f") for each in results],
        "peak memory of a rank": [
            _text(max(_list(each, "peak_memory_mb"), default=None), ",.0f", " MB") for each in results
        ],
        "bubble": [_text(_mean(_list(each, "bubble")), ".1%") for each in results],
    }
    names = [each["schedule"] + (" (so far)" if each["so_far"] else "") for each in results]
    return _known_columns({"schedule": names, **numbers})


def sentences(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who did better, in words; of a run of one schedule, how it did."""
    known = [(_as_result(each), bool(each["so_far"])) for each in results]
    ended = [result for result, so_far in known if result is not None and not so_far]
    single = ended[:1] if len(ended) == 1 else []
    told = [verdict(ended[0], other) for other in ended[1:]] + [f"{_came_to(each)}." for each in single]
    return told + [f"{_came_to(result)} so far." for result, so_far in known if result is not None and so_far]


def _came_to(result: Result) -> str:
    bits = f"{result.val_bits:.3f} bits per {result.unit}"
    return f"{result.schedule} came to {bits} in {result.steps:,} steps, {result.seconds:,.1f} s of training"


def _as_result(told: Mapping[str, Any]) -> Result | None:
    steps, seconds, val_bits = (number(told.get(key)) for key in ("steps", "seconds", "val_bits"))
    if not (steps > 0 and seconds > 0) or math.isnan(val_bits):
        return None
    return Result(told["schedule"], int(steps), seconds, val_bits, str(told["unit"]))


def split_table(facts: Mapping[str, Any]) -> Rows | None:
    """How the model was cut: a row for each stage."""
    split = items(facts, "split")
    if not split:
        return None
    total = sum(number(each.get("parameters")) for each in split)
    texts: dict[str, list[str]] = {
        "stage": [_text(each.get("stage"), ".0f") for each in split],
        "layers": [_text(each.get("layers"), ".0f") for each in split],
        "from, to": [str(each.get("name") or UNKNOWN) for each in split],
        "parameters": [_text(each.get("parameters"), ",.0f") for each in split],
        "share": [_text(number(each.get("parameters")) / total if total else None, ".0%") for each in split],
        "forward": [_text(each.get("forward_ms"), ",.2f", " ms") for each in split],
        "backward": [_text(each.get("backward_ms"), ",.2f", " ms") for each in split],
        "weights": [_text(_scaled(each.get("parameter_bytes"), 1e-6), ",.1f", " MB") for each in split],
        "saved for backward": [_text(_scaled(each.get("saved_bytes"), 1e-6), ",.1f", " MB") for each in split],
    }
    return _known_columns(texts, words=frozenset({"from, to"}))


def balance(facts: Mapping[str, Any]) -> str | None:
    """How much the slowest stage holds the others up, in words; None where the times are not known, or of one stage."""
    times = [number(each.get("forward_ms")) + number(each.get("backward_ms")) for each in items(facts, "split")]
    if len(times) < 2 or any(math.isnan(time) for time in times) or sum(times) <= 0:
        return None
    slowest, mean = max(times), sum(times) / len(times)
    return (
        f"Forward and backward take stage {times.index(slowest)} the longest, {slowest:,.2f} ms, "
        f"{slowest / mean:.2f} times the mean."
    )


def start_up(facts: Mapping[str, Any]) -> tuple[str, bool] | None:
    """From start to first step in words, and whether that took too long; None if nobody wrote it down."""
    phases = facts.get("startup_s")
    known = {str(name): number(value) for name, value in phases.items()} if isinstance(phases, dict) else {}
    known = {name: seconds for name, seconds in known.items() if not math.isnan(seconds)}
    if not known:
        return None
    total = sum(known.values())
    told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in known.items())
    return f"{total:.1f} s from start to first step: {told}", total > LONGEST_START_S


def machine_table(facts: Mapping[str, Any]) -> Rows | None:
    """What it ran on and with; ranks with the same device share a row."""
    devices = facts.get("devices")
    ranks: dict[str, list[int]] = {}
    for rank, device in enumerate(devices if isinstance(devices, list) else []):
        ranks.setdefault(str(device), []).append(rank)
    rows = [
        (f"{'rank' if len(of_one) == 1 else 'ranks'} {_ranges(of_one)}", device) for device, of_one in ranks.items()
    ]
    versions = facts.get("versions")
    if isinstance(versions, dict):
        rows += [(str(name), str(version)) for name, version in versions.items() if version is not None]
    return Rows(("", ""), rows, frozenset({""})) if rows else None


def key_figures(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, how much) for the head of the page."""
    wanted = (
        ("parameters", _text(facts.get("parameters"), ",.0f")),
        ("stages", _text(facts.get("num_stages"), ".0f")),
        ("replicas", _text(facts.get("num_replicas"), ".0f")),
        ("FLOPs per token", _engineering(facts.get("flops_per_token"))),
        ("peak FLOP/s of a device", _engineering(facts.get("peak_flops"))),
        ("started", _moment(facts.get("started"))),
    )
    return [(name, text) for name, text in wanted if text != UNKNOWN]


def items(facts: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects; empty if it is missing, null or anything else."""
    value = facts.get(key)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _known_columns(texts: Mapping[str, Sequence[str]], words: frozenset[str] = frozenset()) -> Rows:
    kept = {name: column for name, column in texts.items() if any(text != UNKNOWN for text in column)}
    return Rows(list(kept), list(zip(*kept.values(), strict=True)), words)


def _text(value: object, form: str, unit: str = "") -> str:
    read = number(value)
    return UNKNOWN if math.isnan(read) else f"{read:{form}}{unit}"


def _list(told: Mapping[str, Any], key: str) -> list[float]:
    """The known numbers of a list."""
    values = told.get(key)
    read = [number(value) for value in values] if isinstance(values, list) else [number(values)]
    return [value for value in read if not math.isnan(value)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _scaled(value: object, factor: float) -> float:
    return number(value) * factor


def _engineering(value: object) -> str:
    """9.89e14 -> "989 T"."""
    read = number(value)
    if math.isnan(read):
        return UNKNOWN
    for prefix in ("", "k", "M", "G", "T"):
        if abs(read) < 1000:
            return f"{read:.3g} {prefix}".strip()
        read /= 1000
    return f"{read:.3g} P"


def _moment(value: object) -> str:
    """2026-11-24T17:02:11+00:00 -> "2026-11-24 17:02:11 UTC"; what is no such text stays as it is."""
    try:
        return f"{datetime.fromisoformat(str(value)):%Y-%m-%d %H:%M:%S %Z}".strip()
    except ValueError:
        return str(value) if value else UNKNOWN


def _ranges(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0 to 2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)
