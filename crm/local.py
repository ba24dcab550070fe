"""The local queue: N workers at a time on this machine, each in a session of its own.

Workers outlive this process: if it is killed they finish their run, and the next call adopts them. So nothing here is
the truth; what runs, what is done and what failed is read from the run folders.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from crm.conditions import Condition
from crm.config import TERMS
from crm.machine import Machine
from crm.records import State, open_run, state
from crm.sweep import Cell
from crm.worker import FAILED, TAKEN, StopFlag, attempt

POLL = 0.5  # seconds between looks


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

    def states(self) -> dict[str, State]:
        """The state of every cell, by label."""
        return {cell.label: self.state(cell) for cell in self.cells}


@dataclass
class Outcome:
    """What became of the cells that this call worked on or waited for: label -> reason."""

    failed: dict[str, str] = field(default_factory=dict)
    unfinished: dict[str, str] = field(default_factory=dict)


Show = Callable[[dict[str, State]], None]


def run_local(queue: Queue, show: Show) -> Outcome:
    """Works until every cell is done or has been tried in this call; `show` gets all states at every look.

    KeyboardInterrupt checkpoints and stops the workers, also the adopted ones, then goes on up.
    """
    waiting = sorted(queue.cells, key=_work, reverse=True)  # longest first: no worker ends up alone
    workers: list[_Worker] = []
    adopted: list[Cell] = []  # another call's workers are at these
    outcome = Outcome()
    try:
        while True:
            states = queue.states()
            for worker in list(workers):
                if (ended := worker.answer()) is not None:
                    cell, code = ended
                    if code == TAKEN:
                        waiting.append(cell)  # somebody else was faster; it is adopted at the next look
                    else:
                        _settle(outcome, cell, queue.state(cell), code)
                if worker.process.poll() is not None:
                    workers.remove(worker)
            adopted = [cell for cell in adopted if states[cell.label].name == "running"]
            busy = sum(worker.cell is not None for worker in workers) + len(adopted)
            for cell in list(waiting):
                if states[cell.label].name == "running":
                    adopted.append(cell)
                elif states[cell.label].name != "done":
                    if busy >= queue.workers:
                        continue
                    _idle(workers, queue).give(cell, open_run(queue.machine.runs, cell.config))
                    busy += 1
                waiting.remove(cell)
            show(states)
            if not waiting and not adopted and all(worker.cell is None for worker in workers):
                break
            time.sleep(POLL)
    except KeyboardInterrupt:
        _stop(queue, workers, adopted)
        raise
    for worker in workers:
        worker.dismiss()
    return outcome


def _work(cell: Cell) -> int:
    """How long a cell takes, in no unit: images seen times the terms computed for each."""
    terms = sum(getattr(cell.config.loss, term) > 0 for term in TERMS)
    return cell.config.steps * cell.config.batch * terms


def _settle(outcome: Outcome, cell: Cell, now: State, code: int) -> None:
    """Files a cell whose attempt has ended under what its folder says."""
    if now.name == "failed":
        outcome.failed[cell.label] = now.reason
    elif code < 0:
        outcome.unfinished[cell.label] = f"its worker was killed by {signal.Signals(-code).name}; run again to resume"
    elif now.name != "done":
        outcome.unfinished[cell.label] = f"stopped before its end ({now.name}); run again to resume"


class _Worker:
    """One worker process and the cell it is at."""

    def __init__(self, queue: Queue) -> None:
        machine = queue.machine
        command = [
            sys.executable, "-m", "crm.worker",
            "--selection", queue.selection,
            "--machine", json.dumps(machine.written()),
            "--conditions", *(condition.name for condition in queue.conditions),
        ]  # fmt: skip
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(machine.threads))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C and a closed terminal reach this process only
            env={**os.environ, **threads},
            cwd=Path(__file__).resolve().parents[1],
            text=True,
            bufsize=1,
        )
        self.cell: Cell | None = None

    def give(self, cell: Cell, folder: Path) -> None:
        assert self.process.stdin is not None
        self.cell = cell
        try:
            print(folder.resolve(), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return  # it has died; answer() will say so

    def answer(self) -> tuple[Cell, int] | None:
        """The cell whose attempt has ended since the last look, with its code; a negative one is the killing signal."""
        if self.cell is None:
            return None
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 0)
        line = self.process.stdout.readline() if ready else ""
        code = int(line.split()[1]) if line else self.process.poll()
        if code is None:
            return None
        cell, self.cell = self.cell, None
        return cell, code

    def dismiss(self) -> None:
        """No more work: the worker leaves by itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()


def _idle(workers: list[_Worker], queue: Queue) -> _Worker:
    """A worker without a cell, a new one if there is none."""
    for worker in workers:
        if worker.cell is None and worker.process.poll() is None:
            return worker
    workers.append(_Worker(queue))
    return workers[-1]


def _stop(queue: Queue, workers: Sequence[_Worker], adopted: Sequence[Cell], patience: float = 120.0) -> None:
    """Asks all workers to checkpoint and end, and waits for them, at most `patience` seconds."""
    pids = [worker.process.pid for worker in workers if worker.process.poll() is None]
    pids += [pid for cell in adopted if (pid := queue.state(cell).pid) is not None]
    for pid in pids:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        left = any(worker.process.poll() is None for worker in workers)
        if not left and not any(queue.state(cell).name == "running" for cell in adopted):
            return
        time.sleep(POLL)


def run_inline(queue: Queue, show: Show) -> Outcome:
    """The same work one cell after another in this process."""
    outcome = Outcome()
    stop = StopFlag()
    stop.listen()
    for cell in queue.cells:
        if queue.state(cell).name == "done":
            continue
        folder = open_run(queue.machine.runs, cell.config)
        code = attempt(
            folder, queue.machine, uuid4().hex[:16], queue.selection, queue.conditions, stop,
            lambda progress: show(queue.states()),
        )  # fmt: skip
        if stop():
            raise KeyboardInterrupt
        if code == FAILED:
            outcome.failed[cell.label] = queue.state(cell).reason
        show(queue.states())
    return outcome
