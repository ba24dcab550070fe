"""The MLflow mirror: a process beside the workers that copies the runs of a sweep from their folders into MLflow.

    python -m crm.mirror NAME --runs DIR [--uri URI] [--follow PID]

The folders are the truth and the mirror only ever reads them; the one file it adds to a run folder, mirror.json, says
what was sent where, and losing it costs nothing but sending everything again. MLflow drops a point that it already has
with the same value, step and time, so sending again changes nothing. For that a step that was redone after a kill is
sent as it was first journaled: the redone line has the same numbers and another time, so it would make a second point.

In MLflow: experiment `crm`; a parent run per sweep (tags crm.kind=sweep, crm.sweep) with its cells in cells.json; below
it a run per crm run (tags crm.kind=run, crm.run_id, crm.token) under the sweep that asked for it first. Metrics are
train/<name>, train/hidden/<modality>, val/miou, val/iou/<class number> and <selection>/<condition>/miou, where the
condition's = is written : because MLflow allows no =.

It runs at low priority, keeps no worker waiting and never imports torch. It sends what is new every few seconds, and
once more when its standard input ends or the followed process is gone; then it leaves, with code 1 if that last time
failed. What goes wrong is one line in mirror.log of the runs folder.
"""

import argparse
import fcntl
import json
import math
import os
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from crm.records import alive, raw_lines, read_json, write_json
from crm.sweep import Cell, Sweep

EXPERIMENT = "crm"
STORE = "crm.store"  # tag of the experiment that tells this store from one that was made anew in its place
ENDINGS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}  # outcome in the journal -> status in MLflow
METRICS_AT_ONCE, OTHERS_AT_ONCE = 1000, 100  # most metrics, and most params or tags, that MLflow takes in one call
PARAM_LENGTH, TAG_LENGTH, KEY_LENGTH = 6000, 8000, 250
LONGEST_PAUSE = 120.0  # seconds between two tries at a store that does not answer


# ---------------------------------------------------------------------------------------------- for the sweep command


def write_cells(runs: Path, name: str, sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Says in the runs folder which runs make up a sweep; the mirror knows nothing else of sweeps."""
    rows = [{"variant": cell.variant, "seed": cell.seed, "id": cell.id} for cell in cells]
    write_json(_cells(runs, name), {"name": name, "title": sweep.title, "selection": sweep.selection, "cells": rows})


def _cells(runs: Path, name: str) -> Path:
    return runs / ".sweeps" / f"{name}.json"


def start(runs: Path, name: str, sweep: Sweep, cells: Sequence[Cell]) -> "Mirror":
    """The mirror of these runs, at work in a process and a session of its own, so that Ctrl-C does not reach it."""
    write_cells(runs, name, sweep, cells)
    command = [sys.executable, "-m", "crm.mirror", name, "--runs", str(runs.absolute())]
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True)
    return Mirror(runs, process)


@dataclass(frozen=True)
class Mirror:
    """A running mirror. If the process that started it dies, its standard input ends and it leaves by itself."""

    runs: Path
    process: subprocess.Popen[bytes]

    def finish(self, patience: float = 60.0) -> str:
        """Lets it send the rest and waits that many seconds; says what went wrong, "" if nothing did."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            return f"MLflow is slow; process {self.process.pid} goes on sending"
        if code == 0:
            return ""
        try:
            return (self.runs / "mirror.log").read_text().splitlines()[-1]
        except (OSError, IndexError):
            return f"the mirror ended with code {code}"


# ---------------------------------------------------------------------------------------------- the store


@dataclass(frozen=True)
class Store:
    """An MLflow store that answers, with its experiment."""

    client: Any
    experiment: str
    identity: str  # under which mirror.json remembers what was sent

    def find(self, tags: Mapping[str, str]) -> str | None:
        """The oldest run with all these tags."""
        having = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self.client.search_runs([self.experiment], having, max_results=1, order_by=["attributes.start_time"])
        return found[0].info.run_id if found else None


def default_uri(runs: Path) -> str:
    """`MLFLOW_TRACKING_URI`, or a file in the runs folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs.absolute() / 'mlflow.db'}"


def connect(uri: str, runs: Path) -> Store:
    """The store, made if it is a file that does not exist yet; raises what MLflow raises if it does not answer."""
    _calm()
    from mlflow import MlflowClient

    with _alone_with(uri):
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(EXPERIMENT) or _new_experiment(client, uri, runs)
        if experiment.lifecycle_stage != "active":
            raise ValueError(f"the experiment {EXPERIMENT!r} is deleted in MLflow; restore it, or nothing is mirrored")
        if STORE not in experiment.tags:
            client.set_experiment_tag(experiment.experiment_id, STORE, uuid4().hex)
            experiment = client.get_experiment(experiment.experiment_id)
    return Store(client, experiment.experiment_id, experiment.tags[STORE])


def _calm() -> None:
    """Settings that MLflow reads from the environment: fail soon, print nothing, call nobody, join no other run."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # the default, 7, blocks for four minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    for inherited in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(inherited, None)


def _alone_with(uri: str) -> Any:
    """A lock on a store that is a file: two processes that make its tables at once both fail."""
    if not uri.startswith("sqlite:///"):
        return nullcontext()
    file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    return _locked(file.with_name(file.name + ".lock"))


def _new_experiment(client: Any, uri: str, runs: Path) -> Any:
    from mlflow.exceptions import MlflowException

    # a server knows its own place for artifacts; without one MLflow would put them below the current folder
    place = None if uri.startswith("http") else (runs.absolute() / "mlflow-artifacts").as_uri()
    try:
        client.create_experiment(EXPERIMENT, artifact_location=place)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another machine was faster
            raise
    return client.get_experiment_by_name(EXPERIMENT)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits until nobody else holds this file's lock; a process that dies lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------- what is sent

Point = tuple[str, float, int, int]  # key, value, time in ms, step


@dataclass(frozen=True, kw_only=True)
class Copy:
    """What one MLflow run shall hold."""

    key: Mapping[str, str]  # the tags it is found by
    label: str
    started: int  # ms, UTC epoch
    status: str
    ended: int | None = None  # ms; None while it runs
    tags: Mapping[str, str] = field(default_factory=dict)  # given when it is made
    notes: Mapping[str, str] = field(default_factory=dict)  # tags that may change
    params: Mapping[str, str] = field(default_factory=dict)
    points: Sequence[Sequence[Point]] = ()  # per journal line; the journal only grows, so only the end can be new
    files: Mapping[str, Path] = field(default_factory=dict)  # name of the artifact -> file


def first_lines(folder: Path) -> list[dict[str, Any]]:
    """The journal with every redone step, and every evaluation repeated with the same result, as written first.

    `crm.records.journal` keeps the last instead. The first never changes, which is what makes sending again harmless.
    """
    lines: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(raw_lines(folder / "journal.jsonl")):
        if line["event"] in ("train", "val"):
            key = (line["event"], line["step"])
        elif line["event"] == "evaluate":
            key = (line["event"], line["selection"], line["condition"], str(line["miou"]))
        else:
            key = number
        lines.setdefault(key, line)
    return list(lines.values())


def points(line: Mapping[str, Any]) -> list[Point]:
    """The metrics of one journal line."""
    event, when = line["event"], _ms(line["time"])
    if event == "evaluate":
        return [(_name(f"{line['selection']}/{line['condition']}/miou"), line["miou"], when, 0)]
    if event not in ("train", "val"):
        return []
    values = {key: value for key, value in line.items() if key not in ("event", "time", "step", "terms", "details")}
    values |= line.get("terms", {}) | line.get("details", {})
    return [(_name(key), value, when, line["step"]) for key, value in _flat(event, values)]


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number in nested values under its path; what is none, such as the IoU of an absent class, is left out."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}/{key}", inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _flat(f"{prefix}/{number}", inner)
    elif isinstance(value, int | float):
        yield prefix, value


def _name(key: str) -> str:
    """The key with what MLflow does not allow written as `:`."""
    return re.sub(r"[^\w./ :-]", ":", key)[:KEY_LENGTH]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def copy_of_run(folder: Path, sweep: str, cell: Mapping[str, Any], parent: str) -> Copy | None:
    """What MLflow shall hold of a run; None for a run that nobody has begun."""
    lines = first_lines(folder)
    first = next((line for line in lines if line["event"] == "attempt"), None)
    if first is None:
        return None
    config = (read_json(folder / "config.json") or {}).get("config", {})
    provenance = read_json(folder / "provenance.json") or {}
    status, ended = _status(folder, lines)
    return Copy(
        # the token tells this folder from another of the same run, trained anew or elsewhere
        key={"crm.kind": "run", "crm.run_id": cell["id"], "crm.token": first["token"]},
        label=f"{cell['variant']}/{cell['seed']}",
        started=_ms(first["time"]),
        status=status,
        ended=ended,
        tags={
            "crm.variant": cell["variant"],
            "crm.seed": str(cell["seed"]),
            "crm.sweep": sweep,
            "mlflow.parentRunId": parent,
        },
        notes=_notes(lines, provenance),
        params={path: value if isinstance(value, str) else json.dumps(value) for path, value in config.items()},
        points=[points(line) for line in lines],
        files=_files(folder, whole=status != "RUNNING"),
    )


def _status(folder: Path, lines: Sequence[Mapping[str, Any]]) -> tuple[str, int | None]:
    """MLflow's word for how the run stands, and when it ended in ms."""
    holder = read_json(folder / "claim.json")
    if holder is not None and alive(holder):
        return "RUNNING", None
    last = [line for line in lines if line["event"] in ("attempt", "end")][-1]
    status = ENDINGS[last["outcome"]] if last["event"] == "end" else "KILLED"
    return status, _ms(max(line["time"] for line in lines))


def _notes(lines: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> dict[str, str]:
    notes = {"crm.attempts": str(sum(line["event"] == "attempt" for line in lines))}
    if provenance.get("commit"):
        notes["mlflow.source.git.commit"] = str(provenance["commit"])  # MLflow's own pages show this one
        notes["crm.dirty"] = str(provenance.get("dirty", "")).lower()
    endings = [line for line in lines if line["event"] == "end"]
    if endings:
        notes["crm.reason"] = endings[-1].get("reason", "")
    odd = [(key, step) for line in lines for key, value, _, step in points(line) if not math.isfinite(value)]
    if odd:  # MLflow would turn an infinity into a number, so such points are named here and not sent
        notes["crm.not_finite"] = f"{odd[0][0]} at step {odd[0][1]}" + (f" and {len(odd) - 1} more" if odd[1:] else "")
    return notes


def _files(folder: Path, whole: bool) -> dict[str, Path]:
    """The record's files; those that still change, and the evaluations, only once nobody works on the run."""
    names = ["config.json", "provenance.json"]
    if whole:
        names += ["numerics.json", "journal.jsonl", "result.json", "failure.json"]
    found = {name: folder / name for name in names if (folder / name).exists()}
    if whole:
        evaluations = sorted((folder / "evals").glob("*/*.npz"))
        found |= {str(path.relative_to(folder)): path for path in evaluations if not path.name.startswith(".")}
    return found


def _copy_of_sweep(file: Path, sweep: Mapping[str, Any], ends: Sequence[tuple[str, int | None]], final: bool) -> Copy:
    """What MLflow shall hold of a sweep whose begun runs have this status and end."""
    statuses = {status for status, _ in ends}
    finished = statuses == {"FINISHED"} and len(ends) == len(sweep["cells"])
    status = "FINISHED" if finished else "FAILED" if "FAILED" in statuses else "KILLED"
    if "RUNNING" in statuses or not (final or finished):
        status = "RUNNING"
    times = [ended for _, ended in ends if ended is not None]
    return Copy(
        key={"crm.kind": "sweep", "crm.sweep": sweep["name"]},
        label=sweep["name"],
        started=_ms(file.stat().st_mtime),
        status=status,
        ended=None if status == "RUNNING" else max(times, default=_ms(time.time())),
        notes={"mlflow.note.content": sweep["title"], "crm.selection": sweep["selection"]},
        files={"cells.json": file},
    )


# ---------------------------------------------------------------------------------------------- sending


def sync(store: Store, runs: Path, name: str, final: bool = False) -> int:
    """Sends what MLflow lacks of a sweep and returns the number of points; `final` looks at finished runs again too.

    Raises what MLflow raises; whatever was sent until then stays sent, and the next call goes on from there.
    """
    file = _cells(runs, name)
    sweep = read_json(file)
    if sweep is None:
        raise FileNotFoundError(f"there is no {file}; `crm sweep {name}` writes it")
    memory = file.with_name(f".{name}.mirror.json")
    sent, ends = 0, []
    with _locked(file.with_name(".lock")):  # two sweeps may share a run, which must not be made twice
        parent = _run_of(store, memory, _copy_of_sweep(file, sweep, [], final=False))
        for cell in sweep["cells"]:
            folder = runs / cell["id"]
            cursor = _cursor(folder / "mirror.json", store)
            if final or _may_have_news(folder, cursor):
                size = _size(folder / "journal.jsonl")  # before it is read: a line that comes between is news again
                copy = copy_of_run(folder, name, cell, parent)
                if copy is None:
                    continue
                sent += _send(store, folder / "mirror.json", copy, size)
                ends.append((copy.status, copy.ended))
            elif cursor:
                ends.append((cursor["status"], cursor["ended"]))
        _send(store, memory, _copy_of_sweep(file, sweep, ends, final))
    return sent


def _cursor(memory: Path, store: Store) -> dict[str, Any]:
    """What was sent to this store before; empty where nothing was, or where the file is damaged."""
    try:
        return (read_json(memory) or {}).get(store.identity, {})
    except (ValueError, AttributeError):
        return {}


def _may_have_news(folder: Path, cursor: Mapping[str, Any]) -> bool:
    """Whether the journal grew, or the run was at work when last looked at and may have died since."""
    return not cursor or cursor["status"] == "RUNNING" or cursor["size"] != _size(folder / "journal.jsonl")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _run_of(store: Store, memory: Path, copy: Copy) -> str:
    """The id of the MLflow run of this copy, which is made if there is none."""
    known = _cursor(memory, store).get("run") or store.find(copy.key)
    if known:
        return known
    tags = {key: value[:TAG_LENGTH] for key, value in {**copy.key, **copy.tags}.items()}
    made = store.client.create_run(store.experiment, start_time=copy.started, tags=tags, run_name=copy.label)
    return made.info.run_id


def _send(store: Store, memory: Path, copy: Copy, size: int = 0) -> int:
    """Brings one MLflow run up to date and returns how many points it was sent; `memory` is written at the end only."""
    old = _cursor(memory, store)
    run = _run_of(store, memory, copy)
    new = {
        "run": run,
        "size": size,
        "status": copy.status,
        "ended": copy.ended,
        "lines": len(copy.points),
        "notes": dict(copy.notes),
        "files": {name: path.stat().st_mtime_ns for name, path in copy.files.items()},
    }
    if new == old:
        return 0
    count = 0
    if not (old and _removed(store, run)):  # what somebody deleted in MLflow is not wanted there
        if not old:
            _send_params(store, run, copy.params)
        if copy.notes != old.get("notes"):
            _send_tags(store, run, copy.notes)
        count = _send_points(store, run, [point for line in copy.points[old.get("lines", 0) :] for point in line])
        for name, path in copy.files.items():
            if new["files"][name] != old.get("files", {}).get(name):
                _send_file(store, run, name, path)
        if (copy.status, copy.ended) != (old.get("status"), old.get("ended")):
            _send_status(store, run, copy)
    try:
        remembered = read_json(memory) or {}
    except ValueError:
        remembered = {}
    write_json(memory, {**remembered, store.identity: new})
    return count


def _removed(store: Store, run: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_run(run).info.lifecycle_stage != "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return True


def _send_params(store: Store, run: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    for part in _parts([Param(key, value[:PARAM_LENGTH]) for key, value in params.items()], OTHERS_AT_ONCE):
        store.client.log_batch(run, params=part)


def _send_tags(store: Store, run: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    store.client.log_batch(run, tags=[RunTag(key, value[:TAG_LENGTH]) for key, value in tags.items()])


def _send_points(store: Store, run: str, points: Sequence[Point]) -> int:
    from mlflow.entities import Metric

    metrics = [Metric(*point) for point in points if math.isfinite(point[1])]
    for part in _parts(metrics, METRICS_AT_ONCE):
        store.client.log_batch(run, metrics=part)
    return len(metrics)


def _send_file(store: Store, run: str, name: str, path: Path) -> None:
    folder, _, last = name.rpartition("/")
    if last == path.name:
        store.client.log_artifact(run, str(path), folder or None)
    else:
        store.client.log_text(run, path.read_text(), name)


def _send_status(store: Store, run: str, copy: Copy) -> None:
    if copy.status == "RUNNING":
        store.client.update_run(run, status="RUNNING")
    else:
        store.client.set_terminated(run, copy.status, copy.ended)


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]


# ---------------------------------------------------------------------------------------------- the process


def mirror(runs: Path, name: str, uri: str, every: float, told: Callable[[float], bool]) -> int:
    """Syncs now and then until `told`, which waits that many seconds, is true, and once more after that.

    Returns the exit code: 0 if that last time everything was sent.
    """
    store, pause, failures = None, 0.0, 0
    while True:
        final = told(pause)
        try:
            store = store or connect(uri, runs)
            sync(store, runs, name, final)
            pause, failures = every, 0
        except Exception as error:  # MLflow, its database and its server fail in more ways than can be listed here
            store, failures = None, failures + 1
            pause = min(every * 2**failures, LONGEST_PAUSE)
            _note(runs, name, error)
            if final:
                return 1
        if final:
            return 0


def _note(runs: Path, name: str, error: Exception) -> None:
    """One line in mirror.log, or on standard error where that cannot be written."""
    text = " ".join(str(error).split())[:400]
    line = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {name}: {type(error).__name__}: {text}\n"
    try:
        with (runs / "mirror.log").open("a") as log:
            log.write(line)
    except OSError:
        sys.stderr.write(line)


def _until_gone(pid: int) -> Callable[[float], bool]:
    """Waits until a process is gone; true once it is."""
    try:
        watched = {"host": socket.gethostname(), "pid": pid, "started": psutil.Process(pid).create_time()}
    except psutil.NoSuchProcess:
        return lambda pause: True

    def told(pause: float) -> bool:
        deadline = time.monotonic() + pause
        while alive(watched):
            if (left := deadline - time.monotonic()) <= 0:
                return False
            time.sleep(min(left, 0.5))
        return True

    return told


def _until_input_ends(pause: float) -> bool:
    """Waits for the end of standard input; true once it is there."""
    deadline = time.monotonic() + pause
    while select.select([0], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not os.read(0, 4096):
            return True
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m crm.mirror", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="a sweep that `crm sweep` has begun in the runs folder")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--uri", help="default: MLFLOW_TRACKING_URI, or mlflow.db in the runs folder")
    parser.add_argument("--follow", type=int, metavar="PID", help="leave with this process, not with standard input")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks")
    given = parser.parse_args(arguments)
    os.nice(10)
    told = _until_input_ends if given.follow is None else _until_gone(given.follow)
    return mirror(given.runs, given.name, given.uri or default_uri(given.runs), given.every, told)


if __name__ == "__main__":
    sys.exit(main())
