"""Cells of the paper's tables, on run folders with invented matrices and planted faults; numbers recomputed here."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from analysis.paper import ledger
from analysis.paper.cells import build_all
from analysis.paper.lacking import cover
from analysis.paper.result import Built, Cell
from analysis.paper.spec import Column, Row, Table
from crm.cli.options import find_sweep
from crm.conditions import CLEAN_TEST, MISSING, SUITES, Condition
from crm.confusion import Evaluation, load_evaluation, save_evaluation
from crm.data.specs import DATASETS
from crm.evaluated import INDEX
from crm.records import evaluation, read_json, write_json
from crm.sums import note
from crm.sweep import Cell as Wanted
from tests.analysis_fixture import trained

CLASSES = list(DATASETS["synthetic"].classes)
NAME, SWEEP = find_sweep("ablation_sharing@tiny")
CELLS = {cell.label: cell for cell in SWEEP.cells()}
ROWS = ("no sharing", "last stage", "last two")
CLEAN, GONE = Column(label="clean"), Column(label="RGB missing", conditions=(MISSING[0].name,))
TABLE = Table(
    name="made_up", title="Invented", columns=[CLEAN, GONE],
    rows=[Row(label=name, sweep="ablation_sharing", variant=name) for name in ROWS],
)  # fmt: skip


def matrices(label: str, condition: Condition, images: int = 12) -> np.ndarray:
    """Per-image matrices (n, k, k) that differ from cell to cell."""
    rng = np.random.default_rng(sum(map(ord, f"{label} {condition.name}")))
    right = np.eye(len(CLASSES), dtype=int) * 40
    return rng.integers(0, 6, (images, len(CLASSES), len(CLASSES))) + right


def record(
    runs: Path,
    cell: Wanted,
    condition: Condition,
    confusion: np.ndarray | None = None,
    selection: str = "last",
    names: Sequence[str] = (),
    **meta: object,
) -> Path:
    """A trained run with one more evaluation."""
    folder = runs / cell.id
    if not (folder / "result.json").exists():
        trained(runs, cell)
    confusion = matrices(cell.label, condition) if confusion is None else confusion
    names = np.array(names or [f"{i:05d}{'N' if i % 3 else 'D'}" for i in range(len(confusion))])
    about = {
        "condition": condition.name,
        "split": "test",
        "dataset": "synthetic",
        "classes": CLASSES,
        "ignore_index": 255,
    }
    about |= {"selection": selection, "size": [64, 96], **meta}
    night = np.array([name.endswith("N") for name in names])
    found, path = (
        Evaluation(confusion.astype(np.int32), names, night, None, about),
        evaluation(folder, selection, condition),
    )
    note(path, found, save_evaluation(path, found))
    return folder


@pytest.fixture
def runs(tmp_path):
    """All cells of the table's rows trained and evaluated under both conditions."""
    for label, cell in CELLS.items():
        if label.rpartition("/")[0] in ROWS:
            for condition in (CLEAN_TEST, MISSING[0]):
                record(tmp_path / "runs", cell, condition)
    return tmp_path / "runs"


def built(runs: Path, table: Table = TABLE, check: bool = False) -> Built:
    return build_all([table], runs, "tiny", runs.parent / "cache", check)[0]


def at(runs: Path, row: str, column: Column = CLEAN, **how: bool) -> Cell:
    return built(runs, **how).cells[row, column.label]


def plain_miou(confusion: np.ndarray) -> float:
    """Written out, class by class."""
    whole = confusion.sum(axis=0)
    shares = [whole[k, k] / (whole[k].sum() + whole[:, k].sum() - whole[k, k]) for k in range(len(whole))]
    return 100 * float(np.mean(shares))


def scores(row: str, condition: Condition = CLEAN_TEST) -> list[float]:
    return [plain_miou(matrices(f"{row}/{seed}", condition)) for seed in SWEEP.seeds]


# ---------------------------------------------------------------------------------------------- numbers


def test_numbers_are_those_of_the_raw_matrices(runs):
    for column, condition in ((CLEAN, CLEAN_TEST), (GONE, MISSING[0])):
        for row in ROWS:
            cell, values = at(runs, row, column), scores(row, condition)
            assert cell.state == "fresh" and cell.n == cell.wanted == len(SWEEP.seeds)
            assert [run.value for run in cell.runs] == pytest.approx(values)
            assert cell.mean == pytest.approx(np.mean(values)) and cell.sd == pytest.approx(np.std(values, ddof=1))
            low, high = scipy_stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy_stats.sem(values))
            assert cell.interval is not None
            assert (cell.interval.low, cell.interval.high) == pytest.approx((low, high))


def test_gains_are_paired_with_the_first_row_at_equal_seed(runs):
    cell = at(runs, "last two")
    differences = np.subtract(scores("last two"), scores("no sharing"))
    assert cell.gain is not None and cell.gain.reference == "no sharing" and cell.gain.n == len(SWEEP.seeds)
    assert cell.gain.mean == pytest.approx(differences.mean()) and cell.gain.sd == pytest.approx(
        differences.std(ddof=1)
    )
    assert at(runs, "no sharing").gain is None


def test_day_night_classes_and_reductions(runs):
    for label in CELLS:
        if label.startswith("no sharing"):
            record(runs, CELLS[label], MISSING[1])
    both = (MISSING[0].name, MISSING[1].name)
    columns = [
        Column(label="night", metric="miou:night"), Column(label="day", metric="miou:day"),
        Column(label="a class", metric=f"iou:{CLASSES[1]}"), Column(label="worst", conditions=both, reduce="min"),
        Column(label="mean", conditions=both), Column(label="parameters", metric="parameters"),
    ]  # fmt: skip
    found = built(runs, replace(TABLE, columns=columns, rows=TABLE.rows[:1])).cells
    raw = matrices("no sharing/0", CLEAN_TEST)
    night = np.array([bool(i % 3) for i in range(len(raw))])
    value = {name: cell.runs[0].value for (_, name), cell in found.items()}
    assert value["night"] == pytest.approx(plain_miou(raw[night])) and value["day"] == pytest.approx(
        plain_miou(raw[~night])
    )
    whole = raw.sum(axis=0)
    assert value["a class"] == pytest.approx(100 * whole[1, 1] / (whole[1].sum() + whole[:, 1].sum() - whole[1, 1]))
    two = [plain_miou(matrices("no sharing/0", one)) for one in MISSING]
    assert value["worst"] == pytest.approx(min(two)) and value["mean"] == pytest.approx(np.mean(two))
    assert value["parameters"] == pytest.approx(1.234567)


def test_without_per_image_files_of_other_cells_numbers_stand(runs, monkeypatch):
    """Values come from the sums; only what is bootstrapped opens per-image files."""
    before = built(runs, replace(TABLE, compare="none"))
    monkeypatch.setattr(np, "load", None)
    assert built(runs, replace(TABLE, compare="none")).cells == before.cells


def test_one_seed_gets_no_deviation_and_no_verdict(runs):
    shutil.rmtree(runs / CELLS["last two/1"].id)
    cell = at(runs, "last two")
    assert (cell.n, cell.sd, cell.interval) == (1, None, None)
    assert cell.gain is not None and cell.gain.sd is None and cell.gain.verdict == ""


# ---------------------------------------------------------------------------------------------- states


def test_a_seed_that_failed_leaves_a_partial_cell_that_says_so(runs):
    folder = runs / CELLS["last two/1"].id
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "evals")
    write_json(folder / "failure.json", {"reason": "CUDA out of memory"})
    cell = at(runs, "last two")
    assert cell.state == "partial" and "seed 1" in cell.reason and "CUDA out of memory" in cell.reason
    assert (cell.n, cell.wanted) == (1, 2)
    assert ledger.told(cell).startswith("partial 1 of 2")
    other = runs / CELLS["last two/0"].id
    (other / "result.json").unlink()
    shutil.rmtree(other / "evals")
    write_json(other / "failure.json", {"reason": "CUDA out of memory"})
    assert at(runs, "last two").state == "failed"


def test_missing_evaluations_are_said_and_only_they_are_asked_for(runs):
    for seed in SWEEP.seeds:
        evaluation(runs / CELLS[f"last two/{seed}"].id, "last", MISSING[0]).unlink()
    found = built(runs)
    cell = found.cells["last two", "RGB missing"]
    assert cell.state == "missing" and "not evaluated under test.rgb=missing_mean" in cell.reason
    assert found.cells["last two", "clean"].state == "fresh"
    assert found.commands == ["crm sweep ablation_sharing@tiny+emm --only 'last two'"]


def test_a_class_that_occurs_nowhere_has_no_number_and_lacks_none(runs):
    for seed in SWEEP.seeds:
        confusion = matrices(f"last two/{seed}", CLEAN_TEST)
        confusion[:, 2], confusion[:, :, 2] = 0, 0
        record(runs, CELLS[f"last two/{seed}"], CLEAN_TEST, confusion)
    column = Column(label="a class", metric=f"iou:{CLASSES[2]}")
    found = built(runs, replace(TABLE, columns=[column], rows=TABLE.rows[2:]))
    cell = found.cells["last two", "a class"]
    assert (cell.state, cell.mean, cell.n, cell.lacking) == ("fresh", None, 0, False) and "nothing of it" in cell.reason
    assert not found.commands


def test_an_edited_evaluation_is_evaluated_anew_and_not_trained(runs):
    folder = runs / CELLS["last two/0"].id
    path = evaluation(folder, "last", CLEAN_TEST)
    stored = load_evaluation(path)
    save_evaluation(path, replace(stored, confusion=stored.confusion + 1, night=~stored.night))
    found = built(runs, check=True)
    assert found.cells["last two", "clean"].state == "stale"
    assert found.commands == ["crm evaluate ablation_sharing@tiny --suite clean --select last --rerun stale"]


def test_an_empty_folder_of_runs_lacks_everything(tmp_path):
    found = built(tmp_path / "runs")
    assert {cell.state for cell in found.cells.values()} == {"missing"}
    assert found.commands == [
        "crm sweep ablation_sharing@tiny+emm --only 'no sharing' --only 'last stage' --only 'last two'"
    ]
    assert not (tmp_path / "runs").exists()  # looking writes nothing


def test_a_changed_default_makes_cells_stale_with_their_number(runs):
    path = runs / CELLS["last stage/0"].id / "config.json"
    written = read_json(path)
    written["config"]["optim.weight_decay"] = 0.123
    write_json(path, written)
    cell = at(runs, "last stage")
    assert cell.state == "stale" and "optim.weight_decay (was 0.123" in cell.reason and "seed 0" in cell.reason
    assert cell.n == 2 and cell.mean == pytest.approx(np.mean(scores("last stage")))
    assert not cell.usable


# ---------------------------------------------------------------------------------------------- never averaged over


def refused(cell: Cell, seed: int, words: str) -> None:
    """The run of that seed gives no value, and the cell says why."""
    run = next(run for run in cell.runs if run.seed == seed)
    assert run.value is None and words in run.reason and words in cell.reason
    assert cell.state == "stale" and cell.n == cell.wanted - 1
    assert not cell.usable


def test_mixed_protocols_are_refused(runs):
    record(runs, CELLS["last two/1"], CLEAN_TEST, size=[48, 64])
    refused(at(runs, "last two"), 1, "other size than the rest of the column ([48, 64], not [64, 96])")
    assert at(runs, "last two", GONE).state == "fresh"


def test_other_images_are_refused(runs):
    record(runs, CELLS["last two/0"], CLEAN_TEST, matrices("x", CLEAN_TEST, images=11))
    refused(at(runs, "last two"), 0, "number of images")


def test_missing_classes_are_refused(runs):
    few = matrices("last two/0", CLEAN_TEST)[:, :-1, :-1]
    record(runs, CELLS["last two/0"], CLEAN_TEST, few, classes=CLASSES[:-1])
    refused(at(runs, "last two"), 0, f"lacks classes: {CLASSES[-1]}")


def test_another_data_set_is_refused(runs):
    record(runs, CELLS["last two/0"], CLEAN_TEST, dataset="mf")
    refused(at(runs, "last two"), 0, "evaluated on mf, not on synthetic")


def test_the_mirrors_listing_of_a_sweep_is_no_folder_of_it(runs):
    listing = runs / ".sweeps" / f"{NAME}+missing.json"
    listing.parent.mkdir()
    listing.write_text("{}")
    (runs / next(iter(CELLS.values())).id / "result.json").unlink()  # so that the scheduler is asked
    assert at(runs, "last two").state == "fresh"


def test_an_edited_evaluation_is_refused(runs):
    folder = runs / CELLS["last two/0"].id
    lines = (folder / "evals/last" / INDEX).read_text()
    record(runs, CELLS["last two/0"], CLEAN_TEST, np.tile(np.eye(len(CLASSES), dtype=int), (12, 1, 1)))
    (folder / "evals/last" / INDEX).write_text(lines)  # the edit left no line
    refused(at(runs, "last two"), 0, "edited")


def test_an_edited_sum_is_found_by_looking_at_the_evidence(runs):
    folder = runs / CELLS["last two/0"].id
    lines = [json.loads(line) for line in (folder / "evals/last" / INDEX).read_text().splitlines()]
    lines[0]["whole"][0][0] += 1000
    (folder / "evals/last" / INDEX).write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused(at(runs, "last two", check=True), 0, "edited")


def test_a_copied_run_folder_is_refused(runs):
    target = runs / CELLS["last two/1"].id
    shutil.rmtree(target)
    shutil.copytree(runs / CELLS["last two/0"].id, target)
    refused(at(runs, "last two"), 1, f"holds the record of run {CELLS['last two/0'].id}")


def test_the_same_network_under_another_seed_is_refused(runs):
    one, other = (runs / CELLS[f"last two/{seed}"].id for seed in SWEEP.seeds)
    shutil.copytree(one / "evals", other / "evals", dirs_exist_ok=True)
    refused(at(runs, "last two"), 1, "a duplicate")


def test_a_run_of_a_search_is_refused(runs):
    write_json(runs / CELLS["last two/0"].id / "tuning.json", {"studies": ["a_search"]})
    refused(at(runs, "last two"), 0, "a_search")


def test_unequal_seeds_are_compared_where_both_are_and_it_is_said(runs):
    shutil.rmtree(runs / CELLS["no sharing/1"].id)
    found = built(runs)
    cell = found.cells["last two", "clean"]
    assert cell.n == 2 and cell.gain is not None and cell.gain.n == 1
    assert cell.gain.mean == pytest.approx(scores("last two")[0] - scores("no sharing")[0])
    assert any("last two, clean: the gain is over seed 0 alone" in note for note in found.notes)


def test_rows_that_are_the_same_runs_have_no_gain(runs):
    rows = [
        Row(label="a", sweep="ablation_sharing", variant="last two"),
        Row(label="b", sweep="ablation_sharing", variant="last two"),
    ]
    found = built(runs, replace(TABLE, rows=rows))
    assert found.cells["b", "clean"].gain is None and any("the same runs" in note for note in found.notes)


# ---------------------------------------------------------------------------------------------- published numbers


def test_published_numbers_stand_beside_ours_or_alone(runs):
    rows = [
        Row(label="theirs", group="published", published={"clean": "RTFNet-50/mf"}),
        Row(label="ours", sweep="ablation_sharing", variant="last two", published={"clean": "CRM, Swin-T/mf"}),
    ]
    found = built(runs, replace(TABLE, rows=rows)).cells
    alone = found["published: theirs", "clean"]
    assert alone.state == "published only" and alone.published is not None and alone.published.value == 51.7
    assert found["published: theirs", "RGB missing"].published is None
    ours = found["ours", "clean"].published
    assert ours is not None and ours.value == 59.1
    assert ours.verdict.startswith("not comparable") and "MF there" in ours.verdict


# ---------------------------------------------------------------------------------------------- ledger, names, suites


def test_the_ledger_is_the_same_twice_and_leads_to_the_log(runs, tmp_path):
    written = [ledger.write(built(runs), tmp_path / name).read_bytes() for name in ("one", "two")]
    assert written[0] == written[1] and str(tmp_path).encode() not in written[0]
    cell = json.loads(written[0])["cells"]["last two/clean"]
    id = CELLS["last two/0"].id
    chain = cell["runs"][0]["chain"]
    assert cell["runs"][0]["id"] == id and chain["log"] == f"{id}/log.txt"
    assert chain["commit"] == "0123456789abcdef" and len(chain["data"]["test"]) == 64
    assert len(chain["evaluations"]["test"]["sha256"]) == 64 and "6 classes" in cell["protocol"]
    assert chain["log"] in ledger.chain_text(built(runs), at(runs, "last two"))


def test_a_moved_folder_of_runs_gives_the_same_ledger(runs, tmp_path):
    before = ledger.write(built(runs), tmp_path / "one").read_bytes()
    shutil.copytree(runs, tmp_path / "elsewhere" / "runs")
    assert ledger.write(built(tmp_path / "elsewhere" / "runs"), tmp_path / "two").read_bytes() == before


def test_misspelt_cells_are_guessed(runs):
    found = built(runs)
    assert ledger.find(found, "last two/clean").column == "clean"
    with pytest.raises(ValueError, match="Did you mean 'last two'"):
        ledger.find(found, "last tow/clean")
    with pytest.raises(ValueError, match="Did you mean 'clean'"):
        ledger.find(found, "last two/claen")
    with pytest.raises(ValueError, match="TABLE:ROW/COLUMN"):
        ledger.table_of("main", {"main": 0})


@pytest.mark.parametrize(
    ("names", "suites"),
    [([], ["clean"]), (["test"], ["clean"]), (["test", MISSING[0].name], ["emm"]),
     ([one.name for one in SUITES["nm"]], ["nm"])],
)  # fmt: skip
def test_the_smallest_suites_that_hold_the_conditions(names, suites):
    assert cover(names) == suites


def test_conditions_of_several_suites_are_covered_by_several():
    names = {one.name for suite in ("rmm", "nm") for one in SUITES[suite]}
    chosen = cover(sorted(names))
    assert names <= {one.name for suite in chosen for one in SUITES[suite]} and "paper" not in chosen
    with pytest.raises(ValueError, match="no suite has"):
        cover(["test.rgb=nothing_like_it"])
