"""Whether a run or an evaluation would come out otherwise if it were made now, and how it is made anew. Torch-free.

Of a training: a default has moved under it, the code that trains has changed (`crm.fingerprint`), the frames or the
initial weights are others, or its result was edited. Of an evaluation: its code has changed (`crm.evaluated`), or the
checkpoint, the frames or the corruptions are not those any more, or its file was edited. What is stale is shown with
its reasons and used all the same; a person may accept exactly these reasons (`crm.waivers`). What nobody knows, because
nothing was recorded, is unknown and not stale.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

from crm import evaluated, waivers
from crm.conditions import Condition
from crm.config import Data
from crm.data.specs import DATASETS
from crm.fingerprint import ROOT, changed_parts, chosen_by, now, words
from crm.machine import initial_file
from crm.names import chosen
from crm.records import alive, claim, evaluation, file_hash, moved, raw_lines, read_json
from crm.sweep import Cell

SUPERSEDED = ".superseded"  # in the runs folder; in evals/ of a run
TRAINING = "training"  # what a waiver calls it; an evaluation is <selection>/<condition>


@dataclass(frozen=True)
class Reason:
    kind: str  # settings, code, data, weights, checkpoint, corruptions, choice, edited
    words: str
    mark: str  # a hash of what it says and of what is there now: another change of the same thing has another

    @classmethod
    def of(cls, kind: str, words: str, *now: Any) -> "Reason":
        return cls(kind, words, sha256(json.dumps([kind, words, *now], default=str).encode()).hexdigest()[:16])


@dataclass(frozen=True)
class Stale:
    """Why something would come out otherwise now; true if anything is that nobody has accepted."""

    reasons: tuple[Reason, ...] = ()
    unknown: tuple[str, ...] = ()  # kinds of reasons of which the record does not tell
    waived: tuple[Reason, ...] = ()  # reasons that a person has accepted
    because: str = ""  # why

    def __str__(self) -> str:
        return "; ".join(reason.words for reason in self.reasons)

    def __bool__(self) -> bool:
        return bool(self.reasons)

    @property
    def drifted(self) -> str:
        """Which recorded setting has another default now."""
        return "; ".join(reason.words for reason in self.reasons if reason.kind == "settings")

    @property
    def code(self) -> str | None:
        """Which code has changed since; None: nobody knows."""
        found = "; ".join(reason.words for reason in self.reasons if reason.kind == "code")
        return None if "code" in self.unknown else found


@dataclass
class _Found:
    """Reasons as they are being looked for."""

    reasons: list[Reason] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def code(self, kind: str, parts: Sequence[str] | None, root: Path, say: Callable = words) -> None:
        if parts is None:
            self.unknown.append(kind)
        elif parts:
            self.reasons.append(Reason.of(kind, say(parts), now(parts, root)))

    def compare(self, kind: str, then: Any, is_now: Any, say: str) -> None:
        """`say` speaks of both; None on one side is unknown."""
        if then is None or is_now is None:
            self.unknown.append(kind)
        elif then != is_now:
            self.reasons.append(Reason.of(kind, say.format(then=_short(then), now=_short(is_now)), then, is_now))

    def judged(self, folder: Path, what: str) -> Stale:
        """With what was accepted taken out; the waivers are read only where there is a reason."""
        accepted = waivers.accepted(folder, what) if self.reasons else {}
        waived = tuple(reason for reason in self.reasons if reason.mark in accepted)
        because = "; ".join(dict.fromkeys(accepted[reason.mark] for reason in waived))
        left = tuple(reason for reason in self.reasons if reason.mark not in accepted)
        return Stale(left, tuple(dict.fromkeys(self.unknown)), waived, because)


def _short(value: Any) -> str:
    return str(value)[:12]


# ---------------------------------------------------------------------------------------------- training


def stale(
    folder: Path,
    cell: Cell,
    provenance: Mapping[str, Any] | None = None,
    root: Path = ROOT,
    content: bool = False,
    data: Path | None = None,
    weights: Path | None = None,
) -> Stale:
    """Why the run of this cell would come out otherwise now, as far as its folder tells.

    Args:
        provenance: the run's, where the caller has read it.
        content: also reads whole files: checkpoints, weights, result.json, frames below `data`; else what is cheap.
        data: a data set's folder, or one that holds several.
        weights: the folder of the files that model.init names.
    """
    if (written := read_json(f"{folder}/config.json")) is None:  # paths as text: thousands of runs are looked at
        return Stale()
    made = provenance or read_json(f"{folder}/provenance.json") or {}
    found = _Found()
    if drift := moved(written, cell.config):
        found.reasons.append(Reason.of("settings", drift))
    found.code("code", changed_parts(folder, made.get("training_code"), root), root)
    for split, then in made.get("data", {}).items():
        present = frames_now(cell.config.data, split, data, content)
        found.compare("data", then.get("sha256"), present, f"the frames of {split} were {{then}}, now {{now}}")
    if content:
        _weights(found, folder, cell, made.get("weights") or {}, weights)
        _result(found, folder)
    return found.judged(folder, TRAINING)


def _weights(found: _Found, folder: Path, cell: Cell, made: Mapping[str, Any], weights: Path | None) -> None:
    """Whether training would start from other weights, and whether its checkpoints are those that it wrote."""
    if made.get("sha256"):
        try:
            path = initial_file(cell.config.model.init, weights, folder.parent)
        except FileNotFoundError:
            path = None
        found.compare("weights", made["sha256"], path and file_hash(path), "the initial weights were {then}, now {now}")
    for name, one in (read_json(folder / "result.json") or {}).get("checkpoints", {}).items():
        if (path := folder / "checkpoints" / f"{name}.safetensors").exists():
            say = f"the checkpoint {name} was edited after it was written"
            found.compare("edited", one.get("sha256"), file_hash(path), say)


def _result(found: _Found, folder: Path) -> None:
    """Whether result.json is what the attempt that trained has written."""
    then = None
    for line in raw_lines(folder / "journal.jsonl"):
        then = line.get("result_sha256", then) if line["event"] == "end" else then
    if (folder / "result.json").exists():
        now = file_hash(folder / "result.json")
        found.compare("edited", then, now, "result.json was edited after it was written")


# ---------------------------------------------------------------------------------------------- evaluations


def evaluation_stale(
    folder: Path,
    cell: Cell,
    selection: str,
    condition: Condition,
    line: Mapping[str, Any] | None = None,
    root: Path = ROOT,
    content: bool = False,
    data: Path | None = None,
) -> Stale:
    """Why one evaluation of a run would come out otherwise now; see `evaluations_stale`, which reads less for several.

    Args:
        line: the evaluation's in its index, where the caller has read it.
    """
    lines = None if line is None else {condition.name: line}
    return evaluations_stale(folder, cell, selection, [condition], lines, root, content, data)[condition.name]


def evaluations_stale(
    folder: Path,
    cell: Cell,
    selection: str,
    conditions: Sequence[Condition],
    lines: Mapping[str, Mapping[str, Any]] | None = None,
    root: Path = ROOT,
    content: bool = False,
    data: Path | None = None,
) -> dict[str, Stale]:
    """Why evaluations of one run would come out otherwise now, by name of the condition; those it lacks are not stale.

    Cheap for thousands of runs: a line of an index tells of an evaluation, and no .npz is opened unless there is none.

    Args:
        lines: of the index, by condition (`crm.evaluated.index`), where the caller has read them.
        content: also reads the evaluations' files, to see whether they were edited, and frames below `data`.
    """
    if lines is None:
        lines = evaluated.index(folder / "evals" / selection, [condition.name for condition in conditions])
    result = read_json(folder / "result.json") or {}
    chooser: list[str] | None = []
    if selection != "last" and not result.get("imported"):
        made = read_json(folder / "provenance.json") or {}
        chooser = chosen_by(folder, made.get("training_code"), root)
    stales = {}
    for condition in conditions:
        path = evaluation(folder, selection, condition)
        if not path.exists():
            stales[condition.name] = Stale()
            continue
        line = lines.get(condition.name, {})
        known = line.get("meta") or _meta(path)
        found = _Found()
        code = evaluated.changed(folder, selection, known.get("code"), condition, root)
        found.code("code", code, root)
        present = result.get("checkpoints", {}).get(selection, {}).get("sha256")
        say = "it was made from checkpoint {then}, the run's is {now}"
        found.compare("checkpoint", known.get("checkpoint_sha256"), present, say)
        if not condition.rgb.kind == condition.thermal.kind == "clean":
            say = "it has version {then} of the corruptions, now there is {now}"
            found.compare("corruptions", known.get("corruptions"), corruptions_version(root), say)
        frames = frames_now(cell.config.data, condition.split, data, content)
        found.compare("data", known.get("data_sha256"), frames, "its frames were {then}, now they are {now}")
        found.code("choice", chooser, root, lambda parts: f"{selection} was chosen by other code: {', '.join(parts)}")
        _edited(found, path, line, content)
        stales[condition.name] = found.judged(folder, f"{selection}/{condition.name}")
    return stales


def _edited(found: _Found, path: Path, line: Mapping[str, Any], content: bool) -> None:
    """By size, and by content if that is asked for."""
    if not line.get("sha256"):
        found.unknown.append("edited")
    elif content or line["bytes"] != path.stat().st_size:
        found.compare("edited", line["sha256"], file_hash(path), "its file was edited after it was written")


def _meta(path: Path) -> Mapping[str, Any]:
    from crm.confusion import load_meta

    return load_meta(path)


@cache
def corruptions_version(root: Path = ROOT) -> int | None:
    """The version of the corruptions as they are now, read without importing them."""
    for line in (root / "crm/corruptions/__init__.py").read_text().splitlines():
        if line.startswith("VERSION = "):
            return int(line.split()[2])
    return None


def frames_now(config: Data, split: str, data: Path | None = None, read: bool = False) -> str | None:
    """The hash of the frames that an evaluation of this split would see now; None where that is not known cheaply.

    Scenes are generated, so their hash costs nothing; files are only read where that is asked for.
    """
    if DATASETS[config.dataset].layout != "generated" and not (read and data):
        return None
    return _manifest(config, split, data)


@cache
def _manifest(config: Data, split: str, data: Path | None) -> str | None:
    from crm.data.dataset import manifest, open_run_split

    try:
        return manifest(open_run_split(config, split, data))["sha256"]
    except (OSError, ValueError):
        return None


def supersede_evaluations(folder: Path, selection: str, conditions: Sequence[Condition]) -> list[Path]:
    """Moves evaluations out of the way, so that they are computed anew; where each lies now.

    Nothing is deleted, and no table reads there. ValueError if somebody works on the run.
    """
    mine = claim(folder, uuid4().hex[:16])
    if mine is None:
        raise ValueError(f"run {folder.name} is being worked on by another process; crm status shows it")
    try:
        place = folder / "evals" / SUPERSEDED / selection
        place.mkdir(parents=True, exist_ok=True)
        kept = []
        for condition in conditions:
            path = evaluation(folder, selection, condition)
            number = 1
            while (target := place / f"{condition.name}.{number}.npz").exists():
                number += 1
            mine.check()
            os.rename(path, target)
            kept.append(target)
        return kept
    finally:
        mine.release()


# ---------------------------------------------------------------------------------------------- run again


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
