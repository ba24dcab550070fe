"""crm status: how a sweep stands, from its run folders and, for one on a cluster, from the scheduler."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from crm.cli import options
from crm.cli.options import Base, Json, OfBase, Runs, Seeds, Set, Tiny, Without
from crm.cli.started import cells_of
from crm.cli.tables import status_of_tables
from crm.sweep import Cell, Sweep

EVERY = 5.0  # seconds between looks of --watch


def add_to(app: typer.Typer) -> None:
    app.command()(status)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One cell."""

    variant: str
    seed: int
    id: str
    state: str
    reason: str
    step: int
    steps: int
    miou: float | None  # newest validation mIoU, per cent
    best: float | None  # best validation mIoU so far, per cent
    eta: float | None  # seconds until trained
    attempts: int
    job: str  # the scheduler's id of the job that has it
    node: str
    heard: float | None  # when its run folder was last written to, seconds, UTC epoch
    log: str


def status(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="A sweep, as in `crm list sweeps`.")] = "",
    of_table: Annotated[str, typer.Option("--table", metavar="T", help="The paper's table T, or all of them.")] = "",
    sets: Set = None,
    seeds: Seeds = "",
    base: Base = "",
    recipe: OfBase = "",
    tiny: Tiny = False,
    without: Without = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every few seconds, until all is over.")] = False,
    runs: Runs = None,
    json: Json = False,
) -> None:
    """How a sweep stands: every cell's state, progress and score, and why those that failed did. Touches nothing."""
    folder = options.runs_folder(runs)
    if bool(of_table) == bool(name):
        raise ValueError("crm status takes a sweep, or --table T for one of the paper's tables (all: every one)")
    if of_table:
        status_of_tables(of_table, tiny, folder, json)
        return
    name, found, cells, _ = cells_of(name, sets, seeds, base, recipe, tiny, folder, without)
    if watch and not json:
        _watch(name, found, cells, folder)
        return
    lines, notes = stand(name, found, cells, folder)
    if json:
        options.echo_json([asdict(line) for line in lines])
        return
    typer.echo(status_text(lines, notes))


def _watch(name: str, found: Sweep, cells: Sequence[Cell], folder: Path) -> None:
    """The same again and again, in place; ends when nothing is on its way, or with Ctrl-C."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                lines, notes = stand(name, found, cells, folder)
                stamp = time.strftime("%H:%M:%S")
                live.update(Text(f"{name} at {stamp}\n\n{status_text(lines, notes)}"), refresh=True)
                if not any(line.state in ("queued", "running", "suspended", "unknown", "lost") for line in lines):
                    return
                time.sleep(EVERY)
        except KeyboardInterrupt:
            return


def stand(name: str, found: Sweep, cells: Sequence[Cell], runs: Path) -> tuple[list[Line], list[str]]:
    """Every cell as it stands, and what is worth saying besides. Changes nothing."""
    from crm.cluster.folder import SweepFolder

    folder = SweepFolder.of(runs, name)
    asked = folder.asked()
    seen, notes = {}, []
    if asked is not None:
        from crm.cluster.view import look

        now = look(folder, asked)
        seen = {one.id: one for one in now.cells}
        if now.trouble:
            notes.append(f"{now.trouble}; what only it knows is unknown")
        notes += [f"{len(now.removed)} jobs are of runs no longer in the sweep: crm cancel {name} --removed"] * bool(
            now.removed
        )
    return [_line(cell, found, runs, seen.get(cell.id)) for cell in cells], notes


def _line(cell: Cell, found: Sweep, runs: Path, seen: object) -> Line:
    from crm.cluster.view import Seen
    from crm.records import state

    now = seen.files if isinstance(seen, Seen) else state(runs, cell.config, found.selection, found.conditions)
    folder = runs / cell.id
    known = isinstance(seen, Seen)
    element = (seen.element if seen.live else seen.elsewhere) if isinstance(seen, Seen) else None
    return Line(
        variant=cell.variant, seed=cell.seed, id=cell.id,
        state=seen.name if known else now.name, reason=seen.reason if known else now.reason,
        step=now.step, steps=now.steps, miou=now.miou, best=now.best, eta=now.eta if now.name == "running" else None,
        attempts=_attempts(folder, now.name), job=element.id if element else "", node=element.node if element else "",
        heard=now.time, log=str(folder / "log.txt"),
    )  # fmt: skip


def _attempts(folder: Path, name: str) -> int:
    """How often a run was begun; not counted for one that nobody has begun."""
    if name == "missing":
        return 0
    try:
        ended = sum(name.endswith(".json") for name in os.listdir(folder / "attempts"))
    except FileNotFoundError:
        ended = 0
    return ended + os.path.exists(folder / "claim.json")


def status_text(lines: Sequence[Line], notes: Sequence[str] = ()) -> str:
    """Variants by seeds with states, then what waits, then the failures with their logs."""
    seeds = list(dict.fromkeys(line.seed for line in lines))
    variants = list(dict.fromkeys(line.variant for line in lines))
    cell = {(line.variant, line.seed): _cell_text(line) for line in lines}
    rows = [[variant, *(cell[variant, seed] for seed in seeds)] for variant in variants]
    text = options.table(rows, ["variant", *(f"seed {seed}" for seed in seeds)])
    counts = {name: sum(line.state == name for line in lines) for name in dict.fromkeys(line.state for line in lines)}
    summary = ", ".join(f"{count} {name}" for name, count in counts.items())
    waits: dict[str, list[str]] = {}
    for line in lines:
        if line.reason and line.state in ("queued", "held", "cancelled", "suspended", "lost", "unknown"):
            waits.setdefault(f"{line.state}: {line.reason}", []).append(f"{line.variant}/{line.seed}")
    reasons = [f"{why} ({', '.join(labels[:4])}{' ...' if len(labels) > 4 else ''})" for why, labels in waits.items()]
    failures = [
        f"{line.variant}/{line.seed} failed at step {line.step}: {line.reason}\n  log: {line.log}"
        for line in lines
        if line.state == "failed"
    ]
    etas = [line.eta for line in lines if line.eta is not None]
    left = f"; the last that runs is trained in {options.duration(max(etas))}" if etas else ""
    return "\n".join([text, "", f"{len(lines)} cells: {summary}{left}", *reasons, *failures, *notes])


def _cell_text(line: Line) -> str:
    best = "" if line.best is None or line.miou is None or line.best <= line.miou else f" (best {line.best:.1f})"
    score = "" if line.miou is None else f" val {line.miou:.1f}{best}"
    begun = line.state not in ("missing", "done", "trained") and line.step
    share = f" {100 * line.step / line.steps:.0f}%" if begun else ""
    eta = f" eta {options.duration(line.eta)}" if line.state == "running" and line.eta is not None else ""
    again = f" attempt {line.attempts}" if line.attempts > 1 and line.state != "done" else ""
    return f"{line.state}{share}{score}{eta}{again}"
