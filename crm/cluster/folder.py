"""A sweep on disk, beside its runs: what was asked, what was submitted, what is held, and who is at it.

    runs/.sweeps/<name>/asked.json             the cells that are wanted, and how they are computed
                        submissions/<token>.json   one job or array: what it works on, and the scheduler's id
                        jobs/<token>/          submitit's files: batch script, pickles, what was printed
                        holds.json             runs that nobody is to start, and why
                        passed.json            tracebacks that no longer hold other runs
                        lease.json             the process that reconciles right now

A submission is written before the scheduler is asked, and its token is the job's name, so that a job whose id never
arrived is found again. Nothing here says how far a run has come: that stands in its own folder.
"""

import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from crm.machine import Machine
from crm.records import alive, identity, read_json, write_json

LEASE = 600.0  # seconds after which a lease of a process that cannot be seen is over


class Busy(RuntimeError):
    """Another process reconciles this sweep right now."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked of a sweep."""

    name: str
    title: str
    cells: Sequence[Mapping[str, Any]]  # variant, seed, id: the runs that are wanted
    selection: str
    conditions: Sequence[str]
    cluster: str  # slurm or local
    machine: Mapping[str, Any]  # as Machine.written() says
    resources: Mapping[str, Any]
    snapshot: str  # folder of the code that runs; "" on the local cluster
    changes: Mapping[str, Any] = field(default_factory=dict)  # of settings, in every cell
    seeds: Sequence[int] = ()
    smoke: bool = True  # jobs wait for a smoke test of their configurations
    afterwards: bool = False  # something is done with finished runs besides
    time: float = 0.0

    @property
    def labels(self) -> dict[str, str]:
        """Run id -> row/seed."""
        return {cell["id"]: f"{cell['variant']}/{cell['seed']}" for cell in self.cells}

    def read_machine(self) -> Machine:
        return Machine.read(self.machine)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One job, or one array of them."""

    token: str  # and name of the job
    kind: str  # smoke, cells, reconcile, afterwards, tune
    cells: Sequence[str]  # run ids; the place in this list is the task of the array
    state: str  # intended (the scheduler has not answered yet), submitted, refused
    snapshot: str
    resources: Mapping[str, Any]
    machine: Mapping[str, Any]
    selection: str
    conditions: Sequence[str]
    job: str = ""  # the scheduler's id
    gate: str = ""  # token of the smoke job that it waits for
    why: str = ""  # what it is for, or why it was refused
    time: float = 0.0


@dataclass(frozen=True)
class SweepFolder:
    path: Path

    @classmethod
    def of(cls, runs: Path, name: str) -> "SweepFolder":
        return cls(runs.resolve() / ".sweeps" / name)

    @property
    def runs(self) -> Path:
        return self.path.parents[1]

    @property
    def name(self) -> str:
        return self.path.name

    def run(self, id: str) -> Path:
        return self.runs / id

    # ------------------------------------------------------------------------------------------ asked

    def asked(self) -> Asked | None:
        found = read_json(self.path / "asked.json")
        return None if found is None else Asked(**found)

    def ask(self, asked: Asked, partly: bool) -> Asked:
        """Records what is wanted now; `partly` keeps what was wanted before besides."""
        before = self.asked()
        if partly and before is not None:
            new = {cell["id"] for cell in asked.cells}
            kept = [cell for cell in before.cells if cell["id"] not in new]
            asked = replace(asked, cells=[*kept, *asked.cells])
        asked = replace(asked, time=time.time())
        write_json(self.path / "asked.json", asdict(asked))
        return asked

    # ------------------------------------------------------------------------------------------ submissions

    def submissions(self) -> list[Submission]:
        """All of them, oldest first."""
        paths = (self.path / "submissions").glob("*.json")
        return sorted((Submission(**read_json(path)) for path in paths), key=lambda one: one.time)

    def submission(self, token: str) -> Submission:
        found = read_json(self.path / "submissions" / f"{token}.json")
        if found is None:
            raise FileNotFoundError(f"{self.path} has no submission {token}")
        return Submission(**found)

    def write(self, submission: Submission) -> Submission:
        write_json(self.path / "submissions" / f"{submission.token}.json", asdict(submission))
        return submission

    def jobs(self, token: str) -> Path:
        """Where submitit keeps the files of a submission."""
        return self.path / "jobs" / token

    # ------------------------------------------------------------------------------------------ holds

    def holds(self) -> dict[str, dict[str, str]]:
        """Run id -> {by, why}; by is user, cancel, smoke or breaker."""
        return read_json(self.path / "holds.json") or {}

    def hold(self, ids: Iterable[str], by: str, why: str) -> None:
        write_json(self.path / "holds.json", self.holds() | {id: {"by": by, "why": why} for id in ids})

    def unhold(self, ids: Iterable[str]) -> None:
        gone = set(ids)
        write_json(self.path / "holds.json", {id: hold for id, hold in self.holds().items() if id not in gone})

    def let_pass(self, signatures: Iterable[str]) -> None:
        """Runs that fail with these tracebacks hold no others any more, because a person has released those."""
        write_json(self.path / "passed.json", sorted({*self.passed(), *signatures}))

    def passed(self) -> list[str]:
        """Signatures of tracebacks, as crm.failures makes them."""
        return read_json(self.path / "passed.json") or []

    # ------------------------------------------------------------------------------------------ lease

    @contextmanager
    def lease(self, patience: float = 0.0) -> Iterator[None]:
        """One process at a time; Busy if another has it for `patience` seconds."""
        path, token = self.path / "lease.json", uuid4().hex
        deadline = time.monotonic() + patience
        while not self._taken(path, token):
            if time.monotonic() >= deadline:
                raise Busy(f"another process reconciles {self.name} right now; try again in a minute")
            time.sleep(0.5)
        try:
            yield
        finally:
            if (holder := read_json(path)) is not None and holder["token"] == token:
                path.unlink(missing_ok=True)

    def _taken(self, path: Path, token: str) -> bool:
        holder = read_json(path)
        if holder is not None:
            if alive(holder) and time.time() - holder["time"] < LEASE:
                return False
            # a dead holder's lease is moved away; what another process moved there meanwhile is moved back
            aside = path.with_name(f".lease.{token}")
            try:
                os.rename(path, aside)
            except FileNotFoundError:
                return False
            moved = read_json(aside)
            if moved is not None and moved["token"] != holder["token"]:
                os.rename(aside, path)
                return False
            aside.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        scratch = self.path / f".lease.{token}.new"
        write_json(scratch, {"token": token, "time": time.time(), "name": socket.gethostname(), **identity()})
        try:
            os.link(scratch, path)
        except FileExistsError:
            return False
        finally:
            scratch.unlink()
        return True
