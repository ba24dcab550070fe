"""Submitting sweeps to Slurm, and the verbs that act on what was started, there or on this machine."""

import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crm.cli import afterwards, options
from crm.cli.options import Json, Runs, Yes
from crm.cli.plan import Only, PlanLine
from crm.machine import Machine, home
from crm.names import unknown
from crm.sweep import Cell, Sweep
from crm.sweep import only as pick

if TYPE_CHECKING:
    from crm.cluster.folder import Asked, SweepFolder
    from crm.cluster.view import Look, Seen

Submitted = Annotated[str, typer.Argument(metavar="NAME", help="A sweep that was started.")]
PATIENCE = 60.0  # seconds that a person waits for a job which looks after the sweep at the same moment


def add_to(app: typer.Typer) -> None:
    for command in (init, reconcile, hold, release, cancel, retry):
        app.command()(command)


def init(
    what: Annotated[str, typer.Argument(help="cluster: a commented cluster.toml.")],
    json: Json = False,
) -> None:
    """Writes a settings file to fill in; never over one that is there."""
    from crm.cluster.settings import FILE, TEMPLATE
    from crm.names import chosen

    chosen("settings file", what, {"cluster": FILE})
    path = home() / FILE
    try:
        with path.open("x") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        raise ValueError(f"{path} is there already; edit it, or move it away") from None
    options.echo_json({"written": path}) if json else typer.echo(f"{path}: uncomment what your cluster needs")


# ---------------------------------------------------------------------------------------------- submitting


def submit_sweep(
    name: str,
    found: Sweep,
    cells: Sequence[Cell],
    machine: Machine,
    given: Sequence[str],
    partly: bool,
    changes: dict[str, Any],
    held: bool,
    smoke: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Hands the cells to Slurm and returns at once; says what was submitted.

    Args:
        given: NAME=VALUE texts for the resources.
        partly: the cells are some of the sweep's; what was asked before stays asked.
    """
    from crm.cluster import slurm, snapshot
    from crm.cluster.folder import SweepFolder
    from crm.cluster.reconcile import reconcile as look_after
    from crm.cluster.settings import resources
    from crm.records import open_run

    wanted = resources(home(), given)
    machine = replace(machine, device=wanted.device, threads=wanted.cpus)
    there = slurm.partitions()  # refuses before anything is written
    if wanted.partition and not set(wanted.partition.split(",")) <= set(there):
        raise unknown("partition", wanted.partition, there)
    folder = SweepFolder.of(machine.runs, name)
    for cell in cells:
        open_run(machine.runs, cell.config)
    ask_again(
        folder, found, cells, machine, "slurm", partly, changes, resources=asdict(wanted),
        snapshot=str(snapshot.take(machine.runs)), smoke=smoke,
        afterwards=bool(afterwards.words(found)),
    )  # fmt: skip
    report = look_after(folder, patience=PATIENCE, held=held)
    count = len(report.submitted)
    if count:
        say(f"submitted {count} runs{' held' if held else ''}; crm status {name} shows how they stand")
    for line in report.words:
        say(line)
    return asdict(report)


def ask_again(
    folder: "SweepFolder",
    found: Sweep,
    cells: Sequence[Cell],
    machine: Machine,
    cluster: str,
    partly: bool,
    changes: dict[str, Any],
    **more: Any,
) -> None:
    """Records what is wanted of a sweep; what has failed or was cancelled may be tried again, for a person asks for it.

    Args:
        partly: the cells are some of the sweep's; what was asked before stays asked.
        changes: the settings that were changed in every cell.
        more: fields of Asked that the cluster needs.
    """
    from crm.cluster.folder import Asked

    asked = Asked(
        name=folder.name,
        title=found.title,
        cells=[{"variant": cell.variant, "seed": cell.seed, "id": cell.id} for cell in cells],
        selection=found.selection,
        conditions=[condition.name for condition in found.conditions],
        cluster=cluster,
        machine=machine.written(),
        changes=changes,
        seeds=list(found.seeds),
        **{"resources": {}, "snapshot": "", **more},
    )
    with folder.lease(PATIENCE):
        folder.ask(asked, partly)
        _again(folder, [cell.id for cell in cells])


def cells_of(
    name: str,
    sets: list[str] | None,
    seeds: str,
    base: str,
    recipe: str,
    tiny: bool,
    runs: Path,
    without: list[str] | None = None,
) -> tuple[str, Sweep, list[Cell], dict[str, Any]]:
    """A sweep, its cells and the settings changed in them: as it was started last, unless options say what is meant."""
    from crm.cluster.folder import SweepFolder

    name, found = options.find_sweep(name, seeds, base, recipe, tiny, without)
    asked = SweepFolder.of(runs, name).asked()
    changes = options.changes(sets)
    if asked is not None and not changes and not seeds:
        found, changes = replace(found, seeds=tuple(asked.seeds)), dict(asked.changes)
    return name, found, found.cells(changes), dict(changes)


def with_queue(name: str, lines: Sequence[PlanLine], runs: Path) -> list[PlanLine]:
    """The plan's cells with what the scheduler has of them: what is queued is not to be submitted again."""
    from crm.cluster.folder import SweepFolder
    from crm.cluster.view import look

    folder = SweepFolder.of(runs, name)
    if (asked := folder.asked()) is None or asked.cluster != "slurm":
        return list(lines)
    now = look(folder, asked)
    _refuse_silence(now)
    seen = {one.id: one for one in now.cells}
    on_its_way = ("queued", "running", "suspended", "unknown")
    return [
        replace(line, state=one.name, reason=one.reason, rerun="")
        if (one := seen.get(line.id)) is not None and (one.name in on_its_way or (one.name == "held" and one.live))
        else line
        for line in lines
    ]


def _again(folder: "SweepFolder", ids: Sequence[str]) -> None:
    """What failed or was cancelled may be tried again, because a person asks for it; what a person holds stays held."""
    holds = folder.holds()
    folder.unhold(id for id in ids if holds.get(id, {}).get("by") in ("cancel", "smoke", "breaker"))
    for id in ids:
        if id in holds or (folder.run(id) / "failure.json").exists():
            _forgive(folder, id)


def _forgive(folder: "SweepFolder", id: str) -> None:
    """Counting of attempts begins anew, and the failure of the last one is no reason any more."""
    from crm.records import append

    append(folder.run(id), "retry")
    (folder.run(id) / "failure.json").unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- verbs


def reconcile(name: Submitted, runs: Runs = None, json: Json = False) -> None:
    """Looks after a sweep on a cluster once: resumes, retries, holds, submits what is left. Doing it twice is harmless.

    The jobs of the sweep do this by themselves.
    """
    from crm.cluster.reconcile import reconcile as look_after

    folder, asked = find(name, runs)
    if asked.cluster == "local":
        raise ValueError(f"{name} runs on this machine, where crm sweep {name} does all of that")
    report = look_after(folder, patience=PATIENCE)
    if json:
        options.echo_json(asdict(report))
        return
    for label, why in report.submitted.items():
        typer.echo(f"submitted {label}{f': {why}' if why else ''}")
    for line in report.words:
        typer.echo(line)
    if report.unsettled:
        typer.echo(f"{report.unsettled} runs: it is not yet certain what has become of their jobs; call it again")
    if not (report.submitted or report.words or report.unsettled):
        typer.echo("nothing to do")
        raise typer.Exit(3)


def hold(name: Submitted, only: Only = None, runs: Runs = None, yes: Yes = False, json: Json = False) -> None:
    """Keeps waiting runs of a sweep from starting; what runs goes on."""
    from crm.cluster import slurm

    folder, asked = find(name, runs)
    chosen = [seen for seen in _seen(folder, asked, only) if seen.name in ("missing", "queued", "interrupted")]
    if _announced("hold", chosen, yes, json):
        with folder.lease(PATIENCE):
            folder.hold([seen.id for seen in chosen], "user", f"held by a person: crm release {name}")
            slurm.hold([seen.element.id for seen in chosen if seen.element is not None and seen.live])


def release(name: Submitted, only: Only = None, runs: Runs = None, yes: Yes = False, json: Json = False) -> None:
    """Lets held runs of a sweep start, whoever held them."""
    from crm.cluster import slurm

    folder, asked = find(name, runs)
    chosen = [seen for seen in _seen(folder, asked, only) if seen.name == "held"]
    if not _announced("release", chosen, yes, json):
        return
    with folder.lease(PATIENCE):
        for seen in chosen:
            if seen.hold is not None and seen.hold["by"] == "smoke":
                _forget_smoke(folder, asked, seen.id)
        folder.unhold(seen.id for seen in chosen)
        slurm.release([seen.element.id for seen in chosen if seen.element is not None and seen.live])
    _go_on(folder, asked, json)


def _go_on(folder: "SweepFolder", asked: "Asked", json: bool) -> None:
    """Submits what may start now; on this machine nothing starts by itself."""
    from crm.cluster.reconcile import reconcile as look_after

    if asked.cluster == "local":
        typer.echo(f"crm sweep {folder.name} starts them, unless it is at work now", err=json)
        return
    for line in look_after(folder, patience=PATIENCE).words:
        typer.echo(line, err=json)


def _forget_smoke(folder: "SweepFolder", asked: "Asked", id: str) -> None:
    """A configuration that failed its smoke test is tested again."""
    from crm.cluster.smoked import forget, smoke_key
    from crm.cluster.submit import new
    from crm.records import read_config

    forget(folder, smoke_key(read_config(folder.run(id)), new(folder, "smoke", [])))


def cancel(
    name: Submitted,
    only: Only = None,
    removed: Annotated[
        bool, typer.Option("--removed", help="The jobs of runs that are no longer in the sweep, alone.")
    ] = False,
    runs: Runs = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Cancels the jobs of a sweep; runs write a checkpoint if their time allows, and `crm retry` goes on from it."""
    from crm.cluster import slurm

    folder, asked = find(name, runs)
    if removed:
        _cancel_removed(folder, asked, yes, json)
        return
    ended = ("done", "failed", "cancelled")
    chosen = [seen for seen in _seen(folder, asked, only) if seen.name not in ended and seen.elsewhere is None]
    if _announced("cancel", chosen, yes, json):
        with folder.lease(PATIENCE):
            folder.hold([seen.id for seen in chosen], "cancel", f"cancelled: crm retry {name} starts it again")
            slurm.cancel([seen.element.id for seen in chosen if seen.element is not None and seen.live])
            for seen in chosen:
                _stop_here(seen)
            if not only:
                _cancel_others(folder)


def _stop_here(seen: "Seen") -> None:
    """Asks a worker of this machine to write its checkpoint and to leave; of another one's nothing is known."""
    from crm.cluster.view import worked_on_here

    holder = seen.files.holder or {}
    if worked_on_here(seen) and holder["host"] == socket.gethostname():
        os.kill(holder["pid"], signal.SIGTERM)


def _cancel_others(folder: "SweepFolder") -> None:
    """The jobs that only look after the sweep or test it, when all of it is cancelled."""
    from crm.cluster import slurm

    slurm.cancel([one.job for one in folder.submissions() if one.kind != "cells" and one.state == "submitted"])


def _cancel_removed(folder: "SweepFolder", asked: "Asked", yes: bool, json: bool) -> None:
    from crm.cluster import slurm
    from crm.cluster.view import look

    found = look(folder, asked)
    _refuse_silence(found)
    jobs = [element.id for one in found.submissions if one.kind == "cells"
            for task, element in found.elements.get(one.token, {}).items()
            if one.cells[task] in found.removed and element.state not in slurm.FINISHED]  # fmt: skip
    if json:
        options.echo_json({"cancel": found.removed, "done": yes})
    else:
        typer.echo(f"{'cancelled' if yes else 'would cancel'} {len(jobs)} jobs: {', '.join(jobs) or 'none'}")
    if yes:
        slurm.cancel(jobs)


def retry(
    name: Submitted,
    only: Only = None,
    reason: Annotated[str, typer.Option("--reason", help="Those alone that failed so, as in gpu_memory.")] = "",
    runs: Runs = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Starts failed and cancelled runs of a sweep again, from their last checkpoints; attempts are counted anew."""
    from crm.failures import REASONS
    from crm.names import chosen as known
    from crm.records import read_json

    if reason:
        known("reason", reason, dict(REASONS))
    folder, asked = find(name, runs)

    def kind(seen: "Seen") -> str:
        return (read_json(folder.run(seen.id) / "failure.json") or {}).get("kind", "cancelled")

    chosen = [seen for seen in _seen(folder, asked, only) if seen.name in ("failed", "cancelled")]
    chosen = [seen for seen in chosen if not reason or kind(seen) == reason]
    if not _announced("retry", chosen, yes, json):
        return
    with folder.lease(PATIENCE):
        folder.unhold(seen.id for seen in chosen)
        for seen in chosen:
            _forgive(folder, seen.id)
    _go_on(folder, asked, json)


def find(name: str, runs: Path | None) -> tuple["SweepFolder", "Asked"]:
    """A sweep that was started; ValueError names those there are."""
    from crm.cluster.folder import SweepFolder

    folder = SweepFolder.of(options.runs_folder(runs), name)
    if (asked := folder.asked()) is None:
        there = sorted(path.parent.name for path in folder.path.parent.glob("*/asked.json"))
        raise unknown("started sweep", name, there)
    return folder, asked


def _seen(folder: "SweepFolder", asked: "Asked", only: list[str] | None) -> list["Seen"]:
    from crm.cluster.view import look

    found = look(folder, asked)
    _refuse_silence(found)
    return pick(found.cells, only)


def _refuse_silence(found: "Look") -> None:
    """Nothing is done to jobs on the word of nobody."""
    from crm.cluster.slurm import Unreachable

    if found.trouble:
        raise Unreachable(found.trouble)


def _announced(verb: str, chosen: Sequence["Seen"], yes: bool, json: bool) -> bool:
    """Says what is meant; True if it is to be done. Nothing to do ends with 3."""
    if json:
        options.echo_json(
            {verb: [{"id": seen.id, "cell": seen.label, "state": seen.name} for seen in chosen], "done": yes}
        )
    elif chosen:
        for seen in chosen:
            typer.echo(f"{verb} {seen.label} ({seen.name})")
        if not yes:
            typer.echo(f"nothing was done: crm {verb} ... --yes does it")
    if not chosen:
        typer.echo(f"no run of this sweep is there to {verb}", err=True)
        raise typer.Exit(3)
    return yes
