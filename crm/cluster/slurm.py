"""The scheduler as its commands show it: what they print becomes values, what they refuse becomes words for a person.

Nothing here decides anything. Jobs are found by their names, which are unique, because a controller that has lost its
state gives the same ids out again.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from crm.names import unknown

TIMEOUT = 30.0  # seconds; the commands themselves give up on a controller after 9 or 10, but not on everything
BATCH = 200  # names of one squeue or sacct, whose command line may not grow without end

# What Slurm calls the states of a job, the flags that newer versions print in their place included.
FINISHED = frozenset(
    ["BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
     "TIMEOUT"]
)  # fmt: skip
LIVE = frozenset(
    ["COMPLETING", "CONFIGURING", "EXPEDITING", "LAUNCH_FAILED", "PENDING", "POWER_UP_NODE", "RECONFIG_FAIL",
     "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESIZING", "RESV_DEL_HOLD", "RUNNING", "SIGNALING", "SPECIAL_EXIT",
     "STAGE_OUT", "STOPPED", "SUSPENDED", "UPDATE_DB"]
)  # fmt: skip
WAITING = frozenset(["PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"])


class Unreachable(RuntimeError):
    """The scheduler does not answer: nothing is known, which is not the same as that there is nothing."""


@dataclass(frozen=True)
class Element:
    """One job, or one element of an array, as squeue shows it."""

    job: str  # of an array its own id, the one that its elements share
    task: int | None  # index within the array
    name: str
    state: str  # Slurm's word
    why: str  # why it waits, in Slurm's word; "" if it does not
    node: str
    restarts: int  # how often it was requeued
    end: float | None  # when it must end at the latest, or has ended; seconds, UTC epoch
    held: bool  # it waits and will not start before it is released

    @property
    def id(self) -> str:
        return self.job if self.task is None else f"{self.job}_{self.task}"


@dataclass(frozen=True)
class Ended:
    """One attempt of a job, as accounting knows it; one that was requeued has several. It may be running still."""

    job: str
    task: int | None
    name: str
    state: str  # of this attempt: REQUEUED means that there is another
    exit: str  # "code:signal"
    node: str
    start: float | None  # None if it was cancelled before it ran; seconds, UTC epoch
    end: float | None
    restarts: int  # attempts of this job before this one


@dataclass(frozen=True)
class Limits:
    """What one submission may ask for."""

    max_array: int  # elements of one array
    max_submit: int | None  # jobs that the whole cluster holds at once


def finished(state: str) -> bool:
    """Whether an attempt in this state is over. A word that is not known here is not: silence declares nothing dead."""
    return word(state) in FINISHED


def word(state: str) -> str:
    """A state without what may follow it: "CANCELLED by 1000", and "COMPLETED+", which did not fit its column."""
    return state.strip().partition(" ")[0].rstrip("+")


# ---------------------------------------------------------------------------------------------- reading


def queue(names: Sequence[str]) -> list[Element]:
    """Everything that the controller knows of the jobs of these names, those that ended a minute ago included.

    A name that is not there is absent. Raises Unreachable.
    """
    # squeue's short form (-o) does not know the number of restarts. The last character is printed after each field.
    fields = (
        "ArrayJobID:|,ArrayTaskID:|,Name:|,State:|,NodeList:|,RestartCnt:|,EndTime:|,PriorityLong:|,JobID:|,Reason:|"
    )
    lines = waiting = ""
    for some in _batches(names):
        waiting += _ask(["squeue", "-h", "-t", "PENDING", "--name", some, "-O", "ArrayJobID:|,ArrayTaskID:|"])
        lines += _ask(["squeue", "-h", "-r", "-t", "all", "--name", some, "-O", fields])
    return read_queue(lines, waiting)


def read_queue(lines: str, waiting: str = "") -> list[Element]:
    """What squeue printed for `queue`: a line per element, and the sets of elements that wait.

    Its line per element loses the last element of those that are still one record and of which every second, say,
    waits (0-498:2). Its sets have all of them, but mix up which are held.
    """
    found = [known for line in lines.splitlines() if (known := _element(line)) is not None]
    shown = {(element.job, element.task) for element, _ in found}
    like = {element.job: element for element, is_rest in found if is_rest}
    for line in waiting.splitlines():
        job, tasks, *_ = (*line.split("|"), "")
        if job in like and ID.fullmatch(text := f"{job}_[{tasks}]"):
            found += [(replace(like[job], task=task), True) for _, task in _ids(text) if (job, task) not in shown]
    return [element for element, _ in found]


def _element(line: str) -> tuple[Element, bool] | None:
    """One line of squeue, and whether it is of those of its array that are still one record; None for other lines."""
    parts = [part.strip() for part in line.split("|", 9)]
    if len(parts) < 10:
        return None
    job, task, name, state, node, restarts, end, priority, record, why = parts
    state, why = word(state), why.rstrip("|")
    waiting = state in WAITING
    element = Element(
        job=job,
        task=int(task) if task.isdigit() else None,
        name=name,
        state=state,
        why=why if waiting and why != "None" else "",
        node=_node(node),
        restarts=int(restarts) if restarts.isdigit() else 0,
        end=_moment(end),
        held=waiting and (priority == "0" or why.startswith("JobHeld") or state in ("REQUEUE_HOLD", "SPECIAL_EXIT")),
    )
    return element, waiting and record == job


# Asked for by state, jobs are found by when they ended; otherwise by when they became eligible, which one that was
# cancelled while it waited, or held while it ran, never was. SUSPENDED is S.
ALL_STATES = "BF,CA,CD,DL,F,NF,OOM,PR,TO,PD,R,RQ,RS,RV,S"


def history(names: Sequence[str], days: int = 30) -> list[Ended]:
    """Every attempt that accounting knows of the jobs of these names, in order; it is seconds behind the queue.

    Raises Unreachable where accounting does not answer or is not kept. As a rule it shows a person only their own jobs.
    An element that was cancelled while it waited may be missing: an array that was not yet split up is one record.
    """
    fields = "JobID,JobName,State,ExitCode,NodeList,Submit,Start,End"
    command = ["sacct", "-D", "-X", "-n", "-P", "-S", f"now-{days}days", "-E", "now", "-s", ALL_STATES]
    return read_history("".join(_ask([*command, "-o", fields, "--name", some]) for some in _batches(names)))


def read_history(text: str) -> list[Ended]:
    """The lines that sacct printed for `history`: in the order in which they were submitted, and numbered by it."""
    rows: list[tuple[str, int | None, float, list[str]]] = []
    never_ran: dict[tuple[str, int | None], list[str]] = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) != 8 or not ID.fullmatch(parts[0]):
            continue
        ids, submitted = _ids(parts[0]), _moment(parts[5]) or 0.0
        if "[" not in parts[0]:
            rows += [(job, task, submitted, parts) for job, task in ids]
        elif finished(parts[2]):  # what is left of an array; it names those that have long had lines of their own, too
            never_ran |= dict.fromkeys(ids, parts)
    own = {(job, task) for job, task, _, _ in rows}
    rows += [(job, task, 0.0, parts) for (job, task), parts in never_ran.items() if (job, task) not in own]
    seen: dict[tuple[str, int | None], int] = {}
    found = []
    for job, task, _, parts in sorted(rows, key=lambda row: row[2]):
        _, name, state, code, node, _, start, end = parts
        number = seen.get((job, task), 0)
        seen[job, task] = number + 1
        found.append(Ended(job, task, name, word(state), code, _node(node), _moment(start), _moment(end), number))
    return found


def limits() -> Limits:
    """What the controller accepts at once. Raises Unreachable."""
    return read_limits(_ask(["scontrol", "show", "config"]))


def read_limits(text: str) -> Limits:
    """What `scontrol show config` printed."""
    settings = dict(re.findall(r"^(\w+)\s*= *(.*?)\s*$", text, re.MULTILINE))
    most = int(settings.get("MaxArraySize", "1001"))
    if at_once := re.search(r"max_array_tasks=(\d+)", settings.get("SchedulerParameters", "")):
        most = min(most, int(at_once[1]))
    jobs = settings.get("MaxJobCount", "")
    return Limits(max_array=most, max_submit=int(jobs) if jobs.isdigit() else None)


def partitions() -> list[str]:
    """The partitions that there are. Raises Unreachable."""
    return list(dict.fromkeys(_ask(["sinfo", "-h", "-o", "%R"]).split()))


def time_left() -> float | None:
    """Seconds until the scheduler ends the job that this process is in; None outside of a job, or where it is unknown.

    Asks the controller where the job's environment does not say it, so it is not for every step.
    """
    job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
    if not job:
        return None
    end = _moment(os.environ.get("SLURM_JOB_END_TIME", ""))  # newer versions set it
    if array:  # the id of the whole array may be that of this element too
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if end is None:
        try:
            end = _moment(_ask(["squeue", "-h", "-j", job, "-o", "%e"]))
        except Unreachable:
            return None
    return None if end is None else end - time.time()


# ---------------------------------------------------------------------------------------------- acting


def hold(ids: Sequence[str]) -> dict[str, str]:
    """Keeps waiting jobs ("123" or "123_4") from starting. Returns those that were refused, with why.

    One that already runs goes on, and does not start again should it be requeued. Raises Unreachable.
    """
    return _each(["scontrol", "hold"], ids)


def release(ids: Sequence[str]) -> dict[str, str]:
    """Lets held jobs start. Returns those that were refused, with why. Raises Unreachable."""
    return _each(["scontrol", "release"], ids)


def cancel(ids: Sequence[str], signal: str | None = None) -> dict[str, str]:
    """Cancels jobs, or sends their processes a signal ("USR2"). Returns those that were refused, with why.

    A job that is over or was never there is not refused: there is nothing to cancel. Raises Unreachable.
    """
    return _each(["scancel", "--quiet", *([f"--signal={signal}"] if signal else [])], ids)


def requeue(id: str) -> dict[str, str]:
    """Stops a running job and puts it back into the queue. Returns it, with why, if that was refused."""
    return _each(["scontrol", "requeue"], [id])


def _each(command: Sequence[str], ids: Sequence[str]) -> dict[str, str]:
    """Applies a command to all ids. Those of one array go as a set, which costs the controller one request."""
    refused: dict[str, str] = {}
    for some in _sets(ids):
        done = _run([*command, some])
        if done.returncode == 0:
            continue
        told = (done.stderr or done.stdout).strip()
        if is_uncertain(told):
            raise _unreachable(command, told)
        asked = set(_ids(some))
        named: dict[tuple[str, int | None], str] = {}
        for line in told.splitlines():
            named |= _refused(line)
        # An element may be named by all that it has not been split from; what cannot be told apart was refused whole.
        about = {each: why for each, why in named.items() if each in asked} if named else dict.fromkeys(asked, told)
        refused |= {_id(job, task): why for (job, task), why in about.items()}
    return refused


def _refused(line: str) -> dict[tuple[str, int | None], str]:
    """`17_4-7: Invalid job id specified` of scontrol; `... on job id 17_4: Access denied` of scancel."""
    found = re.search(r"(?:^|job id |job )(\d+(?:_\[?[\d,\-]+\]?)?): (.+)", line)
    if found is None or found[2].strip() == "No error":  # the part of a set that went well
        return {}
    return {each: found[2].strip() for each in _ids(found[1])}


def _sets(ids: Sequence[str]) -> Iterator[str]:
    """Ids as few arguments: 12, 17_[3,5-9]. At most BATCH ranges each."""
    arrays: dict[str, set[int]] = {}
    for id in dict.fromkeys(ids):
        for job, task in _ids(id):
            if task is None:
                yield job
            else:
                arrays.setdefault(job, set()).add(task)
    for job, tasks in arrays.items():
        ranges: list[list[int]] = []
        for task in sorted(tasks):
            if ranges and ranges[-1][1] == task - 1:
                ranges[-1][1] = task
            else:
                ranges.append([task, task])
        texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
        for start in range(0, len(texts), BATCH):
            yield f"{job}_[{','.join(texts[start : start + BATCH])}]"


ID = re.compile(r"(\d+)(?:\+\d+)?(?:_\[?([\d,\-:.]+)(?:%\d+)?\]?)?")


def _ids(text: str) -> list[tuple[str, int | None]]:
    """The jobs that an id of Slurm means: 12, 12_3, 12_[1-3,7%2] (at most two at once), 12_[0-8:4], 12_[1,2,...]."""
    found = ID.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no id of a Slurm job; those look like 123, 123_4 or 123_[4-7,9]")
    job, tasks = found.groups()
    if tasks is None:
        return [(job, None)]
    every: list[tuple[str, int | None]] = []
    for part in tasks.split(","):
        if bounds := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):  # else it is the "..." of a list cut short
            first, last, step = (int(each) if each else None for each in bounds.groups())
            assert first is not None
            every += [(job, task) for task in range(first, (first if last is None else last) + 1, step or 1)]
    return every


def _id(job: str, task: int | None) -> str:
    return job if task is None else f"{job}_{task}"


# ---------------------------------------------------------------------------------------------- refusals

# What sbatch prints -> what it means and what to do. The first that is found counts.
REFUSALS = {
    r"Could not detect .(sbatch|srun)|sbatch: (command )?not found|No such file or directory: '?sbatch": (
        "there is no sbatch on the path: this machine has no Slurm, or its module is not loaded. Run this where sbatch "
        "works (a login node), or take --cluster local"
    ),
    r"Unable to contact slurm controller|Connection refused": "Slurm's controller does not answer; try again later",
    r"Socket timed out|Zero Bytes were transmitted|Unexpected message received|not connected|reset by peer": (
        "Slurm's controller did not answer in time, and it is not known whether it has taken the job"
    ),
    r"(Assoc|QOS)\w*Submit\w*Limit": (
        "you have as many jobs in the queue as you are allowed to; submit the rest when some of them are done"
    ),
    r"temporarily unable to accept job|Resource temporarily unavailable": (
        "the cluster's queue is full; submit the rest later"
    ),
    r"Invalid account|account/partition combination": (
        "Slurm does not know this account, or it may not use this partition; `sacctmgr show associations user=$USER` "
        "lists yours"
    ),
    r"Invalid qos": "Slurm does not know this QOS, or your account may not use it; `sacctmgr show qos` lists them",
    r"Invalid partition name|invalid partition specified": "Slurm does not know this partition; `sinfo` lists them",
    r"User's group not permitted|Access/permission denied|not permitted to use this partition": (
        "you may not use this partition, or this account in it"
    ),
    r"time limit is invalid|(MaxWall|TimeLimit|WallDuration)\w*Limit": (
        "the time asked for is more than the partition or your account allows; `sinfo -o '%R %l'` shows the limits"
    ),
    r"Memory specification can ?not": "no node of this partition has as much memory as asked for",
    r"Invalid generic resource|Invalid gres|Invalid GRES": (
        "no node has such a resource (gres); `sinfo -o '%R %G'` lists them"
    ),
    r"Invalid feature specification": "no node has such a feature (constraint); `sinfo -o '%R %f'` lists them",
    r"More processors requested|CPU count|node configuration is not available|Node count|partition configuration": (
        "no node, or not as many, of this partition has as many CPUs, as much memory and as many GPUs as asked for; "
        "`sinfo -o '%R %D %c %m %G'` shows nodes, CPUs, memory (MB) and GPUs"
    ),
    r"Invalid job array": "the array is larger than Slurm's MaxArraySize",
    r"partition not available": "this partition takes no jobs at the moment",
    r"Job violates accounting/QOS policy": (
        "your account's limits do not allow this: too many jobs, or one that is too large or too long"
    ),
    r"Unable to process configuration|cannot stat file": (
        "Slurm's commands do not find their configuration; where it is not in /etc/slurm, SLURM_CONF names it"
    ),
}


def refusal(text: str) -> str:
    """What sbatch printed when it refused a job, in words that say what to do, its own at the end."""
    own = " ".join(dict.fromkeys(re.sub(r"^\w+: (error|fatal): ", "", line).strip() for line in text.splitlines()))
    words = next((words for pattern, words in REFUSALS.items() if re.search(pattern, text, re.IGNORECASE)), "")
    if named := re.search(r"invalid partition specified: (\S+)", text):
        try:
            words = str(unknown("partition", named[1], partitions()))
        except Unreachable:
            words = f"Slurm does not know the partition {named[1]!r}"
    return f"{words} (Slurm says: {own.strip()})" if words else f"Slurm refused the job: {own.strip() or 'no reason'}"


def is_limit(text: str) -> bool:
    """Whether a submission was refused only because there are too many jobs already: the rest can go later."""
    return _found(r"(Assoc|QOS)\w*Submit\w*Limit|temporarily unable to accept job|Resource temporarily unav", text)


def is_uncertain(text: str) -> bool:
    """Whether the connection failed in a way that leaves it open what was done: look a job up before trying again.

    A refused connection is among them, because what is printed is about the last of several tries.
    """
    return _found(
        r"timed out|Zero Bytes were transmitted|Unable to contact slurm|Unexpected message received|"
        r"Connection (refused|reset)|endpoint is not connected|Insane message length|Communication connection failure|"
        r"persistent connection|authentication error|munge",
        text,
    )


def _found(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.IGNORECASE) is not None


# ---------------------------------------------------------------------------------------------- commands


def _ask(command: Sequence[str]) -> str:
    """What a command that only reads prints. Raises Unreachable."""
    done = _run(command)
    if done.returncode != 0:
        raise _unreachable(command, done.stderr or done.stdout)
    return done.stdout


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=TIMEOUT,
            env=_environment(os.environ), check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise Unreachable(
            f"there is no {command[0]} on the path: this machine has no Slurm, or its module is not loaded. "
            "Run this on a login node, or take --cluster local"
        ) from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[0]} has not answered within {TIMEOUT:.0f} s; try again later") from None


def _environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Times in seconds, sets of elements in full, and none of a person's own filters and formats."""
    own = ("SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SCONTROL_")
    kept = {name: value for name, value in inherited.items() if not name.startswith(own)}
    return {**kept, "SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0"}


def _unreachable(command: Sequence[str], told: str) -> Unreachable:
    own = " ".join(told.split())
    if "storage is disabled" in told:
        return Unreachable("this cluster keeps no accounting, so what has become of a job that is over is not known")
    if command[0] == "sacct":
        return Unreachable(f"Slurm's accounting does not answer; try again later (sacct says: {own})")
    return Unreachable(f"Slurm's controller does not answer {command[0]}; try again later (it says: {own})")


def _batches(names: Sequence[str]) -> Iterator[str]:
    every = list(dict.fromkeys(names))
    assert all(name and "," not in name for name in every), every
    for start in range(0, len(every), BATCH):
        yield ",".join(every[start : start + BATCH])


def _moment(text: str) -> float | None:
    """Seconds since the epoch, as SLURM_TIME_FORMAT=%s asks for; None for N/A, None, Unknown."""
    return float(text) if re.fullmatch(r"\d+", text.strip()) and int(text) > 0 else None


def _node(text: str) -> str:
    return "" if text in ("None assigned", "(null)", "N/A") else text
