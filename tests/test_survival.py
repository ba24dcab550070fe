"""Whatever ends a run in the middle, the next attempt ends bit for bit where an undisturbed one does."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from crm.checkpoint import load_checkpoint, newest_checkpoint
from crm.conditions import MISSING, Condition
from crm.config import Config, override
from crm.confusion import load_evaluation
from crm.records import evaluation, journal, open_run, read_json, state
from crm.worker import DONE, FAILED, STOPPED, attempt
from tests.tiny import TINY, TINY_SETS, machine

CONFIG: Config = override(TINY, {"steps": 12, "val_every": 2, "test_best": True, "optim.ema": 0.9})
CONDITIONS = [Condition(), *MISSING]
SELECTIONS = ("last", "val_best", "test_best")


def never() -> bool:
    return False


def worked(runs: Path, fault: str = "", kill_after: float | None = None) -> int:
    """The exit code of a worker at the run, killed after some seconds."""
    folder = open_run(runs, CONFIG)
    where = json.dumps(machine(runs, checkpoint_every=2).written())
    names = [condition.name for condition in CONDITIONS]
    worker = subprocess.Popen(
        [sys.executable, "-m", "crm.worker", "--machine", where, "--selection", "last", "--conditions", *names],
        env={**os.environ, "CRM_FAULT": fault, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        said, _ = worker.communicate(f"{folder}\n", timeout=kill_after or 100)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.communicate()
        return -signal.SIGKILL
    return int(said.split()[1]) if said else worker.returncode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed")
    assert worked(runs) == DONE
    return open_run(runs, CONFIG)


def lines(folder: Path, event: str) -> list[dict]:
    """Journal lines without times, which differ."""
    found = [line for line in journal(folder) if line["event"] == event]
    return [{key: value for key, value in line.items() if key not in ("time", "seconds")} for line in found]


def assert_same(folder: Path, undisturbed: Path) -> None:
    for name in SELECTIONS:
        one, two = (load_checkpoint(each / f"checkpoints/{name}.safetensors") for each in (undisturbed, folder))
        for part in ("weights", "trained", "optimizer"):
            first, second = getattr(one, part), getattr(two, part)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first), (name, part)
        assert one.meta == two.meta
    for event in ("train", "val", "test"):
        assert lines(folder, event) == lines(undisturbed, event)
    for condition in CONDITIONS:
        one, two = (load_evaluation(evaluation(each, "last", condition)) for each in (undisturbed, folder))
        np.testing.assert_array_equal(one.confusion, two.confusion)
    ours, theirs = (read_json(each / "result.json") for each in (folder, undisturbed))
    changing = ("train_seconds", "seconds_per_step", "attempts")
    assert {k: v for k, v in ours.items() if k not in changing} == {
        k: v for k, v in theirs.items() if k not in changing
    }
    scratch = [path.name for path in folder.rglob(".*") if path.name != ".claim.lock"]
    assert not scratch, f"left behind: {scratch}"


@pytest.mark.slow
def test_sigkill_at_random_moments(undisturbed, tmp_path):
    """From while the libraries load to the evaluations; a kill costs at most what was not checkpointed."""
    draw, codes, began = random.Random(7), [], time.monotonic()
    worked(tmp_path, kill_after=0.1)
    while not codes or codes[-1] != DONE:
        codes.append(worked(tmp_path, kill_after=draw.uniform(2.0, 2.0 + 1.5 * (1 + len(codes)))))
        assert codes[-1] in (DONE, -signal.SIGKILL)
        assert time.monotonic() - began < 250
    assert_same(open_run(tmp_path, CONFIG), undisturbed)


@pytest.mark.parametrize(
    "fault",
    ["kill last.safetensors 1", "kill last.safetensors 3", "kill val_best.safetensors 1", "kill test.npz 1",
     "kill result.json 1"],
)  # fmt: skip
def test_sigkill_in_the_middle_of_writing(fault, undisturbed, tmp_path):
    assert worked(tmp_path, fault) == -signal.SIGKILL
    folder = open_run(tmp_path, CONFIG)
    name = fault.split()[1]
    assert any(path.name.startswith(f".{name}.") for path in folder.rglob(".*"))  # it was in the middle
    assert worked(tmp_path) == DONE
    assert_same(folder, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_ends_with_a_checkpoint_of_the_step_it_came_in(number, undisturbed, tmp_path):
    from crm.worker import StopFlag

    stop, before = (
        StopFlag(),
        {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)},
    )
    stop.listen()
    folder = open_run(tmp_path, CONFIG)
    try:
        tell = lambda told: signal.raise_signal(number) if told.step == 5 else None  # noqa: E731
        code = attempt(folder, machine(tmp_path, checkpoint_every=100), "one", "last", CONDITIONS, stop, tell)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert code == STOPPED
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None and checkpoint.meta["step"] == 5
    assert worked(tmp_path) == DONE
    assert_same(folder, undisturbed)


@pytest.mark.parametrize("damage", ["cut", "one byte"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(damage, undisturbed, tmp_path, caplog):
    assert worked(tmp_path, "kill last.safetensors 4") == -signal.SIGKILL
    folder = open_run(tmp_path, CONFIG)
    path = folder / "checkpoints/last.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[-100] ^= 1
    path.unlink()  # its other name, last.previous, keeps the bytes: the kill came between the link and the rename
    path.write_bytes(content)
    found = newest_checkpoint(folder)
    assert found is not None and found.meta["step"] == 6
    assert "falling back to the one before" in caplog.text and "last.safetensors" in caplog.text
    assert worked(tmp_path) == DONE
    assert_same(folder, undisturbed)


# ---------------------------------------------------------------------------------------------- disk and folder


@pytest.mark.slow
def test_a_full_disk_fails_with_its_reason_and_leaves_the_last_good_checkpoint(undisturbed, tmp_path):
    assert worked(tmp_path, "full last.safetensors 3") == FAILED
    folder = open_run(tmp_path, CONFIG)
    assert "No space left on device" in read_json(folder / "failure.json")["reason"]
    found = newest_checkpoint(folder)
    assert found is not None and found.meta["step"] == 4
    assert worked(tmp_path) == DONE
    assert_same(folder, undisturbed)


def test_a_disk_that_is_really_full(undisturbed, tmp_path):
    """A disk of one megabyte: a checkpoint and its predecessor do not fit."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs rights that this process has not")
    try:
        assert worked(small) == FAILED
        folder = open_run(small, CONFIG)
        assert not (folder / "result.json").exists()
        found = newest_checkpoint(folder)  # none, or a whole one
        assert found is None or found.meta["step"] > 0
        log = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""
        assert "No space left on device" in log + json.dumps(read_json(folder / "failure.json"))
        shutil.copytree(folder, tmp_path / "runs" / folder.name)  # room enough
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert worked(tmp_path / "runs") == DONE
    assert_same(tmp_path / "runs" / folder.name, undisturbed)


def test_a_folder_that_is_deleted_under_the_run_is_said_and_not_made_again(tmp_path, caplog):
    folder = open_run(tmp_path, CONFIG)
    tell = lambda told: shutil.rmtree(folder) if told.step == 3 else None  # noqa: E731
    assert attempt(folder, machine(tmp_path), "one", "last", CONDITIONS, never, tell) == FAILED
    assert "is gone: it was deleted or moved" in caplog.text
    assert not folder.exists()


READ_ONLY = """
import os, sys
from pathlib import Path
import crm.train, crm.worker, crm.cli.runs, crm.provenance, crm.evaluate, crm.data.dataset, experiments.synthetic_small
from typer.testing import CliRunner
CliRunner().invoke(crm.cli.app, ["train", "nothing"])  # loads what an ordinary user may not read here
os.chdir("/")
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.argv = ["crm", *sys.argv[1:]]
from crm.cli import main
main()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("what", ["runs", "run"])
def test_a_read_only_folder_is_said_in_one_line(what, tmp_path):
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    runs = tmp_path / "runs"
    runs.mkdir()
    if what == "run":
        open_run(runs, override(TINY, {"model.drop_path": 0.0}))  # what TINY_SETS say
    command = ["train", "synthetic_small", *TINY_SETS, "--runs", str(runs)]
    done = subprocess.run([sys.executable, "-c", READ_ONLY, *command], capture_output=True, text=True, cwd=Path.cwd(),
                          env={**os.environ, "CRM_HOME": str(tmp_path)})  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Permission denied" in done.stderr and str(runs) in done.stderr
    assert done.stderr.strip().count("\n") == 0, done.stderr


def test_running_out_of_memory_names_the_cause(tmp_path):
    assert worked(tmp_path, "memory step 3") == FAILED
    folder = open_run(tmp_path, CONFIG)
    assert read_json(folder / "failure.json")["reason"].startswith("OutOfMemoryError")
    assert state(tmp_path, CONFIG, "last", CONDITIONS).name == "failed"
