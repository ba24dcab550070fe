"""Sends what an MLflow store lacks of a sweep."""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from crm.records import read_json, write_json
from crm.tracking.content import Head, Standing, head_of_run, head_of_sweep, standing_of_run, standing_of_sweep
from crm.tracking.listing import listing_file, read_listing
from crm.tracking.store import Store, locked
from crm.tracking.tail import Point, Tail, first_attempt

METRICS_AT_ONCE, OTHERS_AT_ONCE = 1000, 100  # most metrics, and most params or tags, that MLflow takes in one call
PARAM_LENGTH, TAG_LENGTH = 6000, 8000

Tails = dict[str, Tail]  # run id -> its journal, as far as it was read


def sync(
    store: Store, runs: Path, name: str, final: bool = False, tails: Tails | None = None, only: str = ""
) -> int:  # fmt: skip
    """Sends what MLflow lacks of a sweep and returns the number of points; `final` looks at finished runs again too.

    Raises what MLflow raises; whatever was sent until then stays sent, and the next call goes on from there.

    Args:
        tails: what this process has read before; to be thrown away after an error.
        only: the id of the one run to look at; what is known of the others stays as it is.
    """
    tails = {} if tails is None else tails
    listing = read_listing(runs, name)
    memory = listing_file(runs, name).with_name(f".{name}.mirror.json")
    sent, ends = 0, []
    with locked(memory.with_name(".lock")):  # two sweeps may share a run, which must not be made twice
        parent = "" if listing.single else _found_or_made(store, memory, head_of_sweep(runs, listing))[0]
        for cell in listing.cells:
            folder = runs / cell["id"]
            cursor = _cursor(folder / "mirror.json", store)
            mine = not only or cell["id"] == only
            if mine and (final or _may_have_news(folder, cursor)):
                begun = first_attempt(folder)
                if begun is None:
                    continue
                tail = tails.get(cell["id"])
                if tail is None or not tail.fits():
                    tail = tails[cell["id"]] = Tail(folder)
                head = head_of_run(folder, listing, cell, begun, parent)
                count, cursor = _send_run(store, folder, head, tail, listing.artifacts)
                sent += count
            if cursor:
                ends.append((cursor["status"], cursor["ended"]))
        if not listing.single:
            standing = standing_of_sweep(runs, listing, ends, final and not only)
            _send_sweep(store, memory, parent, standing)
    return sent


def _cursor(memory: Path, store: Store) -> dict[str, Any]:
    """What was sent to this store before; empty where nothing was, or where the file is damaged."""
    try:
        return (read_json(memory) or {}).get(store.identity, {})
    except (ValueError, AttributeError):
        return {}


def _remember(memory: Path, store: Store, cursor: Mapping[str, Any]) -> None:
    try:
        others = read_json(memory) or {}
    except ValueError:
        others = {}
    write_json(memory, {**others, store.identity: {**cursor, "place": store.place}})


def _may_have_news(folder: Path, cursor: Mapping[str, Any]) -> bool:
    """Whether the journal grew, or the run was at work when last looked at and may have died since."""
    return not cursor or cursor["status"] == "RUNNING" or cursor["size"] != _size(folder / "journal.jsonl")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _found_or_made(store: Store, memory: Path, head: Head) -> tuple[str, str]:
    """The id of the MLflow run, and of its parent; the run is made if there is none."""
    if known := _cursor(memory, store):
        return known["run"], known.get("parent", "")
    run = store.find(head.key)
    if run is None:
        tags = {key: value[:TAG_LENGTH] for key, value in {**head.key, **head.tags}.items()}
        run = store.client.create_run(store.experiment, start_time=head.started, tags=tags, run_name=head.label)
    return run.info.run_id, run.data.tags.get("mlflow.parentRunId", "")


def _send_run(
    store: Store, folder: Path, head: Head, tail: Tail, artifacts: Iterable[str]
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """Brings one MLflow run up to date: how many points it was sent, and what is known of it now."""
    memory = folder / "mirror.json"
    old = _cursor(memory, store)
    run, parent = _found_or_made(store, memory, head)
    size = _size(folder / "journal.jsonl")  # before it is read: a line that comes between is news again
    wanted = _Wanted(store, run, bool(old))
    if not old:
        _send_params(store, run, head.params)
    if not parent and (parent := head.tags.get("mlflow.parentRunId", "")) and wanted():
        _send_tags(store, run, head.tags)  # it was a run of its own, and now a sweep has asked for it
    count = 0
    fresh = (point for number, points in tail.news() if number >= old.get("lines", 0) for point in points)
    for part in _parts((point for point in fresh if math.isfinite(point[1])), METRICS_AT_ONCE):
        if wanted():
            _send_points(store, run, part)
            count += len(part)
    standing = standing_of_run(folder, tail.story, list(artifacts))
    new = {"run": run, "parent": parent, "size": size, "lines": tail.story.lines, **_written(standing)}
    if new != {key: value for key, value in old.items() if key != "place"}:
        if wanted():
            _send_standing(store, run, old, standing)
        _remember(memory, store, new)
    return count, new


def _send_sweep(store: Store, memory: Path, run: str, standing: Standing) -> None:
    old = _cursor(memory, store)
    new = {"run": run, **_written(standing)}
    if new != {key: value for key, value in old.items() if key != "place"}:
        if _Wanted(store, run, bool(old))():
            _send_standing(store, run, old, standing)
        _remember(memory, store, new)


class _Wanted:
    """Whether a run may be written: what was deleted in MLflow is not wanted there. Asked once, and only if needed."""

    def __init__(self, store: Store, run: str, may_be_gone: bool) -> None:
        self.store, self.run = store, run
        self.answer = None if may_be_gone else True

    def __call__(self) -> bool:
        if self.answer is None:
            self.answer = not _removed(self.store, self.run)
        return self.answer


def _removed(store: Store, run: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_run(run).info.lifecycle_stage != "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return True


# ---------------------------------------------------------------------------------------------- calls


def _written(standing: Standing) -> dict[str, Any]:
    """A standing as mirror.json remembers it."""
    return {
        "status": standing.status,
        "ended": standing.ended,
        "notes": dict(standing.notes),
        "files": {name: path.stat().st_mtime_ns for name, path in standing.files.items()},
    }


def _send_standing(store: Store, run: str, old: Mapping[str, Any], standing: Standing) -> None:
    before = old.get("notes", {})
    _send_tags(store, run, {key: value for key, value in standing.notes.items() if before.get(key) != value})
    for name, path in standing.files.items():
        if old.get("files", {}).get(name) != path.stat().st_mtime_ns:
            _send_file(store, run, name, path)
    if (standing.status, standing.ended) != (old.get("status"), old.get("ended")):
        if standing.status == "RUNNING":
            store.client.update_run(run, status="RUNNING")
        else:
            store.client.set_terminated(run, standing.status, standing.ended)


def _send_params(store: Store, run: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    for part in _parts((Param(key, value[:PARAM_LENGTH]) for key, value in params.items()), OTHERS_AT_ONCE):
        store.client.log_batch(run, params=part)


def _send_tags(store: Store, run: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    for part in _parts((RunTag(key, value[:TAG_LENGTH]) for key, value in tags.items()), OTHERS_AT_ONCE):
        store.client.log_batch(run, tags=part)


def _send_points(store: Store, run: str, points: Iterable[Point]) -> None:
    from mlflow.entities import Metric

    store.client.log_batch(run, metrics=[Metric(*point) for point in points])


def _send_file(store: Store, run: str, name: str, path: Path) -> None:
    folder, _, last = name.rpartition("/")
    if last == path.name:
        store.client.log_artifact(run, str(path), folder or None)
    else:
        store.client.log_text(run, path.read_text(), name)


def _parts(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The items in lists of at most that many, never more of them in memory than one list."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
