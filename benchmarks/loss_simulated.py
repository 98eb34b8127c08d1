"""Time to loss without a race: loss by step from one benchmark, seconds of a step from another.

Loss:    rows of benchmarks.policies. Policy "wait" is backpropagation, whose loss is that of all of torch's schedules.
Seconds: rows of benchmarks.throughput, or the paces in those of a race. DNI's steps under `wait` take what 1F1B's do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Any

from dnipipe.schedule.choose import choose_late_weights
from dnipipe.schedule.policy import AUTO, LATE

from .contestants import TORCH_SCHEDULES
from .loss_rows import EQUAL_STEPS, LENGTH, LossRow, with_marks
from .machine import commit

Loaded = Mapping[str, Any]


def simulate(loaded: Sequence[Loaded], microbatches: int, command: str) -> list[LossRow]:
    """Rows with measured = False, marked by 1F1B at the given number of microbatches.

    A run counts if it came to its end, with the weights and the microbatches in flight that are the default; one whose
    policy nobody has timed is left out.

    Args:   loaded: rows of both kinds, as read from JSON; those with a val_bpb say the loss.
    Raises: ValueError: no row of a kind, none of backpropagation, or rows of different models.
    """
    losses = [row for row in loaded if "val_bpb" in row and _is_plain(row)]
    paces = [row for row in loaded if "val_bpb" not in row and _pace_ms(row) is not None]
    if not losses or not paces:
        kind = "of benchmarks.policies, with a val_bpb" if not losses else "of benchmarks.throughput, with a step_ms"
        raise ValueError(f"the files hold no row {kind}: name one file of each benchmark")
    lengths = {_race(row): row["steps"] for row in losses if row["policy"] == "wait"}
    if not lengths:
        raise ValueError("no row of policy 'wait': without backpropagation's loss there is no mark to reach")
    rows = [
        _row(loss, pace, wait_ms, EQUAL_STEPS if loss["steps"] == lengths[_race(loss)] else LENGTH, command)
        for loss in losses
        if _race(loss) in lengths
        for pace, wait_ms in _fitting(loss, paces)
    ]
    return with_marks(rows, microbatches)


def _is_plain(loss: Loaded) -> bool:
    whole = loss["steps"] == loss.get("planned_steps", loss["steps"])
    weights = choose_late_weights(AUTO, loss["optimizer"])
    usual = loss["policy"] not in LATE or loss.get("late_weights", weights) == weights
    return whole and usual and loss.get("in_flight") is None


def _race(loss: Loaded) -> tuple[Any, ...]:
    return loss["optimizer"], loss["seed"]


def _pace_ms(row: Loaded) -> float | None:
    """Of an unlocked step."""
    return row.get("before_ms") or row.get("step_ms")


def _fitting(loss: Loaded, paces: Sequence[Loaded]) -> Iterator[tuple[Loaded, float]]:
    """Who takes such steps, each once, and what a step under `wait` takes. Raises: ValueError: another model."""
    seen = set()
    for row in paces:
        key = (row["schedule"], row["stages"], row["microbatches"], row["transport"])
        if key in seen or not _fits(loss, row):
            continue
        _check_model(loss, row)
        seen.add(key)
        size = (row["stages"], row["microbatches"])
        of_1f1b = [
            each for each in paces if each["schedule"] == "1F1B" and (each["stages"], each["microbatches"]) == size
        ]
        yield row, _pace_ms(of_1f1b[0] if of_1f1b else row) or 0.0


def _fits(loss: Loaded, pace: Loaded) -> bool:
    if loss["policy"] == "wait":
        return pace["schedule"] in TORCH_SCHEDULES
    same = ("policy", "interface", "stages", "microbatches")
    return pace["schedule"] == "DNI" and all(pace[name] == loss[name] for name in same)


def _check_model(loss: Loaded, pace: Loaded) -> None:
    sizes = {name: pace[name] for name in ("width", "seq_len", "dtype")}
    sizes["blocks"] = pace["blocks_per_stage"] * pace["stages"]
    sizes["batch_size"] = pace["microbatches"] * pace["microbatch_size"]
    for name, size in sizes.items():
        if loss.get(name, size) != size:
            raise ValueError(
                f"the loss is of a run with {name} {loss[name]}, the seconds of one with {size}: name files of one size"
            )


def _row(loss: Loaded, pace: Loaded, wait_ms: float, purpose: str, command: str) -> LossRow:
    step_ms, backprop, steps = _pace_ms(pace) or 0.0, loss["policy"] == "wait", loss["steps"]
    unlock = 0 if backprop else loss["unlock_after_steps"] or 0

    def seconds(step: int) -> float:
        return (min(step, unlock) * wait_ms + max(0, step - unlock) * step_ms) / 1e3

    points = list(loss["curve"])
    if points and points[-1][0] < steps and loss["val_bpb"] is not None:
        points.append((steps, loss["val_bpb"]))
    same = (
        "device", "card", "schedule", "policy", "interface", "transport", "stages", "microbatches", "microbatch_size",
        "seq_len", "width", "blocks_per_stage", "dtype", "torch",
    )  # fmt: skip
    return LossRow(
        **{name: pace[name] for name in same},
        optimizer=loss["optimizer"],
        num_parameters=loss.get("parameters") or 0,
        seed=loss["seed"],
        commit=commit(),
        date=date.today().isoformat(),
        command=command,
        own_microbatches=pace.get("own_microbatches"),
        purpose=purpose,
        learning_rate=loss.get("learning_rate"),
        unlock_after_steps=None if backprop else unlock,
        late_weights=loss.get("late_weights") if loss["policy"] in LATE else None,
        steps=steps,
        seconds=seconds(steps),
        step_ms=seconds(steps) / steps * 1e3,
        before_ms=step_ms,
        final_bpb=loss["val_bpb"],
        peak_bytes=pace.get("peak_bytes"),
        measured=False,
        curve=[[step, seconds(step), bpb] for step, bpb in points],
    )
