"""MLflow: sending what is missing, what is behind, and looking at it."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from crm.cli import options
from crm.cli.options import Json, Runs
from crm.machine import home

app = typer.Typer(no_args_is_help=True, help="The copy of the runs in MLflow: sync, status, ui.")

Uri = Annotated[
    str, typer.Option("--uri", envvar="MLFLOW_TRACKING_URI", help="The store. [default: mlflow.db of the runs folder]")
]


def add_to(root: typer.Typer) -> None:
    root.add_typer(app, name="track")


@app.command()
def sync(
    names: Annotated[list[str] | None, typer.Argument(metavar="[SWEEP...]", help="[default: all there are]")] = None,
    runs: Runs = None,
    uri: Uri = "",
    artifacts: Annotated[
        str, typer.Option(help="Which: record,evaluations,report,checkpoints. Kept for later. [default: not the last]")
    ] = "",
    json: Json = False,
) -> None:
    """Sends what the store lacks, as often as you like: what it has already stays one point."""
    from crm.tracking.listing import choose_artifacts
    from crm.tracking.sending import sync as send
    from crm.tracking.store import connect, default_uri, words

    folder = options.runs_folder(runs)
    wanted = _listed(folder, names or [])
    if not wanted:
        typer.echo(f"there is nothing below {folder} that could be sent", err=True)
        raise typer.Exit(3)
    for name in wanted if artifacts else []:
        choose_artifacts(folder, name, artifacts.split(","))
    place = uri or default_uri(folder)
    sent: dict[str, int] = {}
    trouble = ""
    try:
        store = connect(place, folder)
        for name in wanted:
            sent[name] = send(store, folder, name, final=True)
            if not json:
                typer.echo(f"{name}: {sent[name]} points sent")
    except Exception as error:  # MLflow, its database and its server fail in more ways than can be listed here
        if os.environ.get("CRM_DEBUG"):
            raise
        trouble = words(error, place)
    if json:
        options.echo_json({"sent": sent, "trouble": trouble or None})
    if trouble:
        typer.echo(f"crm: tracking: {trouble}", err=True)
        raise typer.Exit(1)


@app.command()
def status(runs: Runs = None, uri: Uri = "", json: Json = False) -> None:
    """What the store lacks, from the run folders alone: no store is asked."""
    from crm.tracking.behind import behind
    from crm.tracking.listing import listed
    from crm.tracking.process import last_trouble
    from crm.tracking.store import default_uri, masked

    folder = options.runs_folder(runs)
    place = masked(uri or default_uri(folder))
    lines = [behind(folder, name, place) for name in listed(folder)]
    trouble = last_trouble(folder)
    if json:
        options.echo_json({"store": place, "sweeps": lines, "last_trouble": trouble or None})
        return
    typer.echo(f"store: {place}")
    rows = [[line["name"], f"{line['begun']}/{line['cells']}", _words(line)] for line in lines]
    typer.echo(options.table(rows, ["sweep", "begun", "behind"]) if rows else f"nothing below {folder} is mirrored yet")
    if trouble and any(line["points"] for line in lines):
        typer.echo(f"last trouble: {trouble}")


@app.command()
def ui(
    runs: Runs = None,
    uri: Uri = "",
    port: Annotated[int, typer.Option(help="On this machine alone.")] = 5000,
) -> None:
    """Opens the store in MLflow's own pages; Ctrl-C ends it."""
    from crm.tracking.store import calm, default_uri

    folder = options.runs_folder(runs)
    place = uri or default_uri(folder)
    if place.startswith("http"):
        typer.echo(f"the server shows it itself: {place}")
        return
    if place.startswith("sqlite:///") and not Path(place.removeprefix("sqlite:///")).exists():
        raise FileNotFoundError(f"there is no {place.removeprefix('sqlite:///')} yet; `crm track sync` makes it")
    calm()
    os.environ["MLFLOW_BACKEND_STORE_URI"] = place  # not on the command line, where others could read a password
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # else it starts a dozen processes
    typer.echo(f"http://127.0.0.1:{port}  (Ctrl-C ends it)")
    sys.stdout.flush()
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, "-m", *command])


def _listed(runs: Path, names: Sequence[str]) -> list[str]:
    """The names to send, each of them listed; a sweep that was never mirrored is listed now."""
    from crm.cli.tune import list_runs
    from crm.cluster.folder import SweepFolder
    from crm.tracking.listing import list_sweep, listed, refresh_report
    from crm.tuning.folder import BESIDE

    there = listed(runs)
    if not names:  # a study's jobs are kept beside those of sweeps; it is mirrored if it was listed
        started = {path.parent.name for path in (runs / ".sweeps").glob("*/asked.json")}
        names = sorted({*there, *(name for name in started if not name.startswith(BESIDE))})
    for name in names:
        report = home() / "reports" / name
        if name in there:
            refresh_report(runs, name, report)
            continue
        if name.startswith(BESIDE):
            list_runs(name.removeprefix(BESIDE), runs)
            continue
        asked = SweepFolder.of(runs, name).asked()
        found = options.find_sweep(name)[1]
        every = found.cells(asked.changes if asked else None)
        list_sweep(runs, name, found, every, report)
    return list(names)


def _words(line: dict[str, Any]) -> str:
    if not line["points"] and not line["runs"]:
        return "nothing"
    return f"{line['points']} points of {line['runs']} runs"
