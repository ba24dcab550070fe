"""Several processes at one run (gloo, two processes on this machine): the same run as with one."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from crm.checkpoint import Checkpoint, load_checkpoint
from crm.conditions import CLEAN_TEST
from crm.config import override, run_id
from crm.confusion import load_evaluation
from crm.distributed import World, announced, share
from crm.records import evaluation, journal, read_json
from experiments.synthetic_small import config as small

SETS = {
    "data.train_images": 12, "data.val_images": 5, "data.test_images": 5, "model.embed": 8,
    "model.depths": (1, 2, 1, 1), "model.drop_path": 0.3, "model.decoder_layers": 1, "loss.points": 64, "batch": 4,
    "steps": 4, "val_every": 2, "test_best": True,
}  # fmt: skip


def start(runs: Path, processes: int, changes: dict | None = None, *options: str) -> list[subprocess.Popen]:
    """`crm train` as a launcher starts it: one process per rank, told by the environment who it is."""
    given = [text for path, value in (SETS | (changes or {})).items() for text in ("--set", f"{path}={value}")]
    command = [sys.executable, "-m", "crm", "train", "synthetic_small", "--runs", str(runs), "--threads", "1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
    return [
        subprocess.Popen(
            [*command, *given, *options],
            env={**os.environ, **told, **({"RANK": str(rank)} if told else {}), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    """What they said; as a launcher does, ends the others soon after one has failed."""
    deadline = time.monotonic() + 100
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
            if any(process.poll() for process in processes):
                deadline = min(deadline, time.monotonic() + 20)
    finally:
        for process in processes:
            process.kill()
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), "\n".join(said)
    return said


def folder(runs: Path, changes: dict | None = None) -> Path:
    return runs / run_id(override(small, SETS | (changes or {})))


def last(run: Path) -> Checkpoint:
    return load_checkpoint(run / "checkpoints/last.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Below it, the same run by one and by two processes."""
    root = tmp_path_factory.mktemp("distributed")
    for processes in (1, 2):
        said = ended(start(root / str(processes), processes))
        assert sum("checkpoint" in text for text in said) == 1  # only the first one tells
    return root


def test_two_processes_train_the_network_of_one(runs):
    """Equal batches, masks, points, stochastic depth and statistics of the norms: equal to rounding."""
    alone, together = (last(folder(runs / name)) for name in ("1", "2"))
    off, moved = 0.0, 0.0
    torch.manual_seed(0)
    for name, weights in alone.weights.items():
        torch.testing.assert_close(together.weights[name], weights, rtol=2e-3, atol=2e-3, msg=name)
        off += (together.weights[name] - weights).double().square().sum().item()
        moved += weights.double().square().sum().item()
    assert (off / moved) ** 0.5 < 1e-3


def test_two_processes_report_the_losses_of_one(runs):
    alone, together = (journal(folder(runs / name)) for name in ("1", "2"))
    for event in ("train", "val", "test"):
        one, two = ([line for line in lines if line["event"] == event] for lines in (alone, together))
        assert [line["step"] for line in one] == [line["step"] for line in two]
        for first, second in zip(one, two, strict=True):
            if event == "train":
                assert second["terms"] == pytest.approx(first["terms"], rel=1e-3)
                assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-2)
                assert second["hidden"] == first["hidden"]
            else:
                assert second["miou"] == pytest.approx(first["miou"], abs=1.0)


def test_every_image_is_counted_once(runs):
    """Five images over two processes; the released choice leaves out the incomplete batch of one."""
    for name in ("1", "2"):
        run = folder(runs / name)
        for selection in ("last", "val_best", "test_best"):
            found = load_evaluation(evaluation(run, selection, CLEAN_TEST))
            assert len(set(found.names)) == 5
            assert (found.confusion.sum(axis=(1, 2)) == 64 * 96).all()
    one, two = (load_evaluation(evaluation(folder(runs / name), "last", CLEAN_TEST)) for name in ("1", "2"))
    assert list(one.names) == list(two.names)
    assert np.abs(one.confusion - two.confusion).sum() <= 0.02 * one.confusion.sum()


def test_the_number_of_processes_is_recorded_and_must_stay(runs):
    run = folder(runs / "2")
    assert read_json(run / "numerics.json")["processes"] == 2
    done = subprocess.run(
        [sys.executable, "-m", "crm", "evaluate", run.name, "--runs", str(runs / "2"), "--suite", "missing"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr  # evaluating is another matter
    (run / "result.json").rename(run / "result.bak")
    said = ended(start(runs / "2", 1), code=2)
    (run / "result.bak").rename(run / "result.json")
    assert "begun with 2 processes; start it with as many, not 1" in said[0]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_signal_to_either_process_stops_both_at_the_same_step(rank, tmp_path):
    stopped(tmp_path, rank, {"steps": 60, "val_every": 0})


def stopped(runs: Path, rank: int, changes: dict) -> None:
    """A run of two processes, one of which is asked to stop after some steps."""
    begun = start(runs, 2, changes, "--machine", "log_every=1")
    run = folder(runs, changes)
    deadline = time.monotonic() + 100
    while (read_json(run / "progress.json") or {}).get("step", 0) < 3:
        if time.monotonic() > deadline or begun[0].poll() is not None:
            ended(begun, code=130)  # fails, with what they said
        time.sleep(0.02)
    begun[rank].send_signal(signal.SIGUSR2)
    ended(begun, code=130)
    assert 3 <= last(run).meta["step"] < changes["steps"]
    assert not (run / "claim.json").exists()


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_bit_for_bit(tmp_path):
    changes = {"steps": 40, "val_every": 20, "optim.ema": 0.9}
    ended(start(tmp_path / "straight", 2, changes, "--machine", "log_every=1"))
    stopped(tmp_path / "resumed", 1, changes)
    ended(start(tmp_path / "resumed", 2, changes, "--machine", "log_every=1"))
    one, two = (last(folder(tmp_path / name, changes)) for name in ("straight", "resumed"))
    for part in ("weights", "trained", "optimizer"):
        first, second = getattr(one, part), getattr(two, part)
        assert all(torch.equal(first[name], second[name]) for name in first), part


def test_a_failure_in_one_process_is_the_runs_reason(tmp_path):
    broken = {"optim.lr": 1e12, "optim.clip": 1e12}
    ended(start(tmp_path, 2, broken), code=1)
    assert "finite" in read_json(folder(tmp_path, broken) / "failure.json")["reason"]


def test_a_batch_smaller_than_the_processes_is_refused(tmp_path):
    said = ended(start(tmp_path, 2, {"batch": 1, "test_best": False}), code=2)
    assert all("batch 1 is smaller than the 2 processes" in text for text in said)
    said = ended(start(tmp_path, 2, {"batch": 3}, "--machine", "micro_batch=2"), code=2)
    assert all("batch 3 does not divide by 2" in text for text in said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, World()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1"}, World(3, 8, 1)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}, World(1, 2, 1)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, World()),
        ({"RANK": "3", "WORLD_SIZE": "8"}, World()),  # left over by something that is no launcher
    ],
)
def test_who_one_is_comes_from_the_launcher(variables, expected, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert announced() == expected


def test_shares_of_a_batch_cover_it_once(monkeypatch):
    for size in range(1, 6):
        for count in range(8):
            places = []
            for rank in range(size):
                monkeypatch.setattr("crm.distributed.world", lambda rank=rank, size=size: World(rank, size))
                places += share(count)
            assert places == list(range(count))
