"""What this engine does otherwise than plain DeepSpeed, said once at the start."""

from __future__ import annotations

import sys

from .block import NAME, Block


def differences(block: Block, max_norm: float, is_tied: bool) -> list[str]:
    """One sentence for each, with the key that restores plain DeepSpeed."""
    found = []
    if block.policy != "wait":
        found.append(f'stages use synthetic gradients ("policy": "wait" restores true ones; now "{block.policy}")')
    if max_norm and block.clip != "global":
        whose = "its own norm" if block.clip == "stage" else "the norm of all stages, the others' one batch old"
        found.append(f'gradient_clipping {max_norm}: each stage clips by {whose} ("clip": "global")')
    elif block.clip != "global":
        found.append('gradient norms and overflow checks are of one stage ("clip": "global")')
    if block.loss != "sync":
        found.append('train_batch() returns the newest loss known to the rank, nan before the first ("loss": "sync")')
    if is_tied and block.tied != "sync" and block.policy != "wait":
        found.append('under synthetic, tied layers take their summed gradient one batch late ("tied": "sync")')
    return found


def print_differences(block: Block, max_norm: float, is_tied: bool) -> None:
    found = differences(block, max_norm, is_tied)
    if found:
        print(f'[dnipipe] other than plain DeepSpeed (keys of "{NAME}"): ' + "; ".join(found), file=sys.stderr)
