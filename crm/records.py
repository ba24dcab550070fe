"""A run on disk: the folder is the truth, and every reader and writer of it goes through this file.

    runs/<id>/config.json        every setting of the run, flat, with the schema version
              provenance.json    commit, code, library versions, data manifest, hardware of the first attempt
              code.json          the parts of the code that trains, as hashes (crm.fingerprint)
              numerics.json      device, threads and passes that every attempt must use
              claim.json         the live attempt: token, process; absent when nobody works on the run
              attempts/          claims of the attempts before
              journal.jsonl      one line per log step, validation, evaluation, attempt and ending
              progress.json      the newest step, for whoever looks
              failure.json       why the last attempt failed
              log.txt            what the attempts printed
              checkpoints/       last.safetensors, last.previous.safetensors, val_best.safetensors
              result.json        its existence means: trained
              diagnosis.json     what `crm diagnose` found last
              tuning.json        the studies that have a trial of it (crm.search)
              mirror.json        what `crm.tracking` has sent to MLflow
              evals/<selection>/<condition>.npz   per-image confusion matrices; its existence means: evaluated
              evals/<selection>/index.jsonl       a line per evaluation: hash, sum over images (`crm.sums`)
              evals/<selection>/unfinished/       evidence of evaluations that are being computed (`crm.unfinished`)

Torch-free; numpy is loaded only by whoever reads confusion matrices.
"""

import json
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

from crm.cluster.slurm import FINISHED, Unreachable, queue
from crm.conditions import Condition
from crm.config import SCHEMA, Config, flatten, override, plain, run_id
from crm.faults import while_writing
from crm.machine import Machine


class Superseded(RuntimeError):
    """This attempt lost its claim on the run to a newer one, so it may write nothing more."""


class Moved(ValueError):
    """A run folder was recorded under other values than the ones asked for."""


# ---------------------------------------------------------------------------------------------- files


def write_json(path: Path, value: Any) -> None:
    """All or nothing, and on disk when it returns, so that a killed job leaves no half file."""
    write_bytes(path, (json.dumps(finite(value), indent=1) + "\n").encode())


def finite(value: Any) -> Any:
    """The value with null in the place of numbers that JSON does not know: nan and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def write_bytes(path: Path, content: bytes, check: Callable[[], None] | None = None) -> None:
    """Temporary file, fsync, rename; `check` may raise just before the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        with scratch.open("wb") as file:
            while_writing(file, content, path.name)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check()
        os.replace(scratch, path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)  # the rename too
        os.close(directory)
    finally:
        scratch.unlink(missing_ok=True)


def remove_scratch(folder: Path) -> None:
    """Removes what a writer that was killed has left half written; only for who holds the claim."""
    for path in folder.rglob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{8}", path.name):
            path.unlink(missing_ok=True)


def read_json(path: Path | str) -> Any:
    """The file's value, or None where there is no such file; ValueError names one that is no JSON."""
    try:
        return json.loads(read_bytes(path).decode())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged, for it is no JSON: {error}") from error


def read_bytes(path: Path | str) -> bytes:
    """A small file, in as few calls of the system as it takes: tens of thousands are read for a plan or a table."""
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        found = os.read(file, size + 1)  # asking for more than there is shows whether it has grown
        while len(found) > size and (more := os.read(file, 1 << 20)):
            size, found = len(found), found + more
        return found
    finally:
        os.close(file)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hex."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- the folder


def open_run(runs: Path, config: Config) -> Path:
    """The folder of this run, new or resumed.

    Raises Moved for a folder that was recorded under other values: a default has changed since.
    """
    folder = runs / run_id(config)
    if (written := read_json(folder / "config.json")) is None:
        wanted = json.loads(json.dumps(flatten(config)))
        write_json(folder / "config.json", {"schema": SCHEMA, "id": folder.name, "config": wanted})
    elif words := moved(written, config):
        raise Moved(f"{folder} {words}; `crm sweep --rerun drifted` trains anew, or use another --runs folder")
    return folder


def moved(written: Mapping[str, Any], config: Config) -> str:
    """How a config.json contradicts this config, for a default moved or a setting is gone; "" if it does not."""
    if written["schema"] != SCHEMA:
        return f"has record schema {written['schema']}, this version reads {SCHEMA}"
    recorded, wanted = written["config"], plain(config)
    if recorded == wanted:
        return ""
    found = [f"{path} (was {recorded[path]!r}, now {wanted.get(path)!r})"
             for path in sorted(recorded) if recorded[path] != wanted.get(path)]  # fmt: skip
    return f"was recorded under other values of {', '.join(found)}" if found else ""


def read_config(folder: Path) -> Config:
    """The config a run folder was recorded under; FileNotFoundError where it is none."""
    written = read_json(folder / "config.json")
    if written is None:
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.json")
    return override(Config(), written["config"])


def trained_on(folder: Path) -> str:
    """The data set whose classes a run's network has: its config's, but for a run imported onto another data set."""
    return (read_json(folder / "result.json") or {}).get("trained_on") or read_config(folder).data.dataset


def recorded_numerics(folder: Path, machine: Machine) -> Machine:
    """The machine with the numerics that the run's first checkpoint was made with; as it is before there is one.

    Bit identity is promised at equal numerics, so every attempt uses those of the first that got somewhere. ValueError
    if that was with another number of processes, which only their launcher can change.
    """
    recorded = read_json(folder / "numerics.json")
    if recorded is None or not list((folder / "checkpoints").glob("last*.safetensors")):
        return machine
    if (begun := recorded.get("processes", 1)) != machine.processes:
        raise ValueError(f"the run was begun with {begun} processes; start it with as many, not {machine.processes}")
    if recorded["device"].partition(":")[0] == machine.device.partition(":")[0]:
        recorded = {**recorded, "device": machine.device}  # which of several GPUs changes nothing
    return replace(machine, **recorded)


def eased(folder: Path, machine: Machine) -> Machine:
    """The machine with the micro-batch that an attempt which ran out of memory left behind (retries.json).

    Equivalent to the one before it, not identical: the same images make up a step, in smaller parts.
    """
    micro_batch = (read_json(folder / "retries.json") or {}).get("micro_batch")
    return machine if micro_batch is None else replace(machine, micro_batch=micro_batch)


def record_numerics(folder: Path, machine: Machine) -> None:
    """Writes what `recorded_numerics` reads."""
    if read_json(folder / "numerics.json") != machine.numerics():
        write_json(folder / "numerics.json", machine.numerics())


def evaluation(folder: Path, selection: str, condition: Condition) -> Path:
    """The file that holds one evaluation's confusion matrices."""
    return folder / "evals" / selection / f"{condition.name}.npz"


def refuse_gone(folder: Path) -> None:
    """FileNotFoundError if a run folder is not there any more: nothing may be written that would half make it again."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} is gone: it was deleted or moved while the run was being worked on")


def unfinished(folder: Path, selection: str) -> Path:
    """The folder of what is known of evaluations that are not yet written."""
    return folder / "evals" / selection / "unfinished"


def lacking(folder: Path | str, selection: str, conditions: Sequence[Condition]) -> list[Condition]:
    """The conditions this run has not been evaluated under."""
    try:
        there = set(os.listdir(f"{folder}/evals/{selection}"))  # one look for all: a suite has hundreds
    except FileNotFoundError:
        return list(conditions)
    return [condition for condition in conditions if f"{condition.name}.npz" not in there]


# ---------------------------------------------------------------------------------------------- journal


def append(folder: Path, event: str, **values: Any) -> None:
    """One line of the journal, stamped with the time (seconds, UTC epoch).

    A torn last line, left by a writer that was killed, is ended first so that it spoils no other.
    """
    refuse_gone(folder)
    append_line(folder / "journal.jsonl", {"event": event, "time": round(time.time(), 3), **values})


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """One line of JSON, in one write; a torn last line is ended first, so that it spoils no other."""
    line = json.dumps(value).encode() + b"\n"
    with path.open("ab+") as file:
        if file.tell() and not _ends_with_newline(file):
            line = b"\n" + line
        file.write(line)


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def journal(folder: Path) -> list[dict[str, Any]]:
    """The journal's lines in order; a step that was redone after a resume counts once, the last.

    Lines torn by a kill are left out.
    """
    kept: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(raw_lines(folder / "journal.jsonl")):
        redone = line["event"] in ("train", "val", "test", "system")
        key = (line["event"], line["step"]) if redone else number
        kept.pop(key, None)
        kept[key] = line
    return list(kept.values())


def raw_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal file as they were written, redone steps included."""
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue  # torn, or the empty end
        if isinstance(value, dict) and "event" in value:
            yield value


# ---------------------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Claim:
    """The right to write one run. One attempt holds it at a time; every write of consequence checks it first."""

    folder: Path
    token: str

    def check(self) -> None:
        """Raises Superseded when another attempt has taken the run over."""
        refuse_gone(self.folder)
        holder = read_json(self.folder / "claim.json")
        if holder is None or holder["token"] != self.token:
            raise Superseded(f"attempt {self.token} of {self.folder.name} was taken over")

    def release(self) -> None:
        """Gives the run back; the claim is kept among the attempts."""
        self.check()
        retire(self.folder, self.token)


TAKEOVER = 60.0  # seconds that a process may need to set a dead claim aside, before another does it


def claim(folder: Path, token: str, job: Mapping[str, Any] | None = None) -> Claim | None:
    """The claim for this process, or None while another live process holds it.

    A claim whose process is gone is set aside first. Two processes that try at once cannot both succeed: files are
    created exclusively and renamed, which file systems of clusters do too.

    Args:
        job: what this process is to a scheduler: `name` of the job, `task`, and what is worth noting.
    """
    holder = read_json(folder / "claim.json")
    if holder is not None and ((alive(holder) and not displaced(holder, job)) or not _set_aside(folder, holder)):
        return None
    mine = {
        "token": token,
        "attempt": len(list((folder / "attempts").glob("*.json"))) + 1,
        **identity(),
        "time": time.time(),
    }
    if job is not None:
        mine["job"] = dict(job)
    scratch = folder / f".claim.{token}"
    scratch.write_text(json.dumps(mine))
    try:
        os.link(scratch, folder / "claim.json")  # fails if the file exists, and the file is never seen half written
    except FileExistsError:
        return None
    finally:
        scratch.unlink()
    if holder is not None:
        again = job is not None and job["name"] == holder.get("job", {}).get("name")
        append(
            folder, "end", token=holder["token"], outcome="lost", kind="preempted" if again else "lost",
            reason="its scheduler started it again" if again else "its process ended without a word",
        )  # fmt: skip
    return Claim(folder, token)


def _set_aside(folder: Path, holder: Mapping[str, Any]) -> bool:
    """Moves a dead claim among the attempts; False if another process is at that.

    Looking and moving are two steps, and between them the claim could be another's already: so only the process that
    has made the marker does it.
    """
    (folder / "attempts").mkdir(exist_ok=True)
    turn = 0
    while True:
        marker = folder / "attempts" / f".{holder['token']}.takeover{turn}"
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            try:
                if time.time() - marker.stat().st_mtime < TAKEOVER:
                    return False
            except FileNotFoundError:
                continue  # it went away just now
            turn += 1  # whoever made it has died over it
    try:
        retire(folder, holder["token"])
    finally:
        marker.unlink(missing_ok=True)
    return True


def retire(folder: Path, token: str) -> None:
    """Moves a claim among the attempts; a no-op where somebody else already did."""
    (folder / "attempts").mkdir(exist_ok=True)
    holder = read_json(folder / "claim.json")
    if holder is not None and holder["token"] == token:
        try:
            os.rename(folder / "claim.json", folder / "attempts" / f"{token}.json")
        except FileNotFoundError:
            return


def identity() -> dict[str, Any]:
    """What tells this process from every other one."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {**identity_of(os.getpid()), **({"gpu": gpu} if gpu else {})}


def identity_of(pid: int) -> dict[str, Any]:
    """What tells a process of this machine from every other one; `started` is None if it is gone."""
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": _started(pid)}


def alive(holder: Mapping[str, Any]) -> bool:
    """Whether the process of a claim still runs here; the start time tells it from another with its number."""
    if holder["host"] != socket.gethostname():
        return True  # another machine's process cannot be seen from here, so it is not ours to take over
    return holder["boot"] == _boot() and holder["started"] == _started(holder["pid"])


def displaced(holder: Mapping[str, Any], job: Mapping[str, Any] | None) -> bool:
    """Whether a claim's process has no right to run any more, though it may: its scheduler has given it up.

    A node that is lost leaves its processes behind. What they still want to write is refused, since their claim is
    gone. A scheduler that does not answer has given up nothing.
    """
    theirs = holder.get("job")
    if theirs is None:
        return False
    if job is not None and (job["name"], job["task"]) == (theirs["name"], theirs["task"]):
        return True  # the scheduler starts a task again only when it has given up the process before
    try:
        elements = queue([theirs["name"]])
    except Unreachable:
        return False
    return not any((element.task or 0) == theirs["task"] and element.state not in FINISHED for element in elements)


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since boot, which no correction of the clock moves; None if it is gone."""
    try:
        _, _, after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return None
    values = after_name.split()  # from the state on, field 3 of proc(5)
    return None if values[0] in "ZX" else int(values[19])


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def claims(folder: Path) -> list[dict[str, Any]]:
    """The claims of all attempts at a run, oldest first; the last may be alive."""
    paths = [*(folder / "attempts").glob("*.json"), folder / "claim.json"]
    return sorted((found for path in paths if (found := read_json(path)) is not None), key=lambda one: one["time"])


# ---------------------------------------------------------------------------------------------- state


@dataclass(frozen=True, kw_only=True)
class State:
    """What is known of a run from its folder alone."""

    name: str  # missing, interrupted, running, failed, trained (not all evaluated), done
    step: int = 0
    steps: int = 0
    reason: str = ""
    miou: float | None = None  # newest validation mIoU, per cent
    best: float | None = None  # best validation mIoU, per cent
    eta: float | None = None  # seconds until trained, as the worker last estimated it
    pid: int | None = None
    holder: Mapping[str, Any] | None = None  # the claim, whether its process is alive or not
    time: float | None = None  # when the run was last heard of, seconds, UTC epoch

    @property
    def share(self) -> float:
        """Share of the training steps done."""
        return self.step / self.steps if self.steps else 0.0


def state(runs: Path, config: Config, selection: str, conditions: Sequence[Condition]) -> State:
    """The state of a run; never changes anything on disk."""
    folder = os.path.join(runs, run_id(config))  # paths as text: thousands of runs are looked at
    try:
        there = set(os.listdir(folder))  # one look for all of its files
    except (FileNotFoundError, NotADirectoryError):
        there = set()
    if "config.json" not in there:
        return State(name="missing", steps=config.steps)
    progress = read_json(f"{folder}/progress.json") or {} if "progress.json" in there else {}
    holder = read_json(f"{folder}/claim.json") if "claim.json" in there else None
    known = {
        "step": progress.get("step", 0), "steps": config.steps, "miou": progress.get("miou"),
        "best": progress.get("best"), "holder": holder, "time": progress.get("time"),
    }  # fmt: skip
    trained = "result.json" in there
    if trained and not lacking(folder, selection, conditions):
        return State(name="done", **{**known, "step": config.steps})
    if holder is not None and alive(holder):
        return State(name="running", pid=holder["pid"], eta=progress.get("eta"), **known)
    if (failure := read_json(f"{folder}/failure.json")) is not None:
        return State(name="failed", reason=failure["reason"], **known)
    if trained:
        return State(name="trained", **{**known, "step": config.steps})
    return State(name="interrupted" if holder or known["step"] or "attempts" in there else "missing", **known)
