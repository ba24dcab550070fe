"""crm clean: frees disk by policy; dry until --yes.

What stays whatever is asked for: journals, results, evaluated evidence (evals/*.npz), the checkpoints that a finished
run names, and everything of a run that is not finished or that somebody is at.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from crm.cli import options
from crm.cli.options import Json, Runs, Yes
from crm.cli.started import cells_of
from crm.conditions import condition
from crm.records import alive, lacking, read_json
from crm.stale import SUPERSEDED

DAY = 86_400.0
SCRATCH = re.compile(r"\..+\.[0-9a-f]{8}")  # as crm.records.write_bytes names it
SNAPSHOTS = ".snapshots"  # in the runs folder: the code that jobs run


@dataclass(frozen=True, kw_only=True)
class Item:
    policy: str  # a key of POLICIES
    path: Path
    bytes: int


def add_to(app: typer.Typer) -> None:
    app.command()(clean)


def clean(
    name: Annotated[str, typer.Argument(metavar="[SWEEP]", help="Only the runs of this sweep.")] = "",
    superseded: Annotated[bool, typer.Option("--superseded", help="Also the runs that --rerun put aside.")] = False,
    runs: Runs = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Frees disk: spare copies of checkpoints, half-written files, old snapshots. Only shows it without --yes."""
    folder = options.runs_folder(runs)
    ids = {cell.id for cell in cells_of(name, None, "", "", "", False, folder)[2]} if name else None
    items = found(folder, ids, [policy for policy in POLICIES if superseded or policy != "superseded"])
    if yes:
        items = [item for item in items if _remove(item)]
    if json:
        options.echo_json(_as_json(items, yes))
    else:
        typer.echo(_as_text(items, yes, folder))
    if not items:
        raise typer.Exit(3)


def found(runs: Path, ids: set[str] | None, policies: Sequence[str]) -> list[Item]:
    """What these policies free below a runs folder.

    Args:
        ids: only of these runs; None is all, and what belongs to no run.
    """
    return [
        Item(policy=policy, path=path, bytes=_bytes(path))
        for policy in policies
        for path in sorted(POLICIES[policy].paths(runs, ids))
    ]


def _bytes(path: Path) -> int:
    """What removing it frees; a second name of a file that stays frees nothing."""
    files = path.rglob("*") if path.is_dir() else [path]
    stats = [file.stat() for file in files if file.is_file()]
    return sum(stat.st_size for stat in stats if path.is_dir() or stat.st_nlink == 1)


def _remove(item: Item) -> bool:
    """Whether it was there to be removed."""
    try:
        shutil.rmtree(item.path) if item.path.is_dir() else item.path.unlink()
    except FileNotFoundError:
        return False
    return True


# ---------------------------------------------------------------------------------------------- policies


def _finished(runs: Path, ids: set[str] | None) -> Iterator[Path]:
    """Folders of trained runs that nobody is at."""
    for path in sorted(runs.glob("[!.]*/result.json")):
        folder = path.parent
        holder = read_json(folder / "claim.json")
        if (ids is None or folder.name in ids) and (holder is None or not alive(holder)):
            yield folder


def _previous(runs: Path, ids: set[str] | None) -> Iterable[Path]:
    for folder in _finished(runs, ids):
        for path in (folder / "checkpoints").glob("*.previous.safetensors"):
            if path.with_name(path.name.replace(".previous", "")).exists():
                yield path


def _scratch(runs: Path, ids: set[str] | None) -> Iterable[Path]:
    old = time.time() - DAY
    for folder in _finished(runs, ids):
        for path in folder.rglob(".*"):
            if SCRATCH.fullmatch(path.name) and path.is_file() and path.stat().st_mtime < old:
                yield path


def _superseded(runs: Path, ids: set[str] | None) -> Iterable[Path]:
    for path in (runs / SUPERSEDED).glob("*.*"):
        if ids is None or path.stem in ids:
            yield path


def _snapshots(runs: Path, ids: set[str] | None) -> Iterable[Path]:
    """Snapshots older than a day that no sweep with anything left to do was ever submitted with."""
    if ids is not None:
        return
    needed: set[str] = set()
    for sweep in (runs / ".sweeps").glob("*/asked.json"):
        if _unfinished(runs, read_json(sweep)):
            submissions = (sweep.parent / "submissions").glob("*.json")
            asked = [read_json(sweep), *(read_json(path) for path in submissions)]
            needed |= {Path(one["snapshot"]).name for one in asked if one and one.get("snapshot")}
    for path in (runs / SNAPSHOTS).glob("*"):
        if path.name not in needed and path.stat().st_mtime < time.time() - DAY:
            yield path


def _unfinished(runs: Path, asked: dict[str, Any]) -> bool:
    """Whether a job of this sweep might still be there: a run of it is not trained and evaluated, or was a day ago."""
    wanted = [condition(name) for name in asked["conditions"]]
    for cell in asked["cells"]:
        folder = runs / cell["id"]
        if not (folder / "result.json").exists() or (folder / "claim.json").exists():
            return True
        if lacking(folder, asked["selection"], wanted):
            return True
        last = max((folder / name).stat().st_mtime for name in ("result.json", f"evals/{asked['selection']}"))
        if last > time.time() - DAY:  # what a sweep does at its end may be at work
            return True
    return False


@dataclass(frozen=True)
class Policy:
    paths: Callable[[Path, set[str] | None], Iterable[Path]]  # what it frees: runs folder, ids of runs or None
    words: str
    costs: str  # what cannot be done afterwards


POLICIES = {
    "previous": Policy(
        _previous, "the checkpoints before the last, of finished runs",
        "a finished run whose last checkpoint is damaged later must be trained again",
    ),
    "scratch": Policy(_scratch, "half-written files older than a day, of finished runs", "nothing"),
    "superseded": Policy(
        _superseded, "runs that --rerun put aside", "what was there before cannot be looked at or compared again"
    ),
    "snapshots": Policy(
        _snapshots, "copies of the code whose sweeps have nothing left to do",
        "nothing; a run's provenance keeps its commit and its uncommitted changes",
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- in words


def _as_text(items: Sequence[Item], done: bool, runs: Path) -> str:
    if not items:
        return f"nothing to free in {runs}; weights, journals, results and evaluations of runs always stay"
    rows = []
    for policy, how in POLICIES.items():
        own = [item for item in items if item.policy == policy]
        if own:
            size = options.size(sum(item.bytes for item in own))
            rows.append([policy, str(len(own)), size, how.words, how.costs])
    total = options.size(sum(item.bytes for item in items))
    end = f"freed {total}" if done else f"{total} could be freed; --yes does it. Nothing was removed"
    return options.table(rows, ["policy", "items", "size", "what", "what it costs"]) + f"\n\n{end}"


def _as_json(items: Sequence[Item], done: bool) -> dict[str, Any]:
    return {
        "removed": done,
        "bytes": sum(item.bytes for item in items),
        "policies": {name: {"what": policy.words, "costs": policy.costs} for name, policy in POLICIES.items()},
        "items": [{"policy": item.policy, "path": str(item.path), "bytes": item.bytes} for item in items],
    }
