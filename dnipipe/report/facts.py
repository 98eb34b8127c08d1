"""What is true of a run as a whole: where it ran, how its model was split, how long it took to start, what came out.

    command      as typed                         started       ISO 8601
    versions     {name: version}                  devices       one text per rank
    num_stages, num_replicas, parameters          flops_per_token, peak_flops
    split        per stage: stage, layers, name, parameters, forward_ms, backward_ms, parameter_bytes, saved_bytes
    startup_s    {phase: seconds}, in order       results       per schedule: the fields of Result, and its speed

Any of these may be missing or null, for a run may be old, or cut short.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .folder import FACTS, write_whole


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes run.json anew, all of it or nothing; to add to it, pass {**read_facts(folder), ...}.

    nan and infinity become null: JSON has no word for them.

    Raises: TypeError: a value that JSON has no form for, such as a tensor.
    """
    plain = json.loads(json.dumps(facts), parse_constant=lambda _: None)
    write_whole(folder / FACTS, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")


def read_facts(folder: Path) -> dict[str, Any]:
    """What write_facts() wrote; empty if there is no run.json.

    Raises: ValueError: run.json is no JSON object, which no kill can cause.
    """
    path = folder / FACTS
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): mend it, or remove it and do without") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} holds a {type(facts).__name__}, not an object: mend it, or remove it and do without")
    return facts
