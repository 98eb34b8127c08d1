"""Reads settings from YAML and from `section.field=value` on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from .section import nearest, sections_within
from .sections import SECTIONS, Config, DataConfig, ModelConfig, OptimConfig, PipelineConfig, RunConfig


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, then overrides, the last one winning.

    Args:
        path: sections of fields; what is missing keeps its default.
        overrides: each `section.field=value`, the value in YAML; `model.options.depth=4` sets one entry of a mapping.

    Raises: ValueError: no YAML, an unknown name or a bad value; it names the setting and the nearest that exists.
    """
    content = _read_yaml(str(path), Path(path).read_text(encoding="utf-8"))
    given: dict[str, dict[str, Any]] = {kind.section: {} for kind in SECTIONS}
    for section, values in _mapping(str(path), content).items():
        for name, value in _mapping(str(section), values).items():
            _put(given, f"{section}.{name}", value)
    for override in overrides:
        full_name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r}: an override is written section.field=value")
        _put(given, full_name, _read_yaml(override, text))
    return Config(
        model=ModelConfig(**given["model"]),
        data=DataConfig(**given["data"]),
        pipeline=PipelineConfig(**given["pipeline"]),
        optim=OptimConfig(**given["optim"]),
        run=RunConfig(**given["run"]),
    )


def _read_yaml(source: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is no YAML: {error}") from error


def _mapping(name: str, value: Any) -> dict[Any, Any]:
    if value is None:  # an empty file, or a section whose fields are all commented out
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold `name: value` lines, got {value!r}")
    return value


def _put(given: dict[str, dict[str, Any]], full_name: str, value: Any) -> None:
    known = {f"{kind.section}.{each.name}": each for kind in SECTIONS for each in fields(kind)}
    section, _, rest = full_name.partition(".")
    name, _, entry = rest.partition(".")
    each = known.get(f"{section}.{name}")
    if each is None or (entry and f"{section}.{name}" not in _mappings()):
        beside = [other for other in known if other.startswith(f"{section}.")] or given
        raise ValueError(f"there is no setting {full_name}; {nearest(full_name, known, beside)}")
    given[section][name] = _with(given[section].get(name), entry.split("."), value) if entry else value


def _mappings() -> set[str]:
    """The settings that consist of entries, which can be set one by one."""
    names = set()
    for kind in SECTIONS:
        plain = {each.name for each in fields(kind) if each.default_factory is dict}
        names |= {f"{kind.section}.{name}" for name in plain | sections_within(kind).keys()}
    return names


def _with(mapping: Any, path: list[str], value: Any) -> dict[str, Any]:
    """The mapping with one entry replaced, however deep; what is no mapping on the way there becomes one."""
    entries = mapping if isinstance(mapping, dict) else {}
    name, *rest = path
    return {**entries, name: _with(entries.get(name), rest, value) if rest else value}
