"""Submission through submitit: an intent on disk first, then one job or one array, then the scheduler's id.

submitit writes the batch script and the pickles, and asks sbatch. The pickles hold nothing but where to look and which
task it is. A request that timed out may have made a job all the same: it is looked up by its name, which is the
submission's token, and taken over if it is there.
"""

import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from crm.cluster import slurm
from crm.cluster.folder import Submission, SweepFolder
from crm.cluster.job import Task
from crm.cluster.settings import Resources

SMALL = {"cpus": 1, "memory_gb": 2, "minutes": 15, "nodes": 1, "tasks": 1, "gres": "", "reserve_seconds": 0}


class Refused(ValueError):
    """The scheduler does not take the job, for a reason that stands in the message."""


class Full(RuntimeError):
    """The scheduler takes no more jobs for now; what is left is submitted later."""


class Uncertain(RuntimeError):
    """The scheduler did not answer, and whether the job exists will only be known when it does."""


def new(
    folder: SweepFolder, kind: str, cells: Sequence[str], gate: str = "", why: str = "", **changes: Any
) -> Submission:
    """A submission that stands nowhere yet, of what was asked last; `changes` are of its fields."""
    asked = folder.asked()
    assert asked is not None
    return Submission(
        token=f"crm-{re.sub(r'[^a-z0-9]+', '-', folder.name.lower()).strip('-')[:40]}-{kind[:1]}{uuid4().hex[:10]}",
        kind=kind,
        cells=list(cells),
        state="intended",
        **{
            "snapshot": asked.snapshot,
            "resources": asked.resources,
            "machine": asked.machine,
            "selection": asked.selection,
            "conditions": asked.conditions,
            **changes,
        },
        gate=gate,
        why=why,
        time=time.time(),
    )


def submit(folder: SweepFolder, submission: Submission, after: str = "", held: bool = False) -> Submission:
    """Hands a submission to the scheduler and records what came of it.

    Args:
        after: a dependency as sbatch takes it, such as `afterok:12`.
        held: it waits until it is released.

    Raises Refused, Full or Uncertain; what stands on disk then says the same.
    """
    folder.write(submission)
    try:
        with scheduler_environment():
            executor = _executor(folder, submission, after, held)
            jobs = executor.map_array(_task(folder, submission), _numbers(submission))
    except Exception as error:  # submitit has several for "sbatch said no", with what it said as text
        return _failed(folder, submission, str(error))
    return folder.write(replace(submission, state="submitted", job=jobs[0].job_id.partition("_")[0]))


def _failed(folder: SweepFolder, submission: Submission, said: str) -> Submission:
    """What is to be made of sbatch's no: maybe the job is there all the same."""
    if slurm.is_uncertain(said):
        try:
            if (found := settle(folder, submission)).state == "submitted":
                return found
        except slurm.Unreachable:
            pass
        raise Uncertain(slurm.refusal(said))
    folder.write(replace(submission, state="refused", why=slurm.refusal(said)))
    raise (Full if slurm.is_limit(said) else Refused)(slurm.refusal(said))


def settle(folder: SweepFolder, submission: Submission) -> Submission:
    """An intended submission after a look at the scheduler: submitted if its job is there, else as it was.

    Raises slurm.Unreachable.
    """
    found = slurm.queue([submission.token])
    if not found:
        return submission
    job = found[0].job
    where = folder.jobs(submission.token)
    executor = _executor(folder, submission, "", False)
    for number in _numbers(submission):
        path = where / (f"{job}_{number}" if len(submission.cells) > 1 else job)
        path = path.with_name(path.name + "_submitted.pkl")
        if not path.exists():  # submitit gave it no name, for it never learnt the id
            delayed = _delayed(_task(folder, submission), number)
            delayed.set_timeout(int(submission.resources["minutes"]), executor.max_num_timeout)
            delayed.dump(path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
    return folder.write(replace(submission, state="submitted", job=job))


def _delayed(task: Task, number: int) -> Any:
    from submitit.core.utils import DelayedSubmission

    return DelayedSubmission(task, number)


def _task(folder: SweepFolder, submission: Submission) -> Task:
    return Task(str(folder.path), submission.token)


def _numbers(submission: Submission) -> range:
    """The tasks: one for every cell of an array, one for any other job."""
    return range(len(submission.cells) if submission.kind == "cells" else 1)


def _executor(folder: SweepFolder, submission: Submission, after: str, held: bool) -> Any:
    from submitit import SlurmExecutor

    wanted = Resources(**{**submission.resources, "setup": tuple(submission.resources["setup"])})
    if submission.kind == "reconcile":
        wanted = replace(wanted, **SMALL)
    if submission.kind == "afterwards":  # one process, with what a run has: it evaluates and measures
        wanted = replace(wanted, nodes=1, tasks=1)
    if submission.kind == "tune":
        wanted = replace(wanted, **{**SMALL, "minutes": wanted.minutes})
    folder.jobs(submission.token).mkdir(parents=True, exist_ok=True)
    executor = SlurmExecutor(folder=folder.jobs(submission.token), max_num_timeout=0)
    executor.update_parameters(**_parameters(submission, wanted, after, held))
    return executor


def _parameters(submission: Submission, wanted: Resources, after: str, held: bool) -> dict[str, Any]:
    """What submitit is told; an empty text leaves the choice to the cluster."""
    named = {name: value for name in ("partition", "account", "qos", "constraint", "gres", "exclude")
             if (value := getattr(wanted, name))}  # fmt: skip
    more: dict[str, Any] = {"requeue": True}
    if held:
        more["hold"] = True
    if after.startswith("afternotok"):
        more["kill-on-invalid-dep"] = "yes"
    return {
        **named,
        "job_name": submission.token,
        "time": wanted.minutes,
        "nodes": wanted.nodes,
        "ntasks_per_node": wanted.tasks,
        "cpus_per_task": wanted.cpus,
        "mem": f"{round(wanted.memory_gb * 1024)}MB",
        "signal_delay_s": min(wanted.warning_seconds, 30 * wanted.minutes),
        "array_parallelism": wanted.throttle or max(1, len(submission.cells)),
        "stderr_to_stdout": True,
        "srun_args": ["--kill-on-bad-exit=1"],
        "setup": [*_setup(submission, wanted)],
        "additional_parameters": more,
        **({"dependency": after} if after else {}),
    }


def _setup(submission: Submission, wanted: Resources) -> Iterator[str]:
    """Shell lines before Python starts; all that is not the user's own is quoted."""
    yield "set -e"
    yield from wanted.setup
    code = shlex.quote(submission.snapshot)
    yield f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}"
    yield f"export CRM_HOME={shlex.quote(str(Path(submission.machine['runs']).parent))}"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        yield f"export {name}={int(submission.machine['threads'])}"
    yield f"cd {code}"


@contextmanager
def scheduler_environment() -> Iterator[None]:
    """Without the variables of a job that this process may be in: sbatch and srun would take them for wishes."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if _of_a_job(name)}
    try:
        yield
    finally:
        os.environ.update(kept)


def _of_a_job(name: str) -> bool:
    return name.startswith(("SLURM_", "SUBMITIT_", "PMI")) and name != "SLURM_CONF"
