"""Sweeps: plan, run on this machine, see how they stand, report."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from crm.cli import afterwards, options
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
    Tiny,
    Without,
    Yes,
)
from crm.config import Config, difference, override, run_id
from crm.machine import Machine, cores, home, initial_file
from crm.sweep import Cell, Sweep

Name = Annotated[str, typer.Argument(metavar="NAME", help="A sweep, as in `crm list sweeps`.")]
CLUSTERS = ("inline", "local")


def add_to(app: typer.Typer) -> None:
    for command in (plan, sweep, status, report):
        app.command()(command)


def plan(
    name: Name,
    sets: Set = None,
    seeds: Seeds = "",
    base: Base = "",
    recipe: OfBase = "",
    tiny: Tiny = False,
    without: Without = None,
    runs: Runs = None,
    json: Json = False,
) -> None:
    """What `crm sweep NAME` would do: cells, what is reused, estimated time."""
    name, found = options.find_sweep(name, seeds, base, recipe, tiny, without)
    lines = planned(found, found.cells(options.changes(sets)), options.runs_folder(runs))
    options.echo_json(_plan_json(found, lines)) if json else typer.echo(plan_text(name, found, lines, cores()))


def sweep(
    name: Name,
    sets: Set = None,
    from_scratch: FromScratch = False,
    seeds: Seeds = "",
    base: Base = "",
    recipe: OfBase = "",
    tiny: Tiny = False,
    without: Without = None,
    runs: Runs = None,
    data: Data = None,
    cluster: Annotated[str, typer.Option(help="inline (one after another, here) or local (workers).")] = "local",
    workers: Annotated[int, typer.Option("--workers", "-j", min=0, help="Runs at once. [default: one per core]")] = 0,
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
    from crm.names import chosen

    name, found = options.find_sweep(name, seeds, base, recipe, tiny, without)
    sets = options.scratch(sets, from_scratch)
    chosen("cluster", cluster, dict.fromkeys(CLUSTERS))
    folder, data_root = options.runs_folder(runs), options.data_folder(data)
    cells = found.cells(options.changes(sets))
    check_data(cells, found.also_on, data_root, folder)
    lines = planned(found, cells, folder)
    if cluster == "inline":
        workers = 1
    workers = min(workers or cores(), len(cells))
    say = _say_nothing if json else typer.echo
    say(plan_text(name, found, lines, workers))
    if dry_run:
        options.echo_json(_plan_json(found, lines)) if json else None
        return
    left = [line for line in lines if line.todo]
    besides = afterwards.missing(found, cells, folder)
    if left and not yes:
        _confirm(len(left))
    machine = Machine(
        runs=folder,
        data=data_root,
        weights=home() / "weights",
        device=device,
        threads=threads or options.share_of_threads(workers),
        loader_workers=loader_workers,
        cache=options.cache_folder(cache),
    )
    machine = options.with_machine(machine, how)
    try:
        failed = run_cells(name, found, cells, machine, workers, cluster, track, say, json)
        trained = [cell for cell in cells if cell.label not in failed]
        failed |= (also := afterwards.carry_out(found, trained, machine, json))
    except KeyboardInterrupt:
        options.interrupted()
    for label, reason in also.items():
        typer.echo(f"{label} failed: {reason}", err=True)
    written = write_report(name, found, folder, data_root, sets, say) if report and not failed else None
    if json:
        after = planned(found, cells, folder)
        options.echo_json({"cells": [asdict(line) for line in after], "failed": failed, "report": written})
    if failed:
        raise typer.Exit(1)
    if not left and not besides and not report:
        say("nothing to do: every cell is trained and evaluated")
        raise typer.Exit(3)


def status(
    name: Name,
    sets: Set = None,
    seeds: Seeds = "",
    base: Base = "",
    recipe: OfBase = "",
    tiny: Tiny = False,
    without: Without = None,
    runs: Runs = None,
    json: Json = False,
) -> None:
    """How a sweep stands: every cell's state, and why those that failed did."""
    name, found = options.find_sweep(name, seeds, base, recipe, tiny, without)
    lines = planned(found, found.cells(options.changes(sets)), options.runs_folder(runs))
    if json:
        options.echo_json([asdict(line) for line in lines])
        return
    typer.echo(status_text(found, lines))


def report(
    name: Name,
    sets: Set = None,
    seeds: Seeds = "",
    base: Base = "",
    recipe: OfBase = "",
    tiny: Tiny = False,
    without: Without = None,
    runs: Runs = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Writes the tables, curves, panels and page of a sweep from its finished runs."""
    name, found = options.find_sweep(name, seeds, base, recipe, tiny, without)
    say = _say_nothing if json else typer.echo
    path = write_report(name, found, options.runs_folder(runs), options.data_folder(data), sets, say)
    if json:
        options.echo_json({"report": path})


# ---------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True, kw_only=True)
class PlanLine:
    """One cell as it stands."""

    variant: str
    seed: int
    id: str
    state: str
    reason: str
    step: int
    steps: int
    miou: float | None  # newest validation mIoU, per cent
    eta: float | None
    log: str
    seconds: float | None  # estimated, from this project's own history; None is unknown
    differs: dict[str, Any]  # from the row that its gain is measured against; that row's own: from the sweep's base

    @property
    def todo(self) -> bool:
        return self.state not in ("done", "running")


def planned(found: Sweep, cells: Sequence[Cell], runs: Path) -> list[PlanLine]:
    """Every cell with its state and estimated time; changes nothing."""
    from crm.records import state

    lines = []
    against = _against(found, cells)
    for cell in cells:
        now = state(runs, cell.config, found.selection, found.conditions)
        speed = step_seconds(cell.config, runs, found.seeds)
        lines.append(
            PlanLine(
                variant=cell.variant, seed=cell.seed, id=cell.id, state=now.name, reason=now.reason, step=now.step,
                steps=now.steps, miou=now.miou, eta=now.eta, log=str(runs / cell.id / "log.txt"),
                seconds=None if speed is None else speed * (now.steps - now.step),
                differs=_without_seed(difference(cell.config, against[cell.variant])),
            )
        )  # fmt: skip
    return lines


def _against(found: Sweep, cells: Sequence[Cell]) -> dict[str, Config]:
    """Of each row, the config that it is set against: that of its baseline, and the base for a baseline."""
    configs = {cell.variant: cell.config for cell in cells}
    baseline = {row: part.reference for part in found.parts().values() for row in part.variants}
    return {row: found.base if row == first else configs[first] for row, first in baseline.items()}


def _without_seed(changes: dict[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in changes.items() if path != "seed"}


def step_seconds(config: Config, runs: Path, seeds: Sequence[int]) -> float | None:
    """Seconds per step of this config's finished runs at any of the seeds; None where there is none."""
    from crm.records import read_json

    results = [read_json(runs / run_id(override(config, {"seed": seed})) / "result.json") for seed in seeds]
    speeds = [result["seconds_per_step"] for result in results if result]
    return sum(speeds) / len(speeds) if speeds else None


def plan_text(name: str, found: Sweep, lines: Sequence[PlanLine], workers: int) -> str:
    """The plan as a person reads it."""
    rows = []
    baselines = {part.reference for part in found.parts().values()}
    for variant in dict.fromkeys(line.variant for line in lines):
        own = [line for line in lines if line.variant == variant]
        differs = ", ".join(f"{path}={value}" for path, value in own[0].differs.items())
        if variant in baselines:
            differs = f"(baseline: the base{' with ' if differs else ''}{differs})"
        have, todo = sum(line.state == "done" for line in own), [line for line in own if line.todo]
        costs = [line.seconds for line in todo]
        cost = None if None in costs else sum(cost for cost in costs if cost is not None)
        running = sum(line.state == "running" for line in own)
        work = f"{len(todo)} to run" + (f", {running} running" if running else "") if todo or running else "reuse"
        rows.append([variant, differs, f"{have}/{len(own)}", work, options.duration(cost) if todo else "-"])
    todo = [line for line in lines if line.todo]
    known = [line.seconds for line in todo if line.seconds is not None]
    total = options.duration(sum(known) / workers if len(known) == len(todo) else None)
    text = options.table([[row[0], row[2], row[3], row[4], row[1]] for row in rows],
                         ["variant", "have", "work", "training", "differs from its baseline"])  # fmt: skip
    failed = [f"  failed before: {line.variant}/{line.seed}: {line.reason}" for line in lines if line.state == "failed"]
    summary = (
        f"{len(todo)} of {len(lines)} runs to do, {workers} at a time; estimated time {total} "
        f"(training, from finished runs); {len(found.conditions)} conditions each"
    )
    reasons = dict.fromkeys(found.left_out.values())
    gone = [f"left out: {', '.join(r for r, w in found.left_out.items() if w == why)}: {why}" for why in reasons]
    besides = [words] if (words := afterwards.words(found)) else []
    return "\n".join([f"{name}: {found.title}", "", text, "", *gone, *failed, summary, *besides])


def _plan_json(found: Sweep, lines: Sequence[PlanLine]) -> list[dict[str, Any]]:
    """The cells, and at the end the rows that this form of the sweep lacks."""
    gone = [{"variant": row, "state": "left out", "reason": why} for row, why in found.left_out.items()]
    return [*(asdict(line) for line in lines), *gone]


def status_text(found: Sweep, lines: Sequence[PlanLine]) -> str:
    """Variants by seeds with states, then the failures with their logs."""
    seeds = list(dict.fromkeys(line.seed for line in lines))
    variants = list(dict.fromkeys(line.variant for line in lines))
    cell = {(line.variant, line.seed): _cell_text(line) for line in lines}
    rows = [[variant, *(cell[variant, seed] for seed in seeds)] for variant in variants]
    text = options.table(rows, ["variant", *(f"seed {seed}" for seed in seeds)])
    counts = {name: sum(line.state == name for line in lines) for name in dict.fromkeys(line.state for line in lines)}
    summary = ", ".join(f"{count} {name}" for name, count in counts.items())
    failures = [
        f"{line.variant}/{line.seed} failed at step {line.step}: {line.reason}\n  log: {line.log}"
        for line in lines
        if line.state == "failed"
    ]
    return "\n".join([text, "", f"{len(lines)} cells: {summary}", *failures])


def _cell_text(line: PlanLine) -> str:
    score = "" if line.miou is None else f" val {line.miou:.1f}"
    share = f" {100 * line.step / line.steps:.0f}%" if line.state in ("running", "interrupted", "failed") else ""
    eta = f" eta {options.duration(line.eta)}" if line.state == "running" and line.eta is not None else ""
    return f"{line.state}{share}{score}{eta}"


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


def run_cells(
    name: str,
    found: Sweep,
    cells: Sequence[Cell],
    machine: Machine,
    workers: int,
    cluster: str,
    track: bool,
    say: Any,
    quiet: bool,
) -> dict[str, str]:
    """Runs what is left and returns the failures, label -> reason; mirrors the runs meanwhile."""
    from crm.cli.progress import Board
    from crm.local import Queue, run_inline, run_local
    from crm.mirror import start as start_mirror
    from crm.records import open_run

    for cell in cells:
        open_run(machine.runs, cell.config)  # refuses moved defaults before anything starts
    queue = Queue(cells=cells, machine=machine, selection=found.selection, conditions=found.conditions, workers=workers)
    mirror = start_mirror(machine.runs, name, found, cells) if track else None
    try:
        with Board(quiet) as board:
            outcome = (run_local if cluster == "local" else run_inline)(queue, board.show)
    finally:
        if mirror is not None and (trouble := mirror.finish()):
            say(f"tracking: {trouble}; the runs themselves are complete, and the next call sends what is missing")
    for cell in cells:
        if reason := outcome.failed.get(cell.label) or outcome.unfinished.get(cell.label):
            typer.echo(f"{cell.label} failed: {reason}\n  log: {machine.runs / cell.id / 'log.txt'}", err=True)
    return {**outcome.failed, **outcome.unfinished}


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
