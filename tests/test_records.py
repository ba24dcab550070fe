"""A run on disk: identity of the folder, atomic files, the journal, claims, states."""

import json
import os
import select
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from crm import records
from crm.conditions import CLEAN_TEST, MISSING
from crm.config import Config, override
from crm.records import Moved, Superseded, append, claim, journal, open_run, read_config, read_json, state, write_json
from experiments.synthetic_small import config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    return open_run(tmp_path / "runs", config)


def python(code: str, *arguments: object) -> subprocess.Popen:
    """A real process beside this one; it prints to us and ends when its standard input does."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


HOLD = """
import sys
from pathlib import Path
from crm.records import claim
print(claim(Path(sys.argv[1]), sys.argv[2]) is not None, flush=True)
sys.stdin.read()
"""


def held_by_a_process_that_died(folder: Path, token: str = "first") -> None:
    with python(HOLD, folder, token) as holder:
        assert holder.stdout.readline() == "True\n"
        holder.kill()


# ---------------------------------------------------------------------------------------------- the folder


def test_a_run_folder_reopens_under_the_same_config_and_reads_back(folder):
    assert open_run(folder.parent, config) == folder
    assert read_config(folder) == config
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_reading_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        read_config(tmp_path)


def rewrite(folder: Path, changes: dict) -> None:
    written = read_json(folder / "config.json")
    write_json(folder / "config.json", {**written, "config": {**written["config"], **changes}})


def test_a_folder_recorded_under_another_default_is_refused_naming_the_setting(folder):
    rewrite(folder, {"optim.weight_decay": 0.01})
    with pytest.raises(Moved, match=r"optim\.weight_decay \(was 0\.01, now 0\.05\)"):
        open_run(folder.parent, config)


def test_a_folder_recorded_with_a_setting_that_is_gone_is_refused_naming_it(folder):
    rewrite(folder, {"loss.boundary": 1.0})
    with pytest.raises(Moved, match=r"loss\.boundary \(was 1\.0, now None\)"):
        open_run(folder.parent, config)


def test_a_folder_from_before_a_setting_existed_still_opens(folder):
    written = read_json(folder / "config.json")
    del written["config"]["loss.count_padding"]
    write_json(folder / "config.json", written)
    assert open_run(folder.parent, config) == folder
    assert read_config(folder) == config


def test_a_folder_of_another_record_schema_is_refused(folder):
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "schema": 99})
    with pytest.raises(Moved, match="schema 99"):
        open_run(folder.parent, config)


# ---------------------------------------------------------------------------------------------- files


def test_a_write_leaves_the_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"x": 1})
    write_json(tmp_path / "new" / "a.json", {"x": 2})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
    assert read_json(tmp_path / "new" / "a.json") == {"x": 2}


def test_a_write_that_fails_keeps_the_old_file_and_no_scratch(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": 1})

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json") == {"x": 1}


def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path):
    code = "import sys; from pathlib import Path; from crm.records import write_json\n"
    code += "print(flush=True)\nfor n in range(10**9): write_json(Path(sys.argv[1]), [n] * 5000)"
    with python(code, tmp_path / "a.json") as writer:
        writer.stdout.readline()
        while not (tmp_path / "a.json").exists():
            pass
        for _ in range(200):
            assert len(set(read_json(tmp_path / "a.json"))) == 1
        writer.kill()
    assert len(read_json(tmp_path / "a.json")) == 5000


# ---------------------------------------------------------------------------------------------- journal


def test_the_journal_keeps_events_in_order_and_stamps_them(folder):
    append(folder, "attempt", step=0)
    append(folder, "train", step=10, total=3.5)
    first, second = journal(folder)
    assert (first["event"], second["event"], second["total"]) == ("attempt", "train", 3.5)
    assert first["time"] <= second["time"]


def test_a_run_without_a_journal_has_an_empty_one(tmp_path):
    assert journal(tmp_path) == []


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_torn_anywhere_spoils_no_other(folder, cut):
    append(folder, "train", step=10)
    append(folder, "train", step=20, note="Größe", terms={"fused": 1.0})
    path = folder / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n") + 1 + cut])
    append(folder, "train", step=30)
    assert [line["step"] for line in journal(folder)] == [10, 30]


def test_a_step_redone_after_a_resume_counts_once_with_its_last_value(folder):
    for step, total in ((10, 3.0), (20, 2.0), (20, 2.5), (30, 1.0)):
        append(folder, "train", step=step, total=total)
    append(folder, "val", step=20, miou=50.0)
    assert [(line["step"], line.get("total")) for line in journal(folder)] == [
        (10, 3.0),
        (20, 2.5),
        (30, 1.0),
        (20, None),
    ]


def test_attempts_are_never_merged(folder):
    append(folder, "attempt", step=0)
    append(folder, "attempt", step=0)
    assert len(journal(folder)) == 2


# ---------------------------------------------------------------------------------------------- claims


def test_a_run_is_claimed_by_one_process_at_a_time_and_can_be_given_back(folder):
    first = claim(folder, "first")
    assert claim(folder, "second") is None
    first.check()
    first.release()
    assert [path.name for path in (folder / "attempts").iterdir()] == ["first.json"]
    second = claim(folder, "second")
    assert read_json(folder / "claim.json")["attempt"] == 2
    second.release()


def test_another_process_that_lives_keeps_its_claim(folder):
    with python(HOLD, folder, "theirs") as holder:
        assert holder.stdout.readline() == "True\n"
        assert claim(folder, "ours") is None
        assert read_json(folder / "claim.json")["token"] == "theirs"
        holder.stdin.close()


def test_a_dead_holder_is_set_aside_and_remembered(folder):
    held_by_a_process_that_died(folder)
    assert claim(folder, "second") is not None
    assert read_json(folder / "claim.json")["token"] == "second"
    assert read_json(folder / "attempts" / "first.json")["attempt"] == 1


def test_a_process_that_merely_has_the_number_of_a_dead_holder_does_not_keep_its_claim(folder):
    claim(folder, "first")
    write_json(folder / "claim.json", {**read_json(folder / "claim.json"), "started": 1.0})
    assert claim(folder, "second") is not None


def test_a_holder_on_another_machine_is_left_alone(folder):
    claim(folder, "first")
    elsewhere = {**read_json(folder / "claim.json"), "host": "node-7.invalid", "started": 1.0}
    write_json(folder / "claim.json", elsewhere)
    assert claim(folder, "second") is None


RACE = """
import sys
from pathlib import Path
from crm.records import claim
print(flush=True)
sys.stdin.readline()
print(claim(Path(sys.argv[1]), sys.argv[2]) is not None, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("dead_holder", [False, True])
def test_of_processes_that_race_for_a_run_exactly_one_wins(tmp_path, dead_holder):
    for attempt in range(3):
        folder = open_run(tmp_path, override(config, {"seed": attempt}))
        if dead_holder:
            held_by_a_process_that_died(folder)
        racers = [python(RACE, folder, f"racer-{n}") for n in range(4)]
        for racer in racers:
            racer.stdout.readline()
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        won = [racer.stdout.readline() == "True\n" for racer in racers]
        for racer in racers:
            racer.communicate()
        assert won.count(True) == 1
        assert read_json(folder / "claim.json")["token"] == f"racer-{won.index(True)}"
        assert not list(folder.glob(".claim.racer*"))


def test_a_slow_process_does_not_set_aside_the_claim_that_replaced_the_dead_one(folder, monkeypatch):
    # The worst moment: `slow` saw the dead holder, and before it moves that claim `quick` may do so and claim.
    held_by_a_process_that_died(folder)
    quick, rename = [], os.rename

    def late(source, target):
        monkeypatch.setattr(os, "rename", rename)
        quick.append(python(HOLD, folder, "quick"))
        select.select([quick[0].stdout], [], [], 2.0)  # it claims now, or it waits for us
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    slow_won = claim(folder, "slow") is not None
    quick_won = quick[0].stdout.readline() == "True\n"
    quick[0].communicate()
    assert [slow_won, quick_won].count(True) == 1


def test_a_superseded_attempt_learns_it_before_it_writes_and_cannot_release_the_new_one(folder):
    old = claim(folder, "old")
    records.retire(folder, "old")
    claim(folder, "new")
    for act in (old.check, old.release):
        with pytest.raises(Superseded, match="attempt old"):
            act()
    assert read_json(folder / "claim.json")["token"] == "new"


# ---------------------------------------------------------------------------------------------- state

CONDITIONS = (CLEAN_TEST, *MISSING)


def look(folder: Path) -> records.State:
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.parent.rglob("*"))
    found = state(folder.parent, config, "last", CONDITIONS)
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.parent.rglob("*")) == before
    return found


def evaluated(folder: Path, conditions) -> None:
    for condition in conditions:
        path = records.evaluation(folder, "last", condition)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_run_nobody_has_begun_is_missing(tmp_path, folder):
    assert state(tmp_path / "nowhere", config, "last", CONDITIONS).name == "missing"
    assert look(folder).name == "missing"


def test_a_run_whose_process_lives_is_running_with_its_progress(folder):
    claim(folder, "ours")
    write_json(folder / "progress.json", {"step": 70, "miou": 41.5, "eta": 12.0})
    found = look(folder)
    assert (found.name, found.miou, found.eta, found.pid) == ("running", 41.5, 12.0, os.getpid())
    assert found.share == 70 / found.steps


def test_a_run_whose_process_died_is_interrupted(folder):
    held_by_a_process_that_died(folder)
    assert look(folder).name == "interrupted"


def test_a_failed_run_says_why_until_somebody_works_on_it_again(folder):
    write_json(folder / "failure.json", {"reason": "non-finite loss at step 3"})
    assert (look(folder).name, look(folder).reason) == ("failed", "non-finite loss at step 3")
    claim(folder, "again")
    assert look(folder).name == "running"


def test_a_run_is_done_when_it_is_trained_and_evaluated_under_every_condition(folder):
    write_json(folder / "result.json", {"steps": config.steps})
    evaluated(folder, CONDITIONS[:-1])
    assert look(folder).name == "trained"
    assert records.lacking(folder, "last", CONDITIONS) == [CONDITIONS[-1]]
    evaluated(folder, CONDITIONS)
    assert (look(folder).name, look(folder).share) == ("done", 1.0)


def test_a_finished_run_counts_for_its_own_selection_only(folder):
    write_json(folder / "result.json", {"steps": config.steps})
    evaluated(folder, CONDITIONS)
    assert state(folder.parent, config, "val_best", CONDITIONS).name == "trained"


def test_the_config_file_is_plain_json_with_every_setting(folder):
    written = json.loads((folder / "config.json").read_text())
    assert written["id"] == folder.name
    assert written["config"]["data.size"] == [64, 96]
    assert override(Config(), written["config"]) == replace(config)
