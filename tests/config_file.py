"""A config as a user writes it: a file, and overrides."""

from __future__ import annotations

from pathlib import Path

from dnipipe.config import Config, load_config


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(path, overrides)
