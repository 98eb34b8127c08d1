"""`import dnipipe.deepspeed` where DeepSpeed is missing, or another than its private names are of. Runs without it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PRETEND = """
import sys, types
version = sys.argv[1]
sys.modules["deepspeed"] = None if version == "none" else types.ModuleType("deepspeed")
if version != "none":
    sys.modules["deepspeed"].__version__ = version
import dnipipe.deepspeed
"""
CURE = "pip install 'deepspeed>=0.19.8,<0.20'"


@pytest.mark.parametrize(
    "version, said",
    [
        ("none", f"ModuleNotFoundError: dnipipe.deepspeed takes DeepSpeed, which is not installed: {CURE}"),
        ("0.16.4", f"in 0.19, and 0.16.4 is installed: {CURE}"),
        ("0.19.7", f"in 0.19, and 0.19.7 is installed: {CURE}"),
        ("0.20.0", f"in 0.19, and 0.20.0 is installed: {CURE}"),
        ("0.19.10+abc", "No module named 'deepspeed."),  # taken, and asked for the rest, which a pretended one lacks
    ],
)
def test_a_deepspeed_that_cannot_serve_is_named_with_the_cure(version: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", PRETEND, version], capture_output=True, text=True)
    assert said in done.stderr.strip().splitlines()[-1]
