"""A study on Slurm: its trials are jobs as a sweep's are, and its coordinator is a job of one CPU.

Before it begins a coordinator submits the next one, which waits until it is over, whatever ended it; one that has
finished the study takes that back. So nobody has to watch, and no time limit ends a study. The trials of a function are
computed by the coordinator's job itself.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from crm.cluster import slurm
from crm.cluster.folder import LEASE, Asked, Busy, SweepFolder
from crm.cluster.reconcile import SCANCELLED, reconcile
from crm.cluster.settings import Resources
from crm.cluster.submit import Full, Refused, Uncertain, new, submit
from crm.cluster.view import look as look_at
from crm.machine import Machine
from crm.records import append, open_run, read_json, write_json
from crm.search import CONDITIONS, Search
from crm.sweep import Cell
from crm.tuning.folder import BESIDE, mark
from crm.tuning.work import Look, Runs, queue_of

EVERY = 15.0  # seconds between looks at the scheduler
HASTY, ATTEMPTS = 60.0, 5  # a coordinator that ends within so many seconds, and how many of them in a row are too many
PATIENCE = LEASE + 60  # seconds: a coordinator that died with its node has left a lease, which nobody there can end


def jobs_of(runs: Path, study: str) -> SweepFolder:
    """Where the jobs of a study are kept, as those of a sweep: `crm cancel tune-<study>` knows it by that name."""
    return SweepFolder.of(runs, f"{BESIDE}{study}")


def begin(runs: Path, study: str, search: Search, machine: Machine, wanted: Resources, snapshot: str) -> str:
    """Records how the trials are computed, and submits a coordinator unless one is there; its job's id, or ""."""
    folder = jobs_of(runs, study)
    with folder.lease(30.0):
        before = folder.asked()
        folder.ask(
            Asked(
                name=folder.name, title=search.title, cells=before.cells if before else [], selection=search.selection,
                conditions=[one.name for one in CONDITIONS], cluster="slurm", machine=machine.written(),
                resources=asdict(wanted), snapshot=snapshot, smoke=False,
            ),
            partly=False,
        )  # fmt: skip
        if _coordinators(folder):
            return ""
        (folder.path / "coordinators.json").unlink(missing_ok=True)  # a person has asked: the count begins anew
        return submit(folder, new(folder, "tune", [])).job


def _coordinators(folder: SweepFolder) -> list[slurm.Element]:
    """The coordinators that wait or run."""
    tokens = [one.token for one in folder.submissions() if one.kind == "tune" and one.state != "refused"]
    return [one for one in slurm.queue(tokens) if one.state not in slurm.FINISHED] if tokens else []


def cancel(runs: Path, study: str, yes: bool) -> list[str]:
    """The live jobs of a study, cancelled if `yes`: first those that wait, which would follow the others."""
    folder = jobs_of(runs, study)
    tokens = [one.token for one in folder.submissions() if one.state != "refused"]
    live = [one for one in slurm.queue(tokens) if one.state not in slurm.FINISHED] if tokens else []
    ids = [one.id for one in sorted(live, key=lambda one: one.state not in slurm.WAITING)]
    if yes:
        slurm.cancel(ids)
    return ids


class SlurmRuns(Runs):
    """Runs by jobs, which look after each other; the coordinator looks too, for jobs that died without a word."""

    def __init__(self, search: Search, study: str, machine: Machine, image_reports: bool) -> None:
        super().__init__(search, study, queue_of(search, machine, 0), image_reports)
        self.folder, self.looked = jobs_of(machine.runs, study), time.monotonic()

    def start(self, number: int, params: Mapping[str, Any]) -> None:
        look, cell = self.stand(self.cells(number, params))
        if cell is None or look.name == "running":
            return
        open_run(self.runs, cell.config)
        mark(self.runs, cell.id, self.study)
        try:
            with self.folder.lease(60.0):
                self._want(cell)
        except Busy:
            return  # the next look begins it
        self._reconcile()

    def _want(self, cell: Cell) -> None:
        """The run is wanted from now on, also where an earlier trial of it was pruned or cancelled."""
        asked = self.folder.asked()
        assert asked is not None
        if cell.id not in asked.labels:
            row = {"variant": cell.variant, "seed": cell.seed, "id": cell.id}
            self.folder.ask(replace(asked, cells=[row]), partly=True)
        if self.folder.holds().get(cell.id, {}).get("by") in ("pruned", "cancel"):
            append(self.folder.run(cell.id), "retry")
            self.folder.unhold([cell.id])

    def look(self, number: int, params: Mapping[str, Any]) -> Look:
        cells = self.cells(number, params)
        look, cell = self.stand(cells)
        asked, hold = self.folder.asked(), self.folder.holds().get(cell.id if cell else "", {"by": "", "why": ""})
        if look.name == "waiting" and cell is not None and asked is not None:
            if cell.id not in asked.labels:
                self.start(number, params)
            elif hold["by"] == "pruned" or hold["why"].startswith(SCANCELLED):
                return Look(name="lost", reason=f"its job was {hold['why'].partition(';')[0]}", step=look.step)
            elif hold["by"] in ("cancel", "breaker"):
                return Look(name="failed", reason=hold["why"], step=look.step)
        if time.monotonic() - self.looked > EVERY:
            self._reconcile()
        return look

    def stop(self, number: int, params: Mapping[str, Any]) -> bool:
        look, cell = self.stand(self.cells(number, params))
        if cell is None:
            return True
        self.folder.hold([cell.id], "pruned", "pruned: it is behind other trials")
        if (asked := self.folder.asked()) is not None:
            seen = [one for one in look_at(self.folder, asked).cells if one.id == cell.id and one.live]
            slurm.cancel([one.element.id for one in seen if one.element is not None])
            return not seen and look.name != "running"
        return look.name != "running"

    def _reconcile(self) -> None:
        self.looked = time.monotonic()
        try:
            reconcile(self.folder, patience=10.0)
        except (Busy, slurm.Unreachable):
            return  # a job is at it, or nobody answers: the next look tries again

    def close(self, interrupt: bool) -> None:
        """Jobs go on by themselves."""


def succeed(folder: SweepFolder, token: str) -> str:
    """Submits the coordinator that follows this one, unless it is there; its job's id.

    "" where the scheduler takes none, or too many have ended as soon as they began.
    """
    path, now = folder.path / "coordinators.json", time.time()
    before = read_json(path) or {"time": 0.0, "hasty": 0}
    hasty = before["hasty"] + 1 if now - before["time"] < HASTY else 0
    write_json(path, {"time": now, "hasty": hasty})
    try:
        there = _coordinators(folder)
        if others := [one.job for one in there if one.name != token]:  # of this one, before it was requeued
            return others[0]
        own = folder.submission(token).job or next((one.job for one in there), "")
        if hasty >= ATTEMPTS or not own:
            return ""
        return submit(folder, new(folder, "tune", []), f"afterany:{own}").job
    except (Full, Refused, Uncertain, slurm.Unreachable):
        return ""
