"""The sweep command and its local queue, in real processes: killed, interrupted, resumed, adopted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from crm.checkpoint import load_checkpoint
from crm.cli.local import Places, places
from crm.config import override
from crm.failures import REASONS
from crm.local import Queue, Worker, fewest
from crm.records import open_run, raw_lines, read_json
from crm.sweep import Cell
from crm.worker import FAILED
from tests.tiny import TINY, TINY_SETS, machine

ROOT = Path(__file__).resolve().parents[1]
CRM = [sys.executable, "-c", "from crm.cli import main; main()"]
# one worker where one is enough: each loads the libraries, which takes longer than its runs
SWEEP = ["sweep", "demo", "--yes", "--no-track", "--threads", "1", "--seeds", "0", "--workers", "1", *TINY_SETS]
STATUS = ["--seeds", "0", *TINY_SETS]  # what status and report need to mean the same cells
PATIENCE = 240  # seconds; a deadline for what takes seconds on an idle machine


def crm(*arguments: str, home: Path, **options) -> subprocess.CompletedProcess:
    """Runs the command to its end."""
    environment = {**os.environ, "CRM_HOME": str(home), **options.pop("env", {})}
    return subprocess.run([*CRM, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, **options)


def start(home: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*CRM, *SWEEP, *more],
        env={**os.environ, "CRM_HOME": str(home)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def until(what, process: subprocess.Popen) -> None:
    """Waits for a condition while the command runs."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def results(home: Path) -> dict[str, tuple]:
    """What two runs are compared by: weights, scores, and how often each was trained."""
    found = {}
    for path in sorted(home.glob("runs/*/result.json")):
        value = json.loads(path.read_text())
        weights = load_checkpoint(path.parent / "checkpoints/last.safetensors").weights
        found[path.parent.name] = (value["miou"], sum(float(tensor.double().sum()) for tensor in weights.values()))
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("undisturbed")
    done = crm(*SWEEP, "--workers", "2", home=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return home


def test_an_undisturbed_sweep_trains_every_cell_and_a_second_call_has_nothing_to_do(undisturbed):
    assert len(results(undisturbed)) == 3
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("runs/*/result.json")}
    again = crm(*SWEEP, home=undisturbed)
    assert again.returncode == 3
    assert "nothing to do" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.glob("runs/*/result.json")}


def test_status_shows_every_cell_as_text_and_as_json(undisturbed):
    sets = STATUS
    text = crm("status", "demo", *sets, home=undisturbed)
    assert "3 cells: 3 done" in text.stdout
    lines = json.loads(crm("status", "demo", "--json", *sets, home=undisturbed).stdout)
    assert {line["state"] for line in lines} == {"done"}
    assert {line["variant"] for line in lines} == {"plain fusion", "modality dropout", "CRM"}


def test_the_next_call_mirrors_what_is_finished_into_mlflow(undisturbed):
    arguments = [argument for argument in SWEEP if argument != "--no-track"]
    again = crm(*arguments, home=undisturbed)
    assert again.returncode == 3, again.stdout + again.stderr
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{undisturbed / 'runs' / 'mlflow.db'}")
    found = client.search_runs([each.experiment_id for each in client.search_experiments()])
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    assert len(found) == 4
    assert {run.data.tags["crm.run_id"] for run in children} == set(results(undisturbed))
    assert {run.info.status for run in children} == {"FINISHED"}
    one = children[0]
    journal = read_json(undisturbed / "runs" / one.data.tags["crm.run_id"] / "result.json")
    assert one.data.metrics["val/miou"] == journal["miou"]


def test_the_report_is_written_from_what_is_finished(undisturbed):
    done = crm("report", "demo", *STATUS, home=undisturbed)
    assert done.returncode == 0, done.stderr
    assert "| CRM" in done.stdout
    page = undisturbed / "reports/demo/index.html"
    assert str(page) in done.stdout
    assert page.stat().st_size > 50_000


@pytest.mark.slow
def test_the_demo_runs_on_real_frames(real_data, tmp_path):
    sets = [*TINY_SETS, "--set", "steps=2", "--set", "val_every=2"]
    done = crm(
        "sweep",
        "demo_real",
        "--yes",
        "--no-track",
        "--report",
        "--data",
        str(real_data),
        "--seeds",
        "0",
        *sets,
        home=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "reports/demo_real/index.html").exists()


def test_a_killed_sweep_loses_nothing_and_ends_with_the_same_numbers(undisturbed, tmp_path):
    process = start(tmp_path, "--workers", "2")
    until(lambda: len(list(tmp_path.glob("runs/*/result.json"))) >= 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    finished = {path.parent.name: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")}
    again = crm(*SWEEP, home=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert results(tmp_path) == results(undisturbed)
    for run, when in finished.items():
        assert (tmp_path / "runs" / run / "result.json").stat().st_mtime_ns == when, f"{run} was trained again"


def test_a_killed_worker_is_reported_and_its_run_resumed_at_once(undisturbed, tmp_path):
    process = start(tmp_path)
    until(lambda: list(tmp_path.glob("runs/*/progress.json")), process)
    path = next(tmp_path.glob("runs/*/claim.json"))
    claimed = path.parent.name
    os.kill(read_json(path)["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert "killed without a word: resumed from the last checkpoint" in output
    assert results(tmp_path) == results(undisturbed)
    run = tmp_path / "runs" / claimed
    ends = [line for line in raw_lines(run / "journal.jsonl") if line["event"] == "end"]
    assert [(line["outcome"], line.get("kind")) for line in ends] == [("lost", "lost"), ("done", None)]


@pytest.mark.slow
def test_a_worker_that_is_killed_every_time_is_given_up_after_as_many_tries_as_the_policy_allows(tmp_path):
    environment = {"CRM_FAULT": "kill last.safetensors 1"}
    done = crm(*SWEEP, "--only", "CRM/0", home=tmp_path, env=environment)
    assert done.returncode == 1
    assert "killed by SIGKILL again and again" in done.stderr
    (run,) = tmp_path.glob("runs/*/journal.jsonl")
    lost = [line for line in raw_lines(run) if line["event"] == "end" and line["outcome"] == "lost"]
    assert len(lost) == 1 + REASONS["lost"].limit


def test_out_of_memory_is_answered_with_half_the_images_at_once(tmp_path):
    # Each worker process runs out of memory at its second step: at once 2 images, then 1, then no less is possible.
    done = crm(*SWEEP, "--only", "CRM/0", home=tmp_path, env={"CRM_FAULT": "memory step 2"})
    assert "half the micro-batch" in done.stdout
    (run,) = (path.parent for path in tmp_path.glob("runs/*/journal.jsonl"))
    assert read_json(run / "retries.json") == {"micro_batch": 1}
    assert read_json(run / "result.json")["identical"] is False
    assert done.returncode == 0, done.stderr


def test_held_cells_wait_cancelled_workers_leave_and_both_go_on_when_asked(undisturbed, tmp_path):
    process = start(tmp_path, "--seeds", "0,1,2")  # more than can end before the commands are there
    until(lambda: list(tmp_path.glob("runs/*/progress.json")), process)
    held = crm("hold", "demo", "--only", "modality*", "--yes", home=tmp_path)
    assert held.returncode == 0, held.stderr
    cancelled = crm("cancel", "demo", "--only", "CRM", "--only", "plain fusion", "--yes", home=tmp_path)
    assert cancelled.returncode == 0, cancelled.stderr
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, output
    states = {line["state"] for line in json.loads(crm("status", "demo", "--json", home=tmp_path).stdout)}
    assert states <= {"held", "cancelled", "done"} and {"held", "cancelled"} <= states
    assert crm("release", "demo", "--yes", home=tmp_path).returncode == 0
    assert crm("retry", "demo", "--yes", home=tmp_path).returncode == 0
    assert crm(*SWEEP, home=tmp_path).returncode == 0
    ours, theirs = results(tmp_path), results(undisturbed)
    assert {run: ours[run] for run in theirs} == theirs


@pytest.mark.slow
def test_two_runs_that_fail_alike_hold_the_others_until_they_are_released(undisturbed, tmp_path):
    full = {"CRM_FAULT": "full last.safetensors 1"}  # the disk, for every checkpoint
    done = crm(*SWEEP, home=tmp_path, env=full)
    assert done.returncode == 1
    assert "2 runs failed with the same traceback" in done.stdout
    states = [line["state"] for line in json.loads(crm("status", "demo", "--json", home=tmp_path).stdout)]
    assert sorted(states) == ["failed"] * 2 + ["held"]
    assert crm("release", "demo", "--yes", home=tmp_path).returncode == 0
    assert crm(*SWEEP, home=tmp_path).returncode == 0
    assert results(tmp_path) == results(undisturbed)


def test_left_alone_the_queue_survives_whoever_started_it(undisturbed, tmp_path):
    begun = crm(*SWEEP, "--detach", home=tmp_path)
    assert begun.returncode == 0, begun.stderr
    assert "in the background" in begun.stdout
    deadline = time.monotonic() + PATIENCE
    while len(results(tmp_path)) < 3 or list(tmp_path.glob("runs/*/claim.json")):
        assert time.monotonic() < deadline, (tmp_path / "runs/.sweeps/demo/queue.log").read_text()
        time.sleep(0.5)
    assert results(tmp_path) == results(undisturbed)


def test_workers_are_dealt_out_to_gpus_several_on_each():
    assert places(0, "cuda", "0,1", 2, 12) == Places(workers=4, gpus=("0", "1"))
    assert places(3, "cuda", "0,1", 1, 12).workers == 2
    assert places(0, "cuda", "0,1", 2, 3).workers == 3
    assert fewest(("0", "1"), ["0", "1", "0"]) == "1"
    assert fewest((), ["0"]) == ""
    with pytest.raises(ValueError, match="add --device cuda"):
        places(0, "cpu", "0", 1, 3)
    with pytest.raises(ValueError, match="names one twice"):
        places(0, "cuda", "0,0", 1, 3)


def test_a_worker_sees_the_gpu_that_it_was_given(tmp_path):
    queue = Queue(cells=[], machine=machine(tmp_path), selection="last", conditions=[], workers=1, gpus=("3",))
    worker = Worker(queue, "3")
    until(lambda: psutil.Process(worker.process.pid).environ().get("CUDA_VISIBLE_DEVICES") == "3", worker.process)
    worker.dismiss()
    with worker.process:  # closes its pipes
        assert worker.process.wait(PATIENCE) == 0


@pytest.mark.parametrize(("device", "stays"), [("cuda:99", False), ("cpu", True)])
def test_a_worker_that_failed_on_a_gpu_gets_no_other_run_for_its_gpu_may_be_lost_to_it(device, stays, tmp_path):
    config = override(TINY, {"model.init": "absent"})
    cell = Cell(variant="a", seed=0, config=config)
    queue = Queue(cells=[cell], machine=machine(tmp_path, device=device), selection="last", conditions=[], workers=1)
    worker = Worker(queue, "")
    worker.give(cell, open_run(tmp_path, config))
    until(lambda: (told := worker.answer()) is not None and told[1] == FAILED, worker.process)
    assert worker.free == stays
    worker.dismiss()
    with worker.process:
        assert worker.process.wait(PATIENCE) == 0


def test_interrupting_checkpoints_the_workers_and_leaves_everything_resumable(undisturbed, tmp_path):
    process = start(tmp_path)
    until(lambda: list(tmp_path.glob("runs/*/progress.json")), process)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    assert "run the same command again to resume" in output
    workers = [
        each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(each.info["cmdline"] or [])
    ]
    assert not workers
    assert not list(tmp_path.glob("runs/*/claim.json"))
    assert crm(*SWEEP, home=tmp_path).returncode == 0
    assert results(tmp_path) == results(undisturbed)


def test_a_failing_cell_is_named_with_reason_and_log_and_the_others_go_on(tmp_path):
    sets = ["--set", "optim.lr=1e12", "--set", "optim.clip=1e12"]
    done = crm(*SWEEP, *sets, home=tmp_path)
    assert done.returncode == 1
    assert "plain fusion/0 failed: RunFailed" in done.stderr
    assert "log.txt" in done.stderr
    status = crm("status", "demo", *STATUS, *sets, home=tmp_path)
    assert "failed at step" in status.stdout
