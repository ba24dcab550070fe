"""Whether a run would come out otherwise if it were trained now, and how it is trained anew. Torch-free.

Two reasons: a default has moved under it, or the code that trains has changed (`crm.fingerprint`). A stale run is shown
with its reason and used all the same; `--rerun` moves it out of the way.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from crm.fingerprint import ROOT, changed
from crm.names import chosen
from crm.records import alive, claim, moved, read_json
from crm.sweep import Cell

SUPERSEDED = ".superseded"  # in the runs folder


@dataclass(frozen=True)
class Stale:
    drifted: str = ""  # which recorded setting has another default now
    code: str | None = ""  # which code has changed since; None: nobody knows

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.drifted, self.code)))

    def __bool__(self) -> bool:
        return bool(self.drifted or self.code)


def stale(folder: Path, cell: Cell, provenance: Mapping[str, Any] | None = None, root: Path = ROOT) -> Stale:
    """Why the run of this cell would come out otherwise now, as far as its folder tells.

    Args:
        provenance: the run's, where the caller has read it.
    """
    if (written := read_json(folder / "config.json")) is None:
        return Stale()
    made = provenance or read_json(folder / "provenance.json") or {}
    return Stale(moved(written, cell.config), changed(folder, made.get("training_code"), root))


def _is_stale(folder: Path, cell: Cell) -> str:
    return str(stale(folder, cell))


def _is_drifted(folder: Path, cell: Cell) -> str:
    return stale(folder, cell).drifted


def _has_failed(folder: Path, cell: Cell) -> str:
    """Only of training: an evaluation that failed is tried again by itself, and the training would be lost."""
    failure = read_json(folder / "failure.json")
    return failure["reason"] if failure and not (folder / "result.json").exists() else ""


def _is_there(folder: Path, cell: Cell) -> str:
    return "asked for"


RERUN = {"stale": _is_stale, "drifted": _is_drifted, "failed": _has_failed, "all": _is_there}


def due(runs: Path, cells: Sequence[Cell], which: str) -> dict[str, str]:
    """Run id -> why it is to be trained anew, of those cells that have a run; running ones are left out."""
    reason = chosen("--rerun", which, RERUN)
    found = {}
    for cell in cells:
        folder = runs / cell.id
        if (folder / "config.json").exists() and (why := reason(folder, cell)):
            holder = read_json(folder / "claim.json")
            if holder is None or not alive(holder):
                found[cell.id] = why
    return found


def supersede(runs: Path, cells: Sequence[Cell], which: str) -> dict[str, Path]:
    """Moves the runs that are due out of the way, so that they are trained anew; run id -> where each lies now.

    Nothing is deleted, and no table reads there. A run that somebody works on, or begins to meanwhile, stays.
    """
    kept = {}
    for id in due(runs, cells, which):
        folder = runs / id
        if claim(folder, uuid4().hex[:16]) is None:
            continue
        kept[id] = _aside(folder, runs / SUPERSEDED)
        (kept[id] / "claim.json").unlink(missing_ok=True)  # it held off others until the folder was gone
    return kept


def _aside(folder: Path, place: Path) -> Path:
    """Moves a run folder to the first free `<id>.<n>`."""
    place.mkdir(exist_ok=True)
    number = 1 + max((int(path.suffix[1:]) for path in place.glob(f"{folder.name}.*")), default=0)
    while True:
        target = place / f"{folder.name}.{number}"
        try:
            os.rename(folder, target)
        except OSError:
            if not target.exists():
                raise
            number += 1  # somebody else has just moved one there
        else:
            return target
