"""What can be set: name, type, default and meaning of every field, read from where they are declared."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

import yaml

from .section import Section, sections_within
from .sections import SECTIONS


@dataclass(frozen=True)
class Setting:
    """One field. default: as it would be written in YAML. meaning: with unit and range."""

    name: str
    type: str
    default: str
    meaning: str


def explain(prefix: str = "") -> list[Setting]:
    """The settings whose full name begins with `prefix`, as in "optim" or "optim.clip".

    Raises: ValueError: there is none.
    """
    found = [each for kind in SECTIONS for each in _settings(kind) if each.name.startswith(prefix)]
    if not found:
        raise ValueError(f"no setting begins with {prefix!r}: sections are {', '.join(k.section for k in SECTIONS)}")
    return found


def _settings(kind: type[Section]) -> Iterator[Setting]:
    meanings, within = _docs_below_fields(kind), sections_within(kind)
    for each in fields(kind):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        yield Setting(f"{kind.section}.{each.name}", str(each.type), _in_yaml(default), meanings[each.name])
        if each.name in within:
            yield from _settings(within[each.name])


def _docs_below_fields(kind: type[Section]) -> dict[str, str]:
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for declared, below in zip(tree.body, tree.body[1:], strict=False):
        text = below.value if isinstance(below, ast.Expr) else None
        if isinstance(declared, ast.AnnAssign) and isinstance(text, ast.Constant) and isinstance(text.value, str):
            assert isinstance(declared.target, ast.Name)
            docs[declared.target.id] = inspect.cleandoc(text.value)
    return docs


def _in_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
