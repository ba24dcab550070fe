"""The local queue: N workers at a time on this machine, each in a session of its own.

Workers outlive this process: if it is killed they finish their run, and the next call adopts them. So nothing here is
the truth; what runs, what is done and what failed is read from the run folders.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from crm.conditions import Condition
from crm.machine import Machine
from crm.records import State, open_run, state
from crm.sweep import Cell
from crm.worker import TAKEN

POLL = 0.25  # seconds between looks


@dataclass(frozen=True, kw_only=True)
class Queue:
    """What one call of the local queue works on."""

    cells: Sequence[Cell]
    machine: Machine
    selection: str
    conditions: Sequence[Condition]
    workers: int  # how many run at once

    def state(self, cell: Cell) -> State:
        return state(self.machine.runs, cell.config, self.selection, self.conditions)


@dataclass
class Outcome:
    """What became of every cell, by label."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # label -> reason
    unfinished: list[str] = field(default_factory=list)


Show = Callable[[dict[str, State]], None]


def run(queue: Queue, show: Show) -> Outcome:
    """Works until every cell is done or has failed in this call; `show` gets all states at every look.

    KeyboardInterrupt checkpoints and stops the workers, then goes on up.
    """
    waiting = list(queue.cells)
    running: dict[str, subprocess.Popen | None] = {}  # cell label -> our child, or None for an adopted worker
    outcome = Outcome()
    by_label = {cell.label: cell for cell in queue.cells}
    try:
        while waiting or running:
            states = {cell.label: queue.state(cell) for cell in queue.cells}
            for label, child in list(running.items()):
                if (child is None or child.poll() is not None) and states[label].name != "running":
                    taken = child is not None and child.returncode == TAKEN
                    _settle(outcome, label, queue.state(by_label[label]), child, taken)
                    del running[label]
            for cell in list(waiting):
                now = states[cell.label]
                if now.name == "done":
                    outcome.done.append(cell.label)
                elif now.name == "running":
                    running[cell.label] = None
                elif len(running) < queue.workers:
                    running[cell.label] = _start(queue, cell)
                else:
                    continue
                waiting.remove(cell)
            show({**states, **{label: states[label] for label in running}})
            time.sleep(POLL)
    except KeyboardInterrupt:
        stop(queue, running)
        raise
    show({cell.label: queue.state(cell) for cell in queue.cells})
    return outcome


def _settle(outcome: Outcome, label: str, now: State, child: subprocess.Popen | None, taken: bool) -> None:
    """Files a worker that has ended under what its folder says."""
    if now.name == "done":
        outcome.done.append(label)
    elif now.name == "failed":
        outcome.failed[label] = now.reason
    elif child is not None and child.returncode and not taken and child.returncode < 0:
        outcome.failed[label] = f"the worker was killed by signal {signal.Signals(-child.returncode).name}"
    else:
        outcome.unfinished.append(label)


def _start(queue: Queue, cell: Cell) -> subprocess.Popen:
    """Starts the worker of one cell; what it prints goes to the run's log.txt."""
    machine = queue.machine
    folder = open_run(machine.runs, cell.config)
    command = [
        sys.executable, "-m", "crm.worker", str(folder.resolve()),
        "--token", uuid4().hex[:16],
        "--selection", queue.selection,
        "--device", machine.device,
        "--threads", str(machine.threads),
        "--checkpoint-every", str(machine.checkpoint_every),
        *(["--data", str(machine.data.resolve())] if machine.data else []),
        "--conditions", *(condition.name for condition in queue.conditions),
    ]  # fmt: skip
    threads = {name: str(machine.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **threads, "PYTHONUNBUFFERED": "1"},
            cwd=Path(__file__).resolve().parents[1],
        )


def stop(queue: Queue, running: dict[str, subprocess.Popen | None], patience: float = 120.0) -> None:
    """Asks the workers to checkpoint and end, and waits for them."""
    by_label = {cell.label: cell for cell in queue.cells}
    for label, child in running.items():
        pid = child.pid if child is not None else queue.state(by_label[label]).pid
        if pid is not None and (child is None or child.poll() is None):
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        ended = [child.poll() is not None if child else queue.state(by_label[label]).name != "running"
                 for label, child in running.items()]  # fmt: skip
        if all(ended):
            return
        time.sleep(POLL)


def run_inline(queue: Queue, show: Show) -> Outcome:
    """The same work one cell after another in this process."""
    from crm.worker import FAILED, StopFlag, attempt

    outcome = Outcome()
    stop_asked = StopFlag()
    stop_asked.listen()
    for cell in queue.cells:
        if queue.state(cell).name != "done":
            folder = open_run(queue.machine.runs, cell.config)
            tell = lambda progress: show({each.label: queue.state(each) for each in queue.cells})  # noqa: E731
            code = attempt(
                folder, queue.machine, uuid4().hex[:16], queue.selection, queue.conditions, stop_asked, tell
            )
            if stop_asked():
                raise KeyboardInterrupt
            if code == FAILED:
                outcome.failed[cell.label] = queue.state(cell).reason
                continue
        outcome.done.append(cell.label)
    show({cell.label: queue.state(cell) for cell in queue.cells})
    return outcome
