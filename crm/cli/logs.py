"""crm fails and crm logs: why cells failed, and what their attempts printed."""

import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from crm.cli import options
from crm.cli.options import Base, Json, OfBase, Runs, Seeds, Set, SweepName, Tiny
from crm.cli.started import cells_of
from crm.failures import REASONS, Attempt, attempts, kind_of, last_frame, signature, spent
from crm.records import alive, raw_lines, read_json, state
from crm.sweep import Cell, Sweep, only

POLL = 0.5  # seconds between looks at a log that grows
STAMP = re.compile(rb"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} ")  # what a line that was logged begins with


def add_to(app: typer.Typer) -> None:
    app.command()(fails)
    app.command()(logs)


# ---------------------------------------------------------------------------------------------- crm fails


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The newest failure of one cell."""

    label: str
    id: str
    kind: str  # a key of crm.failures.REASONS
    reason: str
    step: int
    host: str
    retries: int  # how many endings of this kind there were since a person said retry
    frame: str  # where it happened; "" where nothing tells
    signature: str


def fails(
    name: SweepName,
    sets: Set = None,
    seeds: Seeds = "",
    base: Base = "",
    recipe: OfBase = "",
    tiny: Tiny = False,
    runs: Runs = None,
    json: Json = False,
) -> None:
    """The failed cells of a sweep, those that failed in the same way together, and what is done about it."""
    folder = options.runs_folder(runs)
    name, found, cells, _ = cells_of(name, sets, seeds, base, recipe, tiny, folder)
    groups = grouped(failures(found, cells, folder))
    if json:
        options.echo_json([_group_json(group) for group in groups])
    elif groups:
        typer.echo("\n\n".join(_group_text(name, group) for group in groups))
    else:
        typer.echo(f"no cell of {name} has failed")


def failures(found: Sweep, cells: Sequence[Cell], runs: Path) -> list[Failure]:
    """Of every cell that is neither done nor at work, the failure that ended its last attempt."""
    failed = []
    for cell in cells:
        folder = runs / cell.id
        if state(runs, cell.config, found.selection, found.conditions).name in ("missing", "running", "done"):
            continue
        lines = list(raw_lines(folder / "journal.jsonl"))
        told = read_json(folder / "failure.json")
        last = next((one for one in reversed(attempts(lines)) if one.outcome), None)
        if told is None and (last is None or last.outcome not in ("failed", "lost")):
            continue
        failed.append(_failure(cell, told or {}, last, lines))
    return failed


def _failure(cell: Cell, told: dict[str, Any], last: Attempt | None, lines: list[dict[str, Any]]) -> Failure:
    """From failure.json, else from the journal: a job that was killed leaves no failure.json."""
    reason = told.get("reason") or (last.reason if last else "") or "killed without a word"
    kind = told.get("kind") or (last.kind if last else "") or kind_of(reason)
    trace = told.get("traceback", "")
    return Failure(
        label=cell.label, id=cell.id, kind=kind, reason=reason,
        step=told.get("step") or (last.last_step if last else 0), host=last.host if last else "",
        retries=spent(lines, kind), frame=last_frame(trace), signature=signature(trace or f"{kind}: {reason}"),
    )  # fmt: skip


def grouped(failed: Sequence[Failure]) -> list[list[Failure]]:
    """Failures of one signature together, the most frequent first."""
    groups: dict[str, list[Failure]] = {}
    for failure in failed:
        groups.setdefault(failure.signature, []).append(failure)
    return sorted(groups.values(), key=len, reverse=True)


def _group_json(group: Sequence[Failure]) -> dict[str, Any]:
    first = group[0]
    policy = REASONS[first.kind]
    return {
        "signature": first.signature, "kind": first.kind, "count": len(group), "reason": first.reason,
        "frame": first.frame, "hosts": _hosts(group), "action": policy.action, "limit": policy.limit,
        "policy": policy.words, "cells": [asdict(failure) for failure in group],
    }  # fmt: skip


def _hosts(group: Sequence[Failure]) -> list[str]:
    return sorted({failure.host for failure in group if failure.host})


def _group_text(name: str, group: Sequence[Failure]) -> str:
    first = group[0]
    hosts = f"  on {', '.join(_hosts(group))}" if _hosts(group) else ""
    return "\n".join(
        [
            f"{len(group)} x {first.kind}  {first.signature}{hosts}",
            f"  {first.reason.splitlines()[0] if first.reason else ''}",
            *([f"  at {first.frame}"] if first.frame else []),
            *(f"  {one.label} ({one.id}) at step {one.step}, attempt {max(1, one.retries)} that ended so"
              for one in group),
            f"  {REASONS[first.kind].words}",
            f"  crm logs {shlex.quote(f'{name}:{first.label}')}",
        ]
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- crm logs


def logs(
    cell: Annotated[str, typer.Argument(metavar="CELL", help="A run's id or first digits, or SWEEP:ROW/SEED.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the attempt ends.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many at the end; 0 is all.")] = 50,
    runs: Runs = None,
    json: Json = False,
) -> None:
    """What the attempts at a run printed, each marked."""
    folder = find_cell(options.runs_folder(runs), cell)
    made = attempts(raw_lines(folder / "journal.jsonl"))
    path = folder / "log.txt"
    written = path.read_bytes() if path.exists() else b""
    shown = list(marked(written, made))
    shown = shown[-lines:] if lines else shown
    if json:
        attempts_json = [asdict(one) for one in made]
        options.echo_json({"run": folder.name, "log": str(path), "attempts": attempts_json, "lines": shown})
        return
    for line in shown:
        typer.echo(line)
    if follow:
        try:
            _follow(folder, path, len(written))
        except KeyboardInterrupt:
            return  # the run goes on
    elif not written:
        typer.echo(f"run {folder.name} has printed nothing yet ({path})", err=True)


def find_cell(runs: Path, target: str) -> Path:
    """The run folder that a run's id or SWEEP:ROW/SEED names."""
    name, colon, pattern = target.partition(":")
    if not colon:
        from crm.cli.runs import find_run

        return find_run(runs, target)
    _, _, started, _ = cells_of(name, None, "", "", "", False, runs)
    cells = only(started, [pattern])
    if len(cells) > 1:
        raise ValueError(f"{target!r} could be {', '.join(one.label for one in cells[:5])}; name one of them")
    folder = runs / cells[0].id
    if not (folder / "config.json").exists():
        raise ValueError(f"{cells[0].label} of {name} has not been begun ({folder} is missing)")
    return folder


def marked(written: bytes, made: Sequence[Attempt]) -> Iterator[str]:
    """The lines of a log with a line before each attempt's first, found by time; none before a single attempt."""
    waiting = [one for one in made if one.time is not None] if len(made) > 1 else []
    for line in written.splitlines():
        if waiting and (stamp := STAMP.match(line)):
            at = time.mktime(time.strptime(stamp[1].decode(), "%Y-%m-%d %H:%M:%S"))
            while waiting and waiting[0].time is not None and int(waiting[0].time) <= at:
                yield _mark(waiting.pop(0))
        yield line.decode(errors="replace")
    yield from map(_mark, waiting)  # they have printed nothing yet


def _mark(one: Attempt) -> str:
    job = f", job {one.job['id']}" if one.job.get("id") else ""
    ended = f": {one.outcome}{f' ({one.kind})' if one.kind else ''}" if one.outcome else ""
    return f"--- attempt {one.attempt} on {one.host}{job}, from step {one.step}{ended} ---"


def _follow(folder: Path, path: Path, position: int) -> None:
    """Prints what is added until nobody is at the run any more."""
    while True:
        holder = read_json(folder / "claim.json")
        at_work = holder is not None and alive(holder)  # looked at first: what it printed last is read below
        if path.exists():
            with path.open("rb") as log:
                log.seek(position)
                added = log.read()
            position += len(added)
            typer.echo(added.decode(errors="replace"), nl=False)
        if not at_work:
            ended = next((one for one in reversed(attempts(raw_lines(folder / "journal.jsonl"))) if one.outcome), None)
            how = f" {ended.outcome}{f': {ended.reason}' if ended.reason else ''}" if ended else ""
            typer.echo(f"crm: nobody is at run {folder.name}; its last attempt ended{how}" if ended else
                       f"crm: nobody is at run {folder.name} yet", err=True)  # fmt: skip
            return
        time.sleep(POLL)
