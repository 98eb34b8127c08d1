"""docs/deepspeed.md: its table has every key of the block, with its default, and no other."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from dnipipe.deepspeed.block import Block

PAGE = Path(__file__).resolve().parents[2] / "docs" / "deepspeed.md"


def _table() -> dict[str, str]:
    """Key to default, as written, of the table under "The block"."""
    section = PAGE.read_text(encoding="utf-8").split("\n## The block\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert all(len(row) == 4 and all(row) for row in cells), "key, values, default, meaning"
    keys = [row[0].strip("`") for row in cells]
    assert len(set(keys)) == len(keys), "a key stands there twice"
    return {row[0].strip("`"): row[2].strip("`") for row in cells}


def test_the_table_has_every_key_in_its_order_and_no_other() -> None:
    assert list(_table()) == [field.name for field in fields(Block)]


def test_the_defaults_are_those_of_the_block() -> None:
    """As JSON, so that they can be copied to a config; a whole number is not written for another kind of number."""
    for key, written in _table().items():
        default = getattr(Block(), key)
        assert json.loads(written) == default and type(json.loads(written)) is type(default), key


def test_lines_are_short_enough() -> None:
    assert [line for line in PAGE.read_text(encoding="utf-8").splitlines() if len(line) > 160] == []
