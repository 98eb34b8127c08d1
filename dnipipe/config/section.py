"""A section of settings checks itself: the types that its fields declare, then their ranges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True)
class Section:
    """Fields that check themselves: first their types, then, in _check(), their ranges."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in fields(self):
            value = _typed(f"{self.section}.{each.name}", getattr(self, each.name), hints[each.name])
            object.__setattr__(self, each.name, value)
        self._check()

    def _check(self) -> None:
        """Calls _require() for each field that has a range."""

    def _require(self, field_name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{self.section}.{field_name} = {getattr(self, field_name)!r}: it must be {rule}")


def sections_within(kind: type[Section]) -> dict[str, type[Section]]:
    """The fields of a section that hold a section of their own, or null."""
    choices = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(kind).items()}
    return {name: each for name, hints in choices.items() for each in hints if _is_section(each)}


def nearest(wrong: str, known: Iterable[str], otherwise: Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in known}
    close = get_close_matches(wrong.lower(), by_lower, n=1)
    return f"did you mean {by_lower[close[0]]}?" if close else f"there are {', '.join(otherwise)}"


def _typed(full_name: str, value: Any, hint: Any) -> Any:
    """The value as the type that its field declares; a whole number will do for a float, and so will 1e-3."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{full_name} = {value!r}; {nearest(str(value), arguments, arguments)}")
    if origin in (UnionType, Union):  # the latter where one of them is a Literal
        return _one_of(full_name, value, [argument for argument in arguments if argument is not NoneType])
    if origin is list and isinstance(value, list):
        return [_typed(f"{full_name}[{index}]", item, arguments[0]) for index, item in enumerate(value)]
    if hint is float:
        return _number(full_name, value)
    if _is_section(hint) and not isinstance(value, hint):
        return _section(full_name, value, hint)
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, origin or hint):
        raise ValueError(f"{full_name} = {value!r}: it must be a {(origin or hint).__name__}")
    return value


def _one_of(full_name: str, value: Any, hints: list[Any]) -> Any:
    """The value as the first of several types that it has; it may also be null."""
    if value is None:
        return None
    if len(hints) == 1:
        return _typed(full_name, value, hints[0])
    for hint in hints:
        try:
            return _typed(full_name, value, hint)
        except ValueError:
            continue
    raise ValueError(f"{full_name} = {value!r}: it must be {', '.join(map(_in_words, hints))} or null")


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def _section(full_name: str, value: Any, kind: type[Section]) -> Section:
    known = [f"{full_name}.{each.name}" for each in fields(kind)]
    if not isinstance(value, Mapping):
        raise ValueError(f"{full_name} = {value!r}: it must hold `name: value` lines; {nearest('', known, known)}")
    for name in value:
        if f"{full_name}.{name}" not in known:
            raise ValueError(f"there is no setting {full_name}.{name}; {nearest(f'{full_name}.{name}', known, known)}")
    return kind(**value)


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    return f"list of {get_args(hint)[0].__name__}" if get_origin(hint) is list else str(hint.__name__)


def _number(full_name: str, value: Any) -> float:
    try:  # YAML 1.1 takes 1e-3, without a point, for text
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{full_name} = {value!r}: it must be a finite number")
    return number
