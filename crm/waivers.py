"""What a person has accepted of what is stale: the audit beside a run. Torch-free.

    runs/<id>/waivers.jsonl   a line per decision: time, accepted or withdrawn, why, and of an acceptance exactly the
                              reasons, each with a hash of what was there at that moment

It holds for exactly these reasons: whatever changes further has another hash, and is stale again. Lines are only ever
added. Nobody's name is kept.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crm.records import refuse_gone

FILE = "waivers.jsonl"


def decisions(folder: Path) -> list[dict[str, Any]]:
    """Every whole line, oldest first."""
    try:
        lines = (folder / FILE).read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # torn
    return found


def accepted(folder: Path, what: str) -> dict[str, str]:
    """Mark of a reason -> why it was accepted, of what holds now; `what` is `training` or `<selection>/<condition>`."""
    holds: dict[str, str] = {}
    for line in decisions(folder):
        if line["decision"] == "withdrawn":
            holds.clear()
        else:
            holds |= {reason["mark"]: line["because"] for reason in line["waived"] if reason["what"] == what}
    return holds


def accept(folder: Path, waived: Sequence[Mapping[str, Any]], because: str, **more: Any) -> dict[str, Any]:
    """Adds an acceptance; each of `waived` says what, kind, words and mark."""
    if not because.strip():
        raise ValueError("a waiver needs its reason: --because TEXT")
    return _add(folder, {"decision": "accepted", "because": because.strip(), "waived": list(waived), **more})


def withdraw(folder: Path, because: str = "") -> dict[str, Any]:
    """Adds the end of all that was accepted before."""
    return _add(folder, {"decision": "withdrawn", "because": because.strip()})


def _add(folder: Path, decision: dict[str, Any]) -> dict[str, Any]:
    refuse_gone(folder)
    decision = {"time": round(time.time(), 3), **decision}
    path = folder / FILE
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("ab") as file:
        file.write(b"\n" * torn + json.dumps(decision).encode() + b"\n")
    return decision
