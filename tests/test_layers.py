"""The house has floors: a room imports lower rooms only. Read from the imports, also those inside functions.

8  benchmarks
7  cli launch
6  dry_run
5  trainer
4  recovery generate report
3  deepspeed checkpoint
2  schedule
1  recurrent graph observe config
0  interface boundary plan partition data optim
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = (
    ("interface", "boundary", "plan", "partition", "data", "optim"),
    ("recurrent", "graph", "observe", "config"),
    ("schedule",),
    ("deepspeed", "checkpoint"),
    ("recovery", "generate", "report"),
    ("trainer",),
    ("dry_run",),
    ("cli", "launch"),
    ("benchmarks",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FACE = "dnipipe"  # dnipipe/__init__.py: shows what is public, and is shown to users, not to rooms
READS_CONFIG = FLOOR_OF["report"]
MAX_LINES = 300
DRAWERS = ("utils", "common")
PAPERS = ("every_layer", "single", "sparse_updates", "deep", "complete_unlock")
"""Experiments of benchmarks/paper: each may be deleted alone. What they share, the other files there, imports none."""


def _sources(root: Path, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def _room(parts: tuple[str, ...]) -> str:
    """The room of a module or file, as ("dnipipe", "schedule", "dni") or ("launch", "train")."""
    if parts[0] != FACE:
        return parts[0]
    inner = parts[1:2]
    return inner[0] if inner and inner != ("__init__",) else FACE


def _imports(path: Path, root: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, dotted name as parts) of all that a file imports; a name imported from a module is its last part."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                yield node.lineno, (*base, *module, alias.name)


def _target_room(parts: tuple[str, ...], root: Path) -> str | None:
    """The room that an import reaches; None: it is not ours. `from dnipipe import ScheduleDNI` reaches the face."""
    if parts[0] not in (FACE, "launch", "benchmarks", "tests"):
        return None
    room = _room(parts)
    is_room = room in FLOOR_OF or (root / FACE / room).is_dir() or (root / FACE / f"{room}.py").is_file()
    return room if parts[0] != FACE or is_room else FACE


def _wrong_import(path: Path, parts: tuple[str, ...], root: Path) -> str | None:
    """What is wrong with one import, or None."""
    own_parts = path.relative_to(root).with_suffix("").parts
    own, target = _room(own_parts), _target_room(parts, root)
    if own == "plan" and parts[0] == "torch":
        return "plan is data: it never imports torch"
    if target is None or own == FACE:
        return None
    if target == own:
        is_paper = parts[:2] == ("benchmarks", "paper") and parts[2:3] != own_parts[2:3] and parts[2:3]
        return "papers never import each other" if is_paper and parts[2] in PAPERS else None
    if target == FACE:
        return None if FLOOR_OF[own] >= FLOOR_OF["launch"] else "a room does not import the face, it is below it"
    if target == "config" and FLOOR_OF[own] < READS_CONFIG:
        return "only the trainer and what is above it read a config"
    if FLOOR_OF.get(target, len(FLOORS)) >= FLOOR_OF[own]:
        return f"{own} is on floor {FLOOR_OF[own]}, {target} on floor {FLOOR_OF.get(target, 'none')}"
    return None


def violations(root: Path) -> list[str]:
    """Everything under `root` that is not as the table says."""
    wrong = []
    for path in _sources(root, FACE, "launch", "benchmarks"):
        name, room = path.relative_to(root).as_posix(), _room(path.relative_to(root).with_suffix("").parts)
        if room not in FLOOR_OF and room != FACE:
            wrong.append(f"{name}: {room} has no floor, give it one in {Path(__file__).name}")
            continue
        for line, parts in _imports(path, root):
            reason = _wrong_import(path, parts, root)
            if reason is not None:
                wrong.append(f"{name}:{line} imports {'.'.join(parts)}: {reason}")
    for path in _sources(root, FACE):
        lines = len(path.read_text().splitlines())
        if lines > MAX_LINES:
            wrong.append(f"{path.relative_to(root).as_posix()}: {lines} lines, at most {MAX_LINES}")
    for path in _sources(root, FACE, "launch", "benchmarks", "tests"):
        if set(DRAWERS) & set(path.relative_to(root).with_suffix("").parts):
            wrong.append(f"{path.relative_to(root).as_posix()}: a drawer for everything, name it after its one idea")
    return wrong


def test_every_room_imports_lower_rooms_only() -> None:
    assert violations(ROOT) == []


HOUSE = {
    "dnipipe/__init__.py": "from .schedule import ScheduleDNI as ScheduleDNI\n",
    "dnipipe/boundary/__init__.py": "from .base import Boundary as Boundary\n",
    "dnipipe/boundary/base.py": "import torch\n",
    "dnipipe/observe/trace.py": "from dnipipe.data import x\nfrom ..partition.sequential import y\n",
    "dnipipe/schedule/__init__.py": "from ..boundary import Boundary\nfrom . import dni\n",
    "dnipipe/schedule/dni.py": "import dnipipe.observe.trace\n" + "\n" * (MAX_LINES - 1),
    "dnipipe/plan/action.py": "import numpy\n",
    "dnipipe/config.py": "import yaml\n",
    "dnipipe/data.py": "import torchvision\n",
    "dnipipe/report.py": "from .config import Config\nfrom .schedule import ScheduleDNI\n",
    "dnipipe/trainer.py": "from . import report\nfrom .config import Config\n",
    "launch/train.py": "from dnipipe import ScheduleDNI\nfrom dnipipe.trainer import Trainer\nfrom launch import gpt\n",
    "benchmarks/paper/deep.py": "from benchmarks import measure\nfrom ..measure import x\nfrom . import deep, rows\n",
    "tests/test_dni.py": "import dnipipe\n",
}


def _build(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_house_that_keeps_the_rules_has_no_violation(tmp_path: Path) -> None:
    assert violations(_build(tmp_path, HOUSE)) == []


@pytest.mark.parametrize(
    "name, text, found",
    [
        (
            "dnipipe/boundary/x.py",
            "from ..schedule import y",
            "imports dnipipe.schedule.y: boundary is on floor 0, sch",
        ),
        (
            "dnipipe/boundary/x.py",
            "from dnipipe.interface.base import y",
            "boundary is on floor 0, interface on floor 0",
        ),
        ("dnipipe/interface/x.py", "import dnipipe.boundary", "interface is on floor 0, boundary on floor 0"),
        (
            "dnipipe/interface/x.py",
            "def f():\n    from .. import boundary",
            ":2 imports dnipipe.boundary: interface is",
        ),
        ("dnipipe/interface/x.py", "if TYPE_CHECKING:\n    from ..schedule.dni import y", "x.py:2 imports"),
        ("dnipipe/schedule/x.py", "from ..trainer import y", "schedule is on floor 2, trainer on floor 5"),
        ("dnipipe/schedule/x.py", "from ..config import Config", "only the trainer and what is above it read a config"),
        ("dnipipe/data.py", "from .config import Config", "only the trainer and what is above it read a config"),
        ("dnipipe/observe/x.py", "from dnipipe import ScheduleDNI", "a room does not import the face"),
        ("dnipipe/schedule/x.py", "import dnipipe", "a room does not import the face"),
        ("dnipipe/report.py", "from . import trainer", "report is on floor 4, trainer on floor 5"),
        ("dnipipe/report.py", "from .generate import x", "report is on floor 4, generate on floor 4"),
        ("dnipipe/trainer.py", "from launch import gpt", "trainer is on floor 5, launch on floor 7"),
        ("dnipipe/trainer.py", "from tests.ranks import run_ranks", "trainer is on floor 5, tests on floor none"),
        ("launch/x.py", "from benchmarks import y", "launch is on floor 7, benchmarks on floor 8"),
        ("dnipipe/plan/x.py", "import torch", "plan is data: it never imports torch"),
        (
            "dnipipe/plan/x.py",
            "def f():\n    from torch.nn import Linear",
            "x.py:2 imports torch.nn.Linear: plan is data",
        ),
        ("benchmarks/paper/single.py", "from benchmarks.paper.deep import y", "papers never import each other"),
        ("benchmarks/paper/single.py", "from . import deep", "papers never import each other"),
        ("benchmarks/paper/rows.py", "from .deep import y", "papers never import each other"),
        ("dnipipe/cellar.py", "import torch", "dnipipe/cellar.py: cellar has no floor, give it one in test_layers.py"),
        ("dnipipe/attic/x.py", "import torch", "dnipipe/attic/x.py: attic has no floor"),
        ("dnipipe/data.py", "\n" * (MAX_LINES + 1), "dnipipe/data.py: 301 lines, at most 300"),
        ("dnipipe/schedule/utils.py", "", "dnipipe/schedule/utils.py: a drawer for everything"),
        ("benchmarks/common.py", "", "benchmarks/common.py: a drawer for everything"),
        ("tests/utils/x.py", "", "tests/utils/x.py: a drawer for everything"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, name: str, text: str, found: str) -> None:
    wrong = violations(_build(tmp_path, {**HOUSE, name: text}))
    assert len(wrong) == 1 and wrong[0].startswith(name) and found in wrong[0], wrong
