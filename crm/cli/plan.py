"""crm plan: what a sweep would do, and what that costs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from crm.cli import afterwards, options
from crm.cli.options import Base, Json, OfBase, Runs, Seeds, Set, SweepName, Tiny
from crm.config import Config, difference, override, run_id
from crm.machine import cores
from crm.sweep import Cell, Sweep


def add_to(app: typer.Typer) -> None:
    app.command()(plan)


def plan(
    name: SweepName,
    sets: Set = None,
    seeds: Seeds = "",
    base: Base = "",
    recipe: OfBase = "",
    tiny: Tiny = False,
    runs: Runs = None,
    json: Json = False,
) -> None:
    """What `crm sweep NAME` would do: cells, what is reused, estimated time."""
    name, found = options.find_sweep(name, seeds, base, recipe, tiny)
    lines = planned(found, found.cells(options.changes(sets)), options.runs_folder(runs))
    options.echo_json(plan_json(found, lines)) if json else typer.echo(plan_text(name, found, lines, cores()))


ON_ITS_WAY = ("running", "queued", "held", "suspended", "unknown")  # states of cells that nobody needs to start


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
        return self.state not in ("done", *ON_ITS_WAY)


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


def plan_json(found: Sweep, lines: Sequence[PlanLine]) -> list[dict[str, Any]]:
    """The cells, and at the end the rows that this form of the sweep lacks."""
    gone = [{"variant": row, "state": "left out", "reason": why} for row, why in found.left_out.items()]
    return [*(asdict(line) for line in lines), *gone]
