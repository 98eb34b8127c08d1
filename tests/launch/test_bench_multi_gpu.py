"""The script for several GPUs, rehearsed on a CPU: all its parts run, and what fails is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "bench_multi_gpu.sh"
pytestmark = pytest.mark.timeout(500)


def _run(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"DEVICE": "cpu", "OUT": str(out), "PYTHON": sys.executable, **environment}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=480)


def test_throughput_of_two_ranks(tmp_path: Path) -> None:
    run = _run(tmp_path, "throughput", "2")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr
    assert "every check held" in run.stdout
    rows = json.loads((tmp_path / "throughput.json").read_text())
    assert {(row["schedule"], row["microbatches"]) for row in rows} >= {("ZBVZeroBubble", 4), ("DNI", 1), ("1F1B", 4)}
    page = (tmp_path / "report.md").read_text()
    assert all(f"![{name}]" in page for name in ("throughput.png", "throughput-m4.png", "planned.png"))
    assert (tmp_path / "traces" / "m4-DNI-stale.json").exists()
    for name in ("links", "check", "throughput", "report"):
        assert (tmp_path / f"{name}.log").exists()


def test_parts_that_fail_are_named_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho some words; echo the reason of $2 >&2; exit 3\n")
    broken.chmod(0o755)
    run = _run(tmp_path / "out", "throughput", "2", PYTHON=str(broken))
    (line,) = run.stderr.splitlines()
    assert run.returncode == 1
    assert line.startswith("bench_multi_gpu.sh: FAILED: links: the reason of benchmarks.links; check: ")
    assert "throughput: the reason of benchmarks.throughput; report: " in line
    assert (tmp_path / "out" / "links.log").read_text() == "some words\nthe reason of benchmarks.links\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["speed"], "say throughput or time_to_loss, got 'speed'"),
        (["throughput", "3"], "N must be 2, 4 or 8, got '3'"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    run = _run(tmp_path, *arguments)
    assert (run.returncode, run.stderr) == (2, f"bench_multi_gpu.sh: {message}\n")
