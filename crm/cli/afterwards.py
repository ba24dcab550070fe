"""What some sweeps do with their finished runs besides: evaluate them on other data sets, measure what they cost."""

import sys
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from crm import elsewhere
from crm.data.specs import DATASETS
from crm.machine import Machine
from crm.records import lacking, read_json, write_json
from crm.sweep import Cell, Sweep

COST = "cost"
COST_FILE = "overhead.json"  # as in crm.overhead, which loads torch


def missing(found: Sweep, cells: Sequence[Cell], runs: Path) -> list[tuple[Cell, str]]:
    """What is still to be done: a cell, and a data set or COST."""
    todo = []
    for cell in cells:
        folder = runs / cell.id
        for dataset in found.also_on:
            if dataset != cell.config.data.dataset:
                there = elsewhere.on(folder, found.selection, dataset)
                if there is None or lacking(there, "last", found.conditions):
                    todo.append((cell, dataset))
        if found.measured and read_json(folder / COST_FILE) is None:
            todo.append((cell, COST))
    return todo


def words(found: Sweep) -> str:
    """What will be done besides, as a line of the plan; "" for most sweeps."""
    names = ", ".join(DATASETS[name].title for name in found.also_on)
    parts = [f"evaluated on {names} too, on the classes that both have"] if names else []
    parts += ["measured: operations, latency and memory of training and inference"] if found.measured else []
    return f"every run is then {' and '.join(parts)}" if parts else ""


def carry_out(found: Sweep, cells: Sequence[Cell], machine: Machine, quiet: bool) -> dict[str, str]:
    """Does what is missing for trained cells, one after another in this process; what failed, by label, and why."""
    todo = missing(found, cells, machine.runs)
    failed = {}
    for number, (cell, what) in enumerate(todo, 1):
        if not quiet:
            how = "measuring the cost of" if what == COST else f"evaluating on {DATASETS[what].title}:"
            print(f"{how} {cell.label} ({number} of {len(todo)})", file=sys.stderr, flush=True)
        try:
            if what == COST:
                _measure(cell, machine)
            else:
                _evaluate(found, cell, what, machine)
        except (OSError, ValueError, RuntimeError) as error:
            failed[f"{cell.label} {'cost' if what == COST else f'on {what}'}"] = str(error)
    return failed


def _evaluate(found: Sweep, cell: Cell, dataset: str, machine: Machine) -> None:
    from crm.weights.imports import import_run
    from crm.worker import DONE, attempt

    folder = machine.runs / cell.id
    made = import_run(folder, found.selection, dataset, machine.runs)
    code = attempt(made, machine, uuid4().hex[:16], "last", found.conditions, lambda: False, lambda progress: None)
    if code != DONE:
        failure = read_json(made / "failure.json") or {}
        raise RuntimeError(failure.get("reason", f"run {made.name} is being worked on by another process"))
    elsewhere.remember(folder, found.selection, dataset, made)


def _measure(cell: Cell, machine: Machine) -> None:
    from crm.overhead import FILE, measure

    machine.take_process()
    write_json(machine.runs / cell.id / FILE, measure(machine.runs / cell.id, machine))
