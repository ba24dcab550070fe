"""crm plan: what a sweep would do, from what, what that costs, and whether there is room for it."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from crm.cli import afterwards, options
from crm.cli.options import Base, Json, OfBase, Runs, Seeds, Set, SweepName, Tiny, Without
from crm.config import Config, difference
from crm.machine import cores
from crm.sweep import Cell, Sweep, only

Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="CELL", help="A row, row/seed, or pattern such as 'patch*' (repeatable)."),
]
Rerun = Annotated[
    str,
    typer.Option(
        "--rerun", metavar="WHICH", help="Train anew: stale (code or a default changed), drifted (a default), failed, "
        "or all. The old run is kept in runs/.superseded.",
    ),
]  # fmt: skip
MaxGpuHours = Annotated[
    float | None, typer.Option("--max-gpu-hours", min=0.0, help="Refuse a plan that costs more, or nobody knows what.")
]
SHOWN = 5  # cells named in one line of text


class Refused(Exception):
    """A budget or a policy says no; exit code 4."""


def add_to(app: typer.Typer) -> None:
    app.command()(plan)


def plan(
    name: SweepName,
    sets: Set = None,
    seeds: Seeds = "",
    base: Base = "",
    recipe: OfBase = "",
    tiny: Tiny = False,
    without: Without = None,
    chosen: Only = None,
    rerun: Rerun = "",
    max_gpu_hours: MaxGpuHours = None,
    device: Annotated[str, typer.Option(help="Whose history counts: cpu or cuda. [default: the most used]")] = "",
    runs: Runs = None,
    json: Json = False,
) -> None:
    """What `crm sweep NAME` would do: cells, what is reused and why, what is stale, cost in time and disk."""
    name, found = options.find_sweep(name, seeds, base, recipe, tiny, without)
    every, folder = found.cells(options.changes(sets)), options.runs_folder(runs)
    lines = planned(found, every, folder, only(every, chosen), device, rerun)
    if json:
        options.echo_json(plan_json(found, lines, folder))
    else:
        typer.echo(plan_text(name, found, lines, cores(), folder))
    if max_gpu_hours is not None:
        refuse_budget(lines, max_gpu_hours)


# ---------------------------------------------------------------------------------------------- the lines


ON_ITS_WAY = ("running", "queued", "held", "suspended", "unknown")  # states of cells that nobody needs to start


@dataclass(frozen=True, kw_only=True)
class PlanLine:
    """One cell as it stands, and what is left of it."""

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
    seconds: float | None  # of the training that is left, estimated from finished runs; None is unknown
    evaluation: float | None  # seconds of the evaluation that is left
    hours: float | None  # that devices are taken up: training, and evaluation where it is known
    device: str  # cpu or cuda, on which those finished runs were; "" where there are none
    basis: str  # which finished runs the estimate is from
    bytes: int | None  # it will write
    reused: str  # by what the run was trained that is used as it is; "" where it is to be trained
    stale: str  # why the run would come out otherwise now
    code_known: bool  # whether the record of a run tells which code trained it
    rerun: str  # why it is trained anew; "" where it is not
    differs: dict[str, Any]  # from the row that its gain is measured against; that row's own: from the sweep's base

    @property
    def label(self) -> str:
        return f"{self.variant}/{self.seed}"

    @property
    def todo(self) -> bool:
        return bool(self.rerun) or self.state not in ("done", *ON_ITS_WAY)


def planned(
    found: Sweep,
    every: Sequence[Cell],
    runs: Path,
    cells: Sequence[Cell] | None = None,
    device: str = "",
    rerun: str = "",
) -> list[PlanLine]:
    """Cells with their state, what they are made from and what they cost; changes nothing.

    Args:
        every: all cells of the sweep, which rows are set against each other.
        cells: those that are asked for; all by default.
        device: cpu or cuda, whose history counts; "" is the most used.
        rerun: which runs are to be trained anew, a key of crm.stale.RERUN.
    """
    from crm.history import History
    from crm.records import read_json, state
    from crm.stale import due, stale

    cells = every if cells is None else cells
    again = due(runs, cells, rerun) if rerun else {}
    lines: list[PlanLine] = []
    as_recorded: dict[str, tuple[Config, Mapping[str, Any]]] = {}
    differs = _differences(found, every)
    for cell in cells:
        folder = runs / cell.id
        now = state(runs, cell.config, found.selection, found.conditions)
        why = again.get(cell.id, "")
        result, old, made = None, None, {}
        if now.name != "missing":
            result = read_json(f"{folder}/result.json")
            made = read_json(f"{folder}/provenance.json") or {}
            old = stale(folder, cell, made)
            if result and not old.drifted:
                as_recorded[cell.id] = cell.config, result
        line = PlanLine(
            variant=cell.variant, seed=cell.seed, id=cell.id, state=now.name, reason=now.reason, step=now.step,
            steps=now.steps, miou=now.miou, eta=now.eta, log=str(folder / "log.txt"), seconds=None, evaluation=None,
            hours=None, device="", basis="", bytes=None,
            reused=_trained_by(result, made) if result and not why else "",
            stale=str(old or ""), code_known=old is None or old.code is not None, rerun=why,
            differs=differs[cell.variant],
        )  # fmt: skip
        lines.append(line)
    history = History(runs, device, as_recorded)
    return [
        replace(line, **_left(history, found, cell, line, runs)) if line.todo else line
        for cell, line in zip(cells, lines, strict=True)
    ]


def _left(history: Any, found: Sweep, cell: Cell, line: PlanLine, runs: Path) -> dict[str, Any]:
    """What is left of a cell, by the project's history; nothing where that has nothing like it."""
    from crm.records import lacking

    fresh = line.state == "missing" or bool(line.rerun)
    conditions = len(found.conditions if fresh else lacking(runs / cell.id, found.selection, found.conditions))
    steps = 0 if not line.rerun and line.reused else line.steps - (0 if fresh else line.step)
    return _cost(history, cell.config, steps, conditions)


def _differences(found: Sweep, every: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Of each row, its settings that its baseline lacks; of a baseline, those that the base lacks."""
    configs = {cell.variant: cell.config for cell in every}
    against = {row: part.reference for part in found.parts().values() for row in part.variants}
    changes = {row: difference(configs[row], found.base if row == first else configs[first])
               for row, first in against.items()}  # fmt: skip
    return {row: {path: value for path, value in changed.items() if path != "seed"} for row, changed in changes.items()}


def _cost(history: Any, config: Config, steps: int, conditions: int) -> dict[str, Any]:
    if (cost := history.cost(config)) is None:
        return {}
    size = history.size(config)
    evaluation = 0.0 if not conditions else None if cost.condition is None else cost.condition * conditions
    known = steps or evaluation is not None  # an evaluation that costs nobody knows what is the whole of it
    hours = (cost.step * steps + (evaluation or 0.0)) * cost.processes / 3600 if known else None
    runs = f"{cost.runs} finished run{'s' * (cost.runs > 1)} of {cost.basis} on {cost.device}"
    written = (size.training if steps else 0) + round((size.condition or 0) * conditions)
    return {
        "seconds": cost.step * steps, "evaluation": evaluation, "hours": hours, "device": cost.device,
        "basis": runs, "bytes": written,
    }  # fmt: skip


def _trained_by(result: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    """Which code trained a run, in how many attempts."""
    commit = str(made.get("commit", "unknown"))[:10]
    attempts = result.get("attempts", 1)
    changed = " with uncommitted changes" if made.get("dirty") else ""
    return f"commit {commit}{changed}" + (f", {attempts} attempts" if attempts > 1 else "")


def refuse_budget(lines: Sequence[PlanLine], hours: float) -> None:
    """Refused, unless what is to be done is known to cost no more than this many hours of device."""
    todo = [line for line in lines if line.todo]
    if unknown := [line.label for line in todo if line.hours is None]:
        raise Refused(
            f"--max-gpu-hours {hours:g}: nobody knows what {_named(unknown)} would cost, for no run like it is "
            f"finished. Run one cell for a history, as in --only '{unknown[0]}' without a budget"
        )
    if (total := sum((line.hours or 0.0 for line in todo), 0.0)) > hours:
        raise Refused(
            f"--max-gpu-hours {hours:g}: the runs to do, {len(todo)}, would cost about {_hours(total, todo)}; "
            "--only and --seeds take fewer of them"
        )


# ---------------------------------------------------------------------------------------------- in words


def plan_text(name: str, found: Sweep, lines: Sequence[PlanLine], workers: int, runs: Path) -> str:
    """The plan as a person reads it."""
    rows = []
    baselines = {part.reference for part in found.parts().values()}
    for variant, own in by_variant(lines).items():
        differs = ", ".join(f"{path}={value}" for path, value in own[0].differs.items())
        if variant in baselines:
            differs = f"(baseline: the base{' with ' if differs else ''}{differs})"
        have, todo = sum(line.state == "done" and not line.rerun for line in own), [line for line in own if line.todo]
        states = Counter(line.state for line in own if line.state in ON_ITS_WAY and not line.rerun)
        work = [f"{len(todo)} to run"] * bool(todo) + [f"{count} {state}" for state, count in states.items()]
        rows.append(
            [
                variant,
                f"{have}/{len(own)}",
                ", ".join(work) or "reuse",
                options.duration(_seconds(todo)) if todo else "-",
                differs,
            ]
        )
    todo = [line for line in lines if line.todo]
    seconds = _seconds(todo)
    text = options.table(rows, ["variant", "have", "work", "time", "differs from its baseline"])
    failed = [f"  failed before: {line.label}: {line.reason}" for line in lines if line.state == "failed"]
    summary = (
        f"{len(todo)} of {len(lines)} runs to do, {workers} at a time; estimated time "
        f"{options.duration(None if seconds is None else seconds / workers)}; {len(found.conditions)} conditions each"
    )
    reasons = dict.fromkeys(found.left_out.values())
    gone = [f"left out: {', '.join(r for r, w in found.left_out.items() if w == why)}: {why}" for why in reasons]
    besides = [words] if (words := afterwards.words(found)) else []
    costs = [cost_words(todo), disk_words(todo, runs)] if todo else []
    return "\n".join(
        [f"{name}: {found.title}", "", text, "", *gone, *_origins(lines), *failed, summary, *costs, *besides]
    )


def by_variant(lines: Sequence[PlanLine]) -> dict[str, list[PlanLine]]:
    rows: dict[str, list[PlanLine]] = {}
    for line in lines:
        rows.setdefault(line.variant, []).append(line)
    return rows


def _seconds(todo: Sequence[PlanLine]) -> float | None:
    """Training and, where it is known, evaluation; None where one is unknown."""
    if any(line.hours is None for line in todo):
        return None
    return sum(((line.seconds or 0.0) + (line.evaluation or 0.0) for line in todo), 0.0)


def _origins(lines: Sequence[PlanLine]) -> list[str]:
    """What is reused, by what trained it; what is stale, by why; what is trained anew."""
    said = []
    for title, kind in (("reused", "reused"), ("stale, reused all the same", "stale"), ("trained anew", "rerun")):
        groups: dict[str, list[str]] = {}
        for line in lines:
            if (why := getattr(line, kind)) and not (kind == "stale" and line.rerun):
                groups.setdefault(why, []).append(f"{line.label} ({line.id})" if kind == "reused" else line.label)
        how = {"reused": "trained by ", "stale": "", "rerun": ""}[kind]
        said += [f"{title}: {_named(labels)}: {how}{why}" for why, labels in groups.items()]
    if any(line.stale and not line.rerun for line in lines):
        said.append("  --rerun stale trains them anew, and keeps the old ones")
    if unknown := [line.label for line in lines if not line.code_known and not line.rerun]:
        said.append(f"from before code was recorded, so nobody knows whether it changed since: {_named(unknown)}")
    return said


def _named(labels: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = len(labels) - SHOWN
    return ", ".join(labels[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def cost_words(todo: Sequence[PlanLine]) -> str:
    """Hours of device of what is to be done, and where the estimate is from."""
    known = [line for line in todo if line.hours is not None]
    total = sum((line.hours or 0.0 for line in known), 0.0)
    unknown = [line.label for line in todo if line.hours is None]
    if not known:
        return f"cost: unknown, for no run like these is finished; --only '{unknown[0]}' makes a history"
    bases = Counter(line.basis for line in known)
    text = f"cost: {_hours(total, todo)}, from {'; '.join(bases)}"
    if missing := sum(line.evaluation is None for line in known):
        text += f"; without the evaluation of {missing}, whose time is unknown"
    return text + (f"; unknown for {_named(unknown)}" if unknown else "")


def _hours(hours: float, lines: Sequence[PlanLine]) -> str:
    unit = "hours of CPU runs" if {line.device for line in lines if line.device} == {"cpu"} else "GPU-hours"
    return f"{hours:.1f} {unit}" if hours >= 10 else f"{hours:.2g} {unit}"


def disk_words(todo: Sequence[PlanLine], runs: Path) -> str:
    """What will be written and what is free; a warning where it does not fit."""
    needed, unknown, free = disk(todo, runs)
    text = f"disk: {options.size(needed)} to write" if needed or not unknown else "disk: to write unknown"
    if needed and unknown:
        text = f"disk: at least {options.size(needed)} to write ({unknown} runs unknown)"
    text += f", {options.size(free)} free where {runs} lies"
    return text + ("; WARNING: it does not fit. crm clean makes room" if needed > free else "")


def disk(todo: Sequence[PlanLine], runs: Path) -> tuple[int, int, int]:
    """Bytes that will be written as far as is known, for how many runs that is unknown, and free bytes."""
    place = runs.absolute()
    while not place.exists():
        place = place.parent
    needed = sum(line.bytes for line in todo if line.bytes is not None)
    return needed, sum(line.bytes is None for line in todo), shutil.disk_usage(place).free


def plan_json(found: Sweep, lines: Sequence[PlanLine], runs: Path) -> dict[str, Any]:
    """Cells, rows that this form of the sweep lacks, and what it all costs."""
    todo = [line for line in lines if line.todo]
    needed, unknown, free = disk(todo, runs)
    known = [line.hours for line in todo if line.hours is not None]
    return {
        "cells": [asdict(line) for line in lines],
        "left_out": dict(found.left_out),
        "cost": {"hours": sum(known) if len(known) == len(todo) else None, "known_hours": sum(known),
                 "unknown": len(todo) - len(known)},
        "disk": {"bytes": needed, "unknown": unknown, "free": free, "fits": needed <= free},
    }  # fmt: skip
