"""The private Slurm of the tests: brought up once, cleaned between tests, its daemons stopped and killed at will."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

HERE = Path(__file__).parent
NODES = ("n1", "n2", "n3", "n4")
PATIENCE = 90.0  # seconds; a deadline for what takes seconds on an idle machine

T = TypeVar("T")


def until(look: Callable[[], T], what: str, seconds: float = PATIENCE, story: Callable[[], str] = str) -> T:
    """Looks until it sees something true, and returns that; `story` is told if that never comes."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for: {what}\n{story()}"
        time.sleep(0.1)
    return seen


def told(*command: str) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}{done.stdout}"
    return done.stdout.strip()


class Cluster:
    """One private Slurm."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # ------------------------------------------------------------------------------------------ jobs

    def submit(self, command: str, *options: str) -> str:
        """The id of a job whose batch script is one shell command; its output is thrown away."""
        return told("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", command)

    def states(self, job: str) -> list[str]:
        """The states of a job's elements, in their order, as squeue shows them; it forgets a job after a minute."""
        lines = told("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%K %T").splitlines()
        return [state for _, state in sorted((line.split() for line in lines), key=lambda each: each[0].zfill(9))]

    def in_state(self, job: str, state: str, count: int = 1) -> None:
        """Waits until that many elements of a job are in a state."""
        until(lambda: self.states(job).count(state) >= count, f"{count} x {state} of job {job}")

    # ------------------------------------------------------------------------------------------ daemons

    def pid(self, daemon: str) -> int:
        """The process of slurmctld, slurmdbd or slurmd.n1 to slurmd.n4."""
        return int((self.root / "run" / f"{daemon}.pid").read_text())

    def running(self, daemon: str) -> bool:
        try:
            process = psutil.Process(self.pid(daemon))
            return process.status() != psutil.STATUS_ZOMBIE and process.name() == daemon.partition(".")[0]
        except (OSError, ValueError, psutil.NoSuchProcess):
            return False

    def kill(self, daemon: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Kills a daemon and waits until it is gone."""
        pid = self.pid(daemon)
        os.kill(pid, how)
        gone = lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # noqa: E731
        until(gone, f"the end of {daemon}")

    def start(self, daemon: str) -> None:
        """Starts a daemon that is not running and waits until it answers."""
        name, _, node = daemon.partition(".")
        if not self.running(daemon):
            with (self.root / "log" / "start.log").open("ab") as log:
                command = [_found(name), *(["-N", node] if node else [])]
                subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        asked = {"slurmctld": ["scontrol", "ping"], "slurmdbd": ["sacctmgr", "-n", "list", "cluster"]}
        if name in asked:
            until(lambda: _succeeds(asked[name]), f"an answer of {name}")

    @contextmanager
    def stopped(self, daemon: str) -> Iterator[None]:
        """The daemon is frozen: it takes connections, as its system does so for it, and never answers."""
        pid = self.pid(daemon)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    @contextmanager
    def without(self, daemon: str) -> Iterator[None]:
        """The daemon is not there."""
        self.kill(daemon, signal.SIGTERM)
        try:
            yield
        finally:
            self.start(daemon)

    # ------------------------------------------------------------------------------------------ between tests

    def clean(self) -> None:
        """Every daemon runs, no job is left, every node is idle."""
        for daemon in ("slurmdbd", "slurmctld", *(f"slurmd.{node}" for node in NODES)):
            if self.running(daemon):
                os.kill(self.pid(daemon), signal.SIGCONT)
            self.start(daemon)
        self.kill_jobs()
        told("scancel", "--user", str(os.geteuid()))
        until(self._empty, "an empty queue")
        until(self._idle, f"idle nodes; there are {told('sinfo', '-h', '-N', '-p', 'main', '-o', '%N %T %E')}")

    def kill_jobs(self, node: str = "") -> None:
        """Kills the processes of all jobs, or of those on a node, whether Slurm still knows them or not."""
        for process in self.orphans(node):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def orphans(self, node: str = "") -> list[psutil.Process]:
        """The processes of this cluster's steps, of one node or of all, and their children.

        Those included that Slurm has lost.
        """
        found = []
        for step in psutil.process_iter():
            if self._is_step(step, self.root / "spool" / node):
                with suppress(psutil.NoSuchProcess):
                    found += [*step.children(recursive=True), step]
        return found

    def _is_step(self, process: psutil.Process, below: Path) -> bool:
        try:
            links = Path(f"/proc/{process.pid}/fd").iterdir()
            return process.name().startswith("slurmstepd") and any(
                Path(os.readlink(link)).is_relative_to(below) for link in links
            )
        except (OSError, psutil.NoSuchProcess):
            return False

    def _empty(self) -> bool:
        left = told("squeue", "-h", "-o", "%A").split()
        if left:
            subprocess.run(["scancel", *left], capture_output=True)
        return not left

    def _idle(self) -> bool:
        return set(self.mend().values()) == {"idle"}

    def mend(self) -> dict[str, str]:
        """Puts nodes back to work that were lost, or that Slurm has drained because a job was on them twice.

        Returns the states of the nodes before; nothing where the controller does not answer.
        """
        done = subprocess.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"], capture_output=True, text=True)
        states = dict(line.split() for line in done.stdout.splitlines())
        wrong = [node for node, state in states.items() if state.startswith(("down", "drain", "fail", "unknown"))]
        if wrong:
            subprocess.run(["scontrol", "update", f"nodename={','.join(wrong)}", "state=resume"], capture_output=True)
        return states


def _found(name: str) -> str:
    """Daemons are where the path of an ordinary user does not lead."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or name


def _succeeds(command: list[str]) -> bool:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode == 0 and "DOWN" not in done.stdout


def _free_ports(start: int = 21000, step: int = 40) -> int:
    """The first of a block of ports that nobody uses; processes that look at once begin at different places."""
    blocks = [start + step * ((os.getpid() + number) % 200) for number in range(200)]
    return next(first for first in blocks if all(_is_free(first + more) for more in (0, 1, 2, 11, 12, 13, 14)))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def bring_up(**settings: str) -> Iterator[Cluster]:
    """A cluster for as long as the caller needs it.

    SLURM_CONF of this process names it, so every command means it. Skips where Slurm is not installed.
    """
    root = Path(tempfile.mkdtemp(prefix="crm", dir="/tmp"))  # short: the path of a socket has 107 characters
    environment = {"CRM_SLURM_PORT": str(_free_ports()), **settings}
    log = root / "up.log"
    with log.open("w") as file:  # not a pipe: the daemons would keep it open
        done = subprocess.run([HERE / "up", root], env={**os.environ, **environment}, stdout=file, stderr=file)
    if done.returncode and "apt-get install" in log.read_text():
        shutil.rmtree(root)
        assert "slurm" not in os.environ.get("CRM_REQUIRE", ""), "CRM_REQUIRE names slurm, but it is not installed"
        pytest.skip("Slurm is not installed; tests/slurm/up says how")
    before = os.environ.get("SLURM_CONF")
    try:
        assert done.returncode == 0, log.read_text()
        os.environ["SLURM_CONF"] = str(root / "etc/slurm.conf")
        yield Cluster(root)
    finally:
        subprocess.run([HERE / "down", root, "--wipe"], stdout=subprocess.DEVNULL)
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before
