"""A study on disk: what was asked of it. What its trials came to stands in its storage and in the run folders.

runs/.studies/<name>/study.json     the search, the storage and how trials are computed
                     lease.json     the coordinator that is at it
                     study.db or journal.log   the study itself, for Optuna
                     values/        what functions came to
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from crm.cluster.folder import Busy, SweepFolder
from crm.config import flatten
from crm.names import unknown
from crm.records import identity, read_json, write_json
from crm.search import MARK, Search

STUDIES = ".studies"
BESIDE = "tune-"  # and the study's name: what its jobs and its mirror are called among those of sweeps


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked of a study."""

    search: str  # by which `crm.cli.tune` finds it; "" for one of a program
    storage: str  # URL
    trials: int  # in all, not more than before
    hours: float = 0.0  # of device time in all; 0 is no limit
    sampler: str = "tpe"
    pruner: str = "none"
    objectives: Sequence[str] = ()
    replicates: int = 1
    changes: Mapping[str, Any] | None = None  # of settings, in every trial
    seed: int = 0  # of what the sampler draws
    signature: Mapping[str, Any] | None = None  # what must not change during a study


def folder_of(runs: Path, name: str) -> SweepFolder:
    """The study's folder, which has a lease as a sweep's has."""
    return SweepFolder(runs.resolve() / STUDIES / name)


def studies(runs: Path) -> list[str]:
    return sorted(path.parent.name for path in (runs / STUDIES).glob("*/study.json"))


def asked(runs: Path, name: str) -> Asked:
    """What was asked of a study; ValueError names those that there are."""
    found = read_json(runs / STUDIES / name / "study.json")
    if found is None:
        raise unknown("study", name, studies(runs))
    return Asked(**found)


def ask(folder: SweepFolder, wanted: Asked) -> None:
    """Records what is asked now; ValueError if the study was begun as another search."""
    before = read_json(folder.path / "study.json")
    if before is not None and before["signature"] != wanted.signature:
        moved = [key for key, value in before["signature"].items() if (wanted.signature or {}).get(key) != value]
        raise ValueError(
            f"the study {folder.name} was begun with other values of {', '.join(moved)}, and its trials cannot be "
            "compared with new ones; --study NAME begins another study"
        )
    write_json(folder.path / "study.json", asdict(wanted))
    (folder.path / "study.json").chmod(0o600)  # its URL may hold a password


def signature(search: Search) -> dict[str, Any]:
    """What must stay the same while a study lasts, as JSON has it."""
    base = {} if search.calculated else {path: repr(value) for path, value in flatten(search.base).items()}
    space = {name: repr(parameter) for name, parameter in search.space.items()}
    told = {"space": space, "objectives": list(search.objectives), "seeds": list(search.seeds)}
    return {**told, "selection": search.selection, "base": base}


def mark(runs: Path, id: str, study: str) -> None:
    """Says in a run's folder that it is a trial of a study."""
    known = (read_json(runs / id / MARK) or {}).get("studies", [])
    if study not in known:
        write_json(runs / id / MARK, {"studies": sorted([*known, study])})


def asked_now(folder: SweepFolder, before: Asked) -> Asked:
    """What was asked, with the count and the hours that a person may have asked for since."""
    now = read_json(folder.path / "study.json") or {}
    return replace(before, trials=now.get("trials", before.trials), hours=now.get("hours", before.hours))


def stay(folder: SweepFolder) -> None:
    """Says that this coordinator still holds its lease; raises Busy if another one has taken the study over."""
    if (holder := read_json(folder.path / "lease.json")) is None:
        return
    if any(holder.get(key) != value for key, value in identity().items()):
        raise Busy(f"another coordinator has taken the study {folder.name} over")
    if time.time() - holder["time"] > 60:
        write_json(folder.path / "lease.json", {**holder, "time": time.time()})
