"""crm sweep --cluster slurm, on a real Slurm: whatever happens to its jobs, its runs end as if nothing had.

Each test has a place for runs of its own. Runs are compared bit by bit with those of a sweep that ran in one process.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from crm.cluster import slurm as scheduler
from crm.cluster.folder import SweepFolder
from crm.records import raw_lines
from tests.slurm.cluster import Cluster, told, until
from tests.slurm.project import SLOW, Home, Project

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
Compare = Callable[..., None]
ONE = ("--only", "CRM/0")


def jobs(home: Home, name: str = "quick") -> list[str]:
    """The ids of the arrays that work on cells."""
    found = SweepFolder.of(home.runs, name).submissions()
    return [one.job for one in found if one.kind == "cells" and one.state == "submitted"]


def process(home: Home, label: str) -> psutil.Process:
    """The process that is at a cell."""
    return psutil.Process(home.attempts(label)[-1]["pid"])


# ---------------------------------------------------------------------------------------------- the ordinary way


def test_one_array_with_a_throttle_behind_a_smoke_test(slurm: Cluster, home: Home, assert_undisturbed: Compare):
    home.configure(throttle=2)
    said = home.submit(smoke=True)
    assert "submitted 4 runs" in said
    assert set(home.states().values()) == {"queued"}
    most = 0

    def over() -> bool:
        nonlocal most
        states = [seen.name for seen in home.look().cells]
        most = max(most, states.count("running"))
        return set(states) == {"done"}

    until(over, "all cells to be done", SLOW, home.story)
    assert most == 2 and len(jobs(home)) == 1
    assert_undisturbed(home)
    status = home.status()
    assert {line["state"] for line in status.values()} == {"done"}
    assert {line["attempts"] for line in status.values()} == {1}
    verdicts = [json.loads(path.read_text()) for path in home.runs.glob(".sweeps/quick/smoke/*.json")]
    assert [verdict["passed"] for verdict in verdicts] == [True, True]  # one for every row, whatever the seeds
    assert "nothing to do" in home.submit(code=3)


def test_a_smoke_test_that_fails_keeps_every_run_from_starting(slurm: Cluster, home: Home, assert_undisturbed: Compare):
    # the third step of a process is the first of the second configuration
    home.submit("--seeds", "0", smoke=True, env={"CRM_FAULT": "memory step 3"})
    home.in_state("held")
    assert not list(home.runs.glob("*/claim.json")) and not list(home.runs.glob("*/attempts"))
    status = home.status("--seeds", "0")
    assert "OutOfMemoryError" in status["CRM/0"]["reason"]
    assert "CRM/0 failed the smoke test" in status["plain/0"]["reason"]
    until(lambda: not told("squeue", "-h"), "the jobs behind it to be gone", SLOW)
    home.crm("release", "quick", "--only", "plain", "--yes")
    home.done("plain/0")
    assert home.states()["CRM/0"] == "held"
    assert_undisturbed(home, "plain/0")


def test_twelve_hundred_cells_are_held_counted_and_cancelled(slurm: Cluster, home: Home):
    seeds = ",".join(str(seed) for seed in range(600))
    said = home.submit("--held", "--seeds", seeds)
    assert "submitted 1200 runs held" in said
    elements = [element for job in jobs(home) for element in told("squeue", "-h", "-r", "-j", job, "-o", "%K").split()]
    assert len(elements) == 1200 and len(jobs(home)) == 3  # of at most 501
    status = home.status("--seeds", seeds)
    assert len(status) == 1200 and {line["state"] for line in status.values()} == {"held"}
    assert len({line["job"] for line in status.values()}) == 1200
    home.crm("cancel", "quick", "--only", "plain/5*", "--yes")
    assert len([seen for seen in home.look().cells if seen.name == "cancelled"]) == 111  # 5, 50 to 59, 500 to 599
    home.crm("cancel", "quick", "--yes")
    until(lambda: not told("squeue", "-h"), "an empty queue")
    assert set(home.states().values()) == {"cancelled"}
    assert not list(home.runs.glob("*/attempts"))


def test_code_that_is_edited_while_jobs_wait_changes_nothing(
    slurm: Cluster, tmp_path: Path, assert_undisturbed: Compare
):
    project = Project(tmp_path / "project")
    home = project.home(tmp_path / "home")
    home.submit("--held", *ONE)
    worker = project.root / "crm" / "train.py"
    edited = worker.read_text()
    worker.write_text('raise RuntimeError("this code was written after the submission")\n')
    home.crm("release", "quick", "--yes")
    home.done()
    worker.write_text(edited)
    assert_undisturbed(home)


def test_two_processes_share_a_run_and_stop_at_the_same_step(slurm: Cluster, project: Project, tmp_path: Path):
    homes = [project.home(tmp_path / name) for name in ("undisturbed", "disturbed")]
    for home in homes:
        home.configure(tasks=2, memory_gb=3)
        home.submit(*ONE)
    seen = homes[1].at_step("CRM/0", 10)
    scheduler.cancel([seen.element.id], signal="USR2")
    for home in homes:
        home.done()
    assert homes[1].endings("CRM/0") == ["preempted", "done"] and homes[0].endings("CRM/0") == ["done"]
    from tests.slurm.project import final

    assert final(homes[0].folder("CRM/0")) == final(homes[1].folder("CRM/0"))
    numerics = json.loads((homes[0].folder("CRM/0") / "numerics.json").read_text())
    assert numerics["processes"] == 2


def test_two_sweeps_submitted_at_once_share_their_baseline(slurm: Cluster, home: Home, assert_undisturbed: Compare):
    arguments = ["--cluster", "slurm", "--yes", "--no-smoke", "--machine", "checkpoint_every=5", "--seeds", "0"]
    both = [home.start("sweep", name, *arguments) for name in ("quick", "other")]
    for each in both:
        out, err = each.communicate(timeout=SLOW)
        assert each.returncode == 0, out + err
    for name in ("quick", "other"):
        home.done(name=name)
    assert home.seen("plain/0", "quick").id == home.seen("plain/0", "other").id
    assert home.endings("plain/0").count("done") == 1
    trained = [line["step"] for line in raw_lines(home.folder("plain/0") / "journal.jsonl") if line["event"] == "train"]
    assert trained == sorted(set(trained))  # no step was done twice
    for name in ("quick", "other"):
        assert_undisturbed(home, name=name)


# ---------------------------------------------------------------------------------------------- stopped and resumed


def test_scontrol_requeue_resumes_exactly(slurm: Cluster, home: Home, assert_undisturbed: Compare):
    home.submit(*ONE)
    seen = home.at_step("CRM/0", 10)
    assert scheduler.requeue(seen.element.id) == {}
    home.done()
    assert len(home.attempts("CRM/0")) == 2 and home.endings("CRM/0")[-1] == "done"
    assert_undisturbed(home)


@pytest.mark.parametrize("partition", ["main", "grace", "killme"])
def test_preemption_resumes_exactly(slurm: Cluster, home: Home, assert_undisturbed: Compare, partition: str):
    """By requeueing without and with a warning, and by cancelling, after which somebody must submit it again."""
    home.submit("--slurm", f"partition={partition}", *ONE)
    seen = home.at_step("CRM/0", 10)
    slurm.submit("sleep 1", "--partition=urgent", "--exclusive", f"--nodelist={seen.element.node}")
    home.done()
    assert len(home.attempts("CRM/0")) == 2
    assert home.endings("CRM/0") == ["preempted", "done"]
    assert_undisturbed(home)


def test_the_time_limit_of_a_job_that_does_not_leave_in_time(slurm: Cluster, home: Home, assert_undisturbed: Compare):
    """The one true time limit, which takes a minute. Slurm wakes a stopped process before it signals it."""
    home.submit("--slurm", "minutes=1", *ONE)
    home.at_step("CRM/0", 10)
    frozen = process(home, "CRM/0")
    deadline = time.monotonic() + SLOW
    while frozen.is_running() and frozen.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, home.story()
        with suppress(psutil.NoSuchProcess):
            frozen.suspend()
        time.sleep(0.01)
    home.done()
    assert home.endings("CRM/0")[0] == "time"
    assert_undisturbed(home)


def test_a_job_that_is_out_of_time_goes_on_in_another(slurm: Cluster, home: Home, assert_undisturbed: Compare):
    """A job has five seconds here, of which loading the libraries takes most: enough for a step, not for the run."""
    home.submit("--slurm", "reserve_seconds=895", *ONE)
    until(lambda: home.endings("CRM/0").count("time") >= 2, "two jobs to be out of time", SLOW, home.story)
    home.crm("cancel", "quick", "--yes")
    home.in_state("cancelled")
    home.submit(*ONE)
    home.done()
    assert home.endings("CRM/0")[-1] == "done"
    assert_undisturbed(home)


def test_a_suspended_job_is_left_alone(slurm: Cluster, home: Home, assert_undisturbed: Compare):
    home.submit(*ONE)
    seen = home.at_step("CRM/0", 10)
    told("scontrol", "suspend", seen.element.id)
    home.in_state("suspended")
    home.crm("reconcile", "quick", code=3)
    assert home.status(*())["CRM/0"]["state"] == "suspended"
    told("scontrol", "resume", seen.element.id)
    home.done()
    assert home.endings("CRM/0") == ["done"] and len(jobs(home)) == 1
    assert_undisturbed(home)


def test_a_kill_for_lack_of_memory_is_answered_with_more(slurm: Cluster, home: Home, assert_undisturbed: Compare):
    home.configure(memory_gb=0.2, max_memory_gb=3.2)
    home.submit(*ONE)
    home.done()
    endings = home.endings("CRM/0")
    assert endings[-1] == "done" and set(endings[:-1]) == {"host_memory"}
    found = SweepFolder.of(home.runs, "quick").submissions()
    memory = [one.resources["memory_gb"] for one in found if one.kind == "cells"]
    assert memory[0] == 0.2 and memory == sorted(memory) and len(set(memory)) == len(memory) > 1
    assert_undisturbed(home)


# ---------------------------------------------------------------------------------------------- lost


def test_a_lost_node_leaves_an_orphan_that_can_write_nothing_more(
    slurm: Cluster, home: Home, assert_undisturbed: Compare
):
    home.submit(*ONE)
    seen = home.at_step("CRM/0", 10)
    orphan = process(home, "CRM/0")
    orphan.suspend()  # it is to outlive the takeover
    slurm.kill(f"slurmd.{seen.element.node}")
    until(lambda: len(home.attempts("CRM/0")) == 2, "another attempt on another node", SLOW, home.story)
    assert orphan.is_running() and home.attempts("CRM/0")[0]["pid"] == orphan.pid
    orphan.resume()
    until(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE, "the orphan to give up", SLOW)
    home.done()
    assert home.endings("CRM/0").count("done") == 1
    assert_undisturbed(home)


def test_a_controller_that_takes_the_job_and_never_says_so(
    slurm: Cluster, home: Home, assert_undisturbed: Compare, tmp_path
):
    """sbatch fails, the job is there all the same, and it must not be submitted a second time."""
    shim = tmp_path / "bin" / "sbatch"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nkill -STOP {slurm.pid("slurmctld")}\nexec {shutil.which("sbatch")} "$@"\n')
    shim.chmod(0o755)
    said = home.submit(*ONE, code=1, env={"PATH": f"{shim.parent}:{os.environ['PATH']}"})
    assert "not known whether it has taken the job" in said
    os.kill(slurm.pid("slurmctld"), signal.SIGCONT)
    until(lambda: told("squeue", "-h", "-t", "all"), "the job that nobody knows of")
    home.crm("reconcile", "quick")
    home.done()
    assert len(jobs(home)) == 1 and home.endings("CRM/0") == ["done"]
    assert_undisturbed(home)


def test_a_controller_that_is_away_during_a_run_and_a_look(slurm: Cluster, home: Home, assert_undisturbed: Compare):
    home.submit(*ONE)
    home.at_step("CRM/0", 10)
    with slurm.without("slurmctld"):
        lines = home.status()
        assert lines["CRM/0"]["state"] in ("running", "unknown")
        assert "does not answer" in home.crm("status", "quick")
        assert "does not answer" in home.crm("reconcile", "quick", code=1)
        until(lambda: (home.folder("CRM/0") / "evals/last/test.npz").exists(), "the run to be finished", SLOW)
    home.done()
    home.crm("reconcile", "quick", code=3)
    assert home.endings("CRM/0") == ["done"] and len(jobs(home)) == 1
    assert_undisturbed(home)


def test_scancel_of_one_that_runs_and_one_that_waits(slurm: Cluster, home: Home, assert_undisturbed: Compare):
    home.configure(throttle=1)
    home.submit()
    first = home.at_step("plain/0", 10)
    waiting = home.seen("CRM/1")
    assert waiting.element.state == "PENDING"
    scheduler.cancel([first.element.id, waiting.element.id])
    home.done("plain/1", "CRM/0")
    home.in_state("cancelled", ["plain/0", "CRM/1"])
    status = home.status()
    assert "scancel" in status["plain/0"]["reason"] and "crm retry" in status["plain/0"]["reason"]
    home.crm("retry", "quick", "--yes")
    home.done()
    assert_undisturbed(home)


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("partition=mian", "no partition 'mian'. Did you mean 'main'?"),
        ("account=nobody", "does not know this account"),
        ("cpus=64", "no node, or not as many"),
        ("gres=gpu:9", "no node, or not as many"),
    ],
)
def test_what_slurm_refuses_is_said_in_words_and_leaves_nothing(slurm: Cluster, home: Home, setting, words):
    assert words in home.submit("--slurm", setting, *ONE, code=2)
    assert not told("squeue", "-h")
    assert {line["state"] for line in home.status().values()} == {"missing"}


def test_without_sbatch_a_person_is_told_what_to_do(slurm: Cluster, home: Home, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    git = shutil.which("git")
    assert git is not None
    (empty / "git").symlink_to(git)
    said = home.submit(*ONE, code=1, env={"PATH": str(empty)})
    assert "on the path" in said and "--cluster local" in said


def test_a_full_queue_takes_what_it_can_and_the_rest_later(slurm: Cluster, home: Home, assert_undisturbed: Compare):
    user = told("id", "-un")
    limit = ["sacctmgr", "--immediate", "--quiet", "modify", "user", user, "set"]
    subprocess.run([*limit, "MaxSubmitJobs=3"], check=True, capture_output=True)
    try:
        said = home.submit()
        assert "as many jobs in the queue as you are allowed to" in said
        assert "of 4 runs were submitted" in said
        home.done(seconds=2 * SLOW)
    finally:
        subprocess.run([*limit, "MaxSubmitJobs=-1"], check=True, capture_output=True)
    assert_undisturbed(home)
