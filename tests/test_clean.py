"""crm clean: what it frees by policy, and what always stays."""

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crm.cli import app
from crm.cli.clean import POLICIES
from crm.cli.options import find_sweep
from crm.conditions import CLEAN_TEST
from crm.records import append, claim, evaluation, open_run, write_json
from crm.stale import supersede
from crm.sweep import Cell

OLD = time.time() - 3 * 86_400


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CRM_HOME", str(tmp_path))
    return tmp_path / "runs"


def crm(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.stdout


def cells(name: str = "demo@tiny") -> list[Cell]:
    return find_sweep(name)[1].cells()


def old(path: Path, size: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (OLD, OLD))
    return path


KEPT = ("config.json", "journal.jsonl", "result.json", "checkpoints/last.safetensors",
        "checkpoints/val_best.safetensors", "evals/last/test.npz")  # fmt: skip
SPARE = ("checkpoints/last.previous.safetensors", "checkpoints/val_best.previous.safetensors",
         "checkpoints/.last.safetensors.0123abcd")  # fmt: skip


def run(runs: Path, cell: Cell, trained: bool = True) -> Path:
    folder = open_run(runs, cell.config)
    append(folder, "attempt", token="t", attempt=1, step=0)
    for name in ("last", "last.previous", "val_best", "val_best.previous"):
        old(folder / f"checkpoints/{name}.safetensors", 1000)
    old(folder / "checkpoints/.last.safetensors.0123abcd")
    old(evaluation(folder, "last", CLEAN_TEST))
    if trained:
        write_json(folder / "result.json", {})
        for name in ("result.json", "evals/last"):
            os.utime(folder / name, (OLD, OLD))
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_removed_before_yes_and_then_only_what_was_shown(runs):
    folder = run(runs, cells()[0])
    before = names(folder)
    shown = json.loads(crm("clean", "--json"))
    assert names(folder) == before and not shown["removed"] and shown["bytes"] == 2010
    assert "2.0 kB could be freed; --yes does it" in crm("clean")
    assert json.loads(crm("clean", "--yes", "--json"))["bytes"] == 2010
    assert names(folder) == set(KEPT) == before - set(SPARE)
    assert "nothing to free" in crm("clean", code=3)


def test_unfinished_and_running_runs_keep_everything(runs):
    first, second, *_ = cells()
    unfinished, running = run(runs, first, trained=False), run(runs, second)
    mine = claim(running, "t")  # a trained run that is being evaluated
    before = names(unfinished), names(running)
    crm("clean", "--yes", code=3)
    assert (names(unfinished), names(running)) == before
    assert mine is not None
    mine.release()
    assert "freed" in crm("clean", "--yes")


def test_the_only_copy_of_a_checkpoint_stays_whatever_its_name(runs):
    folder = run(runs, cells()[0])
    (folder / "checkpoints/last.safetensors").unlink()
    crm("clean", "--yes")
    assert "checkpoints/last.previous.safetensors" in names(folder)


def test_a_file_that_is_being_written_stays(runs):
    folder = run(runs, cells()[0])
    fresh = folder / "evals/last/.test.npz.89abcdef"
    fresh.write_bytes(b"x")
    crm("clean", "--yes")
    assert fresh.exists() and not (folder / SPARE[-1]).exists()


def test_a_sweep_frees_what_is_its_own_alone(runs):
    own, other = run(runs, cells()[0]), run(runs, cells("baselines@tiny")[-1])
    assert own != other
    crm("clean", "demo@tiny", "--yes")
    assert names(own) == set(KEPT) and set(SPARE) <= names(other)


def test_superseded_runs_go_only_when_asked_for(runs):
    cell = cells()[0]
    run(runs, cell)
    (place,) = supersede(runs, [cell], "all").values()
    crm("clean", "--yes", code=3)
    assert place.exists()
    assert "cannot be looked at or compared again" in crm("clean", "--superseded")
    crm("clean", "--superseded", "--yes")
    assert not place.exists()


def test_a_snapshot_goes_when_its_sweeps_have_nothing_left_to_do(runs):
    done, waiting = cells()[:2]
    run(runs, done)
    run(runs, waiting, trained=False)
    places = {}
    for name, cell in (("finished", done), ("live", waiting)):
        snapshot = runs / ".snapshots" / name
        old(snapshot / "crm/train.py", 500)
        submitted = runs / ".snapshots" / f"{name}-before"
        old(submitted / "crm/train.py", 500)
        for path in (snapshot, submitted):
            os.utime(path, (OLD, OLD))
        asked = {"snapshot": str(snapshot), "selection": "last", "conditions": ["test"]}
        write_json(runs / ".sweeps" / name / "asked.json", {**asked, "cells": [{"id": cell.id}]})
        write_json(runs / ".sweeps" / name / "submissions/a.json", {"snapshot": str(submitted)})
        places[name] = (snapshot, submitted)
    new = runs / ".snapshots" / "new"
    new.mkdir()
    crm("clean", "--yes")
    assert not any(path.exists() for path in places["finished"])
    assert all(path.exists() for path in (*places["live"], new))


@pytest.mark.parametrize("still", ["an evaluation is missing", "it was finished today"])
def test_a_snapshot_stays_while_its_sweep_may_be_at_work(runs, still):
    folder = run(runs, cells()[0])
    snapshot = runs / ".snapshots" / "s"
    snapshot.mkdir(parents=True)
    os.utime(snapshot, (OLD, OLD))
    asked = {"snapshot": str(snapshot), "selection": "last", "conditions": ["test"]}
    if still == "an evaluation is missing":
        asked["conditions"] = ["test", "test.rgb=missing_mean"]
    else:
        os.utime(folder / "evals/last")
    write_json(runs / ".sweeps/demo/asked.json", {**asked, "cells": [{"id": cells()[0].id}]})
    crm("clean", "--yes")
    assert snapshot.exists()


def test_every_policy_says_what_it_costs():
    assert all(policy.words and policy.costs for policy in POLICIES.values())
