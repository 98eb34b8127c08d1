"""What does a late or a predicted gradient cost? Bits per byte of every policy at equal steps, beside backprop's.

python -m benchmarks.policies --device cuda --side-by-side 14 --json policies.json \
    wait stale:M=8,4,1 corrected/transformer:M=4,1 synthetic/local_head

One process per run, no pipeline: which microbatches are late follows from (S, M) alone (grouped.py). Several runs share
the card. A run is POLICY[/INTERFACE][:KEY=VALUE[,VALUE...]]..., where each list makes one run for each value:

    M            microbatches of a step (8)            S        stages (--stages)
    opt          AdamW or Muon (--optimizers)          unlock   synchronous steps at the beginning (--unlock)
    in_flight    of the first stage, S to 2 S - 1 (S)  weights  of a late backward: auto, predicted, old, new
    lr           peak learning rate (--learning-rate)  before   POLICY@STEP: this one until then, after unlocking
    seed         (--seeds)

Writes the rows, and beside them the table and a picture of bits per byte over steps and over time.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.machine import card, commit
from benchmarks.options import DTYPES, check_device, check_least, dtype_of
from benchmarks.policy_cost import mean_utilisation, measure_interface_share
from benchmarks.policy_curves import draw_curves
from benchmarks.policy_rows import PolicyRow, markdown, show
from benchmarks.policy_run import Size, Spec, cut_model, run
from benchmarks.recipe_text import LEAST_BYTES, recipe_corpus
from benchmarks.rows import read_rows_of, write_rows
from dnipipe.plan.phases import AUTO, PREDICTING
from dnipipe.schedule.choose import choose_late_weights

PREDICTS_BEFORE = tuple(f"before={name}" for name in PREDICTING)
POLICIES = ("wait", "stale", "corrected", "synthetic")
KEYS = ("M", "S", "opt", "unlock", "in_flight", "weights", "lr", "before", "seed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr for a value that cannot be."""
    options = _parser().parse_args(arguments)
    command = "python -m benchmarks.policies " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    try:
        size = _size(options)
        specs = list(dict.fromkeys(itertools.chain.from_iterable(parse(text, options) for text in options.runs)))
        for spec in specs:
            check(spec, size)
    except ValueError as error:
        print(f"benchmarks.policies: {error}", file=sys.stderr)
        return 2
    options.json.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows_of(PolicyRow, options.json) if options.json.exists() else []
    with tempfile.TemporaryDirectory(prefix="dnipipe-") as folder:
        rows += _run_all(specs, size, options, command, Path(folder))
    write_rows(rows, options.json)
    show(Console(width=None if sys.stdout.isatty() else 170), rows)
    options.json.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    draw_curves(rows, options.json.with_suffix(".png"))
    return 0


def _run_all(specs: list[Spec], size: Size, options: argparse.Namespace, command: str, folder: Path) -> list[PolicyRow]:
    """Longest first, and no more side by side than asked for. What --limit-s cuts short keeps its curve so far."""
    deadline_s = time.monotonic() + options.limit_s
    corpus = recipe_corpus(options.max_bytes)
    for name, stream in (("train.bin", corpus.train), ("validation.bin", corpus.validation)):
        stream.numpy().tofile(folder / name)
    model = cut_model(replace(size, device="cpu"), 1, 0)[0]
    parameters = sum(each.numel() for each in model.parameters())
    bases = [_base(spec, size, options, command, parameters) for spec in specs]
    parts = [folder / f"{number}.json" for number in range(len(specs))]
    spawn = multiprocessing.get_context("spawn")
    with Progress(transient=True) as progress, ProcessPoolExecutor(options.side_by_side, mp_context=spawn) as pool:
        task = progress.add_task(f"{len(specs)} runs", total=len(specs) * size.steps)
        futures = {
            pool.submit(run, spec, size, base, folder, part, options.threads)
            for spec, base, part in zip(specs, bases, parts, strict=True)
        }
        left = set(futures)
        while left and time.monotonic() < deadline_s:
            _, left = wait(left, timeout=1.0)
            rows = _read(parts)
            progress.update(task, completed=sum(row.steps for row in rows))
            write_rows(rows, options.json.with_name(options.json.stem + ".part.json"))
        if left:
            print(f"--limit-s {options.limit_s:g}: {len(left)} runs were cut short or left out", file=sys.stderr)
            processes = list(pool._processes.values())  # private, but torch's kernels know no other end
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
    for future in futures - left:
        if future.exception() is not None:
            print(f"a run failed: {future.exception()!r}", file=sys.stderr)
    options.json.with_name(options.json.stem + ".part.json").unlink(missing_ok=True)
    return _read(parts)


def _read(parts: Sequence[Path]) -> list[PolicyRow]:
    return [row for part in parts if part.exists() for row in read_rows_of(PolicyRow, part)]


def _base(spec: Spec, size: Size, options: argparse.Namespace, command: str, parameters: int) -> PolicyRow:
    """The row of a run, but for what the run finds out."""
    key = (spec.interface, spec.stages, spec.microbatches)
    if key not in _SHARES:
        _SHARES[key] = measure_interface_share(spec, size)
    share = _SHARES[key]
    policy = spec.policy if spec.before is None else f"{spec.before} to {spec.switch_step} then {spec.policy}"
    return PolicyRow(
        policy=policy,
        interface=spec.interface,
        optimizer=spec.optimizer,
        stages=spec.stages,
        microbatches=spec.microbatches,
        unlock_after_steps=size.steps if spec.policy == "wait" else spec.unlock_after_steps,
        in_flight=spec.in_flight,
        late_weights=spec.late_weights,
        seed=spec.seed,
        learning_rate=spec.learning_rate,
        planned_steps=size.steps,
        steps=0,
        val_bpb=None,
        curve=[],
        cosines=[],
        mean_utilisation=round(mean_utilisation(spec, size.steps, options.transfer, share or 0.0), 4),
        interface_cost_share=None if share is None else round(share, 4),
        run_s=0.0,
        blocks=size.blocks,
        width=size.width,
        seq_len=size.seq_len,
        batch_size=size.batch_size,
        parameters=parameters,
        dtype=str(size.dtype).removeprefix("torch."),
        device=size.device,
        card=card(torch.device(size.device)),
        commit=commit(),
        torch=torch.__version__,
        date=date.today().isoformat(),
        command=command,
    )


_SHARES: dict[tuple[str | None, int, int], float | None] = {}


def parse(text: str, options: argparse.Namespace) -> Iterator[Spec]:
    """The runs that POLICY[/INTERFACE][:KEY=VALUE,...]... means. Raises: ValueError, which names the part."""
    name, *settings = text.split(":")
    policy, _, interface = name.partition("/")
    if policy not in POLICIES:
        raise ValueError(f"{text}: unknown policy {policy!r}, choose of {', '.join(POLICIES)}")
    needs = policy in PREDICTING or any(setting.startswith(PREDICTS_BEFORE) for setting in settings)
    if needs != bool(interface) and policy != "wait":
        raise ValueError(f"{text}: {policy} {'needs' if needs else 'has no'} interface: POLICY/INTERFACE")
    values: dict[str, list[str]] = {
        "M": ["1" if policy == "wait" else "8"],  # backprop does not depend on it
        "S": [str(options.stages)],
        "opt": options.optimizers.split(","),
        "unlock": [str(options.unlock)],
        "in_flight": [""],
        "weights": [AUTO],
        "lr": [str(options.learning_rate)],
        "before": [""],
        "seed": options.seeds.split(","),
    }
    for setting in settings:
        key, _, given = setting.partition("=")
        if key not in KEYS or not given:
            raise ValueError(f"{text}: {setting!r} is not KEY=VALUE[,VALUE...] with a key of {', '.join(KEYS)}")
        values[key] = given.split(",")
    for m, s, opt, unlock, in_flight, weights, lr, before, seed in itertools.product(*values.values()):
        first, _, at = before.partition("@")
        yield Spec(
            policy=policy,
            interface=interface or None,
            optimizer=opt,
            stages=int(s),
            microbatches=int(m),
            unlock_after_steps=int(unlock),
            in_flight=int(in_flight) if in_flight else None,
            late_weights=choose_late_weights(weights, opt),
            seed=int(seed),
            learning_rate=float(lr),
            before=first or None,
            switch_step=int(at or 0),
        )


def check(spec: Spec, size: Size) -> None:
    """Raises: ValueError: what no run can be."""
    if spec.optimizer not in ("AdamW", "Muon"):
        raise ValueError(f"opt={spec.optimizer}: choose AdamW or Muon")
    if spec.before is not None and spec.before not in ("synthetic", "stale", "corrected"):
        raise ValueError(f"before={spec.before}@...: choose synthetic, stale or corrected")
    if spec.microbatches < 1 or size.batch_size % spec.microbatches:
        raise ValueError(f"M={spec.microbatches}: --batch-size {size.batch_size} must be a multiple of it")
    if not 1 <= spec.stages <= size.blocks:
        raise ValueError(f"S={spec.stages}: must be from 1 to --blocks {size.blocks}")
    spec.phases.check(spec.stages)


def _size(options: argparse.Namespace) -> Size:
    for name in ("blocks", "width", "seq_len", "batch_size", "steps", "side_by_side", "stages"):
        check_least(name, getattr(options, name))
    check_least("max_bytes", options.max_bytes, LEAST_BYTES)
    check_device(options.device)
    dtype = dtype_of(options.dtype, options.device)
    return Size(
        blocks=options.blocks,
        width=options.width,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        steps=options.steps,
        eval_sequences=options.eval_sequences,
        device=options.device,
        dtype=dtype,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.policies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="POLICY[/INTERFACE][:KEY=VALUE,...]...")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add("--side-by-side", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    add("--threads", type=int, default=1, help="CPU threads of a run (default: 1)")
    add("--json", type=Path, default=Path("runs/policies/policies.json"), metavar="FILE", help="rows are added to it")
    add("--stages", type=int, default=4, metavar="S", help="(default: 4)")
    add("--optimizers", default="AdamW", help="of AdamW,Muon (default: AdamW)")
    add("--seeds", default="0", help="(default: 0)")
    add("--unlock", type=int, default=300, metavar="STEPS", help="synchronous steps at the beginning (default: 300)")
    add("--learning-rate", type=float, default=1e-3, help="at its peak (default: 1e-3)")
    add("--steps", type=int, default=3000, help="(default: 3000)")
    add("--blocks", type=int, default=8, help="of the whole model (default: 8)")
    add("--width", type=int, default=512, metavar="D", help="(default: 512)")
    add("--seq-len", type=int, default=256, metavar="T", help="bytes of a sequence (default: 256)")
    add("--batch-size", type=int, default=64, metavar="N", help="sequences of a step (default: 64)")
    add("--eval-sequences", type=int, default=3840, metavar="N", help="of the last evaluation (default: 3840)")
    add("--max-bytes", type=int, default=120_000_000, help="of text to read (default: 120 million)")
    add("--dtype", choices=tuple(DTYPES), help="(default: bfloat16 on a GPU, else float32)")
    add("--transfer", type=float, default=0.0, help="a message's time in slots, for the utilisation (default: 0)")
    add("--limit-s", type=float, default=86400.0, help="seconds after which what is left is cut short (default: a day)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
