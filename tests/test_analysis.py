"""What the tables, statistics, figures and the report promise, on run folders with invented numbers."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from analysis import figures, report, tables
from analysis.load import load, read
from analysis.panels import pick
from analysis.stats import Interval, bootstrap_miou, hierarchical_percentile, image_draws, paired_gain, summary
from crm.conditions import MISSING, SUITES
from crm.confusion import miou
from crm.sweep import Sweep
from experiments.synthetic_small import config
from tests.analysis_fixture import Invented, evaluated, fabricate, trained

ROOT = Path(__file__).parent.parent
SMALL = replace(config, data=replace(config.data, size=(48, 64), crop=(48, 64), test_images=8))
NASTY = "100% <b>a_b</b> & #1"
SWEEP = Sweep(
    title="Which <em>invented</em> variant wins?",
    base=SMALL,
    variants={"plain": {"loss.rgb": 0.5}, NASTY: {"loss.rgb": 0.6}, "method": {}},
    seeds=(0, 1),
)
INVENTED = {"plain": Invented(0.85, 0.6, 0.1), NASTY: Invented(0.86, 0.4, 0.15), "method": Invented(0.9, 0.2, 0.3)}
TWO = Sweep(title="two", base=SMALL, variants={"a": {"loss.rgb": 0.5}, "b": {}}, seeds=(0, 1, 2), suite="clean")


@pytest.fixture(scope="module")
def holed(tmp_path_factory):
    """A study in which one run of the method is missing, and its report."""
    place = tmp_path_factory.mktemp("study")
    fabricate(place / "runs", SWEEP, INVENTED, skip={"method/1"})
    page = report.report("invented", SWEEP, place / "runs", place / "reports")
    return place, page


def diagonal(right: int, wrong: int, images: int = 6, classes: int = 3) -> np.ndarray:
    """Per-image matrices in which each class has `right` pixels and loses `wrong` to the next class."""
    one = right * np.eye(classes, dtype=int) + wrong * np.roll(np.eye(classes, dtype=int), 1, axis=1)
    return np.repeat(one[None], images, axis=0)


def two(runs: Path, right: dict[str, list[int]]) -> None:
    """Evaluated cells of TWO; variant to the right pixels out of 100 of its seeds, fewer where a run is missing."""
    for cell in TWO.cells():
        if cell.seed < len(right[cell.variant]):
            hits = right[cell.variant][cell.seed]
            folder = trained(runs, cell, seconds=0.2 if cell.variant == "a" else 0.5)
            evaluated(folder, TWO.conditions[0], diagonal(hits, 100 - hits))


# ---------------------------------------------------------------------------------------------- statistics


def test_mean_and_sd_are_the_ones_scipy_gives():
    values = np.array([51.2, 53.9, 52.4, np.nan])
    total = summary(values)
    known = scipy_stats.describe(values[:3], ddof=1)
    assert (total.mean, total.sd, total.n) == pytest.approx((known.mean, np.sqrt(known.variance), 3))


def test_one_value_has_no_spread_and_none_has_no_mean():
    assert np.isnan(summary([50.0]).sd)
    assert np.isnan(summary([]).mean)


def test_gain_is_taken_at_equal_seed_and_leaves_unshared_seeds_out():
    gains = paired_gain(pd.Series({0: 60.0, 1: 63.0, 2: 66.0}), pd.Series({2: 64.0, 0: 58.0}))
    assert gains.to_dict() == {0: 2.0, 2: 2.0}


def test_every_image_draw_draws_as_many_images_as_there_are():
    assert (image_draws(7, 50, np.random.default_rng(0)).sum(axis=1) == 7).all()


def test_a_draw_of_every_image_once_gives_the_mean_iou_of_the_split():
    confusion = np.random.default_rng(0).integers(1, 50, size=(5, 4, 4))
    assert bootstrap_miou(confusion, np.ones((1, 5), int))[0] == pytest.approx(miou(confusion.sum(axis=0)))


def test_a_class_that_a_draw_lacks_is_left_out_whatever_was_predicted():
    common, rare = np.array([[10, 0], [0, 0]]), np.array([[10, 0], [0, 5]])
    predicts_rare = np.array([[8, 2], [0, 0]])
    only_first = np.array([[1, 0]])
    assert bootstrap_miou(np.stack([common, rare]), only_first) == pytest.approx(100.0)
    assert bootstrap_miou(np.stack([predicts_rare, rare]), only_first) == pytest.approx(80.0)


def test_percentiles_over_images_agree_with_scipys_bootstrap():
    rng = np.random.default_rng(0)
    confusion = rng.integers(1, 40, size=(30, 3, 3)) + 40 * np.eye(3, dtype=int)
    ours = hierarchical_percentile(bootstrap_miou(confusion, image_draws(30, 4000, rng))[None], rng)
    theirs = scipy_stats.bootstrap(
        (np.arange(30),), lambda i: miou(confusion[i].sum(axis=0)), n_resamples=4000, method="percentile",
        vectorized=False, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.15)


@pytest.mark.parametrize(("low", "high", "verdict"), [(-1, 2, "within noise"), (0.1, 2, "gain"), (-2, -0.1, "loss")])
def test_verdict_is_within_noise_when_the_interval_includes_zero(low, high, verdict):
    assert Interval(low, high, "").verdict == verdict


# ---------------------------------------------------------------------------------------------- frames and tables


def test_frame_holds_the_miou_of_the_summed_matrix_and_a_hole_for_each_missing_run(tmp_path):
    two(tmp_path, {"a": [80, 90, 70], "b": [90]})
    frame = load(TWO, tmp_path).set_index(["variant", "seed"])
    assert frame.loc[("a", 0), "miou"] == pytest.approx(100 * 80 / 120)
    assert frame.loc[("a", 0), "iou.road"] == pytest.approx(100 * 80 / 120)
    assert frame["miou"].notna().sum() == 4
    assert frame.loc[("b", 1), "state"] == "missing"


def test_a_missing_run_is_counted_out_and_gains_pair_what_is_there(tmp_path):
    two(tmp_path, {"a": [80, 90, 70], "b": [90, 95]})
    study = read(TWO, tmp_path)
    table = tables.ablation(study, tables.Comparison(study, np.random.default_rng(0)))
    iou = {hits: 100 * hits / (200 - hits) for hits in (70, 80, 90, 95)}
    assert table.loc["b", "clean.n"] == 2
    assert table.loc["b", "clean.mean"] == pytest.approx((iou[90] + iou[95]) / 2)
    assert table.loc["b", "clean.gain"] == pytest.approx((iou[90] - iou[80] + iou[95] - iou[90]) / 2)
    assert table.loc["b", "clean.low"] <= table.loc["b", "clean.gain"] <= table.loc["b", "clean.high"]
    assert table.loc["b", "cost.ratio"] == pytest.approx(2.5)
    shown = tables.shown_ablation(table, study)
    assert shown.rows[1][1][0].value == "2 of 3"
    assert any("1 of 6 runs" in note for note in shown.notes)


def test_a_variant_without_runs_is_a_row_of_dashes(tmp_path):
    two(tmp_path, {"a": [80, 90, 70], "b": []})
    study = read(TWO, tmp_path)
    shown = tables.shown_ablation(tables.ablation(study, tables.Comparison(study, np.random.default_rng(0))), study)
    assert [entry.value for entry in shown.rows[1][1]] == ["0 of 3", "—", "—"]


def test_runs_evaluated_on_different_images_are_refused(tmp_path):
    first, second = TWO.cells()[:2]
    evaluated(trained(tmp_path, first), TWO.conditions[0], diagonal(80, 20, images=6))
    evaluated(trained(tmp_path, second), TWO.conditions[0], diagonal(80, 20, images=4))
    with pytest.raises(ValueError, match="different images"):
        read(TWO, tmp_path)


def test_worst_case_leaves_out_what_changes_the_network():
    worst = next(m for m in tables.measures(SUITES["robustness"]) if m.key == "worst")
    kinds = {how.kind for c in worst.conditions for how in (c.rgb, c.thermal)}
    every = {how.kind for c in SUITES["robustness"] for how in (c.rgb, c.thermal)}
    assert kinds == every & set(tables.INPUT_KINDS)
    assert every - kinds == {"missing_token", "missing_route"}


def test_the_headline_is_the_mean_of_both_missing_modalities(holed):
    records = load(SWEEP, holed[0] / "runs")
    measure = next(m for m in tables.measures(SWEEP.conditions) if m.key == tables.HEADLINE)
    parts = [records.set_index(["variant", "seed", "condition"]).loc[("plain", 0, c.name), "miou"] for c in MISSING]
    assert tables.values(records, measure)["plain", 0] == pytest.approx(np.mean(parts))
    assert np.isnan(tables.values(records, measure)["method", 1])


def test_row_labels_are_escaped_in_latex_html_and_markdown():
    shown = tables.Shown(["a|b"], [(NASTY, [tables.Entry("1.0 ± 0.1", "−0.5", "[−1.0, +0.1]", "within noise")])])
    assert r"100\% \textless{}b\textgreater{}a\_b\textless{}/b\textgreater{} \& \#1" in tables.latex(shown)
    assert "100% &lt;b&gt;a_b&lt;/b&gt; &amp; #1" in tables.html(shown)
    assert "<b>a_b" not in tables.html(shown)
    assert r"a\|b" in tables.markdown(shown)


@pytest.mark.parametrize("letter", ["\\", "{", "}", "%", "_", "&", "#", "$", "^", "~"])
def test_every_letter_that_latex_acts_on_is_escaped(letter):
    assert tables.latex_text(letter) != letter


def test_latex_compiles_by_itself(holed, tmp_path):
    if shutil.which("pdflatex") is None:
        assert "tex" not in os.environ.get("CRM_REQUIRE", ""), "CRM_REQUIRE names tex, but there is no pdflatex"
        pytest.skip("there is no pdflatex here")
    text = "".join((holed[1].parent / name).read_text() for name in ("table.tex", "robustness.tex"))
    (tmp_path / "t.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n" + text + "\\end{document}\n"
    )
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]


def test_csv_is_unrounded(holed):
    table = pd.read_csv(holed[1].parent / "table.csv", index_col="variant")
    records = load(SWEEP, holed[0] / "runs")
    clean = records[(records["condition"] == "test") & (records["variant"] == "plain")]["miou"]
    assert table.loc["plain", "clean.mean"] == pytest.approx(clean.mean(), rel=1e-12)


# ---------------------------------------------------------------------------------------------- figures and panels


def test_each_variant_has_one_colour_and_the_baseline_is_grey():
    colours = figures.colours(SWEEP)
    assert len(set(colours.values())) == 3
    assert colours["plain"] == figures.BASELINE


def test_patch_curves_run_from_clean_to_missing():
    first = figures.families(SWEEP.conditions)[0]
    assert [severity for severity, _ in first.steps] == [0, 0.25, 0.5, 0.75, 1]
    assert [first.steps[0][1].name, first.steps[-1][1].name] == ["test", "test.rgb=missing_mean"]
    assert len(figures.families(SWEEP.conditions)) == 5


def test_a_suite_without_severities_has_no_curves():
    assert figures.families(SUITES["missing"]) == []


def test_images_are_picked_by_rule():
    gains = np.array([5.0, -3.0, 9.0, 1.0, 2.0, np.nan])
    night = np.array([False, True, False, True, False, False])
    assert pick(gains, night) == {"largest gain": 2, "median gain by day": 0, "median gain at night": 1}
    by_day = np.zeros(6, bool)
    assert pick(gains, by_day) == {"largest gain": 2, "median gain by day": 4, "largest loss": 1}
    assert "smallest gain" in pick(gains + 10, by_day)
    assert "smallest loss" in pick(gains - 20, by_day)
    assert pick(np.array([np.nan]), by_day[:1]) == {}


# ---------------------------------------------------------------------------------------------- the report


def test_report_of_an_incomplete_sweep_counts_its_holes(holed):
    page = holed[1].read_text()
    assert "This sweep is not complete: 1 of 6 runs are not done." in page
    assert "method: seed 1 missing (0 of 24 conditions)" in page


def test_report_answers_first_and_states_seeds_and_interval(holed):
    page = holed[1].read_text()
    answer, table = page.index("“method” keeps"), page.index("<table>")
    assert answer < table
    assert "one seed, so it says nothing about another one" in page


def test_report_escapes_what_people_wrote(holed):
    page = holed[1].read_text()
    assert "<em>invented" not in page
    assert "<b>a_b" not in page


def test_report_names_every_run_commit_and_checkpoint(holed):
    page = holed[1].read_text()
    assert all(cell.id in page for cell in SWEEP.cells())
    assert "0123456789ab" in page


def test_report_writes_every_file_and_renders_the_same_bytes_again(holed):
    place, page = holed
    names = {path.name for path in page.parent.iterdir()}
    for stems, suffixes in (("table robustness", ".md .tex .csv .html"), ("dots curves dots_narrow", ".svg .png")):
        assert {stem + suffix for stem in stems.split() for suffix in suffixes.split()} <= names
    assert {"panels_rgb_missing.png", "panels_thermal_missing.png", "index.html"} <= names
    again = report.report("invented", SWEEP, place / "runs", place / "again").parent
    assert all((again / name).read_bytes() == (page.parent / name).read_bytes() for name in names)


def test_report_says_when_a_gain_is_within_noise_and_when_nothing_beats_the_baseline(tmp_path):
    two(tmp_path / "noise", {"a": [80, 90, 70], "b": [81, 88, 72]})
    study = read(TWO, tmp_path / "noise")
    said = " ".join(report.answer(study, tables.Comparison(study, np.random.default_rng(0))))
    assert "within noise, and no gain has been shown" in said
    two(tmp_path / "loss", {"a": [80, 90, 70], "b": [60, 70, 50]})
    study = read(TWO, tmp_path / "loss")
    said = report.answer(study, tables.Comparison(study, np.random.default_rng(0)))
    assert said[0].startswith("Nothing beats the baseline")


def test_report_without_a_baseline_states_no_gain(tmp_path):
    two(tmp_path, {"a": [], "b": [80, 81, 82]})
    page = report.report("two", TWO, tmp_path, tmp_path / "reports").read_text()
    assert "has not been run, so no gain can be stated" in page


def test_report_of_nothing_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="crm sweep two"):
        report.report("two", TWO, tmp_path, tmp_path / "reports")


def test_analysis_never_imports_torch():
    check = "import sys, analysis.report; sys.exit(bool({'torch', 'timm', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
