"""The command as people type it, wrong input included: messages that help, the right exit codes, no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crm.config import FAMILIES, alternatives
from tests.tiny import TINY_SETS

ROOT = Path(__file__).resolve().parents[1]


def crm(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", "from crm.cli import main; main()", *arguments],
        capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL,
        env={**os.environ, "CRM_HOME": str(home), **environment},
    )  # fmt: skip


WRONG = {
    "a sweep that does not exist": (["sweep", "demmo"], "Did you mean 'demo'"),
    "a sweep of another name for status": (["status", "demo_reel"], "Did you mean 'demo_real'"),
    "a report of no sweep": (["report", "dmo"], "Did you mean 'demo'"),
    "an experiment that does not exist": (["train", "synthetic_smal"], "Did you mean 'synthetic_small'"),
    "a setting that does not exist": (["train", "synthetic_small", "--set", "masking.ration=1"], "masking.ratio"),
    "a value of the wrong kind": (["train", "synthetic_small", "--set", "steps=many"], "steps takes a int"),
    "a setting without a value": (["plan", "demo", "--set", "steps"], "path=value"),
    "a masking that does not exist": (["plan", "demo", "--set", "masking.kind=complementry"], "complementary"),
    "a value out of range": (["plan", "demo", "--set", "masking.ratio=1.5"], "masking.ratio must be between 0 and 1"),
    "a data set that does not exist": (["data", "show", "sinthetic"], "Did you mean 'synthetic'"),
    "a split that does not exist": (["data", "show", "synthetic", "--split", "tset"], "test"),
    "a data set that is not there": (["data", "show", "mf", "--data", "/nowhere"], "/nowhere"),
    "real data without a folder": (["sweep", "demo_real", "--yes"], "--data"),
    "a cluster that does not exist": (["sweep", "demo", "--cluster", "slrum"], "inline, local"),
    "a section that does not exist": (["list", "experimints"], "Did you mean 'experiments'"),
    "a run that does not exist": (["evaluate", "abc"], "no run 'abc'"),
    "a suite that does not exist": (["evaluate", "abc", "--suite", "robust"], "Did you mean 'robustness'"),
    "a selection that does not exist": (["evaluate", "abc", "--select", "best"], "val_best"),
    "a row that does not exist": (["plan", "demo", "--without", "CMR"], "Did you mean 'CRM'"),
    "a member of a family": (["list", "model.fusoin"], "Did you mean 'model.fusion'"),
    "a change that one row cannot take": (["plan", "ablation_fusion", "--set", "model.fusion=add"], "row 'RGB only'"),
    "a temperature of a form without one": (["plan", "demo", "--set", "loss.temperature=2"], "loss.temperature is of"),
    "weights that are not there": (
        [
            "sweep",
            "ablation_initialisation",
            "--without",
            "ImageNet",
            "--without",
            "ImageNet, thermal stem sum",
            "--yes",
        ],
        "crm weights import FILE --name mask2former",
    ),
    "a report without any finished run": (["report", "demo"], "crm sweep demo"),
    "no terminal to confirm on": (["sweep", "demo", *TINY_SETS], "--yes"),
    "an unknown command": (["swep"], "sweep"),
    "an unknown option": (["plan", "demo", "--sed", "1"], "--sed"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_answered_with_what_would_be_right(what, tmp_path):
    arguments, hint = WRONG[what]
    done = crm(*arguments, home=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*")), "wrong input left something behind"


def test_listing_names_every_alternative_with_a_line_about_it(tmp_path):
    """Read from the source, so that one that is added to its family is listed at once."""
    done = crm("list", "--json", home=tmp_path)
    found = json.loads(done.stdout)
    for path in FAMILIES.keys() - {"data.dataset"}:
        assert tuple(found[path]) == alternatives(path)
        if path not in ("masking.corruptions",):
            assert all(found[path].values()), path
    assert found["model.fusion"]["max"].startswith("Elementwise maximum")
    assert crm("list", "model.fusion", home=tmp_path).stdout.count("\n") == 1 + len(alternatives("model.fusion"))


def test_listing_names_experiments_sweeps_suites_and_data(tmp_path):
    found = json.loads(crm("list", "--json", home=tmp_path).stdout)
    assert "synthetic_small" in found["experiments"]
    assert {"demo", "demo_real"} <= found["sweeps"].keys()
    assert "robustness" in found["suites"]
    assert {"synthetic", "mf"} <= found["data"].keys()


def test_the_version_is_shown(tmp_path):
    assert crm("--version", home=tmp_path).stdout.startswith("crm 0.")


def test_a_plan_shows_every_variant_and_starts_nothing(tmp_path):
    done = crm("sweep", "demo", "--dry-run", home=tmp_path)
    assert done.returncode == 0
    for variant in ("plain fusion", "modality dropout", "CRM"):
        assert f"{variant} " in done.stdout
    assert "9 of 9 runs to do" in done.stdout
    assert "unknown" in done.stdout, "a time that is not known is not 0"
    assert not list(tmp_path.glob("runs/*"))


def test_training_evaluating_and_asking_again(tmp_path):
    done = crm("train", "synthetic_small", *TINY_SETS, "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["test"].keys() == {"last", "val_best"} and value["optimism"] is None
    suite = crm("evaluate", value["run"][:6], "--suite", "missing", "--json", home=tmp_path)
    assert suite.returncode == 0, suite.stderr
    assert len(json.loads(suite.stdout)["miou"]) == 9
    again = crm("evaluate", value["run"], "--suite", "missing", "--json", home=tmp_path)
    assert again.returncode == 3
    assert json.loads(again.stdout)["miou"] == json.loads(suite.stdout)["miou"]


def test_a_contact_sheet_is_written(tmp_path):
    from PIL import Image

    done = crm("data", "show", "synthetic", "--rows", "1", "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(json.loads(done.stdout)["file"]) as sheet:
        assert sheet.width > 600
