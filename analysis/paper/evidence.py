"""One run's contribution to a cell: how it stands, its value, where that came from, and why it may not be used.

Nothing here writes. A value is refused, with the reason, where averaging over it would be wrong: the record is another
run's, it was made while tuning, its evaluation was edited or is of other images or classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from analysis.paper.metrics import parse, value
from analysis.paper.wanted import Wanted
from crm import elsewhere, sums
from crm.cluster.folder import SweepFolder
from crm.cluster.view import look
from crm.conditions import Condition
from crm.confusion import load_evaluation
from crm.data.specs import DATASETS
from crm.records import State, claims, evaluation, file_hash, read_json, state
from crm.search import tuning_run
from crm.stale import Stale, evaluations_stale, stale
from crm.sums import Sums
from crm.sweep import Cell

EDITED = "was edited after it was written"
REDUCE = {"mean": np.mean, "min": np.min}  # of a run's conditions
ON_ITS_WAY = ("queued", "held", "running", "suspended", "unknown", "lost", "cancelled")  # what a scheduler knows


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one run gives to one cell."""

    cell: Cell
    state: str  # as crm.records.State or the scheduler has it
    reason: str = ""
    share: float = 0.0
    value: float | None = None  # None until evaluated
    stale: str = ""  # why it would come out otherwise now
    waived: str = ""  # why that was accepted
    refused: str = ""  # why its value may not be used
    absent: bool = (
        False  # whether it was evaluated and there is nothing to measure, such as a class that occurs nowhere
    )
    mended: str = "training"  # what is to be done anew where it is stale or refused: training or evaluating
    protocol: tuple[Any, ...] = ()  # what must be the same in all runs that are compared
    files: Sequence[Path] = ()  # evaluations, one per condition
    chain: Mapping[str, Any] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        return self.value is not None and not self.refused


class Records:
    """Run folders, each read once however many cells count on it."""

    def __init__(self, runs: Path, check: bool = False) -> None:
        """With `check` whole files are read, to see whether one was edited after it was written."""
        self.runs, self.check = runs, check
        self._folders: dict[str, dict[str, Any]] = {}
        self._sums: dict[tuple[str, str, str], Sums | None] = {}
        self._judged: dict[tuple[str, str, str], Stale] = {}
        self._queues: dict[str, dict[str, Any]] = {}
        self.troubles: list[str] = []  # what a scheduler had to say instead of an answer

    def contribution(self, want: Wanted, cell: Cell) -> Contribution:
        metric, on = parse(want.column.metric), want.on(cell)
        now = state(self.runs, cell.config, want.selection, [] if on else want.conditions)
        name, reason, share = self._scheduled(want, cell, now)
        told = {"cell": cell, "state": name, "reason": reason, "share": share}
        folder = self.runs / cell.id
        if not (folder / "config.json").exists():
            return Contribution(**told)
        known = self._known(folder, cell)
        about = {**told, **{key: known[key] for key in ("stale", "waived", "refused")}}
        if now.name not in ("done", "trained") and not known["result"]:
            return Contribution(**about, chain=known["chain"])
        if metric.file:
            values = known["result"] if metric.file == "result.json" else read_json(folder / metric.file)
            found = float("nan") if values is None else value(want.column.metric, values)
            if values is None and name in ("done", "trained"):
                about |= {"state": "trained", "reason": f"not measured yet: it has no {metric.file}"}
            chain = {**known["chain"], "file": f"{cell.id}/{metric.file}"}
            if values is not None:
                chain["sha256"] = file_hash(folder / metric.file)
            return Contribution(**about, value=_real(found), chain=chain)
        place, selection = folder, want.selection
        if on:
            there = elsewhere.on(folder, want.selection, on)
            if there is None:
                why = f"not evaluated on {DATASETS[on].title} yet"
                return Contribution(**{**about, "state": "trained", "reason": why}, chain=known["chain"])
            place, selection = there, "last"
        return self._evaluated(want, cell, about, place, selection, known["chain"])

    def _evaluated(
        self, want: Wanted, cell: Cell, about: dict[str, Any], place: Path, selection: str, chain: Mapping[str, Any]
    ) -> Contribution:
        found = self.sums(place, selection, want.conditions)
        missing = [one.name for one in want.conditions if one.name not in found]
        if missing:
            if about["state"] == "done":
                about["state"] = "trained"
            reason = about["reason"] or f"trained, not evaluated under {_few(missing)}"
            return Contribution(**{**about, "reason": reason}, chain=chain)
        every = [found[one.name] for one in want.conditions]
        refused = about["refused"] or next(filter(None, (self._edited(place, selection, one) for one in every)), "")
        refused = refused or _wrong(every, want.column.on or cell.config.data.dataset)
        number = None if refused else _real(
            float(REDUCE[want.column.reduce]([value(want.column.metric, one) for one in every]))
        )  # fmt: skip
        mended = "training" if about["stale"] or about["refused"] else "evaluating"
        absent = number is None and not refused
        first = every[0]
        paths = [evaluation(place, selection, one) for one in want.conditions]
        for judged in self._stale_evaluations(want, cell, place, selection).values():
            about = {
                **about,
                "stale": _with(about["stale"], str(judged)),
                "waived": _with(about["waived"], judged.because),
            }
        chain = {
            **chain,
            "evaluations": {
                one.condition: {"file": f"{place.name}/evals/{selection}/{one.condition}.npz", "sha256": one.sha256}
                for one in every
            },
            "selection": want.selection,
            "checkpoint_sha256": first.meta.get("checkpoint_sha256") or chain["checkpoints"].get(want.selection),
            "data_sha256": first.meta.get("data_sha256") or chain["data"].get(first.meta["split"]),
            "images": first.images,
        }
        return Contribution(
            **{**about, "refused": refused},
            mended=mended,
            value=number,
            absent=absent,
            protocol=_protocol(first),
            files=paths,
            chain=chain,
        )

    def sums(self, folder: Path, selection: str, conditions: Sequence[Condition]) -> dict[str, Sums]:
        """Those that there are."""
        new = [one for one in conditions if (folder.name, selection, one.name) not in self._sums]
        if new:
            found = sums.read(folder, selection, new)
            self._sums |= {(folder.name, selection, one.name): found.get(one.name) for one in new}
        known = {one.name: self._sums[folder.name, selection, one.name] for one in conditions}
        return {name: one for name, one in known.items() if one is not None}

    def _stale_evaluations(self, want: Wanted, cell: Cell, folder: Path, selection: str) -> dict[str, Stale]:
        """Why evaluations would come out otherwise now; of a run evaluated elsewhere the training is judged alone."""
        if folder.name != cell.id:
            return {}
        new = [one for one in want.conditions if (folder.name, selection, one.name) not in self._judged]
        if new:
            lines = {one.name: self._line(folder, selection, one) for one in new}
            found = evaluations_stale(folder, cell, selection, new, lines)
            self._judged |= {(folder.name, selection, name): one for name, one in found.items()}
        return {one.name: self._judged[folder.name, selection, one.name] for one in want.conditions}

    def _line(self, folder: Path, selection: str, condition: Condition) -> Mapping[str, Any]:
        found = self._sums[folder.name, selection, condition.name]
        return {} if found is None else {"sha256": found.sha256, "bytes": found.bytes, "meta": found.meta}

    def _edited(self, folder: Path, selection: str, found: Sums) -> str:
        if not found.edited and not self.check:
            return ""
        path = folder / "evals" / selection / f"{found.condition}.npz"
        edited = found.edited and file_hash(path) != found.sha256
        if self.check and found.sha256 and not edited:
            edited = file_hash(path) != found.sha256 or not _sums_up(path, found)
        return f"its evaluation under {found.condition} {EDITED}" if edited else ""

    def _known(self, folder: Path, cell: Cell) -> dict[str, Any]:
        """What a run folder says of the run, whatever it is evaluated under."""
        if folder.name in self._folders:
            return self._folders[folder.name]
        made = read_json(folder / "provenance.json") or {}
        result = read_json(folder / "result.json") or {}
        judged = stale(folder, cell, made)
        written = read_json(folder / "config.json")
        refused = f"its folder holds the record of run {written['id']}" if written["id"] != folder.name else ""
        refused = refused or tuned(folder)
        diff = folder / "uncommitted.diff"
        jobs = [str(one["job"].get("id") or one["job"]["name"]) for one in claims(folder) if "job" in one]
        chain = {
            "commit": made.get("commit"),
            "diff_sha256": sha256(diff.read_bytes()).hexdigest() if made.get("dirty") and diff.exists() else None,
            "code": made.get("code"),
            "data": {split: one.get("sha256") for split, one in made.get("data", {}).items()},
            "checkpoints": {name: one.get("sha256") for name, one in result.get("checkpoints", {}).items()},
            "train_seconds": result.get("train_seconds"),
            "jobs": jobs,
            "log": f"{folder.name}/log.txt",
        }
        self._folders[folder.name] = {
            "result": result, "chain": chain, "stale": str(judged), "waived": judged.because,
            "refused": refused,
        }  # fmt: skip
        return self._folders[folder.name]

    # ------------------------------------------------------------------------------------------ the scheduler

    def _scheduled(self, want: Wanted, cell: Cell, now: State) -> tuple[str, str, float]:
        """State, reason and share done, with what a scheduler knows where the run folder cannot know it."""
        if now.name == "done":
            return "done", "", 1.0
        seen = self._queue(want.name).get(cell.id)
        if seen is not None and seen.name in ON_ITS_WAY:
            return seen.name, seen.reason, now.share
        return now.name, now.reason, now.share

    def _queue(self, name: str) -> dict[str, Any]:
        """What the scheduler has of a sweep, in whatever suite it was started, by run."""
        if name not in self._queues:
            seen: dict[str, Any] = {}
            for path in sorted((self.runs / ".sweeps").glob("*/asked.json")):  # beside them lie the mirror's listings
                started = path.parent.name
                if started.partition("+")[0] != name:
                    continue
                folder = SweepFolder.of(self.runs, started)
                asked = folder.asked()
                if asked is None or asked.cluster != "slurm":
                    continue
                found = look(folder, asked)
                self.troubles += [f"{started}: {found.trouble}"] * bool(found.trouble)
                seen |= {one.id: one for one in found.cells if one.id not in seen or one.name in ON_ITS_WAY}
            self._queues[name] = seen
        return self._queues[name]


def tuned(folder: Path) -> str:
    """Why a run of a search is no evidence: it was chosen among others by what luck it had. "" for any other run."""
    studies = tuning_run(folder.parent, folder.name)
    return f"a run of the search {studies}, whose choice makes its score too good" if studies else ""


def _real(number: float) -> float | None:
    return None if np.isnan(number) else number


def _with(before: str, new: str) -> str:
    """Both, unless one says nothing or they say the same."""
    return before if not new or new in before else "; ".join(filter(None, (before, new)))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _wrong(every: Sequence[Sums], dataset: str) -> str:
    """Why evaluations are not what their run's settings promise; "" if they are."""
    for one in every:
        if one.meta["dataset"] != dataset:
            return f"{one.condition} was evaluated on {one.meta['dataset']}, not on {dataset}"
        lacking = [name for name in DATASETS[dataset].classes if name not in one.meta["classes"]]
        if lacking and not one.meta.get("mapping"):
            return f"its evaluation under {one.condition} lacks classes: {', '.join(lacking)}"
        if (one.names, one.images) != (every[0].names, every[0].images):
            return f"{one.condition} was evaluated on other images than {every[0].condition}"
    return ""


def _protocol(found: Sums) -> tuple[Any, ...]:
    """What must be the same in evaluations that are compared."""
    meta = found.meta
    return (
        meta["dataset"], meta["split"], tuple(meta["classes"]), meta.get("trained_on", ""), tuple(meta["size"]),
        found.images, found.names,
    )  # fmt: skip


def _sums_up(path: Path, found: Sums) -> bool:
    """Whether the per-image matrices have the sum that their line says."""
    return bool((load_evaluation(path).confusion.sum(axis=0, dtype=np.int64) == found.whole).all())
