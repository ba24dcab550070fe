"""The verbs that act on sweeps that were started, on Slurm or on this machine; the cluster's settings file."""

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crm.cli import options
from crm.cli.options import Json, Runs, Yes
from crm.cli.plan import Only
from crm.cli.started import PATIENCE, forgive, refuse_silence
from crm.machine import home
from crm.names import unknown
from crm.sweep import only as pick

if TYPE_CHECKING:
    from crm.cluster.folder import Asked, SweepFolder
    from crm.cluster.view import Seen

Submitted = Annotated[str, typer.Argument(metavar="NAME", help="A sweep that was started.")]


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
        if any(seen.hold is not None and seen.hold["by"] == "breaker" for seen in chosen):
            folder.let_pass(_signatures(folder, asked))
        folder.unhold(seen.id for seen in chosen)
        slurm.release([seen.element.id for seen in chosen if seen.element is not None and seen.live])
    _go_on(folder, asked, json)


def _signatures(folder: "SweepFolder", asked: "Asked") -> set[str]:
    """Of the tracebacks with which runs of this sweep have failed."""
    from crm.failures import signature
    from crm.records import read_json

    found = [read_json(folder.run(id) / "failure.json") for id in asked.labels]
    return {signature(failure["traceback"]) for failure in found if failure is not None}


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
    refuse_silence(found)
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
            forgive(folder, seen.id)
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
    refuse_silence(found)
    return pick(found.cells, only)


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
