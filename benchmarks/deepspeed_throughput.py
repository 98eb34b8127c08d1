"""Training steps per second of DeepSpeed's pipeline, and of the same job with `import dnipipe.deepspeed`.

python -m benchmarks.deepspeed_throughput --device cpu --stages 2 --microbatches 1,2,4,8

The same PipelineModule, ds_config and data for both engines, in the same processes, in turns. All microbatches have one
size, so the batch grows with their number. Writes the rows and, beside them, the table and a bar picture.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.deepspeed_bars import draw_bars
from benchmarks.deepspeed_compete import Job, Settings, compete
from benchmarks.deepspeed_rows import DeepSpeedRow, markdown, show
from benchmarks.options import DTYPES, check_device, check_least, dtype_of, numbers
from benchmarks.ranks import run_ranks
from benchmarks.rows import read_rows_of
from benchmarks.workload import Workload

TIMEOUT_S = 300.0  # DeepSpeed's first start on a machine may compile for minutes
INTERFACES = ("linear", "mlp", "local_head", "transformer")
NAME = "benchmarks.deepspeed_throughput"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one line on stderr for a value that cannot be, or without DeepSpeed."""
    options = _parser().parse_args(arguments)
    try:
        settings = _settings(options)
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError("DeepSpeed is not installed: pip install 'dnipipe[deepspeed]'")
    except ValueError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    options.json.parent.mkdir(parents=True, exist_ok=True)
    run_ranks(options.stages, options.device, TIMEOUT_S, compete, settings)
    rows = read_rows_of(DeepSpeedRow, settings.rows)
    show(Console(width=None if sys.stdout.isatty() else 170), rows)
    draw_bars(rows, options.json.with_suffix(".png"))
    options.json.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {NAME}", description="Training throughput of DeepSpeed's pipeline, plain and with dnipipe."
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="one process per stage; several may share a GPU")
    add("--stages", type=int, default=2, metavar="S", help="stages, one process each, at least 2 (default: 2)")
    add("--microbatches", default="1,2,4,8", metavar="M,...", help="microbatches of a step (default: 1,2,4,8)")
    add("--microbatch-size", type=int, default=1, metavar="B", help="sequences of a microbatch (default: 1)")
    add("--seq-len", type=int, default=256, metavar="T", help="tokens of a sequence (default: 256)")
    add("--width", type=int, default=256, metavar="D", help="of the model, a multiple of 64 (default: 256)")
    add("--blocks", type=int, default=4, metavar="N", help="transformer blocks per stage (default: 4)")
    add("--vocab-size", type=int, default=256, metavar="V", help="(default: 256)")
    add("--dtype", choices=tuple(DTYPES), help="(default: bfloat16 on a GPU, else float32)")
    add("--zero", type=int, choices=(0, 1), default=1, help="stage of ZeRO (default: 1)")
    lag = "of dnipipe: microbatches between an activation and its true gradient (default: 2)"
    add("--lag", type=int, default=2, metavar="N", help=lag)
    add("--interface", choices=INTERFACES, default="local_head", help="of dnipipe, predictor (default: local_head)")
    carries = "of dnipipe: group, the process group; auto, direct copies where all ranks share one GPU (default: auto)"
    add("--transport", choices=("auto", "group"), default="auto", help=carries)
    add("--rounds", type=int, default=5, help="turns of each engine (default: 5)")
    add("--steps", type=int, default=4, help="timed steps of a turn (default: 4)")
    add("--json", type=Path, default=Path("runs/deepspeed/throughput.json"), metavar="FILE", help="the rows")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    """Raises: ValueError, which names the option."""
    dtype = dtype_of(options.dtype, options.device)
    for name in ("microbatch_size", "seq_len", "width", "blocks", "vocab_size", "lag", "rounds", "steps"):
        check_least(name, getattr(options, name))
    if options.stages < 2:
        raise ValueError(f"--stages must be at least 2, for one stage has no bubble; got {options.stages}")
    check_device(options.device)
    workload = Workload(
        options.stages,
        options.blocks,
        options.width,
        options.seq_len,
        options.vocab_size,
        options.microbatch_size,
        dtype,
    )
    if options.width % workload.heads:
        raise ValueError(f"--width {options.width} is no multiple of {workload.heads} attention heads")
    jobs = (
        Job(workload, m, options.zero, options.lag, options.interface, options.transport)
        for m in numbers("--microbatches", options.microbatches)
    )
    return Settings(tuple(jobs), options.rounds, options.steps, options.json)


if __name__ == "__main__":
    sys.exit(main())
