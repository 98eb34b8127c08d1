"""Where the commands look for the module of model.factory: where launch/train.py does."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def look_where_training_does() -> None:
    """In the user's folder, and in its launch/: Python looks beside train.py, too, where the example's is."""
    sys.path += [os.getcwd(), str(Path("launch").resolve())]
