"""dnipipe config: a file as it is resolved, or what every setting means.

dnipipe config --explain optim
dnipipe config launch/configs/quickstart.yaml optim.clip=0
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dnipipe.config import explain, load_config


def add_arguments(config: argparse.ArgumentParser) -> None:
    files = "a file and overrides: prints all settings as they are resolved"
    config.add_argument("config", nargs="*", metavar="CONFIG.yaml [section.field=value ...]", help=files)
    names = "prints name, type, default and meaning of the settings that begin so (default: of all)"
    config.add_argument("--explain", nargs="?", const="", metavar="SECTION[.FIELD]", help=names)


def run(options: argparse.Namespace, console: Console) -> None:
    """Raises: ValueError: neither a file nor --explain, or what load_config() and explain() refuse."""
    if options.explain is not None:
        console.print(_table(options.explain))
    elif options.config:
        console.print(
            load_config(options.config[0], options.config[1:]).to_yaml(), highlight=False, markup=False, end=""
        )
    else:
        raise ValueError("give a CONFIG.yaml, or --explain")


def _table(prefix: str) -> Table:
    table = Table(show_lines=False, box=None, padding=(0, 2, 0, 0))
    for heading in ("setting", "type", "default"):
        table.add_column(heading, overflow="fold")
    table.add_column("meaning, unit, range", ratio=1)
    for each in explain(prefix):
        table.add_row(*map(escape, (each.name, each.type, each.default, each.meaning)))
    return table
