"""crm tables, cell, status --table and sweep --for, as a person types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crm.data.dataset import open_split
from tests.test_paper_cells import CELLS, CLEAN_TEST, MISSING, matrices, record

ROOT = Path(__file__).resolve().parents[1]


def crm(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CRM_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "crm", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home in which the tiny sharing table is complete but for one seed of its last row."""
    home = tmp_path_factory.mktemp("home")
    for label, cell in CELLS.items():
        for condition in (CLEAN_TEST, *MISSING):
            if label != "all stages/1":
                record(home / "runs", cell, condition)
    return home


def test_tables_write_every_form_and_final_fails_with_what_fills_them(home):
    done = crm(home, "tables", "sharing", "--tiny", "--final")
    assert done.returncode == 1
    assert "crm sweep ablation_sharing@tiny+emm --only 'all stages/1'" in done.stdout
    assert "sharing: all stages/clean is partial: seed 1 missing" in done.stderr
    out = home / "reports/tables-tiny"
    assert {"sharing.tex", "sharing.md", "sharing.html", "sharing.csv", "sharing.ledger.json", "index.html"} <= {
        path.name for path in out.iterdir()
    }
    first = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    marked = crm(home, "tables", "sharing", "--tiny", "--final", "--allow-partial")
    assert marked.returncode == 0 and "1/2" in (out / "sharing.md").read_text()
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == first


def test_status_draws_the_table_with_states(home):
    done = crm(home, "status", "--table", "sharing", "--tiny")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("all stages"))
    assert row.split("partial 1 of 2")[0].strip() == "all stages" and row.count("partial 1 of 2") == 5
    found = json.loads(crm(home, "status", "--table", "sharing", "--tiny", "--json").stdout)
    assert {cell["state"] for cell in found["sharing"]} == {"fresh", "partial"}


def test_a_cell_is_followed_down_to_its_log(home):
    done = crm(home, "cell", "sharing:last two/clean", "--tiny")
    assert done.returncode == 0 and f"log: {CELLS['last two/0'].id}/log.txt" in done.stdout
    assert json.loads(crm(home, "cell", "sharing:last two/clean", "--tiny", "--json").stdout)["n"] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cell", "shraing:last two/clean"], "Did you mean 'sharing'"),
        (["tables", "shraing"], "Did you mean 'sharing'"),
        (["sweep", "--for", "shraing"], "Did you mean 'sharing'"),
        (["sweep"], "--for T"),
        (["status"], "--table T"),
        (["sweep", "--for", "sharing", "--seeds", "0"], "leave out --seeds"),
    ],
)
def test_what_is_wrong_is_said(home, words, said):
    done = crm(home, *words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_dry_run_plans_exactly_what_lacks(home):
    done = crm(home, "sweep", "--for", "sharing", "--tiny", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "1 of 1 runs to do" in done.stdout and "3 conditions each" in done.stdout


@pytest.mark.slow
def test_what_a_table_lacks_is_trained_and_evaluated_and_then_it_is_final(tmp_path):
    split = open_split("synthetic", "test", size=(64, 96), limit=8)
    for label, cell in CELLS.items():
        for condition in (CLEAN_TEST, *MISSING):
            if not label.startswith("all stages"):
                record(tmp_path / "runs", cell, condition, matrices(label, condition, 8), names=list(split.names))
    done = crm(tmp_path, "sweep", "--for", "sharing", "--tiny", "--yes", "--no-track")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs to do" in done.stdout
    final = crm(tmp_path, "tables", "sharing", "--tiny", "--final", "--check")
    assert final.returncode == 0, final.stderr
    assert "25 fresh" in final.stdout
    again = crm(tmp_path, "sweep", "--for", "sharing", "--tiny", "--yes", "--no-track")
    assert again.returncode == 3 and "nothing to do" in again.stdout
    evaluations = sorted(
        path.stem for path in (tmp_path / "runs" / CELLS["all stages/0"].id / "evals/last").glob("*.npz")
    )
    assert evaluations == sorted(one.name for one in (CLEAN_TEST, *MISSING))  # and not the sweep's whole suite


def test_a_cell_of_a_table_is_asked_why(home):
    done = crm(home, "why", "sharing@tiny:last two/clean", "--json")
    found = json.loads(done.stdout)
    assert [one["run"] for one in found["runs"]] == [CELLS[f"last two/{seed}"].id for seed in (0, 1)]
    assert [list(one["evaluations"]) for one in found["runs"]] == [["last/test"]] * 2
    done = crm(home, "why", "sharing@tiny:last twoo/clean")
    assert done.returncode == 2 and "Did you mean 'last two'" in done.stderr
