"""How a sweep on a cluster stands: run folders and scheduler side by side. Looking changes nothing.

The run folders say what was done, the scheduler what is waiting or running. Where the scheduler does not answer, what
only it knows is `unknown`; nothing is declared dead because nobody speaks of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crm.cluster import slurm
from crm.cluster.folder import Asked, Submission, SweepFolder
from crm.cluster.slurm import FINISHED, WAITING, Element
from crm.conditions import condition
from crm.records import State, alive, read_config, state

STOPPED_BY_SLURM = ("SUSPENDED", "STOPPED")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One wanted cell."""

    id: str
    label: str
    files: State  # what its run folder says
    submission: Submission | None  # the newest that works on it
    task: int
    element: Element | None  # of that submission
    elsewhere: Element | None  # of another sweep's job that has the run
    hold: Mapping[str, str] | None
    reachable: bool

    @property
    def live(self) -> bool:
        """Whether the scheduler has it, waiting or running."""
        return self.element is not None and self.element.state not in FINISHED

    @property
    def name(self) -> str:
        """missing, queued, held, running, suspended, interrupted, failed, cancelled, lost, unknown, trained, done."""
        if self.files.name == "done":
            return "done"
        element = self.element if self.live else self.elsewhere
        if element is not None:
            if element.state in STOPPED_BY_SLURM:
                return "suspended"
            if element.state not in WAITING:
                return "running"
            return "held" if element.held else "queued"
        if self.hold is not None:
            return "cancelled" if self.hold["by"] == "cancel" else "held"
        if self.submission is not None and self.submission.state == "intended":
            return "unknown"
        if self.files.name == "running" and self.of_a_job:
            return "lost" if self.reachable else "unknown"
        if self.files.name in ("missing", "interrupted", "trained") and self.submission is not None:
            return "unknown" if not self.reachable and self.submission.state == "submitted" else self.files.name
        return self.files.name

    @property
    def of_a_job(self) -> bool:
        """Whether a job of the scheduler has claimed the run."""
        return self.files.holder is not None and "job" in self.files.holder

    @property
    def reason(self) -> str:
        """Why it is as it is, in words; "" where the name says all."""
        element = self.element if self.live else self.elsewhere
        whose = "" if self.live or element is None else f"for sweep job {element.name}; "
        told = {
            "queued": whose + (WORDS.get(element.why, element.why) if element else ""),
            "running": whose + (f"job {element.id} on {element.node}" if element else ""),
            "held": self.hold["why"] if self.hold else "held in the queue: crm release",
            "cancelled": self.hold["why"] if self.hold else "",
            "suspended": "the scheduler has stopped it for a while",
            "lost": "its job is gone without a word: crm reconcile starts it again",
            "unknown": "the scheduler does not answer" if not self.reachable else "sbatch did not answer",
        }
        return told.get(self.name, self.files.reason)


# Slurm's reasons why a job waits, for people
WORDS = {
    "Priority": "others come first",
    "Resources": "waits for free nodes",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "waits for a job that failed: crm reconcile",
    "JobArrayTaskLimit": "as many as the throttle allows are running",
    "QOSMaxJobsPerUserLimit": "as many as your account may are running",
    "AssocMaxJobsLimit": "as many as your account may are running",
    "AssocGrpGRES": "your group's GPUs are all in use",
    "ReqNodeNotAvail": "the nodes it may run on are not available (maintenance?)",
    "BeginTime": "starts again in a moment",
    "PartitionTimeLimit": "asks for more time than the partition allows",
    "PartitionConfig": "the partition cannot run it: fewer CPUs, memory or GPUs",
    "JobHeldUser": "held: crm release",
    "JobHeldAdmin": "held by an administrator",
}


@dataclass(frozen=True, kw_only=True)
class Look:
    cells: Sequence[Seen]
    elements: Mapping[str, Mapping[int, Element]]  # token -> task -> element
    submissions: Sequence[Submission]
    trouble: str = ""  # why the scheduler does not answer
    removed: Sequence[str] = field(default=())  # runs that jobs of this sweep have, and that are no longer wanted

    def of(self, submission: Submission) -> list[Element]:
        return list(self.elements.get(submission.token, {}).values())


def look(folder: SweepFolder, asked: Asked) -> Look:
    """All wanted cells of a sweep that was submitted to Slurm."""
    submissions = folder.submissions()
    named = [one.token for one in submissions if one.state != "refused"]
    conditions = [condition(name) for name in asked.conditions]
    files = {cell["id"]: _state(folder, cell["id"], asked.selection, conditions) for cell in asked.cells}
    others = _others(files.values(), set(named))
    elements, trouble = elements_of([*named, *others])
    newest = {id: (one, task) for one in submissions if one.kind == "cells" and one.state != "refused"
              for task, id in enumerate(one.cells)}  # fmt: skip
    holds, cells = folder.holds(), []
    for id, label in asked.labels.items():
        submission, task = newest.get(id, (None, 0))
        cells.append(
            Seen(
                id=id, label=label, files=files[id], submission=submission, task=task,
                element=elements.get(submission.token, {}).get(task) if submission else None,
                elsewhere=_elsewhere(files[id], set(named), elements), hold=holds.get(id), reachable=not trouble,
            )
        )  # fmt: skip
    wanted = asked.labels
    removed = [
        id for id, (submission, task) in newest.items()
        if id not in wanted and (element := elements.get(submission.token, {}).get(task)) is not None
        and element.state not in FINISHED
    ]  # fmt: skip
    return Look(cells=cells, elements=elements, submissions=submissions, trouble=trouble, removed=removed)


def _state(folder: SweepFolder, id: str, selection: str, conditions: Sequence[Any]) -> State:
    try:
        config = read_config(folder.run(id))
    except FileNotFoundError:
        return State(name="missing", reason="its run folder is gone: crm sweep makes it again")
    return state(folder.runs, config, selection, conditions)


def elements_of(tokens: Sequence[str]) -> tuple[dict[str, dict[int, Element]], str]:
    """What the queue knows of jobs of these names, by token and task; and why it does not answer, "" if it does."""
    found: dict[str, dict[int, Element]] = {}
    try:
        listed = slurm.queue(tokens) if tokens else []
    except slurm.Unreachable as error:
        return {}, str(error)
    for element in listed:
        found.setdefault(element.name, {})[element.task or 0] = element
    return found, ""


def _others(states: Iterable[State], own: set[str]) -> set[str]:
    """Names of jobs that have claimed these runs and belong to other sweeps."""
    jobs = [one.holder["job"]["name"] for one in states if one.holder is not None and "job" in one.holder]
    return {name for name in jobs if name not in own}


def _elsewhere(found: State, own: set[str], elements: Mapping[str, Mapping[int, Element]]) -> Element | None:
    """The live element of another sweep that has claimed the run."""
    job = (found.holder or {}).get("job")
    if job is None or job["name"] in own:
        return None
    element = elements.get(job["name"], {}).get(job["task"])
    return element if element is not None and element.state not in FINISHED else None


def worked_on_here(seen: Seen) -> bool:
    """Whether a process that no scheduler knows is at the run."""
    return seen.files.holder is not None and "job" not in seen.files.holder and alive(seen.files.holder)
