"""The MLflow mirror against a real store: what it copies, that sending again changes nothing, and how it fails."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from crm.conditions import CLEAN_TEST, MISSING
from crm.config import Config, flatten
from crm.confusion import Evaluation, save_evaluation
from crm.records import append, claim, evaluation, journal, open_run, read_json, write_json
from crm.sweep import Cell, Sweep
from crm.tracking.listing import list_sweep
from crm.tracking.process import start
from crm.tracking.sending import sync
from crm.tracking.store import STORE, Store, connect

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own, of its database library; nothing we could mend

SWEEP = Sweep(title="Which patch?", base=Config(), variants={"large": {}, "small": {"masking.patch": 16}}, seeds=[0])


def begin(runs: Path, cell: Cell, steps: range, step: int = 0) -> Path:
    """An attempt that has journaled these steps and holds its claim."""
    folder = open_run(runs, cell.config)
    holder = claim(folder, uuid4().hex[:16])
    assert holder is not None
    write_json(folder / "provenance.json", {"schema": 1, "commit": "c0ffee", "dirty": False})
    append(folder, "attempt", token=holder.token, attempt=1, step=step)
    for done in steps:
        append(
            folder, "train", step=done, total=2.0 / done, terms={"fused": 1.0 / done}, details={"fused/class": 0.5},
            lr=1e-4, grad_norm=1.5, seconds=0.2 + step, hidden={"rgb": 0.25, "thermal": 0.75},
        )  # fmt: skip
    return folder


def end(folder: Path, outcome: str, **more) -> None:
    token = read_json(folder / "claim.json")["token"]
    append(folder, "end", token=token, outcome=outcome, **more)
    os.rename(folder / "claim.json", folder / "attempts.json")


def finish(folder: Path) -> None:
    append(folder, "val", step=50, miou=41.5, iou=[80.0, None, 3.0])
    for where in (CLEAN_TEST, MISSING[0]):
        counts = Evaluation(
            np.ones((1, 2, 2), np.int32), np.array(["a"]), np.array([False]), None, {"condition": where.name}
        )
        save_evaluation(evaluation(folder, "last", where), counts)
        append(folder, "evaluate", selection="last", condition=where.name, miou=31.25, seconds=1.0)
    write_json(folder / "result.json", {"schema": 1, "id": folder.name, "steps": 50, "miou": 41.5})
    end(folder, "done")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A store made once, since that takes seconds; each test has its own runs folder and sweep."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def store(place) -> Store:
    return connect(f"sqlite:///{place}/mlflow.db", place)


@pytest.fixture
def cells() -> list[Cell]:
    return SWEEP.cells({"steps": 50})


@pytest.fixture
def name(request) -> str:
    return request.node.name


def asked(runs: Path, name: str, cells: list[Cell]) -> None:
    list_sweep(runs, name, SWEEP, cells)


def children(store: Store, name: str) -> dict:
    found = store.client.search_runs([store.experiment], f"tags.`crm.kind` = 'run' and tags.`crm.sweep` = '{name}'")
    return {run.data.tags["mlflow.runName"]: run for run in found}


def parent(store: Store, name: str):
    return store.find({"crm.kind": "sweep", "crm.sweep": name})


def history(store: Store, run) -> dict:
    """Every point of a run: key -> (step, value, time), in order."""
    keys = sorted(run.data.metrics)
    found = {key: store.client.get_metric_history(run.info.run_id, key) for key in keys}
    return {key: sorted((point.step, point.value, point.timestamp) for point in found[key]) for key in keys}


def artifacts(store: Store, run, folder: str | None = None) -> set[str]:
    return {file.path for file in store.client.list_artifacts(run.info.run_id, folder)}


def test_a_finished_run_is_copied_whole(store, tmp_path, cells, name):
    folder = begin(tmp_path, cells[0], range(10, 51, 10))
    finish(folder)
    asked(tmp_path, name, cells)
    sync(store, tmp_path, name)

    run = children(store, name)["large/0"]
    lines = journal(folder)
    wanted = [(line["step"], line["total"], round(1000 * line["time"])) for line in lines if line["event"] == "train"]
    points = history(store, run)
    assert points["train/total"] == wanted
    assert {"train/fused", "train/fused/class", "train/lr", "train/grad_norm", "train/hidden/thermal"} <= set(points)
    assert points["val/miou"][0][:2] == (50, 41.5)
    assert set(points) >= {"val/iou/0", "val/iou/2"} and "val/iou/1" not in points  # the class was absent
    assert points["last/test.rgb:missing_mean/miou"][0][:2] == (0, 31.25)

    assert run.info.status == "FINISHED"
    assert (run.info.start_time, run.info.end_time) == tuple(round(1000 * lines[at]["time"]) for at in (0, -1))
    assert set(run.data.params) == set(flatten(Config()))
    assert json.loads(run.data.params["data.crop"]) == [240, 320]
    tags = run.data.tags
    assert (tags["crm.run_id"], tags["crm.variant"], tags["crm.seed"]) == (cells[0].id, "large", "0")
    assert tags["mlflow.source.git.commit"] == "c0ffee"
    files = {"config.json", "provenance.json", "journal.jsonl", "result.json"}
    assert artifacts(store, run) == files | {"evals"}
    assert artifacts(store, run, "evals/last") == {"evals/last/test.npz", "evals/last/test.rgb=missing_mean.npz"}


def test_runs_stand_below_their_sweep_which_lists_all_its_cells(store, tmp_path, cells, name):
    finish(begin(tmp_path, cells[0], range(10, 51, 10)))
    asked(tmp_path, name, cells)
    sync(store, tmp_path, name)

    above = parent(store, name)
    assert {run.data.tags["mlflow.parentRunId"] for run in children(store, name).values()} == {above.info.run_id}
    assert list(children(store, name)) == ["large/0"]  # nobody has begun the other one
    assert above.info.status == "RUNNING"
    listed = json.loads((Path(above.info.artifact_uri.removeprefix("file://")) / "cells.json").read_text())
    assert [cell["id"] for cell in listed["cells"]] == [cell.id for cell in cells]

    finish(begin(tmp_path, cells[1], range(10, 51, 10)))
    sync(store, tmp_path, name)
    assert parent(store, name).info.status == "FINISHED"


@pytest.mark.parametrize("forgotten", [False, True], ids=["remembered", "forgotten"])
def test_sending_again_changes_nothing(store, tmp_path, cells, name, forgotten):
    folders = [begin(tmp_path, cell, range(10, 51, 10)) for cell in cells]
    finish(folders[0])
    asked(tmp_path, name, cells)
    assert sync(store, tmp_path, name) > 0
    before = {label: history(store, run) for label, run in children(store, name).items()}
    if forgotten:
        for folder in folders:
            (folder / "mirror.json").unlink()
    sent = sync(store, tmp_path, name, final=True)
    assert bool(sent) == forgotten
    assert {label: history(store, run) for label, run in children(store, name).items()} == before


@pytest.mark.parametrize("forgotten", [False, True], ids=["remembered", "forgotten"])
def test_a_step_redone_after_a_kill_is_one_point(store, tmp_path, cells, name, forgotten):
    folder = begin(tmp_path, cells[0], range(10, 31, 10))
    asked(tmp_path, name, cells)
    sync(store, tmp_path, name)
    assert children(store, name)["large/0"].info.status == "RUNNING"

    with (folder / "journal.jsonl").open("a") as file:
        file.write('{"event": "train", "st')  # torn by the kill
    os.rename(folder / "claim.json", folder / "killed.json")
    sync(store, tmp_path, name)
    assert children(store, name)["large/0"].info.status == "KILLED"

    time.sleep(0.01)
    begin(tmp_path, cells[0], range(20, 51, 10), step=10)  # journals steps 20 and 30 again
    finish(folder)
    if forgotten:
        (folder / "mirror.json").unlink()
    sync(store, tmp_path, name)
    run = children(store, name)["large/0"]
    points = history(store, run)
    assert [point[0] for point in points["train/total"]] == [10, 20, 30, 40, 50]
    assert [point[:2] for point in points["train/total"]] == [(step, 2.0 / step) for step in range(10, 51, 10)]
    assert [point[0] for point in points["train/seconds"]] == [10, 20, 30, 40, 50]  # though these values differ
    assert (run.info.status, run.data.tags["crm.attempts"]) == ("FINISHED", "2")


def test_a_failure_is_copied_with_its_reason_and_numbers_that_are_none_are_named(store, tmp_path, cells, name):
    folder = begin(tmp_path, cells[0], range(10, 21, 10))
    append(folder, "train", step=30, total=float("inf"), terms={"fused": float("nan")})
    end(folder, "failed", reason="RunFailed: loss at step 30", step=30)
    asked(tmp_path, name, cells)
    sync(store, tmp_path, name, final=True)
    run = children(store, name)["large/0"]
    assert (run.info.status, run.data.tags["crm.reason"]) == ("FAILED", "RunFailed: loss at step 30")
    assert run.data.tags["crm.not_finite"] == "train/total at step 30 and 1 more"
    assert [point[0] for point in history(store, run)["train/total"]] == [10, 20]
    assert parent(store, name).info.status == "FAILED"


def test_a_run_that_two_sweeps_share_is_one_run_below_the_first(store, tmp_path, cells, name):
    finish(begin(tmp_path, cells[0], range(10, 51, 10)))
    for sweep in (name, f"{name}_too"):
        asked(tmp_path, sweep, cells[:1])
        sync(store, tmp_path, sweep)
    found = store.client.search_runs([store.experiment], f"tags.`crm.run_id` = '{cells[0].id}'")
    mine = [run for run in found if run.data.tags["crm.sweep"].startswith(name)]
    assert [run.data.tags["mlflow.parentRunId"] for run in mine] == [parent(store, name).info.run_id]
    assert parent(store, f"{name}_too").info.status == "FINISHED"


def test_a_run_deleted_in_mlflow_stays_deleted_and_stops_no_other(store, tmp_path, cells, name):
    folder = begin(tmp_path, cells[0], range(10, 31, 10))
    asked(tmp_path, name, cells)
    sync(store, tmp_path, name)
    store.client.delete_run(children(store, name)["large/0"].info.run_id)
    finish(folder)
    finish(begin(tmp_path, cells[1], range(10, 51, 10)))
    sync(store, tmp_path, name)
    assert list(children(store, name)) == ["small/0"]


def test_another_store_is_sent_everything(place, store, tmp_path, cells, name):
    finish(begin(tmp_path, cells[0], range(10, 51, 10)))
    asked(tmp_path, name, cells)
    first = sync(store, tmp_path, name)
    store.client.set_experiment_tag(store.experiment, STORE, "made anew")  # as if the file had been deleted
    assert sync(connect(f"sqlite:///{place}/mlflow.db", place), tmp_path, name) == first


# ---------------------------------------------------------------------------------------------- the process


def command(name: str, runs: Path, uri: str, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "crm.tracking.process",
        name,
        "--runs",
        str(runs),
        "--uri",
        uri,
        "--every",
        "0.2",
        *more,
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("broken", ["server", "folder"])
def test_a_store_that_does_not_answer_is_one_line_in_the_log_and_leaves_the_runs_alone(tmp_path, cells, name, broken):
    folder = begin(tmp_path / "runs", cells[0], range(10, 51, 10))
    asked(tmp_path / "runs", name, cells)
    if broken == "server":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            uri = f"http://127.0.0.1:{free.getsockname()[1]}"  # closed again below
    else:
        (tmp_path / "file").touch()
        uri = f"sqlite:///{tmp_path}/file/mlflow.db"  # a folder that nobody can make, root neither
    before = files(folder)
    done = subprocess.run(command(name, tmp_path / "runs", uri), input="", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert files(folder) == before
    log = (tmp_path / "runs" / "mirror.log").read_text().splitlines()
    assert len(log) == 1 and f" {name}: " in log[0]


def test_the_process_follows_the_runs_and_leaves_when_its_input_ends(place, store, tmp_path, cells, name):
    folder = begin(tmp_path, cells[0], range(10, 31, 10))
    asked(tmp_path, name, cells)
    uri = f"sqlite:///{place}/mlflow.db"
    process = subprocess.Popen(
        command(name, tmp_path, uri), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 40
    while not children(store, name) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert children(store, name)["large/0"].info.status == "RUNNING"
    finish(folder)
    out, _ = process.communicate(timeout=40)
    assert (process.returncode, out) == (0, b"")
    run = children(store, name)["large/0"]
    assert run.info.status == "FINISHED"
    assert len(history(store, run)["train/total"]) == 3


def test_the_process_sends_the_rest_when_the_followed_one_was_killed(place, store, tmp_path, cells, name):
    finish(begin(tmp_path, cells[0], range(10, 51, 10)))
    asked(tmp_path, name, cells)
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process = subprocess.Popen(command(name, tmp_path, f"sqlite:///{place}/mlflow.db", "--follow", str(parent.pid)))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert process.wait(timeout=180) == 0  # a guard, on a busy machine too
    assert children(store, name)["large/0"].info.status == "FINISHED"


def test_finish_tells_the_sweep_command_why_nothing_was_sent(tmp_path, cells, name, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    asked(tmp_path, name, cells)
    running = start(tmp_path, name)
    assert "Error" in running.finish()
