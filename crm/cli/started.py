"""Sweeps that are started: what was asked of them, their cells since, and submitting them to Slurm."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crm.cli import afterwards, options
from crm.cli.plan import PlanLine
from crm.machine import Machine, home
from crm.names import unknown
from crm.sweep import Cell, Sweep

if TYPE_CHECKING:
    from crm.cluster.folder import SweepFolder
    from crm.cluster.view import Look

PATIENCE = 60.0  # seconds that a person waits for a job which looks after the sweep at the same moment


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
    accepted: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Hands the cells to Slurm and returns at once; says what was submitted.

    Args:
        given: NAME=VALUE texts for the resources.
        partly: the cells are some of the sweep's; what was asked before stays asked.
        accepted: called once nothing is refused any more, before anything is submitted.
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
    accepted()
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
    refuse_silence(now)
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
            forgive(folder, id)


def forgive(folder: "SweepFolder", id: str) -> None:
    """Counting of attempts begins anew, and the failure of the last one is no reason any more."""
    from crm.records import append

    append(folder.run(id), "retry")
    (folder.run(id) / "failure.json").unlink(missing_ok=True)


def refuse_silence(found: "Look") -> None:
    """Nothing is done to jobs on the word of nobody."""
    from crm.cluster.slurm import Unreachable

    if found.trouble:
        raise Unreachable(found.trouble)
