"""A sweep on a real Slurm while whatever takes part in it is killed at random moments, and how it ends all the same.

    python -m pytest -m slurm tests/chaos --kills 200 --chaos-seed 7

The seed draws what is killed and how long to wait before; the rest is up to the machine. Each round is a sweep in a
place of its own, and there are as many rounds as the kills need.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import pytest

from crm.records import raw_lines
from tests.slurm.cluster import NODES, Cluster, told, until
from tests.slurm.project import SLOW, Home, Project

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(0)]  # waits have deadlines of their own
SUBMIT = ["sweep", "quick", "--cluster", "slurm", "--yes", "--machine", "checkpoint_every=5"]


@dataclass
class Chaos:
    """What is killed, and what happens to it afterwards."""

    slurm: Cluster
    draw: random.Random
    left: int  # kills
    told: list[str] = field(default_factory=list)
    away: dict[str, float] = field(default_factory=dict)  # daemons that are dead, and until when

    def strike(self, home: Home) -> None:
        """One kill, of something that is there to be killed."""
        kinds = [self.worker, self.worker, self.command, self.command, self.controller, self.node, self.node_and_jobs]
        self.draw.shuffle(kinds)
        for kind in kinds:
            if what := kind(home):
                self.left -= 1
                self.say(f"{kind.__name__}: {what}")
                return

    def worker(self, home: Home) -> str:
        """A process that trains, under Slurm's nose."""
        alive = []
        for seen in home.look().cells:
            pid = (seen.files.holder or {}).get("pid", 0)
            if pid and psutil.pid_exists(pid):
                alive.append((seen.label, pid))
        if not alive:
            return ""
        label, pid = self.draw.choice(alive)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return ""
        return label

    def node(self, home: Home, jobs_too: bool = False) -> str:
        """A slurmd; its jobs go on, and nobody can reach them."""
        there = [node for node in NODES if f"slurmd.{node}" not in self.away]
        if len(there) < 3:  # somebody must be able to work
            return ""
        busy = [node for node in there if self.slurm.orphans(node)]
        node = self.draw.choice(busy or there)
        self.slurm.kill(f"slurmd.{node}")
        if jobs_too:
            self.slurm.kill_jobs(node)
        self.away[f"slurmd.{node}"] = time.monotonic() + self.draw.uniform(0.0, 40.0)
        return node

    def node_and_jobs(self, home: Home) -> str:
        """A slurmd with all that ran there: a machine without power."""
        return self.node(home, jobs_too=True)

    def controller(self, home: Home) -> str:
        """slurmctld, which forgets what it has not yet written."""
        if "slurmctld" in self.away:
            return ""
        self.slurm.kill("slurmctld")
        self.away["slurmctld"] = time.monotonic() + self.draw.uniform(0.0, 8.0)
        return "slurmctld"

    def command(self, home: Home) -> str:
        """`crm sweep` or `crm reconcile`, while it looks, submits or writes."""
        arguments = self.draw.choice([SUBMIT, ["reconcile", "quick"]])
        process = home.start(*arguments)
        time.sleep(self.draw.uniform(0.2, 4.0))
        process.kill()
        process.communicate()
        return f"{arguments[0]}, {'which was over' if process.returncode >= 0 else 'killed'}"

    def mend(self, everything: bool = False) -> None:
        """Brings back what has been away for long enough."""
        for daemon, until_when in list(self.away.items()):
            if everything or time.monotonic() >= until_when:
                self.slurm.start(daemon)
                del self.away[daemon]
                self.say(f"{daemon} is back")
        if "slurmctld" not in self.away:
            self.slurm.mend()

    def say(self, what: str) -> None:
        self.told.append(f"{time.strftime('%H:%M:%S')} {what}")

    def story(self, home: Home) -> Callable[[], str]:
        return lambda: "\n".join([*self.told, home.story()])


def test_a_sweep_ends_as_if_nothing_had_been_killed(
    slurm: Cluster,
    project: Project,
    tmp_path,
    assert_undisturbed: Callable[..., None],
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
):
    kills, seed = request.config.getoption("--kills"), request.config.getoption("--chaos-seed")
    chaos = Chaos(slurm, random.Random(seed), kills)
    number = 0
    while chaos.left > 0:
        number += 1
        home = project.home(tmp_path / f"round{number}")
        chaos.say(f"round {number}, {chaos.left} kills left")
        _round(chaos, home)
        until(lambda home=home: _carried_on(home), "the sweep to be done", 3 * SLOW, chaos.story(home))
        _assert_each_finished_once(home, chaos)
        assert_undisturbed(home)
        slurm.clean()
    with capsys.disabled():
        print("", *chaos.told, sep="\n  ")


def _round(chaos: Chaos, home: Home) -> None:
    """Kills until the sweep is done or nothing is left to be killed."""
    home.start(*SUBMIT).communicate(timeout=SLOW)
    while chaos.left > 0 and set(home.states().values()) != {"done"}:
        time.sleep(chaos.draw.uniform(0.0, 6.0))
        chaos.mend()
        chaos.strike(home)
    chaos.mend(everything=True)


def _carried_on(home: Home) -> bool:
    """Somebody comes back now and then and types the same again; whether all is done."""
    home.start(*SUBMIT).communicate(timeout=SLOW)
    states = home.states()
    return set(states.values()) == {"done"} and len(states) == 4


def _assert_each_finished_once(home: Home, chaos: Chaos) -> None:
    story = chaos.story(home)
    for label in home.states():
        lines = list(raw_lines(home.folder(label) / "journal.jsonl"))
        assert home.endings(label).count("done") == 1, f"{label} was finished more than once\n{story()}"
        evaluated = [line["condition"] for line in lines if line["event"] == "evaluate"]
        assert len(evaluated) == len(set(evaluated)), f"{label} was evaluated more than once\n{story()}"
    until(lambda: not told("squeue", "-h"), "the last jobs to leave", SLOW, story)
