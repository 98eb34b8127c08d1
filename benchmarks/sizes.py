"""The sizes of the benchmark's GPT, read from a config such as launch/train.py takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.workload import HEAD_WIDTH
from dnipipe.config import load_config

FACTORIES = ("gpt:byte_gpt", "launch.gpt:byte_gpt")
OPTIONS = ("vocab_size", "seq_len", "width", "depth", "heads")


def sizes_of(path: Path, stages: int) -> dict[str, Any]:
    """By the names of benchmarks.throughput's options: seq_len, width, blocks, vocab_size, dtype, microbatch_size.

    Args:   stages: over which the config's blocks are spread.
    Raises: ValueError: a model that is not launch/gpt.py's, heads of another width than 64, or blocks that cannot be
            spread; OSError: no such file.
    """
    config = load_config(path)
    if config.model.factory not in FACTORIES:
        raise ValueError(f"--config {path}: model.factory must be {FACTORIES[0]}, got {config.model.factory!r}")
    model = dict(config.model.options)
    missing = [name for name in OPTIONS if name not in model]
    if missing:
        raise ValueError(f"--config {path}: model.options lacks {', '.join(missing)}: write it there")
    if model["heads"] * HEAD_WIDTH != model["width"]:
        heads = model["width"] // HEAD_WIDTH
        raise ValueError(
            f"--config {path}: model.options.heads must be width / {HEAD_WIDTH} = {heads}, got {model['heads']}"
        )
    if model["depth"] % stages:
        raise ValueError(
            f"--config {path}: {model['depth']} blocks cannot be spread over {stages} stages: change depth"
        )
    pipeline = config.pipeline
    num_parts = pipeline.num_replicas * pipeline.accumulate * pipeline.num_microbatches
    return {
        "seq_len": config.data.seq_len,
        "width": model["width"],
        "blocks": str(model["depth"] // stages),
        "vocab_size": model["vocab_size"],
        "dtype": config.model.dtype,
        "microbatch_size": config.run.batch_size // num_parts,
    }
