"""A run on one page: report.html, which needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from . import plots, tables
from .canvas import colours, data_uri
from .curves import read_tracks
from .facts import read_facts
from .folder import CONFIG, METRICS, PAGE, TIMELINE, write_whole

TEMPLATE = "page.html.jinja"


def draw_page(folder: Path) -> Path:
    """write_page(), which imports this module only when it is called."""
    tracks, facts = read_tracks(folder / METRICS), read_facts(folder)
    config = _text(folder / CONFIG)
    unit = _unit(facts, config)
    results = tables.merge(tracks, facts, unit)
    shown = {
        "title": folder.resolve().name,
        "facts": facts,
        "figures": tables.key_figures(facts),
        "sentences": tables.sentences(results),
        "results": tables.result_table(results, unit) if results else None,
        "colours": list(colours([each["schedule"] for each in results]).values()),
        "loss": plots.loss(tracks, unit),
        "speed": plots.speed(tracks, unit),
        "longest_start_s": tables.LONGEST_START_S,
        "start_up": tables.start_up(facts),
        "waits": plots.waits(tracks),
        "ranks": plots.ranks(tracks),
        "timeline": _picture(folder / TIMELINE),
        "predictors": plots.predictors(tracks),
        "learning_rate": plots.learning_rate(tracks),
        "gradients": plots.gradients(tracks),
        "split": tables.split_table(facts),
        "balance": tables.balance(facts),
        "machine": tables.machine_table(facts),
        "config": config,
    }
    write_whole(folder / PAGE, _render(shown))
    return folder / PAGE


def _render(shown: Mapping[str, Any]) -> str:
    """Everything is escaped: a setting or a device may be called anything."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(template).render(shown)


def _unit(facts: Mapping[str, Any], config: str | None) -> str:
    """What is learned, "byte" or "token": as a result says or, before there is one, as the settings say."""
    told = [str(each["unit"]) for each in tables.items(facts, "results") if each.get("unit")]
    try:
        kind = yaml.safe_load(config or "")["data"]["kind"]
    except (yaml.YAMLError, TypeError, KeyError):  # an old run's settings, or none
        kind = "bytes"
    return told[0] if told else "byte" if kind == "bytes" else "token"


def _picture(path: Path) -> str | None:
    return data_uri("image/png", path.read_bytes()) if path.exists() else None


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
