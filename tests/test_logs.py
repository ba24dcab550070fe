"""crm fails and crm logs: failures of one kind together, and what attempts printed, each marked."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crm.cli import app, logs
from crm.cli.options import find_sweep
from crm.failures import REASONS, attempts
from crm.records import append, claim, open_run, write_json
from crm.sweep import Cell

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CRM_HOME", str(tmp_path))
    return tmp_path


def crm(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.stdout


def cells() -> list[Cell]:
    return find_sweep("demo@tiny")[1].cells()


TRACE = """Traceback (most recent call last):
  File "/somewhere/{copy}/crm/worker.py", line 83, in attempt
    finished = work()
  File "/somewhere/{copy}/crm/step.py", line {line}, in step
    raise RunFailed("...")
crm.step.RunFailed: the loss is not finite at step {step}: fused nan
"""


def begun(home: Path, cell: Cell, token: str, number: int = 1, host: str = "n1", **values) -> Path:
    folder = open_run(home / "runs", cell.config)
    (folder / "attempts").mkdir(exist_ok=True)
    (folder / "attempts" / f"{token}.json").write_text("{}")
    append(folder, "attempt", token=token, attempt=number, host=host, pid=1, step=0, **values)
    return folder


def failed(home: Path, cell: Cell, step: int, line: int = 107, host: str = "n1") -> None:
    folder = begun(home, cell, "t", host=host)
    reason = f"RunFailed: the loss is not finite at step {step}: fused nan"
    failure = {"reason": reason, "kind": "non_finite", "step": step, "token": "t"}
    write_json(
        folder / "failure.json", {**failure, "traceback": TRACE.format(copy=f"copy{step}", step=step, line=line)}
    )
    append(folder, "end", outcome="failed", **failure)


# ---------------------------------------------------------------------------------------------- crm fails


def test_cells_that_failed_in_the_same_way_stand_together_with_what_is_done_about_it(home):
    first, second, third, fourth, *_ = cells()
    failed(home, first, step=3)
    failed(home, second, step=4000, host="n2")
    failed(home, third, step=3, line=9)
    open_run(home / "runs", fourth.config)
    groups = json.loads(crm("fails", "demo@tiny", "--json"))
    assert [[one["label"] for one in group["cells"]] for group in groups] == [
        [first.label, second.label], [third.label],
    ]  # fmt: skip
    assert groups[0]["count"] == 2 and groups[0]["hosts"] == ["n1", "n2"]
    assert groups[0]["frame"] == "crm/step.py:107 in step" and groups[0]["kind"] == "non_finite"
    said = crm("fails", "demo@tiny")
    assert said.startswith("2 x non_finite") and "at crm/step.py:107 in step" in said
    assert REASONS["non_finite"].words in said and f"crm logs 'demo@tiny:{first.label}'" in said
    assert f"{second.label} ({second.id}) at step 4000" in said


def test_a_job_that_was_killed_without_a_word_is_a_failure_too(home):
    folder = begun(home, cells()[0], "t")
    append(folder, "end", token="t", outcome="lost", kind="node", reason="NODE_FAIL on n1", step=40)
    (group,) = json.loads(crm("fails", "demo@tiny", "--json"))
    assert (group["kind"], group["reason"], group["cells"][0]["step"]) == ("node", "NODE_FAIL on n1", 40)
    assert group["action"] == "exclude_node"


def test_records_from_before_kinds_were_written_are_grouped_too(home):
    folder = begun(home, cells()[0], "t")
    reason = "OSError: [Errno 28] No space left on device"
    write_json(folder / "failure.json", {"reason": reason, "step": 1, "token": "t"})
    (group,) = json.loads(crm("fails", "demo@tiny", "--json"))
    assert group["kind"] == "disk" and group["frame"] == ""


def test_a_cell_that_is_at_work_again_or_was_stopped_is_no_failure(home):
    first, second, *_ = cells()
    failed(home, first, step=3)
    mine = claim(home / "runs" / first.id, "again")
    append(begun(home, second, "t"), "end", token="t", outcome="stopped")
    assert "no cell of demo@tiny has failed" in crm("fails", "demo@tiny")
    assert mine is not None
    mine.release()


# ---------------------------------------------------------------------------------------------- crm logs


def stamp(seconds: float, text: str) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))},123 INFO root: {text}\n"


@pytest.fixture
def twice(home) -> Path:
    """A run with two attempts and a log."""
    folder = begun(home, cells()[0], "a", time=1000.0, job={"id": "12_3"})
    append(folder, "end", token="a", outcome="lost", kind="node", reason="gone", time=1500.0)
    begun(home, cells()[0], "b", number=2, host="n2", time=2000.0)
    log = stamp(1000.5, "one") + "a line without a time\n" + stamp(1400, "two") + stamp(2001, "three") + "torn"
    (folder / "log.txt").write_text(log)
    return folder


def test_every_attempt_in_a_log_is_marked_where_it_begins(twice):
    said = crm("logs", twice.name[:6]).splitlines()
    assert said[0] == "--- attempt 1 on n1, job 12_3, from step 0: lost (node) ---"
    assert [line.rpartition(" ")[2] for line in said[1:4]] == ["one", "time", "two"]
    assert said[4] == "--- attempt 2 on n2, from step 0 ---"
    assert said[5].endswith("three") and said[6] == "torn"


def test_the_last_lines_are_shown_and_all_of_them_with_0(twice):
    assert len(crm("logs", twice.name, "--lines", "2").splitlines()) == 2
    (twice / "log.txt").write_text("".join(stamp(1001, str(n)) for n in range(200)))
    assert len(crm("logs", twice.name).splitlines()) == 50
    assert len(crm("logs", twice.name, "--lines", "0").splitlines()) == 202


def test_a_single_attempt_needs_no_mark(twice):
    (only,) = attempts([{"event": "attempt", "token": "a", "time": 1.0}])
    assert list(logs.marked(b"one\n", [only])) == ["one"]


def test_a_cell_is_found_by_its_sweep_row_and_seed(twice):
    first = cells()[0]
    assert crm("logs", f"demo@tiny:{first.label}") == crm("logs", first.id)
    found = json.loads(crm("logs", f"demo@tiny:{first.label}", "--json"))
    assert found["run"] == first.id and [one["token"] for one in found["attempts"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("target", "hint"),
    [("demo@tiny:CRM/9", "There is: CRM/0"), ("demo@tiny:*", "name one of them"), ("feedbeef", "no run 'feedbeef'"),
     ("demo@tiny:CRM/1", "has not been begun"), ("dmeo:CRM/0", "Did you mean 'demo'")],
)  # fmt: skip
def test_a_target_that_names_no_run_is_refused_with_what_there_is(twice, home, target, hint):
    with pytest.raises(ValueError, match=hint.replace("(", r"\(")):
        logs.find_cell(home / "runs", target)


WORKER = """
import sys, time
from pathlib import Path
from crm.records import append, claim
folder = Path(sys.argv[1])
mine = claim(folder, "w")
print(flush=True)
for word in ("first", "second"):
    time.sleep(0.3)
    with (folder / "log.txt").open("a") as log:
        print(word, file=log)
append(folder, "end", token="w", outcome="done")
mine.release()
"""


def test_following_shows_what_is_added_and_ends_with_the_attempt(home):
    folder = open_run(home / "runs", cells()[0].config)
    (folder / "log.txt").write_text("before\n")
    with subprocess.Popen([sys.executable, "-c", WORKER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None and worker.stdout.readline()
        command = [sys.executable, "-m", "crm", "logs", "-f", folder.name, "--runs", str(home / "runs")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.split() == ["before", "first", "second"]
    assert "its last attempt ended done" in done.stderr


def test_following_a_run_that_nobody_is_at_ends_at_once(twice):
    assert "three" in crm("logs", "-f", twice.name)
