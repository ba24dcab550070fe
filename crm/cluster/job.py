"""What a job of the cluster does: a smoke test, one run, or looking after its sweep.

submitit starts it on every task with what `Task` holds, which is where to look. From then on nothing of submitit
counts: its signal handlers are replaced, and its result files are never read. What became of the job stands in the run
folder, under a token of the attempt's own.
"""

import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from crm.cluster import slurm
from crm.cluster.folder import Busy, Submission, SweepFolder
from crm.cluster.smoked import record_smoke, smoke_key
from crm.cluster.snapshot import refuse_other_code
from crm.conditions import condition
from crm.failures import reason_of
from crm.machine import Machine
from crm.records import read_config
from crm.tracking.listing import listed
from crm.tracking.process import Mirror, start
from crm.worker import DONE, FAILED, STOPPED, TAKEN, StopFlag, attempt, print_to

log = logging.getLogger("crm.cluster")


@dataclass(frozen=True)
class Task:
    """Called by submitit with the number of a task of one submission."""

    folder: str
    token: str

    def __call__(self, number: int) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
        folder = SweepFolder(Path(self.folder))
        submission = folder.submission(self.token)
        refuse_other_code(Path(submission.snapshot))
        {"smoke": _smoke, "cells": _cell, "reconcile": _reconcile, "afterwards": _afterwards, "tune": _tune}[
            submission.kind
        ](folder, submission, number)


def identity(submission: Submission, number: int) -> dict[str, Any]:
    """What this process is to the scheduler, for the claim on its run."""
    found = os.environ
    array = found.get("SLURM_ARRAY_JOB_ID")
    return {
        "name": submission.token,
        "task": number,
        "id": f"{array}_{found['SLURM_ARRAY_TASK_ID']}" if array else found.get("SLURM_JOB_ID", ""),
        "restarts": int(found.get("SLURM_RESTART_COUNT", 0)),
        "node": found.get("SLURMD_NODENAME", socket.gethostname()),
    }


# ---------------------------------------------------------------------------------------------- one run


LATE = 60.0  # seconds by which Slurm's warning that time is running out may be early or late


def _cell(folder: SweepFolder, submission: Submission, number: int) -> None:
    left, wanted = slurm.time_left(), submission.resources
    warned = wanted["warning_seconds"] - wanted["reserve_seconds"] + LATE
    stop = StopFlag(None if left is None else time.time() + left - wanted["reserve_seconds"], warned)
    stop.listen()
    id = submission.cells[number]
    if id in folder.holds():
        log.info("run %s is held: %s", id, folder.holds()[id]["why"])
        return
    run = folder.run(id)
    print_to(run / "log.txt")
    machine = _machine(submission)
    conditions = [condition(name) for name in submission.conditions]
    job = identity(submission, number)
    log.info("job %s on %s, %s left", job["id"], job["node"], "unknown time" if left is None else f"{left:.0f} s")
    mirror = _mirror(folder, id) if _chief(machine) else None
    code = attempt(run, machine, uuid4().hex[:16], submission.selection, conditions, stop, lambda _: None, job)
    log.info("attempt over: %s", {DONE: "done", FAILED: "failed", STOPPED: "stopped", TAKEN: "taken"}[code])
    _end(machine, code)
    if _chief(machine):
        # asked to go by a signal: only when the job is gone can be told whether it starts again by itself
        own = None if code == STOPPED and not stop.over else (submission.token, number)
        _look_after(folder, own)
    if mirror is not None:  # whoever has no time left does not wait
        trouble = mirror.finish(patience=0.0 if code == STOPPED else MIRROR_PATIENCE)
        log.info("tracking: %s", trouble or "all is sent")
    if code == FAILED or (code == TAKEN and machine.processes > 1):
        sys.exit(code)  # so that the scheduler calls it failed too, and ends the other processes


MIRROR_PATIENCE = 60.0  # seconds that a job waits for MLflow at its end


def _mirror(folder: SweepFolder, id: str) -> Mirror | None:
    """The mirror of this run, where there is a server: the embedded store is a file, which nodes would share."""
    if not os.environ.get("MLFLOW_TRACKING_URI") or folder.name not in listed(folder.runs):
        return None
    try:
        return start(folder.runs, folder.name, only=id)
    except OSError as error:
        log.warning("the run is not mirrored: %s", error)
        return None


def _machine(submission: Submission) -> Machine:
    """The machine of this job, whose processes have met."""
    machine = Machine.read(submission.machine)
    tasks = submission.resources["nodes"] * submission.resources["tasks"]
    if tasks == 1:
        return machine
    from crm.distributed import join

    return replace(machine, processes=join(machine.device).size)


def _end(machine: Machine, code: int) -> None:
    """Leaves the other processes in good order, where all of them have come here."""
    if machine.processes > 1 and code in (DONE, STOPPED):
        from crm.distributed import leave

        leave()


def _chief(machine: Machine) -> bool:
    return machine.processes == 1 or int(os.environ.get("SLURM_PROCID", 0)) == 0


def _look_after(folder: SweepFolder, own: tuple[str, int] | None, patience: float = 0.0) -> None:
    """Reconciles the sweep; what goes wrong with that is never the fault of the run."""
    from crm.cluster.reconcile import reconcile

    try:
        for line in reconcile(folder, own, patience).words:
            log.info("%s", line)
    except (Busy, slurm.Unreachable, OSError, RuntimeError, ValueError) as error:
        log.warning("the sweep was not looked after: %s", error)


# ---------------------------------------------------------------------------------------------- the others


def _smoke(folder: SweepFolder, submission: Submission, number: int) -> None:
    """Every configuration that the cells have, seeds apart; a verdict for each, and exit code 1 if one is bad."""
    from crm.smoke import smoke

    machine = _machine(submission)
    configs = {}
    for id in submission.cells:
        config = read_config(folder.run(id))
        configs.setdefault(smoke_key(config, submission), (config, id))
    bad = 0
    for key, (config, id) in configs.items():
        log.info("smoke test of run %s", id)
        try:
            smoke(config, machine)
            failure: Mapping[str, Any] | None = None
        except Exception as error:  # whatever it was, it would happen to every run of this configuration
            logging.exception("run %s would fail", id)
            bad += 1
            reason = f"{type(error).__name__}: {error}"
            failure = {"kind": reason_of(error), "reason": reason, "traceback": traceback.format_exc()}
        if _chief(machine):
            record_smoke(folder, key, id, failure)
    _end(machine, FAILED if bad else DONE)
    if _chief(machine) and bad:
        _look_after(folder, (submission.token, number), patience=30.0)
    if bad:
        sys.exit(FAILED)


TAIL_PATIENCE = 300.0  # seconds that the last job waits until the scheduler's word on the others is settled


def _reconcile(folder: SweepFolder, submission: Submission, number: int) -> None:
    """The job behind all others: nobody else acts if every one of them was killed."""
    from crm.cluster.reconcile import reconcile

    deadline = time.monotonic() + TAIL_PATIENCE
    while True:
        try:
            found = reconcile(folder, (submission.token, number), patience=60.0)
            words: Sequence[str] = found.words
            settled = not found.unsettled
        except (Busy, slurm.Unreachable) as error:
            words, settled = [str(error)], False
        for line in words:
            log.info("%s", line)
        if settled or time.monotonic() > deadline:
            return
        time.sleep(5.0)


def _afterwards(folder: SweepFolder, submission: Submission, number: int) -> None:
    """What a sweep does with its finished runs besides, by the command that does it on any machine."""
    import subprocess

    asked = folder.asked()
    assert asked is not None
    command = [sys.executable, "-m", "crm", "sweep", asked.name, "--cluster", "inline", "--no-track", "--yes"]
    command += ["--runs", str(folder.runs), "--seeds", ",".join(str(seed) for seed in asked.seeds)]
    for path, value in asked.changes.items():
        command += ["--set", f"{path}={value}"]
    for label in asked.labels.values():
        command += ["--only", label]
    if (data := asked.machine["data"]) is not None:
        command += ["--data", data]
    command += ["--device", asked.machine["device"], "--threads", str(asked.machine["threads"])]
    subprocess.run(command, check=True)


def _tune(folder: SweepFolder, submission: Submission, number: int) -> None:
    """The coordinator of a study, by its command, which takes this process over and with it the scheduler's signals."""
    from crm.tuning.folder import BESIDE

    name = folder.name.removeprefix(BESIDE)
    arguments = [sys.executable, "-m", "crm", "tune", "coordinate", name, "--runs", str(folder.runs)]
    os.execv(sys.executable, [*arguments, "--token", submission.token])
