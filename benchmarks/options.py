"""What the command lines of the benchmarks have in common: each check names the option, the value and the cure."""

from __future__ import annotations

import argparse

import torch

from dnipipe.schedule.policy import Policy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def numbers(option: str, text: str) -> list[int]:
    """Of a list such as 1,2,4. Raises: ValueError: other text, or a number below 1."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is a list of numbers such as 1,2,4, got {text!r}") from None
    if any(number < 1 for number in numbers):
        raise ValueError(f"{option} must be at least 1 each, got {text!r}")
    return numbers


def dtype_of(name: str | None, device: str) -> torch.dtype:
    """--dtype, or what suits --device."""
    return DTYPES[name or ("bfloat16" if device == "cuda" else "float32")]


def check_device(device: str) -> None:
    """Raises: ValueError: --device cuda where there is none."""
    if device == "cuda" and not torch.cuda.device_count():
        raise ValueError("--device cuda: torch sees no GPU; run with --device cpu")


def check_least(name: str, value: int | None, least: int = 1) -> None:
    """name: of the attribute. Raises: ValueError: a value below the least; None is none."""
    if value is not None and value < least:
        raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def add_in_flight(parser: argparse.ArgumentParser) -> None:
    text = "microbatches on the first stage, of stale and corrected, from S (the default) to 2 S - 1"
    parser.add_argument("--in-flight", type=int, metavar="N", help=text)


def check_in_flight(in_flight: int | None, num_stages: int) -> None:
    """Raises: ValueError: so many stages cannot have it."""
    try:
        Policy("stale", in_flight=in_flight).check(num_stages)
    except ValueError as error:
        raise ValueError(f"--in-flight {in_flight}: {error}") from None
