"""Sweeps: run on this machine or on a cluster, report."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from crm.cli import afterwards, options
from crm.cli.evaluate import evaluate
from crm.cli.filling import Work, fill
from crm.cli.local import detach, mirror_once, places, run_cells, then
from crm.cli.options import (
    Base,
    Cache,
    Data,
    Device,
    FromScratch,
    Json,
    Loaders,
    OfBase,
    On,
    Runs,
    Seeds,
    Set,
    Slurm,
    SweepName,
    Tiny,
    Without,
    Yes,
)
from crm.cli.plan import MaxGpuHours, Only, Rerun, plan_json, plan_text, planned, refuse_budget
from crm.cli.started import submit_sweep, with_queue
from crm.machine import Machine, home, initial_file
from crm.sweep import Cell, Sweep, only

CLUSTERS = ("inline", "local", "slurm")


def add_to(app: typer.Typer) -> None:
    for command in (sweep, report):
        app.command()(command)


def sweep(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="A sweep, as in `crm list sweeps`.")] = "",
    for_table: Annotated[
        str, typer.Option("--for", metavar="T", help="Exactly what the paper's table T lacks, or all of them.")
    ] = "",
    sets: Set = None,
    from_scratch: FromScratch = False,
    seeds: Seeds = "",
    base: Base = "",
    recipe: OfBase = "",
    tiny: Tiny = False,
    without: Without = None,
    runs: Runs = None,
    data: Data = None,
    cluster: Annotated[
        str, typer.Option(help="inline (one after another, here), local (workers here) or slurm.")
    ] = "local",
    resources: Slurm = None,
    chosen_cells: Only = None,
    rerun: Rerun = "",
    max_gpu_hours: MaxGpuHours = None,
    held: Annotated[bool, typer.Option("--held", help="Submit, but do not start before crm release.")] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke/--no-smoke", help="Jobs wait for a smoke test of the configs.")
    ] = True,
    workers: Annotated[
        int, typer.Option("--workers", "-j", min=0, help="Runs at once. [default: one per core or place on a GPU]")
    ] = 0,
    gpus: Annotated[str, typer.Option(metavar="0,1", help="GPUs that the runs are dealt out to. [default: all]")] = "",
    per_gpu: Annotated[int, typer.Option("--per-gpu", min=1, help="Runs at once on every GPU.")] = 1,
    detached: Annotated[bool, typer.Option("--detach", help="Leave the local queue to itself and return.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of one run. [default: its share]")] = 0,
    loader_workers: Loaders = 0,
    cache: Cache = False,
    how: On = None,
    device: Device = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan.")] = False,
    track: Annotated[bool, typer.Option("--track/--no-track", help="Mirror the runs into MLflow.")] = True,
    report: Annotated[bool, typer.Option("--report", help="Write the report at the end and print its table.")] = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Runs every cell of a sweep that is missing, interrupted or failed, and evaluates it; shows the plan first."""
    from crm.cluster.settings import resources as slurm_resources
    from crm.names import chosen
    from crm.stale import supersede
    from crm.tracking.listing import list_sweep

    if bool(for_table) == bool(name):
        raise ValueError(
            "crm sweep takes a sweep, or --for T for what one of the paper's tables lacks (all: every one)"
        )
    if for_table:
        alone = {"--set": sets, "--from-scratch": from_scratch, "--seeds": seeds, "--base": base, "--recipe": recipe,
                 "--without": without, "--only": chosen_cells, "--detach": detached, "--report": report}  # fmt: skip
        if given := [option for option, value in alone.items() if value]:
            raise ValueError(f"--for says itself what is run; leave out {', '.join(given)}")
        same = {"runs": runs, "data": data, "cluster": cluster, "resources": resources, "workers": workers,
                "device": device, "threads": threads, "json": json}  # fmt: skip
        own = {"max_gpu_hours": max_gpu_hours, "held": held, "smoke": smoke, "gpus": gpus, "per_gpu": per_gpu,
               "loader_workers": loader_workers, "cache": cache, "how": how, "dry_run": dry_run, "track": track,
               "yes": yes}  # fmt: skip

        def start(work: Work) -> None:
            if work.rerun and work.rerun != rerun:
                how = "evaluated" if work.evaluate else "trained"
                typer.echo(f"not {how} anew without --rerun {work.rerun}", err=True)
            elif not work.evaluate:
                sweep(
                    f"{work.sweep}+{work.suite}", chosen_cells=list(work.only) or None, rerun=work.rerun, **same, **own
                )
            elif dry_run:
                typer.echo("evaluates the runs that are trained by then")
            else:
                evaluate(work.sweep, suite_name=work.suite, selection=work.selection, rerun=work.rerun, **same)

        fill(for_table, tiny, options.runs_folder(runs), start, cluster == "slurm" or dry_run, json)
        return
    name, found = options.find_sweep(name, seeds, base, recipe, tiny, without)
    sets = options.scratch(sets, from_scratch)
    chosen("cluster", cluster, dict.fromkeys(CLUSTERS))
    folder, data_root = options.runs_folder(runs), options.data_folder(data)
    every = found.cells(options.changes(sets))
    cells = only(every, chosen_cells)
    check_data(cells, found.also_on, data_root, folder)
    history = slurm_resources(home(), resources or []).device if cluster == "slurm" else device.partition(":")[0]
    lines = planned(found, every, folder, cells, history, rerun)
    if cluster == "slurm":
        lines = with_queue(name, lines, folder)
    if cluster == "inline":
        workers = 1
    where = places(workers, device, gpus, per_gpu, len(cells))
    say = _say_nothing if json else typer.echo
    say(plan_text(name, found, lines, where.workers, folder))
    if dry_run:
        options.echo_json(plan_json(found, lines, folder)) if json else None
        return
    if max_gpu_hours is not None:
        refuse_budget(lines, max_gpu_hours)
    left = [line for line in lines if line.todo]
    besides = afterwards.missing(found, cells, folder)
    if left and not yes:
        _confirm(len(left))
    if rerun:
        mine = {line.id for line in lines if line.rerun}
        supersede(folder, [cell for cell in cells if cell.id in mine], rerun)
    machine = Machine(
        runs=folder,
        data=data_root,
        weights=home() / "weights",
        device=device,
        threads=threads or options.share_of_threads(where.workers),
        loader_workers=loader_workers,
        cache=options.cache_folder(cache),
    )
    machine = options.with_machine(machine, how)
    changes, partly = options.changes(sets), bool(chosen_cells)
    nothing = not left and not (besides and cluster != "slurm")
    if cluster == "slurm" and not nothing:

        def accepted() -> None:
            if track:
                list_sweep(folder, name, found, every, home() / "reports" / name)

        done = submit_sweep(name, found, cells, machine, resources or [], partly, changes, held, smoke, say, accepted)
        options.echo_json(done) if json else None
        if not done["submitted"]:
            raise typer.Exit(1)
        return
    if detached and not nothing:
        log = detach(folder, name, sys.argv[1:])
        say(f"{len(left)} runs go on in the background: crm status {name} --watch; what it prints is in {log}")
        options.echo_json({"log": log}) if json else None
        return
    failed: dict[str, str] = {}
    if cluster != "slurm":
        try:
            failed = run_cells(name, found, cells, machine, where, cluster, track, say, json, partly, changes)
            failed = then(found, cells, machine, failed, json)
        except KeyboardInterrupt:
            options.interrupted()
    written = write_report(name, found, folder, data_root, sets, say) if report and not failed else None
    if track and (written or nothing) and (cluster != "slurm" or os.environ.get("MLFLOW_TRACKING_URI")):
        mirror_once(name, found, cells, folder, say)  # the report, or what a store lacked the last time
    if json:
        after = planned(found, every, folder, cells)
        options.echo_json({"cells": [asdict(line) for line in after], "failed": failed, "report": written})
    if failed:
        raise typer.Exit(1)
    if nothing and not report:
        say("nothing to do: every cell is trained and evaluated, or on its way")
        raise typer.Exit(3)


def report(
    name: SweepName,
    sets: Set = None,
    seeds: Seeds = "",
    base: Base = "",
    recipe: OfBase = "",
    tiny: Tiny = False,
    without: Without = None,
    runs: Runs = None,
    data: Data = None,
    from_mlflow: Annotated[
        str, typer.Option("--from-mlflow", metavar="URI", help="Read an MLflow store instead of run folders.")
    ] = "",
    json: Json = False,
) -> None:
    """Writes the tables, curves, panels and page of a sweep from its finished runs."""
    name, found = options.find_sweep(name, seeds, base, recipe, tiny, without)
    say = _say_nothing if json else typer.echo
    folder = options.runs_folder(runs)
    if from_mlflow:
        from analysis.from_mlflow import fetch

        folder = fetch(found, from_mlflow, home() / "cache", options.changes(sets))
    path = write_report(name, found, folder, options.data_folder(data), sets, say)
    if json:
        options.echo_json({"report": path})


# ---------------------------------------------------------------------------------------------- how it stands


# ---------------------------------------------------------------------------------------------- running


def check_data(cells: Sequence[Cell], also_on: Sequence[str], data_root: Path | None, runs: Path) -> None:
    """Refuses before anything starts if the data set of a cell is not there, or the weights it starts from."""
    from crm.data.dataset import open_run_split, open_split, run_splits

    for init in sorted({cell.config.model.init for cell in cells}):
        initial_file(init, None, runs)
    for data in {cell.config.data for cell in cells}:
        for split in run_splits(data):
            open_run_split(data, split, data_root)
    for dataset in also_on:
        open_split(dataset, "test", data_root=data_root)


def write_report(name: str, found: Sweep, runs: Path, data: Path | None, sets: list[str] | None, say: Any) -> str:
    """The report's page; prints the tables, but for the one of all conditions."""
    from analysis.report import report as make

    page = make(name, found, runs, home() / "reports", data_root=data, changes=options.changes(sets))
    others = sorted(path for path in page.parent.glob("*.md") if path.stem not in ("table", "robustness"))
    for path in (page.parent / "table.md", *others):
        say("\n" + path.read_text().rstrip())
    say(f"\nreport: {page}")
    return str(page)


def _confirm(count: int) -> None:
    """Asks on a terminal; elsewhere refuses and says how to go on."""
    if not sys.stdin.isatty():
        raise ValueError("there is no terminal to ask on; add --yes to run this plan, or --dry-run to only see it")
    if not typer.confirm(f"Run {count} runs?", default=False):
        typer.echo("nothing was started")
        raise typer.Exit(4)


def _say_nothing(text: str) -> None:
    """Under --json only JSON is printed."""
