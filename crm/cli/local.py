"""Sweeps on this machine: what is asked of the local queue, its GPUs, and leaving it alone."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from crm.cli import afterwards
from crm.cli.started import ask_again
from crm.machine import Machine, cores, home
from crm.sweep import Cell, Sweep


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where on this machine runs are computed."""

    workers: int  # runs at once
    gpus: tuple[str, ...] = ()  # to which the workers are dealt out, as CUDA_VISIBLE_DEVICES takes them


def places(workers: int, device: str, gpus: str, per_gpu: int, cells: int) -> Places:
    """How many runs at once, and on which GPUs; ValueError for GPUs without --device cuda.

    Args:
        workers: as asked for; 0 is one per core, or `per_gpu` on every GPU.
        gpus: as in 0,1; "" is all that are visible.
    """
    if not device.startswith("cuda"):
        if gpus:
            raise ValueError("--gpus is about GPUs: add --device cuda")
        return Places(workers=min(workers or cores(), cells))
    found = tuple(part.strip() for part in gpus.split(",") if part.strip()) if gpus else visible_gpus()
    if len(set(found)) != len(found):
        raise ValueError(f"--gpus names one twice: {gpus}; --per-gpu puts several runs on each")
    if ":" in device or len(found) == 0:
        return Places(workers=min(workers or 1, cells))
    most = len(found) * per_gpu
    return Places(workers=min(workers or most, most, cells), gpus=found)


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, without loading torch; none where that cannot be told."""
    if (told := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(part.strip() for part in told.split(",") if part.strip())
    try:
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(done.stdout.split())


def run_cells(
    name: str,
    found: Sweep,
    cells: Sequence[Cell],
    machine: Machine,
    where: Places,
    cluster: str,
    track: bool,
    say: Callable[[str], object],
    quiet: bool,
    partly: bool = False,
    changes: dict[str, Any] | None = None,
) -> dict[str, str]:
    """Runs what is left and returns the failures, label -> reason; mirrors the runs meanwhile.

    Args:
        partly: the cells are some of the sweep's; what was asked before stays asked.
        changes: the settings that were changed in every cell.
    """
    from crm.cli.progress import Board
    from crm.cluster.folder import SweepFolder
    from crm.local import Queue, run_inline, run_local
    from crm.records import open_run
    from crm.tracking.listing import list_sweep
    from crm.tracking.process import start as start_mirror

    for cell in cells:
        open_run(machine.runs, cell.config)  # refuses moved defaults before anything starts
    folder = SweepFolder.of(machine.runs, name)
    if cluster == "local":
        ask_again(folder, found, cells, machine, cluster, partly, changes or {})
    queue = Queue(
        cells=cells, machine=machine, selection=found.selection, conditions=found.conditions,
        workers=where.workers, gpus=where.gpus, folder=folder,
    )  # fmt: skip
    if track:
        list_sweep(machine.runs, name, found, cells, home() / "reports" / name)
    mirror = start_mirror(machine.runs, name) if track else None
    try:
        with Board(quiet) as board:
            outcome = run_local(queue, board.show, board.say) if cluster == "local" else run_inline(queue, board.show)
    finally:
        if mirror is not None and (trouble := mirror.finish()):
            say(untracked(trouble))
    for cell in cells:
        if reason := outcome.failed.get(cell.label):
            typer.echo(f"{cell.label} failed: {reason}\n  log: {machine.runs / cell.id / 'log.txt'}", err=True)
        elif reason := outcome.unfinished.get(cell.label):
            typer.echo(f"{cell.label} is not finished: {reason}", err=True)
    return {**outcome.failed, **outcome.unfinished}


def mirror_once(name: str, found: Sweep, cells: Sequence[Cell], runs: Path, say: Callable[[str], object]) -> None:
    """Sends what an MLflow store lacks of a sweep and of its report.

    Of runs on a cluster to a server only: the embedded store is a database file, which nodes would share.
    """
    from crm.tracking.listing import list_sweep
    from crm.tracking.process import start

    list_sweep(runs, name, found, cells, home() / "reports" / name)
    if trouble := start(runs, name).finish():
        say(untracked(trouble))


def untracked(trouble: str) -> str:
    """What is said where MLflow lacks something."""
    return f"tracking: {trouble}; the runs are unharmed, and `crm track sync` sends what is missing"


def then(found: Sweep, cells: Sequence[Cell], machine: Machine, failed: dict[str, str], quiet: bool) -> dict[str, str]:
    """What the sweep does with finished runs besides; returns the failures, old and new."""
    trained = [cell for cell in cells if cell.label not in failed]
    also = afterwards.carry_out(found, trained, machine, quiet)
    for label, reason in also.items():
        typer.echo(f"{label} failed: {reason}", err=True)
    return failed | also


def detach(runs: Path, name: str, arguments: Sequence[str]) -> Path:
    """Starts the same command in a session of its own, which no closed terminal reaches; the file that it prints to."""
    from crm.cluster.folder import SweepFolder

    path = SweepFolder.of(runs, name).path / "queue.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "crm", *(part for part in arguments if part != "--detach"), "--yes"]
    with path.open("ab") as log:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    return path
