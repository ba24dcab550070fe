"""The mirror at work: a process beside the workers, at low priority, that keeps none of them waiting.

    python -m crm.tracking.process NAME --runs DIR [--uri URI] [--follow PID] [--only RUN]

It never imports torch. It sends what is new every few seconds, and once more when its standard input ends or the
followed process is gone; then it leaves, with code 1 if that last time failed. After a failure it tries again by
itself, ever more rarely. What goes wrong is one line in mirror.log of the runs folder.
"""

import argparse
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crm.records import alive, identity_of
from crm.tracking.sending import Tails, sync
from crm.tracking.store import connect, default_uri, words

LONGEST_PAUSE = 120.0  # seconds between two tries at a store that does not answer
LOG = "mirror.log"


def start(runs: Path, name: str, only: str = "") -> "Mirror":
    """A mirror of what is listed under this name, at work in a session of its own, which no Ctrl-C reaches."""
    command = [sys.executable, "-m", "crm.tracking.process", name, "--runs", str(runs.absolute())]
    command += ["--only", only] if only else []
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True)
    return Mirror(runs, process)


@dataclass(frozen=True)
class Mirror:
    """A running mirror. If the process that started it dies, its standard input ends and it leaves by itself."""

    runs: Path
    process: subprocess.Popen[bytes]

    def finish(self, patience: float = 60.0) -> str:
        """Lets it send the rest and waits that many seconds; says what went wrong, "" if nothing did."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            return f"MLflow is slow; process {self.process.pid} goes on sending"
        if code == 0:
            return ""
        return last_trouble(self.runs) or f"the mirror ended with code {code}"


def last_trouble(runs: Path) -> str:
    """The last line of mirror.log; "" without one."""
    try:
        return (runs / LOG).read_text().splitlines()[-1]
    except (OSError, IndexError):
        return ""


def mirror(runs: Path, name: str, uri: str, every: float, told: Callable[[float], bool], only: str = "") -> int:
    """Syncs now and then until `told`, which waits that many seconds, is true, and once more after that.

    Returns the exit code: 0 if that last time everything was sent.
    """
    store, pause, failures = None, 0.0, 0
    tails: Tails = {}
    while True:
        final = told(pause)
        try:
            store = store or connect(uri, runs)
            sync(store, runs, name, final, tails, only)
            pause, failures = every, 0
        except Exception as error:  # MLflow, its database and its server fail in more ways than can be listed here
            store, failures = None, failures + 1
            tails.clear()  # they are ahead of what was sent
            pause = min(every * 2**failures, LONGEST_PAUSE)
            note(runs, name, words(error, uri))
            if final:
                return 1
        if final:
            return 0


def note(runs: Path, name: str, text: str) -> None:
    """One line in mirror.log, or on standard error where that cannot be written."""
    line = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {name}: {text}\n"
    try:
        with (runs / LOG).open("a") as log:
            log.write(line)
    except OSError:
        sys.stderr.write(line)


def until_gone(pid: int) -> Callable[[float], bool]:
    """Waits until a process is gone; true once it is."""
    watched = identity_of(pid)
    if watched["started"] is None:
        return lambda pause: True

    def told(pause: float) -> bool:
        deadline = time.monotonic() + pause
        while alive(watched):
            if (left := deadline - time.monotonic()) <= 0:
                return False
            time.sleep(min(left, 0.5))
        return True

    return told


def until_input_ends(pause: float) -> bool:
    """Waits for the end of standard input; true once it is there."""
    deadline = time.monotonic() + pause
    while select.select([0], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not os.read(0, 4096):
            return True
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m crm.tracking.process", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("name", help="a sweep, or run-ID, that is listed in the runs folder")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--uri", help="default: MLFLOW_TRACKING_URI, or mlflow.db in the runs folder")
    parser.add_argument("--follow", type=int, metavar="PID", help="leave with this process, not with standard input")
    parser.add_argument("--only", default="", metavar="RUN", help="look at this run alone")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks")
    given = parser.parse_args(arguments)
    os.nice(19)
    os.environ["OMP_NUM_THREADS"] = "1"  # what it imports would start a thread per core
    told = until_input_ends if given.follow is None else until_gone(given.follow)
    return mirror(given.runs, given.name, given.uri or default_uri(given.runs), given.every, told, given.only)


if __name__ == "__main__":
    sys.exit(main())
