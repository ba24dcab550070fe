"""Which runs make up a sweep, for a mirror that knows nothing else of sweeps: runs/.sweeps/<name>.json.

A run of `crm train` is listed alone, as run-<id>, and has no parent in MLflow until a sweep asks for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from crm.config import Config
from crm.names import unknown
from crm.records import read_json, write_json
from crm.sweep import Cell, Sweep

# what of a run, or of a sweep's report, becomes artifacts
ARTIFACTS = {
    "record": "config, provenance, numerics, journal, result, failure",
    "evaluations": "confusion matrices per image",
    "report": "tables, figures, panels and page of the sweep",
    "checkpoints": "last, val_best and test_best of finished runs",
}
CHOSEN = ("record", "evaluations", "report")  # checkpoints are large, and stay where they are unless asked for


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A sweep as the mirror knows it."""

    name: str
    title: str
    selection: str
    cells: Sequence[Mapping[str, Any]]  # variant, seed, id
    suite: str = ""
    single: bool = False  # a run of its own, without a parent
    study: bool = False  # its runs are those of trials: more may come, and some are pruned
    artifacts: Sequence[str] = field(default_factory=lambda: list(CHOSEN))  # keys of ARTIFACTS
    report: str = ""  # folder of the report, once there is one


def listing_file(runs: Path, name: str) -> Path:
    return runs / ".sweeps" / f"{name}.json"


def listed(runs: Path) -> list[str]:
    """The names of all that can be mirrored."""
    return sorted(path.stem for path in (runs / ".sweeps").glob("[!.]*.json"))


def read_listing(runs: Path, name: str) -> Listing:
    """FileNotFoundError where there is none."""
    found = read_json(listing_file(runs, name))
    if found is None:
        raise FileNotFoundError(f"there is no {listing_file(runs, name)}; `crm track sync {name}` writes it")
    return Listing(**found)


def list_sweep(runs: Path, name: str, sweep: Sweep, cells: Sequence[Cell], report: Path | None = None) -> Listing:
    """Records what a sweep consists of; the choice of artifacts stays as it was."""
    rows = [{"variant": cell.variant, "seed": cell.seed, "id": cell.id} for cell in cells]
    made = Listing(
        name=name, title=sweep.title, selection=sweep.selection, suite=sweep.suite, cells=rows,
        report=str(report.absolute()) if report else "",
    )  # fmt: skip
    return _write(runs, made)


def list_study(
    runs: Path, name: str, title: str, selection: str, cells: Sequence[Mapping[str, Any]], report: Path | None = None
) -> Listing:  # fmt: skip
    """Records the runs that the trials of a study have so far."""
    place = str(report.absolute()) if report else ""
    return _write(runs, Listing(name=name, title=title, selection=selection, cells=cells, study=True, report=place))


def list_run(runs: Path, experiment: str, config: Config, id: str) -> Listing:
    """Records a run that no sweep has asked for."""
    row = {"variant": experiment, "seed": config.seed, "id": id}
    return _write(runs, Listing(name=f"run-{id}", title=experiment, selection="last", cells=[row], single=True))


def choose_artifacts(runs: Path, name: str, chosen: Sequence[str]) -> Listing:
    """Records which artifacts are wanted; ValueError for others than `ARTIFACTS`."""
    for key in chosen:
        if key not in ARTIFACTS:
            raise unknown("artifact", key, list(ARTIFACTS))
    now = replace(read_listing(runs, name), artifacts=list(chosen))
    write_json(listing_file(runs, name), asdict(now))
    return now


def refresh_report(runs: Path, name: str, report: Path) -> None:
    """Records where a sweep's report is, for one that was listed without."""
    now = read_listing(runs, name)
    if not now.single and now.report != str(report.absolute()) and report.is_dir():
        write_json(listing_file(runs, name), asdict(replace(now, report=str(report.absolute()))))


def _write(runs: Path, listing: Listing) -> Listing:
    """Writes the file if it changes anything: its age is the age of the sweep."""
    before = read_json(listing_file(runs, listing.name))
    if before is not None:
        kept = {key: before[key] for key in ("artifacts", "report") if before.get(key)}
        listing = replace(listing, **{"report": listing.report or kept.get("report", ""),
                                      "artifacts": kept.get("artifacts", listing.artifacts)})  # fmt: skip
    if before != asdict(listing):
        write_json(listing_file(runs, listing.name), asdict(listing))
    return listing
