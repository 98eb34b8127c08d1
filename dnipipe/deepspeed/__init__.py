"""DeepSpeed, with a pipeline whose stages never wait: one import and one block in the same ds_config.

    import dnipipe.deepspeed as deepspeed                          # where `import deepspeed` stood
    engine, *_ = deepspeed.initialize(model=PipelineModule(...), config={..., "dnipipe": {"policy": "auto"}})

Without the block, and for every other name, this is plain DeepSpeed.
"""

from __future__ import annotations

from typing import Any

from .available import deepspeed as _deepspeed
from .block import Block as Block
from .engine import DNIPipelineEngine as DNIPipelineEngine
from .start import initialize as initialize


def __getattr__(name: str) -> Any:
    return getattr(_deepspeed, name)
