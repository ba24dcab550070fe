"""The local queue: N workers at a time on this machine, each in a session of its own.

Workers outlive this process: if it is killed they finish their run, and the next call adopts them. So nothing here is
the truth; what runs, what is done and what failed is read from the run folders, and what nobody is to start from the
sweep's holds. What is done about an attempt that failed or was killed is data (crm.failures.REASONS), as on a cluster.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from crm import failures
from crm.cluster.folder import SweepFolder
from crm.conditions import Condition
from crm.config import TERMS
from crm.machine import Machine
from crm.records import State, append, open_run, read_json, retire, state
from crm.retries import halve, may_retry
from crm.sweep import Cell
from crm.worker import DONE, FAILED, STOPPED, TAKEN, StopFlag, attempt

POLL = 0.5  # seconds between looks
BREAKER = 2  # runs with the same traceback, after which no other is started


@dataclass(frozen=True, kw_only=True)
class Queue:
    """What one call of the local queue works on."""

    cells: Sequence[Cell]
    machine: Machine
    selection: str
    conditions: Sequence[Condition]
    workers: int  # how many run at once
    gpus: Sequence[str] = ()  # as CUDA_VISIBLE_DEVICES takes them; each worker sees one. None: whatever is visible
    folder: SweepFolder | None = None  # of the sweep, whose holds count

    def state(self, cell: Cell) -> State:
        return state(self.machine.runs, cell.config, self.selection, self.conditions)

    def states(self) -> dict[str, State]:
        """The state of every cell, by label."""
        return {cell.label: self.state(cell) for cell in self.cells}

    def holds(self) -> dict[str, str]:
        """Why cells are not to be started, by label."""
        held = self.folder.holds() if self.folder else {}
        return {cell.label: held[cell.id]["why"] for cell in self.cells if cell.id in held}


@dataclass
class Outcome:
    """What became of the cells that this call worked on or waited for: label -> reason."""

    failed: dict[str, str] = field(default_factory=dict)
    unfinished: dict[str, str] = field(default_factory=dict)


Show = Callable[[dict[str, State]], None]
Say = Callable[[str], None]


def run_local(queue: Queue, show: Show, say: Say = print) -> Outcome:
    """Works until every cell is done, has been tried as often as the policy says, or is held.

    KeyboardInterrupt checkpoints and stops the workers, also the adopted ones, then goes on up.

    Args:
        show: gets all states at every look.
        say: gets what is worth a line: retries, holds.
    """
    waiting = sorted(queue.cells, key=_work, reverse=True)  # longest first: no worker ends up alone
    workers: list[Worker] = []
    adopted: list[Cell] = []  # another call's workers are at these
    outcome = Outcome()
    try:
        while True:
            states = queue.states()
            for worker in list(workers):
                if (ended := worker.answer()) is not None:
                    cell, code = ended
                    if code == TAKEN or _again(queue, cell, code, say):
                        waiting.append(cell)  # taken: somebody else was faster; it is adopted at the next look
                    else:
                        _settle(outcome, cell, queue.state(cell), code)
                        states = queue.states()
                        _break(queue, waiting, states, say)
                if worker.process.poll() is not None:
                    workers.remove(worker)
            for cell in [cell for cell in adopted if states[cell.label].name != "running"]:
                adopted.remove(cell)
                if states[cell.label].name == "failed":
                    outcome.failed[cell.label] = states[cell.label].reason
                elif states[cell.label].name != "done":
                    waiting.append(cell)
            busy = sum(worker.cell is not None for worker in workers) + len(adopted)
            holds = queue.holds()
            for cell in list(waiting):
                if states[cell.label].name == "running":
                    adopted.append(cell)
                elif cell.label in holds and states[cell.label].name != "done":
                    outcome.unfinished[cell.label] = holds[cell.label]
                elif states[cell.label].name != "done":
                    if busy >= queue.workers:
                        continue
                    _idle(workers, queue, adopted).give(cell, open_run(queue.machine.runs, cell.config))
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


def _again(queue: Queue, cell: Cell, code: int, say: Say) -> bool:
    """Whether a cell whose attempt has ended is to be tried again, as the policy says; prepares that."""
    run = queue.machine.runs / cell.id
    if code in (DONE, STOPPED) or cell.label in queue.holds():
        return False
    if code == FAILED:
        kind = (read_json(run / "failure.json") or {}).get("kind", "unknown")
    else:
        kind = bury(run, code)
    action = failures.REASONS[kind].action
    if action == failures.MORE_MEMORY or not may_retry(run, kind, queue.machine.processes):
        return False  # this machine has no more memory than it had
    if action == failures.HALVE:
        halve(run, queue.machine.processes)
    say(f"{cell.label}: {failures.REASONS[kind].words}")
    return True


def bury(run: Path, code: int) -> str:
    """Writes the last word of an attempt whose process was killed, and takes its claim away; the kind of the end."""
    if (holder := read_json(run / "claim.json")) is None:
        return "lost"
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    step = (read_json(run / "progress.json") or {}).get("step", 0)
    append(
        run, "end", token=holder["token"], outcome="lost", kind="lost", reason=f"its worker ended by {name}", step=step
    )
    retire(run, holder["token"])
    return "lost"


def _break(queue: Queue, waiting: list[Cell], states: dict[str, State], say: Say) -> None:
    """Holds what waits, if runs fail one after another with the same traceback."""
    if queue.folder is None:
        return
    failed = {cell.id: read_json(queue.machine.runs / cell.id / "failure.json") for cell in queue.cells
              if states[cell.label].name == "failed"}  # fmt: skip
    worst = failures.outbreak(
        {id: failure for id, failure in failed.items() if failure}, BREAKER, queue.folder.passed()
    )
    left = [cell for cell in waiting if states[cell.label].name not in ("done", "running") and cell.id not in worst]
    if worst and left:
        why = f"{len(worst)} runs failed with the same traceback: crm fails {queue.folder.name}"
        queue.folder.hold([cell.id for cell in left], "breaker", why)
        say(f"{why}; {len(left)} runs are held until crm release {queue.folder.name}")


def _work(cell: Cell) -> int:
    """How long a cell takes, in no unit: images seen times the terms computed for each."""
    terms = sum(getattr(cell.config.loss, term) > 0 for term in TERMS)
    return cell.config.steps * cell.config.batch * terms


def _settle(outcome: Outcome, cell: Cell, now: State, code: int) -> None:
    """Files a cell whose attempt has ended under what its folder says."""
    if now.name == "failed":
        outcome.failed[cell.label] = now.reason
    elif code < 0:
        name = signal.Signals(-code).name
        outcome.unfinished[cell.label] = f"its worker was killed by {name} again and again; run again to resume"
    elif now.name != "done":
        outcome.unfinished[cell.label] = f"stopped before its end ({now.name}); run again to resume"


class Worker:
    """One worker process and the cell it is at."""

    def __init__(self, queue: Queue, gpu: str) -> None:
        machine = queue.machine
        self.gpu = gpu  # the one that it sees; "" for what is visible anyway
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
            env={**os.environ, **threads, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})},
            cwd=Path(__file__).resolve().parents[1],
            text=True,
            bufsize=1,
        )
        self.cell: Cell | None = None
        self.fragile = machine.device.startswith("cuda")  # an error on a GPU may spoil it for the whole process

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
        if code == FAILED and self.fragile:
            self.dismiss()
        return cell, code

    @property
    def free(self) -> bool:
        """Whether it takes work."""
        assert self.process.stdin is not None
        return self.cell is None and not self.process.stdin.closed and self.process.poll() is None

    def dismiss(self) -> None:
        """No more work: the worker leaves by itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()


def _idle(workers: list[Worker], queue: Queue, adopted: Sequence[Cell]) -> Worker:
    """A worker without a cell; if there is none a new one, on the GPU that has the fewest, others' workers counted."""
    for worker in workers:
        if worker.free:
            return worker
    used = [worker.gpu for worker in workers if worker.process.poll() is None]
    used += [(queue.state(cell).holder or {}).get("gpu", "") for cell in adopted]
    workers.append(Worker(queue, fewest(queue.gpus, used)))
    return workers[-1]


def fewest(gpus: Sequence[str], used: Sequence[str]) -> str:
    """The GPU with the fewest workers, of which `used` has one entry each; "" where there are no GPUs."""
    counts = Counter(used)
    return min(gpus, key=lambda gpu: counts[gpu], default="")


def _stop(queue: Queue, workers: Sequence[Worker], adopted: Sequence[Cell], patience: float = 120.0) -> None:
    """Asks all workers to checkpoint and end, and waits for them, at most `patience` seconds."""
    pids = [worker.process.pid for worker in workers if worker.process.poll() is None]
    pids += [pid for cell in adopted if (pid := queue.state(cell).pid) is not None]
    stop_workers(pids)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        left = any(worker.process.poll() is None for worker in workers)
        if not left and not any(queue.state(cell).name == "running" for cell in adopted):
            return
        time.sleep(POLL)


def stop_workers(pids: Sequence[int]) -> None:
    """Asks processes to checkpoint and end."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            continue


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
