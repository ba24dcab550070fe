"""What MLflow shall hold of a run and of a sweep."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crm.records import alive, read_json
from crm.tracking.listing import Listing, listing_file
from crm.tracking.tail import Story, ms, written

ENDINGS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}  # outcome in the journal -> status in MLflow


@dataclass(frozen=True, kw_only=True)
class Head:
    """What an MLflow run is made with."""

    key: Mapping[str, str]  # the tags it is found by
    label: str
    started: int  # ms, UTC epoch
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What of an MLflow run changes, but for its points."""

    status: str
    ended: int | None = None  # ms; None while it runs
    notes: Mapping[str, str] = field(default_factory=dict)  # tags
    files: Mapping[str, Path] = field(default_factory=dict)  # name of the artifact -> file


# ---------------------------------------------------------------------------------------------- runs


def head_of_run(folder: Path, listing: Listing, cell: Mapping[str, Any], begun: Mapping[str, Any], parent: str) -> Head:
    """Args:
    begun: the journal line of the run's first attempt.
    parent: MLflow's id of the sweep's run; "" for a run of its own.
    """
    config = (read_json(folder / "config.json") or {}).get("config", {})
    tags = {"crm.variant": cell["variant"], "crm.seed": str(cell["seed"])}
    if parent:
        tags |= {"crm.sweep": listing.name, "mlflow.parentRunId": parent}
    return Head(
        # the token tells this folder from another of the same run, trained anew or elsewhere
        key={"crm.kind": "run", "crm.run_id": cell["id"], "crm.token": begun["token"]},
        label=f"{cell['variant']}/{cell['seed']}",
        started=ms(begun["time"]),
        tags=tags,
        params={path: value if isinstance(value, str) else json.dumps(value) for path, value in config.items()},
    )


def standing_of_run(folder: Path, story: Story, artifacts: Sequence[str]) -> Standing:
    """How a begun run stands now."""
    status, ended = _status(folder, story)
    provenance = read_json(folder / "provenance.json") or {}
    return Standing(
        status=status,
        ended=ended,
        notes=_notes(story, provenance),
        files=_files(folder, status != "RUNNING", status == "FINISHED", artifacts),
    )


def _status(folder: Path, story: Story) -> tuple[str, int | None]:
    """MLflow's word for how the run stands, and when it ended in ms."""
    holder = read_json(folder / "claim.json")
    if holder is not None and alive(holder):
        return "RUNNING", None
    status = ENDINGS.get(story.last["outcome"], "KILLED") if story.last["event"] == "end" else "KILLED"
    return status, ms(story.newest)


def _notes(story: Story, provenance: Mapping[str, Any]) -> dict[str, str]:
    notes = {"crm.attempts": str(story.attempts)}
    if provenance.get("commit"):
        notes["mlflow.source.git.commit"] = str(provenance["commit"])  # MLflow's own pages show this one
        notes["crm.dirty"] = str(provenance.get("dirty", "")).lower()
    if story.reason is not None:
        notes["crm.reason"] = story.reason
    if story.odd:  # MLflow would turn an infinity into a number, so such points are named here and not sent
        notes["crm.not_finite"] = story.first_odd + (f" and {story.odd - 1} more" if story.odd > 1 else "")
    return notes | {f"crm.condition.{written(name)}"[:250]: name for name in sorted(story.conditions)}


def _files(folder: Path, whole: bool, finished: bool, artifacts: Sequence[str]) -> dict[str, Path]:
    """The chosen artifacts; those that still change, and the evaluations, only once nobody works on the run."""
    found: list[Path] = []
    if "record" in artifacts:
        found += [folder / name for name in ("config.json", "provenance.json")]
        if whole:
            names = ("code.json", "numerics.json", "journal.jsonl", "progress.json", "result.json", "failure.json")
            found += [folder / name for name in names]
            found += sorted((folder / "attempts").glob("[!.]*.json"))
    if "evaluations" in artifacts and whole:
        found += sorted((folder / "evals").glob("*/[!.]*.npz"))
    if "checkpoints" in artifacts and finished:
        found += sorted((folder / "checkpoints").glob("[!.]*[!s].safetensors"))  # not last.previous
    return {str(path.relative_to(folder)): path for path in found if path.is_file()}


# ---------------------------------------------------------------------------------------------- sweeps


def head_of_sweep(runs: Path, listing: Listing) -> Head:
    age = listing_file(runs, listing.name).stat().st_mtime
    return Head(key={"crm.kind": "sweep", "crm.sweep": listing.name}, label=listing.name, started=ms(age))


def standing_of_sweep(
    runs: Path, listing: Listing, ends: Sequence[tuple[str, int | None]], final: bool
) -> Standing:  # fmt: skip
    """How a sweep, or a study, stands whose begun runs have this status and end."""
    statuses = {status for status, _ in ends}
    finished = statuses == {"FINISHED"} and len(ends) == len(listing.cells) and not listing.study
    status = "FINISHED" if finished else "FAILED" if "FAILED" in statuses else "KILLED"
    if listing.study and final:
        status = "FINISHED"
    if "RUNNING" in statuses or not (final or finished):
        status = "RUNNING"
    times = [ended for _, ended in ends if ended is not None]
    files = {"cells.json": listing_file(runs, listing.name)}
    report = Path(listing.report) if listing.report else None
    if report is not None and "report" in listing.artifacts and report.is_dir():
        shown = [path for path in sorted(report.rglob("[!.]*")) if path.is_file()]
        files |= {f"report/{path.relative_to(report)}": path for path in shown}
    return Standing(
        status=status,
        ended=None if status == "RUNNING" else max(times, default=ms(time.time())),
        notes={"mlflow.note.content": listing.title, "crm.selection": listing.selection, "crm.suite": listing.suite},
        files=files,
    )
