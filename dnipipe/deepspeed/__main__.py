"""Runs a script of DeepSpeed's as it is: its deepspeed.initialize() becomes ours, the "dnipipe" block says the rest.

torchrun --nproc-per-node 2 -m dnipipe.deepspeed train.py --deepspeed_config ds_config.json
deepspeed --num_gpus 2 --module dnipipe.deepspeed train.py --deepspeed_config ds_config.json
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import deepspeed
import torch.distributed as dist

from .start import initialize


def main() -> None:
    # `deepspeed --module dnipipe.deepspeed SCRIPT.py` puts its own argument before the script's name
    of_launcher = [each for each in sys.argv[1:2] if each.startswith("--local_rank=")]
    arguments = sys.argv[1 + len(of_launcher) :]
    if not arguments:
        raise SystemExit("usage: python -m dnipipe.deepspeed SCRIPT.py [the script's arguments]")
    deepspeed.initialize = initialize
    script, sys.argv = arguments[0], [arguments[0], *of_launcher, *arguments[1:]]
    sys.path[0] = str(Path(script).resolve().parent)  # as `python SCRIPT.py` has it
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if not end.code:  # else the others may not come to the end, and NCCL would wait for them
            _leave()
        raise
    _leave()


def _leave() -> None:
    if dist.is_initialized():  # few scripts end it, and gloo's threads, when cut off by the exit, may abort it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
