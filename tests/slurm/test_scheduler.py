"""The scheduler as its commands show it, on a real Slurm. What that cannot show is in tests/test_slurm_lines.py."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crm.cluster import slurm as scheduler
from crm.cluster.slurm import Element, Ended, Unreachable
from tests.slurm.cluster import Cluster, told, until

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slurm


def elements(name: str) -> dict[int | None, Element]:
    return {element.task: element for element in scheduler.queue([name])}


def attempts(name: str, count: int) -> list[Ended]:
    """What accounting knows, once it knows that many attempts to be over."""

    def over() -> list[Ended]:
        found = scheduler.history([name])
        return (
            found if sum(scheduler.finished(each.state) or each.state == "REQUEUED" for each in found) >= count else []
        )

    return until(over, f"{count} ended attempts of {name} in accounting")


def test_an_array_with_a_throttle_is_seen_element_by_element(slurm: Cluster):
    before = time.time()
    job = slurm.submit("sleep 60", "--job-name=crm-throttled-0123456789-abcdefghijklmnop", "--array=0-5%2", "--time=3")
    slurm.submit("sleep 60", "--job-name=another")
    slurm.in_state(job, "RUNNING", 2)
    seen = elements("crm-throttled-0123456789-abcdefghijklmnop")
    assert sorted(seen) == [0, 1, 2, 3, 4, 5] and {element.job for element in seen.values()} == {job}
    running = [element for element in seen.values() if element.state == "RUNNING"]
    assert len(running) == 2
    for element in running:
        assert element.node in ("n1", "n2", "n3", "n4") and element.why == "" and element.restarts == 0
        assert element.end is not None and before + 170 < element.end < time.time() + 190
    waiting = [element for element in seen.values() if element.state == "PENDING"]
    assert {element.why for element in waiting} == {"JobArrayTaskLimit"}
    assert not any(element.held for element in seen.values())
    assert scheduler.queue(["nobody"]) == []


def test_a_thousand_waiting_elements(slurm: Cluster):
    for _ in range(2):
        slurm.submit("true", "--job-name=many", "--array=0-499", "--hold")
    seen = scheduler.queue(["many"])
    assert len(seen) == len({element.id for element in seen}) == 1000
    assert all(element.held and element.state == "PENDING" for element in seen)
    odd = [element.id for element in seen if element.task is not None and element.task % 2]
    assert scheduler.cancel(odd) == {}
    left = [element.task for element in scheduler.queue(["many"]) if element.state == "PENDING"]
    assert sorted(left) == sorted([*range(0, 500, 2)] * 2)


def test_hold_and_release(slurm: Cluster):
    job = slurm.submit("sleep 60", "--job-name=held", "--array=0-4%1")
    slurm.in_state(job, "RUNNING")
    assert scheduler.hold([f"{job}_3", f"{job}_4", f"{job}_77"]) == {f"{job}_77": "Invalid job id specified"}
    held = {task for task, element in elements("held").items() if element.held}
    assert held == {3, 4}
    assert scheduler.release([f"{job}_3"]) == {}
    assert {task for task, element in elements("held").items() if element.held} == {4}
    assert not scheduler.finished(elements("held")[4].state)


def test_cancel_one_that_waits_and_one_that_runs(slurm: Cluster):
    job = slurm.submit("sleep 60", "--job-name=cancelled", "--array=0-3%1")
    slurm.in_state(job, "RUNNING")
    assert scheduler.cancel([f"{job}_0", f"{job}_2"]) == {}
    until(lambda: elements("cancelled")[0].state == "CANCELLED", "the running one to be cancelled")
    assert 2 not in elements("cancelled")  # an element that waited vanishes from the queue
    first = next(each for each in attempts("cancelled", 1) if each.task == 0)
    assert first.state == "CANCELLED" and first.start is not None and first.end is not None
    assert scheduler.cancel([f"{job}_2", "99999"]) == {}  # there is nothing to cancel


def test_a_signal_reaches_the_processes_of_a_job(slurm: Cluster, tmp_path):
    script = (
        f"srun bash -c 'trap \"touch {tmp_path}/usr2; exit\" USR2; touch {tmp_path}/up; while :; do sleep 0.1; done'"
    )
    job = slurm.submit(script)
    until((tmp_path / "up").exists, "the job's process")
    assert scheduler.cancel([job], signal="USR2") == {}
    until((tmp_path / "usr2").exists, "the signal")


def test_requeue_is_a_second_attempt_under_the_same_id(slurm: Cluster):
    job = slurm.submit("sleep 60", "--job-name=again", "--array=0-1")
    slurm.in_state(job, "RUNNING", 2)
    assert scheduler.requeue(f"{job}_1") == {}
    until(lambda: elements("again")[1].restarts == 1, "a restart")
    slurm.in_state(job, "RUNNING", 2)
    assert scheduler.requeue("99999") == {"99999": "Invalid job id specified for job 99999"}
    scheduler.cancel([job])
    ended = [(each.task, each.state, each.restarts) for each in attempts("again", 3)]
    assert sorted(ended) == [(0, "CANCELLED", 0), (1, "CANCELLED", 1), (1, "REQUEUED", 0)]


def test_a_node_that_fails_is_an_attempt_of_its_own(slurm: Cluster):
    job = slurm.submit("sleep 60", "--job-name=lost", "--nodelist=n2")
    slurm.in_state(job, "RUNNING")
    told("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    first = attempts("lost", 1)[0]
    assert (first.job, first.state, first.node) == (job, "NODE_FAIL", "n2")
    assert elements("lost")[None].restarts == 1


def test_preemption_is_seen_in_the_history(slurm: Cluster):
    job = slurm.submit("sleep 60", "--job-name=preempted", "--exclusive", "--nodelist=n1")
    slurm.in_state(job, "RUNNING")
    slurm.submit("sleep 5", "--partition=urgent", "--exclusive", "--nodelist=n1")
    assert attempts("preempted", 1)[0].state in ("PREEMPTED", "REQUEUED")
    assert elements("preempted")[None].restarts == 1


def test_a_job_that_was_held_while_it_ran_is_in_the_history_all_the_same(slurm: Cluster):
    job = slurm.submit("sleep 1", "--job-name=never-eligible")
    slurm.in_state(job, "RUNNING")
    scheduler.hold([job])
    assert attempts("never-eligible", 1)[0].state == "COMPLETED"


def test_a_failure_has_its_exit_code(slurm: Cluster):
    slurm.submit("exit 3", "--job-name=failed")
    (ended,) = attempts("failed", 1)
    assert (ended.state, ended.exit) == ("FAILED", "3:0")


def test_limits_and_partitions(slurm: Cluster):
    assert scheduler.limits() == scheduler.Limits(max_array=501, max_submit=20000)
    assert scheduler.partitions() == ["main", "grace", "killme", "urgent"]
    slurm.submit("true", "--array=0-500", "--hold")  # 501 elements
    assert sbatch("--array=0-501").startswith("the array is larger than Slurm's MaxArraySize")


def test_every_job_knows_the_time_that_is_left_to_it(slurm: Cluster, tmp_path):
    code = "import sys; from crm.cluster.slurm import time_left; print(time_left(), file=open(sys.argv[1], 'w'))"
    script = f"{sys.executable} -c {shlex.quote(code)} {tmp_path}/${{SLURM_ARRAY_TASK_ID:-alone}}"
    slurm.submit(script, "--time=7", "--array=0-2", f"--chdir={ROOT}")
    slurm.submit(script, "--time=7", f"--chdir={ROOT}")
    for name in ("0", "1", "2", "alone"):
        told = until(lambda name=name: (tmp_path / name).exists() and (tmp_path / name).read_text(), f"job {name}")
        assert 300 < float(told) <= 421


def test_without_a_job_no_time_is_left_or_known(slurm: Cluster, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "99999")
    assert scheduler.time_left() is None


# ---------------------------------------------------------------------------------------------- refusals


def sbatch(*options: str) -> str:
    """What a refused submission is told."""
    done = subprocess.run(["sbatch", *options, "--wrap", "true"], capture_output=True, text=True)
    assert done.returncode != 0
    assert not scheduler.is_limit(done.stderr) and not scheduler.is_uncertain(done.stderr)
    return scheduler.refusal(done.stderr)


def test_a_wrong_partition_is_answered_with_the_right_ones(slurm: Cluster):
    said = sbatch("--partition=mian")
    assert said.startswith("no partition 'mian'. Did you mean 'main'? There is: grace, killme, main, urgent")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--ntasks=64", "no node, or not as many"),
        ("--mem=900G", "as much memory"),
        ("--gres=gpu:9", "no node, or not as many"),
        ("--gres=tpu:1", "no node has such a resource"),
        ("--constraint=fast", "no node has such a feature"),
        ("--time=99-0", "time asked for is more"),
    ],
)
def test_what_no_node_has_is_refused_in_words(slurm: Cluster, option, words):
    assert words in sbatch(option)


# ---------------------------------------------------------------------------------------------- no answer


def test_a_controller_that_is_gone_is_unreachable(slurm: Cluster):
    job = slurm.submit("sleep 60", "--job-name=survivor", "--hold")
    with slurm.without("slurmctld"), pytest.raises(Unreachable, match="controller does not answer squeue"):
        scheduler.queue(["survivor"])
    assert [element.job for element in scheduler.queue(["survivor"])] == [job]


def test_a_controller_that_is_frozen_is_unreachable_and_takes_the_job_all_the_same(slurm: Cluster):
    with slurm.stopped("slurmctld"):
        submitting = subprocess.Popen(
            ["sbatch", "--job-name=ghost", "--hold", "--wrap", "true"], stderr=subprocess.PIPE, text=True
        )
        with pytest.raises(Unreachable, match="does not answer scancel"):
            scheduler.cancel(["99999"])
        _, said = submitting.communicate(timeout=60)
    assert submitting.returncode != 0
    assert scheduler.is_uncertain(said)
    assert until(lambda: scheduler.queue(["ghost"]), "the job that sbatch says it could not submit")


def test_accounting_that_is_gone_leaves_the_queue(slurm: Cluster):
    job = slurm.submit("sleep 60", "--job-name=unaccounted")
    slurm.in_state(job, "RUNNING")
    with slurm.without("slurmdbd"):
        with pytest.raises(Unreachable, match="accounting does not answer"):
            scheduler.history(["unaccounted"])
        assert elements("unaccounted")[None].state == "RUNNING"
        scheduler.cancel([job])
    assert attempts("unaccounted", 1)[0].state == "CANCELLED"  # it was told afterwards


# ---------------------------------------------------------------------------------------------- the tests' own cluster


def test_the_cluster_is_whole_again_whatever_a_test_has_killed(slurm: Cluster):
    job = slurm.submit("sleep 60", "--nodelist=n3")
    slurm.in_state(job, "RUNNING")
    for daemon in ("slurmd.n3", "slurmctld", "slurmdbd"):
        slurm.kill(daemon)
    os.kill(slurm.pid("slurmd.n1"), signal.SIGSTOP)
    slurm.clean()
    assert scheduler.queue(["nothing"]) == [] and not slurm.orphans()
    assert set(told("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()) == {"idle"}
