"""The plan: which cells, what they cost by the history, what is reused and stale, what a budget refuses."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crm import fingerprint
from crm.cli import app, main, options
from crm.cli.plan import Refused, cost_words, disk, disk_words, plan_json, plan_text, planned, refuse_budget
from crm.config import override
from crm.fingerprint import code_parts, training_code
from crm.history import SAME, SIMILAR, History
from crm.records import append, claim, evaluation, open_run, write_json
from crm.sweep import Cell, Sweep, only
from experiments.synthetic_small import config

PLAIN = {"masking.kind": "none", "loss.masked": 0.0, "loss.complementary": 0.0, "loss.non_local": 0.0}
SWEEP = Sweep(
    title="?", base=config, variants={"plain": PLAIN, "CRM": {}, "CRM, patch 8": {"masking.patch": 8}}, seeds=(0, 1),
    suite="missing",
)  # fmt: skip
COUNT = len(SWEEP.conditions)


def cell(variant: str, seed: int = 0) -> Cell:
    (found,) = only(SWEEP.cells(), [f"{variant}/{seed}"])
    return found


def finished(
    runs: Path, which: Cell, step: float = 0.5, device: str = "cuda:0", processes: int = 1, conditions: int = COUNT
) -> Path:
    """A run folder as a finished run leaves it, with invented times."""
    folder = open_run(runs, which.config)
    write_json(folder / "numerics.json", {"device": device, "processes": processes})
    write_json(folder / "provenance.json", {"commit": "0123456789abcdef", "training_code": training_code()})
    write_json(folder / "code.json", code_parts())
    for condition in SWEEP.conditions[:conditions]:
        path = evaluation(folder, "last", condition)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1000)
        append(folder, "evaluate", selection="last", condition=condition.name, miou=50.0, seconds=2.0)
    write_json(folder / "result.json", {"seconds_per_step": step, "steps": which.config.steps, "attempts": 2})
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/last.safetensors").write_bytes(b"x" * 1_000_000)
    return folder


def lines(runs: Path, *patterns: str, **how):
    every = SWEEP.cells()
    return {line.label: line for line in planned(SWEEP, every, runs, only(every, patterns), **how)}


def text(runs: Path, *patterns: str, **how) -> str:
    return plan_text("sweep", SWEEP, list(lines(runs, *patterns, **how).values()), 2, runs)


# ---------------------------------------------------------------------------------------------- which cells


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (["CRM"], ["CRM/0", "CRM/1"]),
        (["CRM/1"], ["CRM/1"]),
        (["CRM*"], ["CRM/0", "CRM/1", "CRM, patch 8/0", "CRM, patch 8/1"]),
        (["*/0"], ["plain/0", "CRM/0", "CRM, patch 8/0"]),
        (["CRM/1", "plain"], ["plain/0", "plain/1", "CRM/1"]),
        ([], [cell.label for cell in SWEEP.cells()]),
    ],
)
def test_patterns_choose_rows_cells_and_globs_in_the_order_of_the_sweep(patterns, chosen):
    assert [one.label for one in only(SWEEP.cells(), patterns)] == chosen


def test_a_row_whose_name_looks_like_a_pattern_is_found_by_its_name():
    cells = [Cell(variant="w/o [a]", seed=0, config=config), Cell(variant="w/o a", seed=0, config=config)]
    assert [one.variant for one in only(cells, ["w/o [a]"])] == ["w/o [a]"]


@pytest.mark.parametrize(("pattern", "hint"), [("CRN", "Did you mean 'CRM'"), ("CRM/7", "There is: CRM/0, CRM/1")])
def test_a_pattern_that_names_nothing_is_refused_with_what_there_is(pattern, hint):
    with pytest.raises(ValueError, match=hint):
        only(SWEEP.cells(), [pattern])


def test_a_row_alone_is_still_set_against_its_baseline(tmp_path):
    assert lines(tmp_path, "CRM")["CRM/0"].differs == {path: config_value(path) for path in PLAIN}


def config_value(path: str) -> object:
    part, _, name = path.partition(".")
    return getattr(getattr(config, part), name)


# ---------------------------------------------------------------------------------------------- cost


def test_what_nobody_has_run_costs_nobody_knows_what(tmp_path):
    one = lines(tmp_path)["CRM/0"]
    assert (one.seconds, one.evaluation, one.hours, one.bytes, one.basis) == (None, None, None, None, "")
    said = text(tmp_path)
    assert "estimated time unknown" in said and "cost: unknown" in said and "to write unknown" in said
    assert plan_json(SWEEP, [one], tmp_path)["cost"] == {"hours": None, "known_hours": 0.0, "unknown": 1}


def test_a_cell_costs_what_other_seeds_of_it_took_training_and_evaluation(tmp_path):
    finished(tmp_path, cell("CRM", 1), step=0.5, processes=2)
    one = lines(tmp_path)["CRM/0"]
    assert (one.seconds, one.evaluation) == (config.steps * 0.5, COUNT * 2.0)
    assert one.hours == pytest.approx(2 * (config.steps * 0.5 + COUNT * 2.0) / 3600), "two devices at once"
    assert SAME in one.basis and "on cuda" in one.basis
    assert one.bytes is not None and 1_000_000 + COUNT * 1000 < one.bytes < 1_200_000 + COUNT * 1000


def test_the_store_of_mlflow_and_its_lock_among_the_runs_are_no_runs(tmp_path):
    finished(tmp_path, cell("CRM", 1), step=0.5)
    for name in ("mlflow.db", "mlflow.db.lock"):
        (tmp_path / name).touch()
    assert SAME in lines(tmp_path)["CRM/0"].basis


def test_similar_runs_are_a_basis_that_says_so_and_runs_with_other_passes_are_none(tmp_path):
    finished(tmp_path, cell("CRM", 1), step=0.5)
    found = lines(tmp_path)
    assert SIMILAR in found["CRM, patch 8/0"].basis and found["CRM, patch 8/0"].seconds == config.steps * 0.5
    assert found["plain/0"].hours is None, "a step of it computes less"
    finished(tmp_path, cell("CRM, patch 8", 1), step=0.7)
    assert SAME in lines(tmp_path)["CRM, patch 8/0"].basis


@pytest.mark.parametrize("change", [{"batch": 3}, {"model.embed": 48}, {"data.train_images": 11}])
def test_another_network_batch_or_data_set_is_no_basis(tmp_path, change):
    finished(tmp_path, Cell(variant="other", seed=0, config=override(config, change)))
    assert lines(tmp_path)["CRM/0"].hours is None


def test_the_history_of_the_device_that_is_asked_for_counts(tmp_path):
    finished(tmp_path, cell("CRM", 1), step=5.0, device="cpu")
    assert lines(tmp_path)["CRM/0"].device == "cpu" and "hours of CPU runs" in text(tmp_path)
    assert lines(tmp_path, device="cuda")["CRM/0"].hours is None
    assert History(tmp_path, "cuda:0").cost(config) is None


def test_what_is_done_of_a_run_is_not_paid_again(tmp_path):
    finished(tmp_path, cell("CRM", 1))
    folder = open_run(tmp_path, cell("CRM", 0).config)
    write_json(folder / "progress.json", {"step": config.steps - 10})
    assert lines(tmp_path)["CRM/0"].seconds == 10 * 0.5
    finished(tmp_path, cell("plain", 0), conditions=COUNT - 2)
    one = lines(tmp_path)["plain/0"]
    assert (one.state, one.seconds, one.evaluation, one.bytes) == ("trained", 0.0, 4.0, 2000)


def test_a_time_that_lacks_the_evaluation_says_so(tmp_path):
    (finished(tmp_path, cell("CRM", 1)) / "journal.jsonl").unlink()
    one = lines(tmp_path, "CRM/0")["CRM/0"]
    assert one.evaluation is None and one.hours == pytest.approx(config.steps * 0.5 / 3600)
    assert "without the evaluation of 1" in cost_words([one])


# ---------------------------------------------------------------------------------------------- budget


def test_a_budget_refuses_what_costs_more_and_what_nobody_knows(tmp_path):
    with pytest.raises(Refused, match="--only 'plain/0'"):
        refuse_budget(list(lines(tmp_path).values()), 1e9)
    finished(tmp_path, cell("CRM", 1))
    wanted = list(lines(tmp_path, "CRM").values())
    hours = sum(line.hours or 0.0 for line in wanted)
    refuse_budget(wanted, hours * 1.001)
    with pytest.raises(Refused, match="the runs to do, 1, would cost about"):
        refuse_budget(wanted, hours * 0.999)
    refuse_budget([line for line in wanted if not line.todo], 0.0)


def test_the_command_ends_with_4_when_the_budget_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CRM_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["crm", "plan", "demo", "--only", "CRM", "--max-gpu-hours", "5"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 4 and "refused: --max-gpu-hours 5: nobody knows" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- reused, stale, again


def test_the_plan_says_what_is_reused_and_what_trained_it(tmp_path):
    finished(tmp_path, cell("CRM", 1))
    said = text(tmp_path)
    assert f"reused: CRM/1 ({cell('CRM', 1).id}): trained by commit 0123456789, 2 attempts" in said
    assert "stale" not in said


def test_a_stale_run_is_shown_with_its_reason_and_reused_all_the_same(tmp_path, monkeypatch):
    folder = finished(tmp_path, cell("CRM", 1))
    before = json.loads((folder / "code.json").read_text())
    write_json(folder / "code.json", {**before, "crm.optim": {**before["crm.optim"], "rate": "other"}})
    write_json(folder / "provenance.json", {"training_code": {**training_code(), "crm.optim": "other"}})
    one = lines(tmp_path)["CRM/1"]
    assert (one.state, one.todo) == ("done", False) and one.stale == "the code has changed since: crm.optim.rate"
    assert "stale, reused all the same: CRM/1: the code has changed since: crm.optim.rate" in text(tmp_path)
    again = lines(tmp_path, rerun="stale")["CRM/1"]
    assert again.todo and again.rerun == one.stale and again.seconds == config.steps * 0.5
    assert "trained anew: CRM/1" in text(tmp_path, rerun="stale")
    assert (tmp_path / cell("CRM", 1).id).exists(), "a plan moves nothing"


def test_a_run_whose_code_nobody_recorded_is_named_and_not_called_stale(tmp_path):
    folder = finished(tmp_path, cell("CRM", 1))
    write_json(folder / "provenance.json", {"commit": "0123"})
    assert not lines(tmp_path)["CRM/1"].stale
    assert "nobody knows whether it changed since: CRM/1" in text(tmp_path)


def test_a_running_cell_is_not_trained_anew(tmp_path):
    folder = open_run(tmp_path, cell("CRM", 0).config)
    mine = claim(folder, "t")
    assert mine and not lines(tmp_path, rerun="all")["CRM/0"].todo
    mine.release()


# ---------------------------------------------------------------------------------------------- disk


def test_the_plan_warns_where_it_does_not_fit(tmp_path):
    finished(tmp_path, cell("CRM", 1))
    (one,) = lines(tmp_path, "CRM/0").values()
    free = shutil.disk_usage(tmp_path).free
    assert disk([one], tmp_path)[:2] == (one.bytes, 0)
    assert "WARNING" not in disk_words([one], tmp_path)
    from dataclasses import replace

    assert "WARNING: it does not fit" in disk_words([replace(one, bytes=2 * free)], tmp_path)
    assert "at least" in disk_words([one, replace(one, bytes=None)], tmp_path)
    assert disk([one], tmp_path / "not" / "yet")[2] > 0


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (999, "999 B"), (1234, "1.2 kB"), (38_400, "38 kB"), (10**9, "1.0 GB")]
)
def test_bytes_are_said_in_few_digits(count, said):
    assert options.size(count) == said


def test_the_json_of_a_plan_carries_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CRM_HOME", str(tmp_path))
    done = CliRunner().invoke(app, ["plan", "demo", "--only", "CRM", "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert set(found) == {"cells", "left_out", "cost", "disk"} and len(found["cells"]) == 3
    assert {"hours", "basis", "stale", "reused", "rerun", "bytes"} <= set(found["cells"][0])
    assert found["cost"]["hours"] is None and found["disk"]["free"] > 0


def test_the_parts_that_the_fixture_names_exist():
    assert "rate" in code_parts()["crm.optim"] and Path(__file__).parents[1] == fingerprint.ROOT
