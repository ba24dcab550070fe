"""Why attempts end, and what the policy says: kinds from exceptions and from the scheduler, signatures, attempts."""

import errno
import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from crm import failures
from crm.failures import (
    HALVE,
    HOLD,
    REASONS,
    attempts,
    halved,
    kind_of,
    last_frame,
    may_retry,
    normalised,
    outbreak,
    reason_of,
    reason_of_end,
    signature,
    spent,
)
from crm.records import Moved
from crm.step import RunFailed

# ---------------------------------------------------------------------------------------------- kinds


def raised(code: str) -> BaseException:
    """What Python itself raises for a piece of code."""
    try:
        exec(code, {})
    except BaseException as error:
        return error
    raise AssertionError(code)


def of_system(number: int) -> OSError:
    return OSError(number, os.strerror(number), "runs/0123456789ab/checkpoints/last.safetensors")


EXCEPTIONS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "gpu_memory"),
    (RuntimeError("CUDA error: out of memory"), "gpu_memory"),
    (MemoryError(), "host_memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), "host_memory"),
    (of_system(errno.ENOMEM), "host_memory"),
    (RunFailed("the loss is not finite at step 3: fused nan"), "non_finite"),
    (FloatingPointError("the class logits to align are nan or inf, so training has diverged"), "non_finite"),
    (of_system(errno.ENOSPC), "disk"),
    (of_system(errno.EDQUOT), "disk"),
    (RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"), "disk"),
    (of_system(errno.ESTALE), "node"),
    (of_system(errno.EIO), "node"),
    (torch.distributed.DistBackendError("NCCL error: unhandled system error"), "node"),
    (RuntimeError("[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "node"),
    (ConnectionResetError(104, "Connection reset by peer"), "node"),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "node"),
    (torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"), "gpu_memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), "gpu_memory"),
    (RuntimeError("FIND was unable to find an engine to execute this computation"), "gpu_memory"),
    (RuntimeError("Triton Error [CUDA]: out of memory"), "gpu_memory"),
    (ValueError("this machine has no cuda:0: PyTorch finds no GPU here (crm doctor)"), "node"),
    (raised("import a_module_that_is_not_there"), "code"),
    (raised("assert 1 == 2"), "code"),
    (raised("None.shape"), "code"),
    (raised("len(1)"), "code"),
    (raised("{}['a']"), "code"),
    (raised("1 / 0"), "code"),
    (raised("open('/nowhere/at/all')"), "input"),
    (raised("int('a')"), "input"),
    (Moved("runs/0123 was recorded under other values of steps"), "input"),
    (KeyboardInterrupt(), "cancelled"),
    (RuntimeError("something else"), "unknown"),
]


@pytest.mark.parametrize(("error", "kind"), EXCEPTIONS, ids=lambda value: str(value)[:40])
def test_an_exception_has_a_kind_and_so_has_the_text_that_older_records_have_of_it(error, kind):
    assert reason_of(error) == kind
    assert kind_of(f"{type(error).__name__}: {error}") == kind


ENDS = [
    ("OUT_OF_MEMORY", "0:125", "", "host_memory"),
    ("TIMEOUT", "0:0", "", "time"),
    ("PREEMPTED", "0:0", "", "preempted"),
    ("NODE_FAIL", "1:0", "", "node"),
    ("BOOT_FAIL", "", "", "node"),
    ("DEADLINE", "", "", "time"),
    ("CANCELLED by 1000", "0:15", "", "cancelled"),
    ("CANCELLED+", "", "slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-22 DUE TO TIME LIMIT ***", "time"),
    ("CANCELLED", "", "slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-22 DUE TO PREEMPTION ***", "preempted"),
    ("FAILED", "9:0", "slurmstepd: error: Step 7.0 exceeded memory limit (600 > 500), being killed", "host_memory"),
    ("FAILED", "1:0", "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0", "host_memory"),
    ("FAILED", "9:0", "", "lost"),
    ("FAILED", "0:9", "", "lost"),
    ("FAILED", "137:0", "Killed", "lost"),
    ("FAILED", "0:53", "", "node"),
    ("FAILED", "1:0", "Traceback (most recent call last):\n  File \"a.py\", line 1, in <module>\n    import b\n"
     "ModuleNotFoundError: No module named 'b'\n", "code"),
    ("FAILED", "1:0", "Traceback (most recent call last):\n  File \"a.py\", line 1, in f\n    f()\n"
     "RuntimeError: odd\nsrun: error: n1: task 0: Exited with exit code 1", "unknown"),
    ("FAILED", "2:0", "no word of it", "unknown"),
    ("COMPLETED", "0:0", "", "lost"),  # without a word in the run folder it did not complete anything
    ("", "", "", "lost"),
]  # fmt: skip


@pytest.mark.parametrize(("state", "code", "log", "kind"), ENDS)
def test_a_job_that_died_without_a_word_has_the_kind_that_the_scheduler_and_its_log_tell(state, code, log, kind):
    assert reason_of_end(state, code, log) == kind


def test_every_kind_that_can_be_found_has_a_policy_and_words():
    tables = (failures.BY_NUMBER, failures.BY_CLASS, failures.BY_STATE)
    found = {kind for table in tables for kind in table.values()}
    found |= {kind for kind, _ in (*failures.BY_MESSAGE, *failures.IN_LOG)}
    assert found <= set(REASONS) and {"lost", "unknown"} <= set(REASONS)
    assert all(policy.words and (policy.limit == 0) == (policy.action == HOLD) for policy in REASONS.values())


# ---------------------------------------------------------------------------------------------- signatures

PROGRAM = """
import sys
def divide(step, path):
    if step == 7: raise RuntimeError(f"step {step}: {path}/last.safetensors at {hex(id(path))} is {step / 3} or nan")
    return step / 0
def other(step, path):
    raise RuntimeError(f"step {step}: {path}/last.safetensors at {hex(id(path))} is {step / 3} or nan")
(other if sys.argv[1] == "other" else divide)(int(sys.argv[2]), sys.argv[3])
"""


def printed(folder: Path, which: str, step: int, path: str) -> str:
    """The traceback of a real process whose program lies in this folder."""
    (folder / "crm").mkdir(parents=True, exist_ok=True)
    (folder / "crm" / "program.py").write_text(PROGRAM)
    command = [sys.executable, "crm/program.py", which, str(step), path]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.stderr


def test_the_same_failure_of_two_cells_has_one_signature_and_another_line_has_another(tmp_path):
    first = printed(tmp_path / "a", "divide", 7, "/elsewhere/me/runs/0123456789ab/checkpoints")
    second = printed(tmp_path / "runs" / ".snapshots" / "fedcba987654", "divide", 7, "runs/ba9876543210")
    assert first != second and signature(first) == signature(second), normalised(first) + "\n" + normalised(second)
    assert len(signature(first)) == 12
    elsewhere = printed(tmp_path / "a", "other", 7, "/elsewhere/me/runs/0123456789ab/checkpoints")
    in_another_line = printed(tmp_path / "a", "divide", 6, "/elsewhere/me")
    assert len({signature(text) for text in (first, elsewhere, in_another_line)}) == 3


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("the loss is not finite at step 3: rgb 2.5e-07", "the loss is not finite at step 1999: rgb -inf"),
        ("[Errno 2] No such file or directory: '/data/a/b.png'", "[Errno 2] No such file or directory: '/other/c.png'"),
        ("<object at 0x7f12ab>", "<object at 0x55ff00>"),
        ("run 0123456789ab is gone", "run fedcba987654 is gone"),
    ],
)  # fmt: skip
def test_messages_that_differ_in_numbers_paths_ids_or_addresses_are_one(one, two):
    assert normalised(one) == normalised(two)


@pytest.mark.parametrize(("one", "two"), [("no class 'car'", "no class 'bus'"), ("conv1 is odd", "conv2 is odd")])
def test_messages_that_differ_in_names_are_two(one, two):
    assert normalised(one) != normalised(two)


def test_the_last_frame_is_the_innermost_of_the_project():
    try:
        shutil.copy("no such file here", "anywhere")
    except OSError:
        text = traceback.format_exc()
    assert last_frame(text).startswith("tests/test_failures.py:")
    assert last_frame(text).endswith(" in test_the_last_frame_is_the_innermost_of_the_project")
    assert last_frame("no traceback") == ""


# ---------------------------------------------------------------------------------------------- attempts


def journal(*events: dict) -> list[dict]:
    """Lines as they come back from disk."""
    return [json.loads(json.dumps({"time": 1000.0 + number, **line})) for number, line in enumerate(events)]


def begin(token: str, step: int = 0, **values) -> dict:
    return {"event": "attempt", "token": token, "attempt": 1, "host": "n1", "pid": 7, "step": step, **values}


def end(token: str, outcome: str = "failed", step: int = 10, **values) -> dict:
    return {"event": "end", "token": token, "outcome": outcome, "step": step, **values}


def test_attempts_are_read_from_the_journal_with_how_they_ended():
    lines = journal(
        begin("a", job={"id": "12_3"}),
        {"event": "train", "step": 10},
        end("a", kind="gpu_memory", reason="OutOfMemoryError: CUDA out of memory"),
        begin("b", step=10, attempt=2, host="n2"),
    )
    first, second = attempts(lines)
    assert (first.host, first.job, first.step, first.last_step) == ("n1", {"id": "12_3"}, 0, 10)
    assert (first.outcome, first.kind, first.time, first.ended) == ("failed", "gpu_memory", 1000.0, 1002.0)
    assert (second.attempt, second.outcome, second.job, second.ended) == (2, "", {}, None)


def test_records_from_before_kinds_were_written_are_read_too():
    lines = journal(
        begin("a"),
        {"event": "end", "token": "a", "outcome": "failed", "reason": "RunFailed: the loss is not finite at step 3"},
        {"event": "end", "token": "only evaluated", "outcome": "done"},
        {"event": "end", "token": "c", "outcome": "lost"},
    )
    assert [(one.token, one.outcome, one.kind) for one in attempts(lines)] == [
        ("a", "failed", "non_finite"), ("only evaluated", "done", ""), ("c", "lost", "lost"),
    ]  # fmt: skip
    assert spent(lines, "non_finite") == 1 and spent(lines, "lost") == 1


def test_a_kind_is_retried_as_often_as_its_policy_says_and_counted_anew_after_a_retry():
    ends = [end(str(n), kind="lost", step=n) for n in range(REASONS["lost"].limit)]
    assert may_retry(journal(*ends), "lost", 16, 0)
    over = [*ends, end("last", kind="lost")]
    assert spent(journal(*over), "lost") == REASONS["lost"].limit + 1
    assert not may_retry(journal(*over), "lost", 16, 0)
    assert may_retry(journal(*over, {"event": "retry"}, end("anew", kind="lost")), "lost", 16, 0)
    assert may_retry(journal(*ends, end("other", kind="node")), "node", 16, 0), "each kind is counted by itself"


@pytest.mark.parametrize("kind", [kind for kind, policy in REASONS.items() if policy.action == HOLD])
def test_what_would_fail_again_is_never_tried_again_by_itself(kind):
    assert not may_retry(journal(end("a", kind=kind)), kind, 16, 0)


def test_a_run_that_runs_out_of_time_is_resumed_as_long_as_it_gets_further():
    further = [end(str(n), kind="time", step=100 * n) for n in range(50)]
    assert may_retry(journal(*further), "time", 16, 0)
    same = [*further, *(end(f"s{n}", kind="time", step=7000) for n in range(REASONS["time"].idle))]
    assert may_retry(journal(*same), "time", 16, 0)
    assert not may_retry(journal(*same, end("still", kind="time", step=7000)), "time", 16, 0)


def test_a_micro_batch_is_halved_down_to_single_images():
    assert REASONS["gpu_memory"].action == HALVE
    assert [halved(16, 0), halved(16, 8), halved(6, 3), halved(2, 1)] == [8, 4, 2, 1]
    assert may_retry(journal(end("a", kind="gpu_memory")), "gpu_memory", 16, 2)
    assert not may_retry(journal(end("a", kind="gpu_memory")), "gpu_memory", 16, 1)
    assert not may_retry(journal(end("a", kind="gpu_memory")), "gpu_memory", 1, 0)


def test_runs_that_fail_alike_are_an_outbreak_unless_a_person_lets_it_pass():
    trace = 'Traceback (most recent call last):\n  File "crm/a.py", line 3, in f\n    x\nNameError: x'
    alike = {id: {"kind": "code", "reason": "NameError: x", "traceback": trace} for id in ("one", "two")}
    diverged = {id: {**failure, "kind": "non_finite"} for id, failure in alike.items()}
    assert outbreak(alike, 2) == ["one", "two"]
    assert outbreak(alike, 3) == [] == outbreak(diverged, 2)
    assert outbreak(alike, 2, [signature(trace)]) == []
