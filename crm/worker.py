"""A worker: takes runs one after another, trains each if it is not trained, evaluates what it lacks.

    python -m crm.worker --machine JSON --selection last --conditions test test.rgb=missing_mean ...

Each line of standard input names a run folder; each line of standard output answers with the code of its attempt. The
libraries load once for all of them. When the input ends, because there is no more work or because the parent died, the
worker finishes its run and leaves. SIGTERM, SIGINT and SIGUSR2 ask it to checkpoint after the running step and to stop.
A run is written only while its claim is held. What an attempt prints goes to the run's log.txt.

Codes: 0 done, 1 failed (failure.json says why), 75 stopped and resumable, 76 another attempt has the run.
"""

import argparse
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from crm.conditions import Condition, condition
from crm.config import Config
from crm.failures import reason_of
from crm.machine import Machine
from crm.records import (
    Claim,
    Superseded,
    append,
    claim,
    eased,
    file_hash,
    lacking,
    read_config,
    read_json,
    record_numerics,
    recorded_numerics,
    remove_scratch,
    write_json,
)

DONE, FAILED, STOPPED, TAKEN = 0, 1, 75, 76


class StopFlag:
    """True once a signal has asked the process to stop, or its time is over; the loop looks at it between steps."""

    def __init__(self, until: float | None = None, warned: float = 0.0) -> None:
        """Not set, and with time left.

        Args:
            until: when its time is over, in seconds of the clock that `time.time` reads; None is never.
            warned: seconds before that from which on SIGUSR2 is a scheduler's warning that time is running out.
        """
        self.set = False
        self.idle = False  # between runs there is no loop to look at it
        self.until, self.warned = until, warned

    def __call__(self) -> bool:
        return self.set or self.over

    @property
    def over(self) -> bool:
        """Whether its time is over."""
        return self.until is not None and time.time() >= self.until

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._raise)

    def _raise(self, number: int, frame: object) -> None:
        self.set = True
        if number == signal.SIGUSR2 and self.until is not None and time.time() >= self.until - self.warned:
            self.until = time.time()
        if self.idle:
            sys.exit(STOPPED)


def attempt(
    folder: Path,
    machine: Machine,
    token: str,
    selection: str,
    conditions: Sequence[Condition],
    stop: Callable[[], bool],
    tell: Callable,
    job: Mapping[str, Any] | None = None,
) -> int:
    """Carries one attempt through and returns its exit code; every ending is recorded in the run folder.

    Args:
        job: what this process is to a scheduler, as `crm.records.claim` wants it.
    """
    mine = _claimed(folder, token, machine.processes, job)
    if mine is None:
        return TAKEN
    if (folder / "result.json").exists() and not lacking(folder, selection, conditions):
        if _chief(machine.processes):  # a scheduler that has lost sight of a finished job starts it again
            mine.release()
        return DONE
    was_trained = (folder / "result.json").exists()
    try:
        finished = _work(mine, read_config(folder), machine, selection, conditions, stop, tell)
    except Superseded:
        logging.warning("another attempt has taken this run over; nothing more is written")
        return TAKEN
    except BaseException as error:  # whatever it was, the folder must say why; it is raised again or turned into 1
        _record_failure(mine, error)
        if not isinstance(error, Exception):
            raise
        logging.exception("failed: %s", error)
        return FAILED
    if _chief(machine.processes):
        if finished:
            append(folder, "end", token=mine.token, outcome="done", **_result_written(folder, was_trained))
        else:
            kind = "time" if isinstance(stop, StopFlag) and stop.over else "preempted"
            step = (read_json(folder / "progress.json") or {}).get("step", 0)
            result = _result_written(folder, was_trained)
            append(folder, "end", token=mine.token, outcome="stopped", kind=kind, step=step, **result)
        mine.release()
    return DONE if finished else STOPPED


def _claimed(folder: Path, token: str, processes: int, job: Mapping[str, Any] | None) -> Claim | None:
    """The claim on a run; with several processes the first one's, for all of them."""
    mine = claim(folder, token, job) if _chief(processes) else None
    if processes > 1:
        from crm.distributed import agreed

        if (token := agreed(mine and mine.token)) is None:
            return None
        mine = mine or Claim(folder, token)
    if mine and _chief(processes):
        (folder / "failure.json").unlink(missing_ok=True)
        remove_scratch(folder)
    return mine


def _chief(processes: int) -> bool:
    if processes == 1:
        return True
    from crm.distributed import world

    return world().chief


def _work(
    mine: Claim,
    config: Config,
    machine: Machine,
    selection: str,
    conditions: Sequence[Condition],
    stop: Callable[[], bool],
    tell: Callable,
) -> bool:
    """Trains and evaluates; False if asked to stop before the end."""
    from crm.evaluate import evaluate_run
    from crm.train import train

    trained = (mine.folder / "result.json").exists()
    machine = eased(mine.folder, machine if trained else recorded_numerics(mine.folder, machine))
    machine.take_process()
    if not trained:
        if _chief(machine.processes):
            record_numerics(mine.folder, machine)
        if not train(config, machine, mine, stop, tell):
            return False
    if not _chief(machine.processes):
        return True
    return evaluate_run(config, machine, mine, selection, lacking(mine.folder, selection, conditions), stop, tell)


def _result_written(folder: Path, before: bool) -> dict[str, str]:
    """What result.json was when training ended, for whoever asks whether it was edited since.

    Only of the attempt that wrote it: a later one cannot know.
    """
    path = folder / "result.json"
    return {} if before or not path.exists() else {"result_sha256": file_hash(path)}


def _record_failure(mine: Claim, error: BaseException) -> None:
    """Says in the run folder why the attempt ended; of several processes, the one that failed first says it.

    What cannot be written, because the disk is full or the folder is gone, stands in the log alone.
    """
    lost = "gloo" in str(error) or "NCCL" in str(error)
    words = "a process of the run is gone, and the others cannot go on without it" if lost else str(error)
    reason = f"{type(error).__name__}: {words}"
    try:
        mine.check()
        told = read_json(mine.folder / "failure.json")
        if told is None or told["token"] != mine.token:
            step = (read_json(mine.folder / "progress.json") or {}).get("step", 0)
            kind = reason_of(error)
            kind = "node" if lost and kind != "gpu_memory" else kind
            known = {"kind": kind, "reason": reason, "step": step, "token": mine.token}
            write_json(mine.folder / "failure.json", {**known, "traceback": traceback.format_exc()})
            append(mine.folder, "end", outcome="failed", **known)
        mine.release()
    except (OSError, Superseded) as other:
        logging.error("the run folder cannot say why the attempt failed: %s", other)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m crm.worker", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--selection", default="last")
    parser.add_argument("--conditions", nargs="*", default=[])
    parser.add_argument("--machine", type=json.loads, required=True, help="a Machine as JSON")
    given = parser.parse_args(arguments)
    stop = StopFlag()
    stop.listen()  # before torch loads, which takes seconds
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    wanted = [condition(name) for name in given.conditions]
    machine = Machine.read(given.machine)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    while not stop():
        stop.idle = True
        line = sys.stdin.readline()
        stop.idle = False
        if not line:
            return DONE
        folder = Path(line.strip())
        print_to(folder / "log.txt")
        code = attempt(folder, machine, uuid4().hex[:16], given.selection, wanted, stop, lambda progress: None)
        try:
            print(folder.name, code, file=answers, flush=True)
        except BrokenPipeError:  # the parent died meanwhile; the run folder says everything
            return code
    return STOPPED


def print_to(path: Path) -> None:
    """Sends what this process prints to a file, whoever prints it."""
    with path.open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
