"""A sweep's forms on the command line: run, looked at, reported, diagnosed; its runs evaluated elsewhere, measured."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from analysis.load import read
from analysis.readings import cross
from crm import elsewhere
from crm.cli import afterwards, app, main
from crm.conditions import CLEAN_TEST
from crm.config import override
from crm.confusion import load_evaluation
from crm.data.export import write_synthetic
from crm.overhead import measure
from crm.records import evaluation, open_run, read_json, write_json
from crm.sweep import Sweep
from crm.verdicts import ACROSS, BETWEEN_ROWS, Row
from crm.worker import DONE, attempt
from experiments.synthetic_tiny import config
from sweeps import PLAIN
from tests.tiny import machine

SHORT = ["--set", "steps=2", "--set", "val_every=0", "--set", "data.train_images=4", "--set", "data.val_images=2",
         "--set", "data.test_images=2", "--seeds", "0"]  # fmt: skip


def crm(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Two tiny runs of a sweep, made by its command."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRM_HOME", str(folder))
        crm("sweep", "baseline_max_fusion", "--tiny", *SHORT, "--cluster", "inline", "--no-track", "--yes", "--report")
    return folder


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.setenv("CRM_HOME", str(home))


def test_a_tiny_form_has_runs_and_a_report_of_its_own(home):
    assert (home / "reports/baseline_max_fusion@tiny/index.html").exists()
    assert not (home / "reports/baseline_max_fusion").exists()
    tiny = json.loads(crm("status", "baseline_max_fusion@tiny", *SHORT, "--json"))
    assert [line["state"] for line in tiny] == ["done", "done"]
    real = json.loads(crm("status", "baseline_max_fusion", "--json"))
    assert {line["state"] for line in real} == {"missing"} and not {x["id"] for x in tiny} & {x["id"] for x in real}


def test_running_it_again_has_nothing_to_do(home):
    arguments = ("sweep", "baseline_max_fusion", "--tiny", *SHORT, "--no-track", "--yes")
    assert "nothing to do" in crm(*arguments, code=3)


def test_a_plan_says_how_each_row_differs_from_its_baseline_and_what_is_left_out():
    said = crm("plan", "ablation_patch_size", "--base", "pst900_swin_t", "--recipe", "released")
    lines = {line.partition("  ")[0]: line for line in said.splitlines()}
    assert said.startswith("ablation_patch_size@pst900_swin_t-released:")
    assert lines["patch 32"].endswith("(baseline: the base)") and lines["patch 8"].endswith("masking.patch=8")
    assert "left out: patch 64: masking.patch 64 does not divide the padded crop (224, 320)" in said
    plain = json.loads(crm("plan", "ablation_patch_size@pst900_swin_t-released", "--json"))
    assert list(plain["left_out"]) == ["patch 64"] and "does not divide" in plain["left_out"]["patch 64"]
    assert plain["cells"][0]["differs"] == {"masking.patch": 4} and len(plain["cells"]) == 4 * 3


def test_a_plan_says_what_is_done_with_the_runs_besides():
    assert "evaluated on MF, KP too" in crm("plan", "cross_dataset")
    assert "measured: operations, latency and memory" in crm("plan", "overhead")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["plan", "demo", "--tiny", "--base", "kp_swin_t"], "--tiny has a base of its own"),
        (["status", "demo@tniy"], "no experiment 'tniy'"),
        (["report", "demo", "--recipe", "relesed"], "Did you mean 'released'"),
        (["diagnose", "demo@tiny", "--seeds", "7"], "no run of demo@tiny"),
        (["diagnose", "dmeo"], "no run 'dmeo'"),
        (["diagnose", "baseline_max_fusion@tiny", "--select", "best"], "no selection 'best'"),
    ],
)
def test_wrong_input_is_answered_with_what_would_do(arguments, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["crm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and reason in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- diagnosis


def test_a_sweep_is_diagnosed_once_and_its_rows_stand_side_by_side(home):
    arguments = ("diagnose", "baseline_max_fusion@tiny", *SHORT, "--threads", "1")
    first = json.loads(crm(*arguments, "--json"))
    assert list(first["rows"]) == ["max fusion", "CRM"] and not first["failed"] and not first["without"]
    files = [read_json(path) for path in home.glob("runs/*/diagnosis.json")]
    assert sorted(one["measures"]["gap"] for one in files) == sorted(row["gap"] for row in first["rows"].values())
    for path in home.glob("runs/*/diagnosis.json"):  # what is stored is what is shown
        write_json(path, {**read_json(path), "findings": [{"rule": "reliance", "level": "problem"}], "healthy": False})
    again = crm(*arguments)
    assert "reliance: One missing modality costs much more" in again and "max fusion (1 of 1), CRM (1 of 1)" in again
    crm(*arguments, "--draws", "1")
    assert {read_json(path)["draws"] for path in home.glob("runs/*/diagnosis.json")} == {1}, "other draws, another one"


def row(**changes) -> Row:
    sides = {"rgb": 40.0, "thermal": 40.0}
    healthy = {"runs": 3, "clean": 60.0, "missing": sides, "retention": {"rgb": 0.7, "thermal": 0.7}, "gap": 5.0}
    healthy |= {"head": sides, "masked": 55.0, "agreement": 0.8, "cosine": 0.1, "distillation": 0.2}
    return Row(**{**healthy, "findings": {}, "problems": 0, **changes})


LIMIT = BETWEEN_ROWS.value


@pytest.mark.parametrize(
    ("sign", "shows", "does_not"),
    [
        ("levelled", {"agreement": 0.9, "head": {"rgb": 39.9 - LIMIT, "thermal": 39.9 - LIMIT}},
         {"agreement": 0.9, "head": {"rgb": 39.9 - LIMIT, "thermal": 40.0}}),
        ("levelled", {"agreement": 0.81, "head": {"rgb": 20.0, "thermal": 20.0}},
         {"agreement": 0.79, "head": {"rgb": 20.0, "thermal": 20.0}}),
        ("paid", {"missing": {"rgb": 50.0, "thermal": 40.0}, "clean": 59.9 - LIMIT},
         {"missing": {"rgb": 50.0, "thermal": 40.0}, "clean": 60.1 - LIMIT}),
        ("leans more", {"gap": 5.1 + LIMIT}, {"gap": 4.9 + LIMIT}),
    ],
)  # fmt: skip
def test_a_sign_beside_the_baseline_shows_on_one_side_of_its_threshold(sign, shows, does_not):
    assert ACROSS[sign](row(**shows), row()) and not ACROSS[sign](row(**does_not), row())


def test_what_was_not_measured_is_no_sign():
    nothing = row(agreement=None, gap=None, clean=None, head={"rgb": None, "thermal": None})
    assert not any(shows(nothing, row()) or shows(row(), nothing) for shows in ACROSS.values())


# ---------------------------------------------------------------------------------------------- besides


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory) -> tuple[Sweep, Path, Path]:
    """A sweep on synthetic scenes that is also evaluated on KP and measured, its runs trained."""
    folder = tmp_path_factory.mktemp("besides")
    data = write_synthetic("kp", folder / "kp", counts={"test": 2})
    small = override(config, {"steps": 2, "val_every": 0, "data.test_images": 2, "data.val_images": 1})
    sweep = Sweep(title="?", base=small, variants={"max fusion": PLAIN, "CRM": {}}, seeds=(0,), suite="clean",
                  also_on=("kp",), measured=True)  # fmt: skip
    for cell in sweep.cells():
        run = open_run(folder / "runs", cell.config)
        assert attempt(run, machine(folder / "runs"), "t", "last", [CLEAN_TEST], lambda: False, lambda p: None) == DONE
    return sweep, folder / "runs", data


def test_trained_runs_are_evaluated_elsewhere_and_measured_once(carried_out):
    sweep, runs, data = carried_out
    cells = sweep.cells()
    todo = [(cell.variant, what) for cell, what in afterwards.missing(sweep, cells, runs)]
    assert todo == [(row, what) for row in ("max fusion", "CRM") for what in ("kp", afterwards.COST)]
    assert afterwards.carry_out(sweep, cells, machine(runs, data=data), quiet=True) == {}
    assert afterwards.missing(sweep, cells, runs) == []
    for cell in cells:
        there = elsewhere.on(runs / cell.id, "last", "kp")
        assert there and load_evaluation(evaluation(there, "last", CLEAN_TEST)).meta["trained_on"] == "synthetic"
        assert elsewhere.on(runs / cell.id, "last", "mf") is None
    found = cross(read(sweep, runs))
    assert found and found.shown.head == ["KP, clean", "Synthetic road scenes, clean"]
    assert found.table.notna()[[name for name in found.table if name.endswith("mean")]].all(axis=None)
    costs = [read_json(runs / cell.id / "overhead.json") for cell in cells]
    same = ("parameters", "multiply_adds")
    assert [costs[0][name] for name in same] == [costs[1][name] for name in same], "inference must not cost more"
    assert costs[1]["training_operations"] > 2 * costs[0]["training_operations"]


def test_a_retrained_checkpoint_is_evaluated_elsewhere_again(carried_out, tmp_path):
    sweep, _, _ = carried_out
    cell = sweep.cells()[0]
    folder = open_run(tmp_path, cell.config)
    write_json(folder / "result.json", {"checkpoints": {"last": {"sha256": "old"}}})
    elsewhere.remember(folder, "last", "kp", tmp_path / "import-1")
    assert elsewhere.on(folder, "last", "kp") == tmp_path / "import-1"
    write_json(folder / "result.json", {"checkpoints": {"last": {"sha256": "new"}}})
    assert elsewhere.on(folder, "last", "kp") is None and (
        "kp" in {w for _, w in afterwards.missing(sweep, [cell], tmp_path)}
    )


def test_what_cannot_be_done_besides_is_told_and_the_rest_is_done(carried_out):
    sweep, runs, _ = carried_out
    other = Sweep(title="?", base=sweep.base, variants=sweep.variants, seeds=(0,), suite="clean", also_on=("pst900",))
    failed = afterwards.carry_out(other, other.cells(), machine(runs), quiet=True)
    assert list(failed) == ["max fusion/0 on pst900", "CRM/0 on pst900"]
    assert all("share no class" in why for why in failed.values())


def test_an_image_of_twice_the_area_takes_about_twice_the_multiply_adds(carried_out):
    """Attention is in windows and nearly everything else per pixel."""
    sweep, runs, _ = carried_out
    small, wide = (
        measure(open_run(runs, override(sweep.base, {**PLAIN, "data.size": size, "data.crop": size})), machine(runs))
        for size in ((64, 64), (64, 128))
    )
    assert small["parameters"] == wide["parameters"]
    assert 1.5 < wide["multiply_adds"] / small["multiply_adds"] < 2.5
