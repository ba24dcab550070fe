"""What Slurm's commands print is understood, also what no private cluster can be made to print.

Recorded lines: those of squeue and sacct of Slurm 22.05 in the formats asked for, with the states, suffixes and reasons
that the manuals of 22.05 to 25.05 list. The same functions meet a real Slurm in tests/slurm/test_scheduler.py.
"""

import stat
import time

import pytest

from crm.cluster import slurm
from crm.cluster.slurm import Element, Unreachable

# ---------------------------------------------------------------------------------------------- squeue

QUEUE = """\
2|2|crm-x-1|PENDING||0|N/A|4294901758|2|JobArrayTaskLimit|
2|7|crm-x-1|PENDING||0|N/A|0|9|JobHeldUser|
2|0|crm-x-1|RUNNING|n1|3|1795529962|4294901757|3|None|
2|1|crm-x-1|RUNNING|n[1-2]|0|1795529962|0|4|JobHeldAdmin|
22|N/A|a-very-long-name-of-more-than-forty-characters|PENDING||1|N/A|1|22|BeginTime|
23|N/A|one|PENDING||0|N/A|1|23|Nodes required for job are DOWN, DRAINED or reserved for other jobs|
24|N/A|two|PENDING||2|N/A|0|24|launch failed requeued held|
25|N/A|three|SUSPENDED|n3|0|1795529962|1|25|None|
26|N/A|four|OUT_OF_MEMORY|n3|0|1795529900|1|26|OutOfMemory|
27|N/A|five|REQUEUE_HOLD||1|N/A|0|27|job requeued in held state|
28|N/A|six|COMPLETING|n4|0|1795529962|1|28|None|
"""


def queued() -> dict[str, Element]:
    return {element.id: element for element in slurm.read_queue(QUEUE)}


def test_every_line_of_the_queue_is_a_job_or_an_element_of_an_array():
    assert list(queued()) == ["2_2", "2_7", "2_0", "2_1", "22", "23", "24", "25", "26", "27", "28"]
    assert queued()["2_0"] == Element("2", 0, "crm-x-1", "RUNNING", "", "n1", 3, 1795529962.0, False)
    assert queued()["22"].task is None and queued()["22"].end is None and queued()["22"].restarts == 1


def test_held_is_what_waits_and_would_not_start():
    assert {id for id, element in queued().items() if element.held} == {"2_7", "24", "27"}  # not 2_1, which runs


def test_only_what_waits_has_a_reason_and_it_may_be_a_sentence():
    assert queued()["23"].why.startswith("Nodes required for job are DOWN, DRAINED")
    assert queued()["2_2"].why == "JobArrayTaskLimit"
    assert queued()["2_1"].why == queued()["26"].why == queued()["28"].why == ""


def test_the_element_that_squeue_forgets_is_found_in_the_set():
    """Seen with Slurm 22.05: of 5_[0-32:2], where 5_3 is held, squeue -r has no line for 5_32."""
    line = "5|{}|x|PENDING||0|N/A|{}|{}|{}|\n"
    lines = "".join(line.format(task, 7, 5, "Priority") for task in range(0, 32, 2)) + line.format(
        3, 0, 6, "JobHeldUser"
    )
    seen = {element.task: element for element in slurm.read_queue(lines, "5|0-32:2%7|\n5|3|\n6|N/A|\n")}
    assert sorted(task for task in seen if task is not None) == sorted([*range(0, 33, 2), 3])
    assert seen[32] == Element("5", 32, "x", "PENDING", "Priority", "", 0, None, False) and seen[3].held


def test_what_is_no_line_of_the_queue_is_left_out():
    assert slurm.read_queue("CLUSTER: two\n\nslurm_load_jobs: warning\n") == []


# ---------------------------------------------------------------------------------------------- sacct

HISTORY = """\
17_1|crm-x-2|CANCELLED by 1000|0:0|None assigned|1795529398|Unknown|1795529406
17_0|crm-x-2|CANCELLED by 0|0:15|n1|1795529397|1795529397|1795529406
17_1|crm-x-2|REQUEUED|0:0|n1|1795529397|1795529397|1795529398
17_[0-1,3,9%2]|crm-x-2|CANCELLED+|0:0|None assigned|1795529397|None|1795529406
30|one|OUT_OF_MEMORY|0:125|gpu[001-002]|1795529400|1795529401|1795529500
31|two|BOOT_FAIL|1:0|n3|1795529400|1795529401|1795529500
32|three|DEADLINE|0:0||1795529400|None|1795529500
33|four|COMPLETED+|0:0|n3|1795529400|1795529401|1795529500
34|five|RUNNING|0:0|n3|1795529400|1795529401|Unknown
35+1|six|TIMEOUT|0:1|n3|1795529400|1795529401|1795529500
36_[4-6,8,...]|seven|CANCELLED|0:0|None assigned|1795529400|Unknown|1795529500
37_[1-9%2]|eight|PENDING|0:0|None assigned|1795529400|Unknown|Unknown
"""


def test_every_attempt_is_there_in_order_and_numbered():
    attempts = [each for each in slurm.read_history(HISTORY) if (each.job, each.task) == ("17", 1)]
    assert [(each.state, each.restarts) for each in attempts] == [("REQUEUED", 0), ("CANCELLED", 1)]
    assert (attempts[0].start, attempts[0].end, attempts[1].start) == (1795529397.0, 1795529398.0, None)


def test_states_are_one_word_and_sets_of_elements_are_written_out():
    ended = {(each.job, each.task): each for each in slurm.read_history(HISTORY)}
    states = {job: each.state for (job, task), each in ended.items() if task is None}
    assert states == {
        "30": "OUT_OF_MEMORY", "31": "BOOT_FAIL", "32": "DEADLINE", "33": "COMPLETED", "34": "RUNNING", "35": "TIMEOUT",
    }  # fmt: skip
    assert ended["17", 3].state == ended["17", 9].state == "CANCELLED"
    assert ended["17", 0].node == "n1"  # it has a line of its own
    assert [task for job, task in ended if job == "36"] == [4, 5, 6, 8]
    assert not [job for job, _ in ended if job == "37"]  # no attempt, and some of them may be gone by now
    assert ended["30", None].node == "gpu[001-002]" and ended["30", None].exit == "0:125"
    assert ended["32", None].node == ended["17", 3].node == "" and ended["34", None].end is None


@pytest.mark.parametrize("state", ["COMPLETED", "CANCELLED by 1000", "COMPLETED+", "OUT_OF_MEMORY", "NODE_FAIL"])
def test_an_attempt_that_is_over(state):
    assert slurm.finished(state)


@pytest.mark.parametrize("state", ["PENDING", "SUSPENDED", "REQUEUED", "SPECIAL_EXIT", "RESIZING", "HIBERNATING", ""])
def test_a_word_nobody_knows_declares_nothing_dead(state):
    assert not slurm.finished(state)


def test_no_state_is_both():
    assert not slurm.LIVE & slurm.FINISHED and slurm.WAITING < slurm.LIVE


# ---------------------------------------------------------------------------------------------- limits, ids


def test_an_array_is_as_large_as_the_smaller_of_two_settings():
    config = "MaxArraySize            = 1001\nMaxJobCount             = 10000\nSchedulerParameters     = {}\n"
    assert slurm.read_limits(config.format("(null)")) == slurm.Limits(1001, 10000)
    assert slurm.read_limits(config.format("bf_interval=1,max_array_tasks=300,x")) == slurm.Limits(300, 10000)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Puts executables on an otherwise empty path: name -> shell script."""

    def put(**scripts: str) -> None:
        for name, script in scripts.items():
            path = tmp_path / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", str(tmp_path))
    return put


def test_elements_of_one_array_are_cancelled_as_a_set(commands, tmp_path):
    commands(scancel=f'echo "$@" >> {tmp_path}/asked')
    ids = ["17_4", "12", "17_5", "17_9", "18_0", "17_6", "17_4"]
    assert slurm.cancel(ids, signal="USR2") == {}
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [f"--quiet --signal=USR2 {each}" for each in ("12", "17_[4-6,9]", "18_[0]")]


def test_part_of_a_set_may_be_refused(commands):
    """scontrol names those that went well too, and elements together with others that were not asked for."""
    commands(scontrol="echo '17_4-7: Invalid job id specified' >&2; echo '17_8: No error' >&2; exit 1")
    refused = slurm.hold(["17_4", "17_5", "17_8"])
    assert refused == dict.fromkeys(["17_4", "17_5"], "Invalid job id specified")
    commands(scontrol="echo '17_3,8-9: Job is pending execution' >&2; exit 1")
    assert slurm.requeue("17_8") == {"17_8": "Job is pending execution"}
    commands(scancel="echo 'scancel: error: Kill job error on job id 12: Access/permission denied' >&2; exit 1")
    assert slurm.cancel(["12"]) == {"12": "Access/permission denied"}


def test_what_is_no_id_never_reaches_a_command(commands, tmp_path):
    commands(scancel=f"touch {tmp_path}/asked")
    for wrong in ("", "--user=root", "12; rm", "n1", "12_", "all"):
        with pytest.raises(ValueError, match="is no id of a Slurm job"):
            slurm.cancel([wrong])
    assert not (tmp_path / "asked").exists()


# ---------------------------------------------------------------------------------------------- no answer


def test_without_slurm_everything_says_that_there_is_none(commands, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    for ask in (
        lambda: slurm.queue(["x"]), lambda: slurm.history(["x"]), slurm.limits, slurm.partitions,
        lambda: slurm.hold(["1"]), lambda: slurm.release(["1"]), lambda: slurm.cancel(["1"]),
        lambda: slurm.requeue("1"),
    ):  # fmt: skip
        with pytest.raises(Unreachable, match=r"there is no s[a-z]+ on the path"):
            ask()
    assert slurm.time_left() is None


def test_nothing_is_asked_about_no_names(commands):
    assert slurm.queue([]) == slurm.history([]) == []  # without a name squeue would list everybody's jobs


def test_a_command_that_hangs_is_no_answer(commands, monkeypatch):
    commands(squeue="exec /bin/sleep 60")
    monkeypatch.setattr(slurm, "TIMEOUT", 0.2)
    with pytest.raises(Unreachable, match="squeue has not answered within"):
        slurm.queue(["x"])


def test_accounting_that_is_not_kept_is_unknown_rather_than_empty(commands):
    commands(sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1")
    with pytest.raises(Unreachable, match="keeps no accounting"):
        slurm.history(["x"])


def test_a_person_s_own_settings_of_the_commands_do_not_reach_them(commands, monkeypatch):
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    commands(squeue='echo "7|N/A|$SQUEUE_STATES$SQUEUE_FORMAT|RUNNING|$SLURM_TIME_FORMAT|0|N/A|1|7|None|"')
    (element,) = slurm.queue(["x"])
    assert (element.name, element.node) == ("", "%s")


def test_many_names_are_asked_for_in_several_commands(commands, tmp_path):
    commands(squeue=f"echo >> {tmp_path}/asked")
    slurm.queue([f"crm-{number}" for number in range(2 * slurm.BATCH + 1)])
    assert (tmp_path / "asked").read_text().count("\n") == 2 * 3


# ---------------------------------------------------------------------------------------------- time


def test_the_time_left_is_what_the_job_s_environment_says(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    left = slurm.time_left()
    assert left is not None and 90 < left <= 100


def test_the_time_left_is_asked_for_where_it_does_not(commands, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    commands(squeue=f"echo {int(time.time()) + 100}")
    left = slurm.time_left()
    assert left is not None and 90 < left <= 100
    commands(squeue="echo N/A")  # no limit
    assert slurm.time_left() is None


def test_outside_of_a_job_there_is_no_time_limit(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert slurm.time_left() is None


# ---------------------------------------------------------------------------------------------- refusals

FAILED = "sbatch: error: Batch job submission failed: "


def test_a_wrong_partition_is_answered_with_those_that_there_are(commands):
    commands(sinfo="echo main; echo urgent")
    text = f"sbatch: error: invalid partition specified: mian\n{FAILED}Invalid partition name specified"
    assert "Did you mean 'main'? There is: main, urgent" in slurm.refusal(text)
    commands(sinfo="exit 1")
    assert "does not know the partition 'mian'" in slurm.refusal(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{FAILED}Invalid account or account/partition combination specified", "does not know this account"),
        (f"{FAILED}Invalid qos specification", "does not know this QOS"),
        (f"{FAILED}Requested node configuration is not available", "no node, or not as many"),
        (f"sbatch: error: Memory specification can not be satisfied\n{FAILED}Requested node configuration is not "
         "available", "as much memory"),
        (f"{FAILED}More processors requested than permitted", "no node, or not as many"),
        (f"{FAILED}Requested time limit is invalid (missing or exceeds some limit)", "time asked for is more"),
        (f"sbatch: error: QOSMaxWallDurationPerJobLimit\n{FAILED}Job violates accounting/QOS policy (job submit limit, "
         "user's size and/or time limits)", "time asked for is more"),
        ("sbatch: error: Invalid generic resource (gres) specification", "no node has such a resource"),
        (f"{FAILED}Invalid feature specification", "no node has such a feature"),
        (f"{FAILED}User's group not permitted to use this partition", "you may not use this partition"),
        ("Could not detect \"srun\", are you indeed on a slurm cluster?", "there is no sbatch on the path"),
        ("[Errno 2] No such file or directory: 'sbatch'", "there is no sbatch on the path"),
        (f"{FAILED}Something of the year 2031", "Slurm refused the job: Batch job submission failed: Something"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_to_do_and_is_final(text, words):
    assert words in slurm.refusal(text)
    assert not slurm.is_limit(text) and not slurm.is_uncertain(text)


@pytest.mark.parametrize(
    "text",
    [
        f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{FAILED}Job violates accounting/QOS policy (job submit limit, "
        "user's size and/or time limits)",
        f"sbatch: error: AssocMaxSubmitJobLimit\n{FAILED}Job violates accounting/QOS policy",
        f"sbatch: error: AssocGrpSubmitJobsLimit\n{FAILED}Job violates accounting/QOS policy",
        f"{FAILED}Slurm temporarily unable to accept job",
    ],
)
def test_a_full_queue_is_a_limit_and_the_rest_may_follow_later(text):
    assert slurm.is_limit(text) and not slurm.is_uncertain(text)
    assert "the rest" in slurm.refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        f"{FAILED}Socket timed out on send/recv operation",
        f"{FAILED}Unable to contact slurm controller (connect failure)",
        f"{FAILED}Zero Bytes were transmitted or received",
        f"{FAILED}Unexpected message received",
    ],
)
def test_after_a_lost_connection_the_job_may_exist(text):
    assert slurm.is_uncertain(text) and not slurm.is_limit(text)
