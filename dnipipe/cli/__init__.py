"""The commands of a shell, such as dnipipe plan: each is a module that adds its arguments and runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from . import config, export, generate, plan

COMMANDS = {
    "plan": (plan, "bubble, step time and memory of every schedule, without a GPU"),
    "generate": (generate, "lets a trained model go on from a prompt"),
    "export": (export, "writes a trained Hugging Face decoder as safetensors"),
    "config": (config, "what can be set, or a config as it is resolved"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code: 0, or 2 with one line on stderr for a value that cannot be."""
    parser = argparse.ArgumentParser(prog="dnipipe", description="Pipeline-parallel training whose stages never wait.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, purpose) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=purpose))
    options = parser.parse_args(arguments)
    try:
        COMMANDS[options.command][0].run(options, Console())
    except (ValueError, OSError) as error:
        print(f"dnipipe {options.command}: {error}", file=sys.stderr)
        return 2
    return 0
