"""Why attempts end before their run does, and what is done about it: the policy as data. Torch-free.

An attempt's ending has a kind, one of REASONS: from the exception inside the process, or from the scheduler's word for
a job that died without one. What was tried before stands in the run's journal; nothing is remembered elsewhere.
"""

import errno
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Any

RESUME = "resume"  # another attempt, from the last checkpoint on
HALVE = "halve_micro_batch"  # the same with half the images at once; the batch that a step sees stays the same
MORE_MEMORY = "more_memory"  # the same with MEMORY_FACTOR times the memory, up to the cluster's max_memory_gb
EXCLUDE = "exclude_node"  # the same on any other node
HOLD = "hold"  # no other attempt before a person says `crm retry`

MEMORY_FACTOR = 1.5


@dataclass(frozen=True, kw_only=True)
class Policy:
    action: str  # RESUME, HALVE, MORE_MEMORY, EXCLUDE or HOLD
    limit: int  # attempts after the first ending of this kind
    words: str  # what it means and what is done, for people
    idle: int = 0  # endings in a row that may bring no step further; 0 is any number
    siblings: bool = False  # cells that would fail in the same way are held too


REASONS: dict[str, Policy] = {
    "gpu_memory": Policy(
        action=HALVE, limit=3,
        words="out of GPU memory: resumed with half the micro-batch and the same batch (equivalent, not identical)",
    ),
    "host_memory": Policy(
        action=MORE_MEMORY, limit=4, words="out of memory: resumed with half as much again, up to max_memory_gb"
    ),
    "time": Policy(
        action=RESUME, limit=1000, idle=3,
        words="out of time: resumed from the last checkpoint, as long as the attempts get further",
    ),
    "preempted": Policy(action=RESUME, limit=1000, words="made room for others: resumed from the last checkpoint"),
    "node": Policy(action=EXCLUDE, limit=5, words="the node or its network failed: resumed on other nodes"),
    "lost": Policy(action=RESUME, limit=3, words="killed without a word: resumed from the last checkpoint"),
    "non_finite": Policy(
        action=HOLD, limit=0, words="training diverged, and would again from the same seed: not tried again"
    ),
    "code": Policy(
        action=HOLD, limit=0, siblings=True,
        words="an error of the program: not tried again, and cells that fail in the same way are held",
    ),
    "input": Policy(
        action=HOLD, limit=0, siblings=True,
        words="a file or setting is wrong: not tried again before that is put right and `crm retry` says so",
    ),
    "disk": Policy(
        action=HOLD, limit=0, siblings=True,
        words="the disk or the quota is full: not tried again before there is room (`crm clean` makes some)",
    ),
    "cancelled": Policy(action=HOLD, limit=0, words="cancelled by a person: resumed when a person says so"),
    "unknown": Policy(action=RESUME, limit=1, words="nothing says why: tried once more"),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- from an exception

BY_NUMBER = {
    errno.ENOSPC: "disk", errno.EDQUOT: "disk", errno.EFBIG: "disk", errno.ENOMEM: "host_memory",
    errno.EIO: "node", errno.ESTALE: "node", errno.ETIMEDOUT: "node", errno.ENOTCONN: "node", errno.EHOSTDOWN: "node",
    errno.EREMOTEIO: "node", errno.ECONNRESET: "node", errno.ECONNREFUSED: "node",
}  # fmt: skip

# What messages say, the first that fits: libraries raise plain RuntimeErrors for most of it.
BY_MESSAGE = (
    (
        "gpu_memory",
        r"(CUDA|HIP) out of memory|CUDA error: out of memory|Cuda failure 2 'out of memory'|Triton Error.*out of memory"
        r"|CU(BLAS|DNN|SPARSE)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|DEVICE_ALLOCATION_FAILED|unable to find an engine",
    ),
    ("host_memory", r"can't allocate memory|not enough memory|Cannot allocate memory|DataLoader worker .* killed by"),
    ("disk", r"No space left on device|Disk quota exceeded|File too large"),
    (
        "node",
        r"NCCL|gloo|Connection (closed|reset) by peer|a process of the run is gone|Stale file handle|ECC error"
        r"|Input/output error|Transport endpoint|unspecified launch failure|CUDA-capable device|no CUDA GPUs"
        r"|this machine has no cuda|CUDA driver|Some CUDA devices are unavailable|\bXid\b",
    ),
    ("non_finite", r"(loss|gradient) is not finite|\bnan or inf\b|training has diverged"),
)  # fmt: skip

BY_CLASS = {
    "OutOfMemoryError": "gpu_memory",
    "MemoryError": "host_memory",
    "FloatingPointError": "non_finite",
    "RunFailed": "non_finite",
    "DistBackendError": "node",
    "DistNetworkError": "node",
    "DistStoreError": "node",
    "ConnectionError": "node",
    "TimeoutError": "node",
    "ImportError": "code",
    "AssertionError": "code",
    "TypeError": "code",
    "AttributeError": "code",
    "NameError": "code",
    "LookupError": "code",
    "ArithmeticError": "code",
    "NotImplementedError": "code",
    "RecursionError": "code",
    "SyntaxError": "code",
    "KeyboardInterrupt": "cancelled",
    "OSError": "input",
    "ValueError": "input",
}
# Names in a text, which knows no base classes.
DERIVED = {
    "ModuleNotFoundError": "ImportError", "KeyError": "LookupError", "IndexError": "LookupError",
    "UnboundLocalError": "NameError", "ZeroDivisionError": "ArithmeticError", "OverflowError": "ArithmeticError",
    "IndentationError": "SyntaxError", "TypeCheckError": "TypeError", "FileNotFoundError": "OSError",
    "PermissionError": "OSError", "NotADirectoryError": "OSError", "IsADirectoryError": "OSError",
    "UnicodeDecodeError": "ValueError", "JSONDecodeError": "ValueError", "Moved": "ValueError",
    "BrokenPipeError": "ConnectionError", "ConnectionResetError": "ConnectionError",
    "ConnectionRefusedError": "ConnectionError",
}  # fmt: skip


def reason_of(error: BaseException) -> str:
    """The kind of an exception, a key of REASONS."""
    if isinstance(error, OSError) and error.errno in BY_NUMBER:
        return BY_NUMBER[error.errno]
    return _kind([base.__name__ for base in type(error).__mro__], str(error))


def kind_of(reason: str) -> str:
    """The kind of a failure that is only told as `ClassName: message`, as in records from before kinds were written."""
    name, _, message = reason.partition(":")
    if not re.fullmatch(r"[\w.]+", name):
        name, message = "", reason
    name = name.rpartition(".")[2]
    return _kind([name, DERIVED.get(name, "")], message)


def _kind(classes: Iterable[str], message: str) -> str:
    """By the class where it says enough, else by the message: a ValueError or OSError may be anything."""
    found = next((BY_CLASS[name] for name in classes if name in BY_CLASS), "unknown")
    told = next((kind for kind, words in BY_MESSAGE if re.search(words, message)), found)
    if found not in ("input", "unknown") and told != "gpu_memory":  # of which libraries of all kinds speak
        return found
    return told


# ---------------------------------------------------------------------------------------------- from a scheduler

BY_STATE = {
    "OUT_OF_MEMORY": "host_memory", "TIMEOUT": "time", "DEADLINE": "time", "PREEMPTED": "preempted",
    "REQUEUED": "preempted", "REQUEUE_HOLD": "preempted", "NODE_FAIL": "node", "BOOT_FAIL": "node",
    "LAUNCH_FAILED": "node", "RECONFIG_FAIL": "node", "CANCELLED": "cancelled", "REVOKED": "cancelled",
    "OOM": "host_memory", "TO": "time", "DL": "time", "PR": "preempted", "RQ": "preempted", "NF": "node",
    "BF": "node", "CA": "cancelled",
}  # fmt: skip

# What Slurm writes into a job's own log, which says more than the state (a memory kill without cgroups is FAILED).
IN_LOG = (
    ("host_memory", r"exceeded memory limit|Exceeded job memory limit|oom[-_]kill|Out Of Memory"),
    ("time", r"DUE TO TIME LIMIT"),
    ("preempted", r"DUE TO PREEMPTION|DUE TO JOB REQUEUE"),
    ("node", r"DUE TO NODE FAILURE|DUE TO SYSTEM FAILURE|Job credential|Bus error|Duplicate jobid"),
)
KILLED = 128  # an exit code above it is a shell's way to tell the signal
NO_OUTPUT = 53  # Slurm's "signal" when a node could not open the job's folder or output


def reason_of_end(state: str, exit_code: str = "", log_tail: str = "") -> str:
    """The kind of the ending of a job that left no word in its run folder, a key of REASONS.

    Args:
        state: Slurm's, long or short, as in `CANCELLED by 1000`; "" where nobody knows.
        exit_code: `code:signal`, as sacct and scontrol tell it.
        log_tail: the end of what the job printed.
    """
    name = (state.split() or [""])[0].rstrip("+").upper()
    kind = BY_STATE.get(name)
    if kind not in (None, "cancelled"):
        return kind
    told = next((kind for kind, words in IN_LOG if re.search(words, log_tail, re.IGNORECASE)), None)
    if told or kind:
        return told or "cancelled"
    code, signal = (int(part) if part.isdigit() else 0 for part in (*exit_code.split(":"), "", "")[:2])
    if signal == NO_OUTPUT:
        return "node"
    if (last := _last_exception(log_tail)) is not None:
        return kind_of(last)
    if signal or code in (0, 9) or code > KILLED:  # a kill, or an end that nothing explains
        return "lost"
    return "unknown"


def _last_exception(log: str) -> str | None:
    """The line that ends the last traceback of a log."""
    _, found, after = log.rpartition("Traceback (most recent call last):")
    lines = [line for line in after.splitlines() if re.match(r"[\w.]*(Error|Exception|Failed|Interrupt)\b", line)]
    return lines[0] if found and lines else None


# ---------------------------------------------------------------------------------------------- the same failure


def normalised(traceback: str) -> str:
    """A traceback without what differs between two runs that fail in the same way.

    Kept are files (the last folder and the name), lines, functions and the words of the messages; gone are source
    lines, folders, addresses, ids and numbers.
    """
    kept = []
    in_frame = False
    for line in traceback.splitlines():
        if frame := FRAME.match(line):
            kept.append(f"{_short(frame[1])}:{frame[2]} in {frame[3]}")
            in_frame = True
        elif in_frame and line.startswith("    "):
            continue  # the source line of a frame, and the marks below it
        elif line.strip():
            in_frame = False
            kept.append(_without_values(line.strip()))
    return "\n".join(kept)


FRAME = re.compile(r'\s*File "([^"]+)", line (\d+), in (.+)')
VALUES = (
    (re.compile(r"\b0x[0-9a-fA-F]+\b"), "ADDRESS"),
    (re.compile(r"(?<![\w.])~?\.{0,2}(/[\w.@+=-]+)+/?"), "PATH"),
    (re.compile(r"(?<![\w.])[\w.@+=-]+(/[\w.@+=-]+)+"), "PATH"),
    (re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{12,64}\b"), "ID"),
    (re.compile(r"(?<![A-Za-z_])[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?\b(nan|inf)\b", re.IGNORECASE), "N"),
)


def _without_values(text: str) -> str:
    for pattern, name in VALUES:
        text = pattern.sub(name, text)
    return text


def _short(path: str) -> str:
    """The same for one file of any copy of the code."""
    return "/".join(PurePosixPath(path).parts[-2:])


def signature(traceback: str) -> str:
    """Twelve hex digits, equal for failures that are the same."""
    return sha256(normalised(traceback).encode()).hexdigest()[:12]


def last_frame(traceback: str) -> str:
    """Where it happened, `crm/step.py:107 in step`: the innermost frame of the project, else of all; "" without any."""
    frames = [frame for line in traceback.splitlines() if (frame := FRAME.match(line))]
    own = [frame for frame in frames if "site-packages" not in frame[1] and "/lib/python" not in frame[1]]
    return f"{_short((own or frames)[-1][1])}:{(own or frames)[-1][2]} in {(own or frames)[-1][3]}" if frames else ""


def outbreak(found: Mapping[str, Mapping[str, Any]], most: int, known: Iterable[str] = ()) -> list[str]:
    """The runs that failed with one traceback, if they are so many that the others would too; else none.

    Args:
        found: failure.json of the failed runs, by id.
        most: from how many on.
        known: signatures that a person has seen and lets pass.
    """
    same: dict[str, list[str]] = {}
    for id, failure in found.items():
        if REASONS[failure.get("kind") or kind_of(failure["reason"])].siblings:
            same.setdefault(signature(failure["traceback"]), []).append(id)
    worst = max((ids for one, ids in same.items() if one not in known), key=len, default=[])
    return worst if len(worst) >= most else []


# ---------------------------------------------------------------------------------------------- attempts


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a run, as its journal tells it."""

    token: str
    attempt: int = 0  # counted from 1; 0 where the journal only has its end
    host: str = ""
    pid: int = 0
    job: Mapping[str, Any] = field(default_factory=dict)  # what the scheduler called it
    step: int = 0  # at which it began
    time: float | None = None  # when
    outcome: str = ""  # done, stopped, failed, lost; "" while nothing says that it has ended
    kind: str = ""  # a key of REASONS for failed, lost and stopped ones that have one
    reason: str = ""
    last_step: int = 0  # at which it ended
    ended: float | None = None


def attempts(lines: Iterable[Mapping[str, Any]]) -> list[Attempt]:
    """A run's attempts in order, from the lines of its journal."""
    found: dict[str, Attempt] = {}
    for line in lines:
        token = line.get("token", "")
        if line["event"] == "attempt":
            found[token] = Attempt(
                token=token, attempt=line.get("attempt", 0), host=line.get("host", ""), pid=line.get("pid", 0),
                job=line.get("job") or {}, step=line.get("step", 0), last_step=line.get("step", 0), time=line["time"],
            )  # fmt: skip
        elif line["event"] == "end":
            before = found.get(token, Attempt(token=token))
            found[token] = replace(
                before, outcome=line["outcome"], kind=_ending(line), reason=line.get("reason", ""),
                last_step=line.get("step", before.last_step), ended=line["time"],
            )  # fmt: skip
    return list(found.values())


def _ending(line: Mapping[str, Any]) -> str:
    """The kind of an `end` line; derived from its reason where the record is from before kinds were written."""
    if "kind" in line or line["outcome"] in ("done", "stopped"):
        return line.get("kind") or ""
    return "lost" if line["outcome"] == "lost" else kind_of(line.get("reason", ""))


def _since_retry(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The `end` lines after the last `retry`, with which a person said that counting begins anew."""
    ends: list[Mapping[str, Any]] = []
    for line in lines:
        if line["event"] == "retry":
            ends = []
        elif line["event"] == "end":
            ends.append(line)
    return ends


def spent(lines: Iterable[Mapping[str, Any]], kind: str) -> int:
    """How often the run ended so since a person last said `crm retry`."""
    return sum(_ending(line) == kind for line in _since_retry(lines))


def may_retry(lines: Iterable[Mapping[str, Any]], kind: str, batch: int, micro_batch: int) -> bool:
    """Whether the policy allows another attempt after the journal's last ending, which was of this kind.

    Args:
        batch: images of a step, of one process.
        micro_batch: how many of them are computed at once, as in Machine; 0 is all.
    """
    policy, ends = REASONS[kind], _since_retry(lines)
    if policy.action == HOLD or sum(_ending(line) == kind for line in ends) > policy.limit:
        return False
    if policy.action == HALVE and (micro_batch or batch) <= 1:
        return False
    return not policy.idle or _idle(ends, kind) <= policy.idle


def _idle(ends: list[Mapping[str, Any]], kind: str) -> int:
    """How many of the latest endings, all of this kind, came at one and the same step."""
    same = 0
    for line in reversed(ends):
        if _ending(line) != kind or line.get("step") != ends[-1].get("step"):
            break
        same += 1
    return same


def halved(batch: int, micro_batch: int) -> int:
    """The next smaller micro-batch, at least 1; arguments as in `may_retry`."""
    return max(1, ((micro_batch or batch) + 1) // 2)
