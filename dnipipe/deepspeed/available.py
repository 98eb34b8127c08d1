"""DeepSpeed, of a version whose private names are those used here; else what to install. Imported before the rest."""

from __future__ import annotations

import re

CURE = "pip install 'deepspeed>=0.19.8,<0.20'"

try:
    import deepspeed as deepspeed
except ModuleNotFoundError as error:
    if error.name != "deepspeed":
        raise
    raise ModuleNotFoundError(f"dnipipe.deepspeed takes DeepSpeed, which is not installed: {CURE}") from error

_found = re.match(r"0\.19\.(\d+)", deepspeed.__version__)
if _found is None or int(_found[1]) < 8:
    raise ImportError(
        f"dnipipe.deepspeed uses private names of DeepSpeed 0.19.8 and its successors in 0.19, and "
        f"{deepspeed.__version__} is installed: {CURE}"
    )
