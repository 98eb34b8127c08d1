"""The folder of the user's cache, where it is on Linux, macOS and Windows."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/dnipipe where that is set; else ~/.cache, ~/Library/Caches or %LOCALAPPDATA%, by the system."""
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "dnipipe"
    system = platform.system()
    if system == "Windows":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "dnipipe" / "Cache"
    return Path.home() / ("Library/Caches" if system == "Darwin" else ".cache") / "dnipipe"
