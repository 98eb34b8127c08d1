"""dnipipe generate: a trained model goes on from a prompt, in one process, whatever number of stages trained it.

dnipipe generate runs/quickstart --prompt "def " --tokens 200
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from dnipipe.generate import generate_alone, printable
from dnipipe.trainer import read_corpus
from dnipipe.trainer.trained import load_trained

from .model_path import look_where_training_does


def add_arguments(generate: argparse.ArgumentParser) -> None:
    add = generate.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of a run: its run.output_dir")
    add("--prompt", required=True, help="the text to go on from")
    add("--tokens", type=int, default=200, metavar="N", help="bytes or tokens to add (default: 200)")
    add("--temperature", type=float, default=0.8, metavar="T", help="the lower, the likelier each token (default: 0.8)")
    add("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    add("--schedule", metavar="NAME", help="whose model, where the run compared schedules (default: the first)")


def run(options: argparse.Namespace, console: Console) -> None:
    """Raises: ValueError, OSError: no such run, no checkpoint in it, or an argument out of range."""
    for name, holds in (("tokens", options.tokens >= 1), ("temperature", options.temperature > 0)):
        if not holds:
            raise ValueError(f"--{name} {getattr(options, name)}: it must be above 0")
    if not options.prompt:
        raise ValueError("--prompt is empty: give at least one character")
    look_where_training_does()
    config, model = load_trained(options.run, options.schedule)
    corpus = read_corpus(config)
    tokens = generate_alone(
        model,
        corpus.encode(options.prompt),
        num_tokens=options.tokens,
        vocab_size=corpus.vocab_size,
        seq_len=config.data.seq_len,
        temperature=options.temperature,
        seed=options.seed,
    )
    console.print(printable(corpus.decode(tokens)), markup=False, highlight=False, soft_wrap=True)
