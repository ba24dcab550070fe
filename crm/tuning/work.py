"""What computes trials: worker processes for runs, a process each for a function. The run folders are the truth."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from crm import failures
from crm.cluster.folder import SweepFolder
from crm.confusion import iou, load_evaluation
from crm.local import Queue, Worker, bury, fewest, stop_workers
from crm.records import State, alive, evaluation, journal, open_run, read_json
from crm.retries import halve, may_retry
from crm.search import CONDITIONS, OBJECTIVES, Search
from crm.sweep import Cell
from crm.tuning.folder import mark
from crm.worker import DONE, FAILED, TAKEN


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a trial stands."""

    name: str  # waiting, running, done, failed, lost
    values: Sequence[float] = ()  # of the objectives, once done
    reason: str = ""
    traceback: str = ""
    step: int = 0  # how far all of its runs have come together
    reports: Mapping[int, float] = field(default_factory=dict)  # what a pruner may go by: place -> value
    state: State | None = None  # of the run that is at work, for who watches


@runtime_checkable
class Work(Protocol):
    """One trial at a time by its number and the places of its parameters; every call may be repeated."""

    def start(self, number: int, params: Mapping[str, Any]) -> None: ...
    def look(self, number: int, params: Mapping[str, Any]) -> Look: ...
    def stop(self, number: int, params: Mapping[str, Any]) -> bool: ...
    def seconds(self, number: int, params: Mapping[str, Any]) -> float: ...
    def answered(self, params: Mapping[str, Any]) -> bool: ...
    def close(self, interrupt: bool) -> None: ...


# ---------------------------------------------------------------------------------------------- runs


class Runs:
    """Trials that are runs: what is read of them, wherever they are computed. Those of one come one after another."""

    def __init__(self, search: Search, study: str, queue: Queue, image_reports: bool) -> None:
        self.search, self.study, self.queue = search, study, queue
        self.runs, self.image_reports = queue.machine.runs, image_reports

    def cells(self, number: int, params: Mapping[str, Any]) -> list[Cell]:
        return [Cell(variant=f"trial {number}", seed=config.seed, config=config) for config in
                self.search.configs(params)]  # fmt: skip

    def answered(self, params: Mapping[str, Any]) -> bool:
        """Whether all runs of a trial are there already; they are the study's from then on too."""
        cells = self.cells(-1, params)
        if any(self.queue.state(cell).name != "done" for cell in cells):
            return False
        for cell in cells:
            mark(self.runs, cell.id, self.study)
        return True

    def stand(self, cells: Sequence[Cell]) -> tuple[Look, Cell | None]:
        """How a trial stands by its folders alone, and the run that is to be worked on next."""
        states = [self.queue.state(cell) for cell in cells]
        step = sum(one.step for one in states)
        reports = self._reports(cells, states)
        for cell, one in zip(cells, states, strict=True):
            if one.name == "failed":
                told = read_json(self.runs / cell.id / "failure.json") or {}
                return Look(name="failed", reason=one.reason, traceback=told.get("traceback", ""), step=step,
                            state=one), cell  # fmt: skip
            if one.name != "done":
                name = "running" if one.name == "running" else "waiting"
                return Look(name=name, step=step, reports=reports, state=one), cell
        found = [values(self.runs / cell.id, self.search) for cell in cells]
        means = [float(np.mean(each)) for each in zip(*found, strict=True)]
        return Look(name="done", values=means, step=step, reports=reports, state=states[-1]), None

    def _reports(self, cells: Sequence[Cell], states: Sequence[State]) -> dict[int, float]:
        """The first run's validations by step; or, for a pruner over images, the images of the runs that are done."""
        if not self.image_reports:
            lines = journal(self.runs / cells[0].id)
            return {line["step"]: line["miou"] for line in lines if line["event"] == "val"}
        found: list[float] = []
        for cell, one in zip(cells, states, strict=True):
            if one.name != "done":
                break
            found += list(image_scores(self.runs / cell.id, self.search))
        return dict(enumerate(found))

    def seconds(self, number: int, params: Mapping[str, Any]) -> float:
        return sum(spent(self.runs / cell.id) for cell in self.cells(number, params))


class LocalRuns(Runs):
    """Runs by worker processes of this machine, which outlive the coordinator."""

    def __init__(self, search: Search, study: str, queue: Queue, image_reports: bool) -> None:
        super().__init__(search, study, queue, image_reports)
        self.pool: list[Worker] = []
        self.mine: dict[int, Worker] = {}  # trial -> the worker that is at it
        self.begun: set[int] = set()

    def start(self, number: int, params: Mapping[str, Any]) -> None:
        """Gives the next run of a trial to a worker, unless somebody is at it."""
        look, cell = self.stand(self.cells(number, params))
        self.begun.add(number)
        if cell is None or look.name == "running":
            return
        folder = open_run(self.runs, cell.config)
        mark(self.runs, cell.id, self.study)
        (folder / "failure.json").unlink(missing_ok=True)
        worker = next((one for one in self.pool if one.free), None)
        if worker is None:
            for dead in [one for one in self.pool if one.process.poll() is not None]:
                self._part_with(dead)
            worker = Worker(self.queue, fewest(self.queue.gpus, [one.gpu for one in self.pool]))
            self.pool.append(worker)
        worker.give(cell, folder)
        self.mine[number] = worker

    def look(self, number: int, params: Mapping[str, Any]) -> Look:
        cells = self.cells(number, params)
        if (worker := self.mine.get(number)) is not None:
            if (ended := worker.answer()) is None:
                look, _ = self.stand(cells)
                return look if look.name == "running" else Look(name="running", step=look.step, state=look.state)
            del self.mine[number]
            cell, code = ended
            look, _ = self.stand(cells)
            if code == FAILED:
                kind = (read_json(self.runs / cell.id / "failure.json") or {}).get("kind", "unknown")
                processes = self.queue.machine.processes
                if failures.REASONS[kind].action == failures.HALVE and may_retry(self.runs / cell.id, kind, processes):
                    halve(self.runs / cell.id, processes)
                    self.start(number, params)
                    return Look(name="running", step=look.step, state=look.state)
                return look
            if code not in (DONE, TAKEN):
                if code < 0:
                    bury(self.runs / cell.id, code)
                self._part_with(worker)
                return Look(name="lost", reason="its worker was killed", step=look.step)
        look, _ = self.stand(cells)
        if look.name == "waiting" and number not in self.begun:  # of a coordinator that is gone, and so is its worker
            return Look(name="lost", reason="coordinator and worker were killed", step=look.step)
        if look.name == "waiting":
            self.start(number, params)
        return look

    def _part_with(self, worker: Worker) -> None:
        """A worker that is dead, or that has stopped as it was asked and so takes nothing more, is none any more."""
        self.pool.remove(worker)
        worker.process.wait(120)
        _close(worker)

    def stop(self, number: int, params: Mapping[str, Any]) -> bool:
        """Asks the run of a trial to checkpoint and stop; whether nothing of it runs any more."""
        look = self.look(number, params) if number in self.mine else self.stand(self.cells(number, params))[0]
        if look.name != "running":
            return True
        if look.state is not None and look.state.pid is not None:
            stop_workers([look.state.pid])
        return False

    def close(self, interrupt: bool) -> None:
        """Lets the workers go; on an interruption they checkpoint first what they are at."""
        for worker in self.pool:
            with suppress(BrokenPipeError):
                worker.dismiss()
        if interrupt:
            stop_workers([one.process.pid for one in self.pool if one.process.poll() is None])
        for worker in self.pool:
            worker.process.wait(120)
            _close(worker)


def _close(worker: Worker) -> None:
    """The pipes to a worker that has left or was killed."""
    for pipe in (worker.process.stdin, worker.process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def values(folder: Path, search: Search) -> list[float]:
    """The objectives of one finished run, in per cent."""
    found = {one: load_evaluation(evaluation(folder, search.selection, one)).miou for one in CONDITIONS}
    return [float(OBJECTIVES[name].reduce([found[one] for one in OBJECTIVES[name].conditions]))
            for name in search.objectives]  # fmt: skip


def image_scores(folder: Path, search: Search) -> np.ndarray:
    """(n,) of every validation image the objective by its own mIoU, over the classes it shows.

    It stands for the whole split's mIoU where images are compared in pairs, and is never reported.
    """
    objective = OBJECTIVES[search.objectives[0]]
    found = []
    for condition in objective.conditions:
        matrices = load_evaluation(evaluation(folder, search.selection, condition)).confusion
        shown = matrices.sum(axis=2) > 0
        found.append(np.where(shown, np.nan_to_num(iou(matrices)), 0).sum(axis=1) / np.maximum(1, shown.sum(axis=1)))
    return objective.reduce(found)


def spent(folder: Path) -> float:
    """Seconds of training that a run has taken so far, finished or not."""
    seconds, before = 0.0, 0
    for line in journal(folder) if folder.exists() else []:
        if line["event"] == "train":
            seconds += line["seconds"] * max(0, line["step"] - before)
            before = line["step"]
        elif line["event"] == "val":
            seconds += line.get("seconds", 0.0)
    return seconds


def queue_of(search: Search, machine: Any, workers: int, gpus: Sequence[str] = ()) -> Queue:
    """How the runs of a search are computed and evaluated: on val alone."""
    return Queue(
        cells=(), machine=machine, selection=search.selection, conditions=CONDITIONS, workers=workers, gpus=gpus
    )


# ---------------------------------------------------------------------------------------------- functions


class Calculations:
    """Trials that are calls of a function."""

    def __init__(self, search: Search, folder: SweepFolder) -> None:
        function: Any = search.objective
        self.name = f"{function.__module__}:{function.__qualname__}"
        if "<" in self.name or function.__module__ == "__main__":
            raise ValueError(
                f"the objective {self.name} must be a function at the top of a module, for other processes"
            )
        self.search, self.path = search, folder.path / "values"
        self.children: dict[int, tuple[subprocess.Popen[bytes], float]] = {}

    def start(self, number: int, params: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        values = json.dumps(self.search.settings(params))
        command = [sys.executable, "-m", "crm.tuning.calculate", str(self.path), str(number), self.name, values]
        where = {**os.environ, "PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path)}
        self.children[number] = (subprocess.Popen(command, start_new_session=True, env=where), time.time())

    def look(self, number: int, params: Mapping[str, Any]) -> Look:
        child = self.children.get(number)
        over = child is not None and child[0].poll() is not None  # before the look at the file
        if (found := read_json(self.path / f"{number}.json")) is not None:
            if child is not None:
                self.children.pop(number)[0].wait()
            if "values" in found:
                return Look(name="done", values=[float("nan") if one is None else one for one in found["values"]])
            return Look(name="failed", reason=found["reason"], traceback=found["traceback"])
        holder = read_json(self.path / f"{number}.claim.json")
        if (child is not None and not over) or (child is None and holder is not None and alive(holder)):
            return Look(name="running")
        return Look(name="lost", reason="its process was killed")

    def stop(self, number: int, params: Mapping[str, Any]) -> bool:
        return True

    def seconds(self, number: int, params: Mapping[str, Any]) -> float:
        """From the claim to the value."""
        try:
            claimed = (self.path / f"{number}.claim.json").stat().st_mtime
            return max(0.0, (self.path / f"{number}.json").stat().st_mtime - claimed)
        except FileNotFoundError:
            return 0.0

    def answered(self, params: Mapping[str, Any]) -> bool:
        return False

    def close(self, interrupt: bool) -> None:
        if interrupt:
            for child, _ in self.children.values():
                child.kill()
                child.wait()
