"""crm tune --cluster slurm, on a real Slurm: its coordinator and its trials are killed, and the study ends complete."""

import json
import os
import signal
from collections.abc import Callable

import optuna
import psutil
import pytest

from crm.cluster.folder import SweepFolder
from crm.cluster.view import Seen
from crm.records import read_json
from crm.tuning.coordinator import counts
from tests.slurm.cluster import Cluster, told, until
from tests.slurm.project import SLOW, Home, Project

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

TRAINED = '''"""Two weights of a network of seconds."""

from crm.search import Search, Weight
from sweeps.quick import BASE

search = Search(BASE, {"loss.masked": Weight(0.1, 10), "loss.non_local": Weight(0.1, 10)}, "missing", trials=4)
'''
CALLED = '''"""A function whose optimum is known: 0, at x = 0.3."""

import time

from crm.search import Number, Search
from sweeps.quick import BASE


def bowl(values):
    time.sleep(0.2)
    return -((values["x"] - 0.3) ** 2)


search = Search(BASE, {"x": Number(-1.0, 1.0)}, bowl, trials=14)
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project with two searches besides."""
    found = Project(tmp_path_factory.mktemp("project"))
    (found.root / "sweeps" / "search_trained.py").write_text(TRAINED)
    (found.root / "sweeps" / "search_called.py").write_text(CALLED)
    return found


def begun(home: Home, name: str, *more: str, trials: int = 0) -> str:
    arguments = ["tune", name, "--cluster", "slurm", "--yes", "--machine", "checkpoint_every=5", *more]
    return home.crm(*arguments, *(["--trials", str(trials)] if trials else []))


def study_of(home: Home, name: str) -> optuna.Study:
    """As anybody reads it, with Optuna alone."""
    backend = optuna.storages.journal.JournalFileBackend(str(home.runs / ".studies" / name / "journal.log"))
    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend))


def kept(home: Home, name: str) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study_of(home, name).trials if counts(trial)]


def coordinator(home: Home, name: str, *but: int) -> int:
    """The process that is at the study, once there is one, and it is none of these."""

    def there() -> int:
        holder = read_json(home.runs / ".studies" / name / "lease.json") or {"pid": 0}
        return 0 if holder["pid"] in but or not psutil.pid_exists(holder["pid"]) else holder["pid"]

    return until(there, f"a coordinator of {name}", SLOW, home.story)


def job_of(home: Home, name: str) -> str:
    """The job of the coordinator that runs."""
    mine = {one.token for one in SweepFolder.of(home.runs, f"tune-{name}").submissions() if one.kind == "tune"}
    lines = [line.split() for line in told("squeue", "-h", "-t", "R", "-o", "%j %i").splitlines()]
    return next(job for token, job in lines if token in mine)


def over(home: Home, name: str, trials: int) -> Callable[[], bool]:
    return lambda: len(kept(home, name)) == trials and not told("squeue", "-h")


def test_a_study_whose_coordinator_and_trials_are_killed_ends_complete(slurm: Cluster, home: Home):
    assert "submitted the coordinator" in begun(home, "trained", "--workers", "2")
    first = coordinator(home, "trained")

    def cells() -> list[Seen]:
        return list(home.look("tune-trained").cells)

    def at_work() -> list[str]:
        """The runs that have gone some steps, as two at once do."""
        found = [seen for seen in cells() if seen.name == "running" and seen.files.holder and seen.files.step >= 5]
        return [seen.id for seen in found]

    struck = until(at_work, "a trial at work", SLOW, home.story)[0]
    assert "goes by this" in begun(home, "trained", "--workers", "2")  # a second call submits no second coordinator
    job = next(seen.element for seen in cells() if seen.id == struck)
    assert job is not None
    told("scancel", job.id)
    os.kill(first, signal.SIGKILL)
    second = coordinator(home, "trained", first)
    other = until(lambda: [id for id in at_work() if id != struck], "another trial at work", SLOW, home.story)[0]
    os.kill(read_json(home.runs / other / "claim.json")["pid"], signal.SIGKILL)
    told("scancel", job_of(home, "trained"))
    coordinator(home, "trained", first, second)
    until(over(home, "trained", 4), "the study to be over", SLOW, home.story)

    trials = kept(home, "trained")
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
    assert len({trial.user_attrs["runs"][0] for trial in trials}) == 4
    assert all((home.runs / trial.user_attrs["runs"][0] / "result.json").exists() for trial in trials)
    lines = (home.runs / struck / "journal.jsonl").read_text().splitlines()
    steps = [one["step"] for one in map(json.loads, lines) if one["event"] == "attempt"]
    assert len(steps) > 1 and steps[-1] > 0  # it went on from its checkpoint
    said = json.loads(home.crm("tune", "status", "trained", "--json"))
    assert (said["trials"], said["complete"], said["asked"], said["at_it"]) == (4, 4, 4, False)


def test_a_function_is_computed_by_the_coordinators_and_more_may_be_asked_for_meanwhile(slurm: Cluster, home: Home):
    begun(home, "called")
    first = coordinator(home, "called")
    until(lambda: len(kept(home, "called")) >= 3, "three values", SLOW, home.story)
    begun(home, "called", trials=16)
    told("scancel", job_of(home, "called"))
    coordinator(home, "called", first)
    until(over(home, "called", 16), "the study to be over", SLOW, home.story)
    trials = kept(home, "called")
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    for trial in trials:
        assert trial.value == pytest.approx(-((trial.user_attrs["settings"]["x"] - 0.3) ** 2))


def test_a_cancelled_study_stays_cancelled_until_it_is_asked_for_again(slurm: Cluster, home: Home):
    begun(home, "called")
    coordinator(home, "called")
    until(lambda: len(kept(home, "called")) >= 2, "two values", SLOW, home.story)
    home.crm("tune", "cancel", "called", "--yes")
    until(lambda: not told("squeue", "-h"), "an empty queue", SLOW, home.story)
    assert len(kept(home, "called")) < 14
    begun(home, "called")
    until(over(home, "called", 14), "the study to be over", SLOW, home.story)
