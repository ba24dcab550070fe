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
from crm.records import read_json
from tests.tiny import TINY_SETS

ROOT = Path(__file__).resolve().parents[1]
CRM = [sys.executable, "-c", "from crm.cli import main; main()"]
SWEEP = ["sweep", "demo", "--yes", "--no-track", "--threads", "1", "--seeds", "0,1", *TINY_SETS]
STATUS = ["--seeds", "0,1", *TINY_SETS]  # what status and report need to mean the same cells
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
    done = crm(*SWEEP, home=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return home


def test_an_undisturbed_sweep_trains_every_cell_and_a_second_call_has_nothing_to_do(undisturbed):
    assert len(results(undisturbed)) == 6
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("runs/*/result.json")}
    again = crm(*SWEEP, home=undisturbed)
    assert again.returncode == 3
    assert "nothing to do" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.glob("runs/*/result.json")}


def test_status_shows_every_cell_as_text_and_as_json(undisturbed):
    sets = STATUS
    text = crm("status", "demo", *sets, home=undisturbed)
    assert "6 cells: 6 done" in text.stdout
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
    assert len(found) == 7
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
    process = start(tmp_path)
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


def test_a_killed_worker_is_reported_and_the_next_call_resumes_its_run(undisturbed, tmp_path):
    process = start(tmp_path, "--workers", "1")
    until(lambda: list(tmp_path.glob("runs/*/progress.json")), process)
    claim = read_json(next(tmp_path.glob("runs/*/claim.json")))
    os.kill(claim["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "killed by SIGKILL; run again to resume" in output
    assert len(results(tmp_path)) == 5, "the other cells went on"
    assert crm(*SWEEP, home=tmp_path).returncode == 0
    assert results(tmp_path) == results(undisturbed)


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
    done = crm(*SWEEP, *sets, "--workers", "2", home=tmp_path)
    assert done.returncode == 1
    assert "plain fusion/0 failed: RunFailed" in done.stderr
    assert "log.txt" in done.stderr
    status = crm("status", "demo", *STATUS, *sets, home=tmp_path)
    assert "failed at step" in status.stdout
