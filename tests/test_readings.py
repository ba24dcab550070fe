"""What some sweeps' reports show besides their tables: breaking points, interactions, matrices, costs, groups."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares

from analysis.load import read
from analysis.readings import cost, cross, dose, interaction, shared_miou
from analysis.report import report
from analysis.stats import broken_stick, dose_at, dose_axis, seed_means
from analysis.tables import Comparison
from crm.conditions import CLEAN_TEST
from crm.config import override
from crm.confusion import Evaluation, confusion_matrix, iou
from crm.data.mapping import mapping
from crm.data.specs import KP, MF
from crm.records import write_json
from crm.sweep import Sweep
from experiments.synthetic_tiny import config
from tests.analysis_fixture import Invented, evaluated, fabricate, trained

RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ---------------------------------------------------------------------------------------------- the broken line


def test_a_broken_line_is_found_where_it_bends():
    x = np.array(RATIOS)
    at, slope = broken_stick(x, (60 - 80 * np.maximum(0, x - 0.53))[:, None])
    assert at[0] == pytest.approx(0.53, abs=0.005) and slope[0] == pytest.approx(80, rel=0.02)


def test_doses_of_a_wide_spread_lie_evenly_and_others_as_they_are():
    weights = np.array([0.0, 0.1, 1.0, 10.0, 30.0])
    assert dose_axis(weights, weights) == pytest.approx([0, 1, 2, 3, 1 + np.log10(300)])
    assert dose_at(dose_axis(weights, weights), weights) == pytest.approx(weights)
    ratios = np.array(RATIOS)
    assert np.array_equal(dose_axis(ratios, ratios), ratios) and np.array_equal(dose_at(ratios, ratios), ratios)
    patches = np.array([4.0, 8.0, 16.0, 32.0, 64.0])
    assert np.diff(dose_axis(patches, patches)) == pytest.approx([np.log10(2)] * 4)


def test_a_weight_that_breaks_is_found_on_a_logarithmic_axis(tmp_path):
    """Level up to 1 and 30 points lower per factor of ten beyond: on a linear axis the bend would lie elsewhere."""
    weights = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    rows = {f"weight {weight:g}": {"loss.complementary": weight} for weight in weights}
    base = override(config, {"data.test_images": 12})
    sweep = Sweep(title="?", base=base, variants=rows, seeds=(0, 1, 2), suite="missing", dose="loss.complementary")
    fabricate(tmp_path, sweep, {
        f"weight {w:g}": Invented(0.85 - (0.3 * np.log10(w) if w > 1 else 0.0), 0.2, 0.2) for w in weights
    })  # fmt: skip
    study = read(sweep, tmp_path)
    found = dose(study, Comparison(study, rng()))
    assert found
    clean = found.table.loc["clean"]
    assert clean["low"] <= clean["break"] <= clean["high"] and 0.5 < clean["break"] < 2.0


def test_a_noisy_broken_line_is_fitted_as_scipy_fits_it():
    x, noise = np.linspace(0, 1, 21), rng().normal(0, 1, (21, 5))
    y = (50 - 40 * np.maximum(0, x - 0.6))[:, None] + noise
    at, slope = broken_stick(x, y, places=2000)
    for draw in range(5):

        def miss(p: np.ndarray, one: np.ndarray = y[:, draw]) -> np.ndarray:
            return p[0] - p[1] * np.maximum(0, x - p[2]) - one

        starts = [least_squares(miss, [50, 30, bend]) for bend in (0.4, 0.5, 0.6, 0.7)]
        best = min(starts, key=lambda fit: fit.cost).x
        assert (slope[draw], at[draw]) == pytest.approx((best[1], best[2]), rel=0.02, abs=0.005)


def test_the_same_seeds_are_drawn_for_all_rows():
    drawn = np.stack([np.full((3, 50), 1.0) * [[1], [2], [3]], 10 + np.full((3, 50), 1.0) * [[1], [2], [3]]])
    low, high = seed_means(drawn, rng())
    assert len(set(low)) > 1 and np.allclose(high - low, 10)


# ---------------------------------------------------------------------------------------------- dose


def by_ratio(ratios=RATIOS, **settings) -> Sweep:
    rows = {f"ratio {ratio:g}": {"masking.ratio": ratio} for ratio in ratios}
    base = override(config, {"data.test_images": 12})
    return Sweep(title="How much?", base=base, variants=rows, seeds=(0, 1, 2), suite="missing", dose="masking.ratio",
                 **settings)  # fmt: skip


def test_a_breaking_point_is_estimated_with_an_interval_around_it(tmp_path):
    sweep = by_ratio()
    quality = {ratio: 0.85 - 1.5 * max(0.0, ratio - 0.5) for ratio in RATIOS}
    fabricate(tmp_path, sweep, {f"ratio {r:g}": Invented(q, 0.2, 0.2) for r, q in quality.items()})
    study = read(sweep, tmp_path)
    found = dose(study, Comparison(study, rng()))
    assert found
    clean = found.table.loc["clean"]
    assert clean["low"] <= clean["break"] <= clean["high"]
    assert 0.4 < clean["break"] < 0.65 and clean["high"] - clean["low"] < 0.3
    assert clean["below"] == 0.6
    assert clean["mean.0.9"] < clean["mean.0.2"]
    assert {"rgb_head", "thermal_head"} <= set(found.table.index), "heads on one modality's features stand beside it"
    assert len(found.figures) == 2


def test_a_bend_that_may_lie_beyond_the_last_value_but_one_has_an_interval_up_to_the_last(tmp_path):
    sweep = by_ratio()
    quality = {ratio: 0.85 if ratio < 0.9 else 0.4 for ratio in RATIOS}
    fabricate(tmp_path, sweep, {f"ratio {r:g}": Invented(q, 0.2, 0.2) for r, q in quality.items()})
    study = read(sweep, tmp_path)
    found = dose(study, Comparison(study, rng()))
    assert found
    clean = found.table.loc["clean"]
    assert clean["break"] == pytest.approx(0.8, abs=0.02) and clean["high"] == pytest.approx(0.9)


def test_no_breaking_point_is_claimed_where_nothing_falls(tmp_path):
    sweep = by_ratio()
    fabricate(tmp_path, sweep, {row: Invented(0.8, 0.2, 0.2) for row in sweep.variants})
    study = read(sweep, tmp_path)
    found = dose(study, Comparison(study, rng()))
    assert found and found.table.loc["clean", ["break", "low", "high"]].isna().all()
    assert found.shown.rows[0][1][1].value == "—"


def test_a_sweep_without_a_dose_and_one_without_runs_have_no_curve(tmp_path):
    study = read(by_ratio(), tmp_path)
    assert dose(study, Comparison(study, rng())) is None
    plain = read(replace(by_ratio(), dose=""), tmp_path)
    assert dose(plain, Comparison(plain, rng())) is None


# ---------------------------------------------------------------------------------------------- interaction


def four(runs: Path, right: dict[str, list[int]]) -> Sweep:
    """Four rows, whose networks get so many of 100 pixels right, one number per seed."""
    rows = {row: {"masking.ratio": 0.1 * n} for n, row in enumerate(right, 1)}
    seeds = tuple(range(len(right["both"])))
    sweep = Sweep(title="?", base=config, variants=rows, seeds=seeds, suite="clean",
                  interaction=("neither", "one", "other", "both"))  # fmt: skip
    for cell in sweep.cells():
        hits = right[cell.variant][cell.seed]
        matrix = np.array([[hits, 100 - hits], [100 - hits, hits]])
        evaluated(trained(runs, cell), CLEAN_TEST, np.stack([matrix] * 8))
    return sweep


def test_parts_that_add_up_have_no_interaction_and_others_have_theirs(tmp_path):
    def points(hits: int) -> float:
        return 100 * hits / (200 - hits)

    right = {"neither": [50, 52], "one": [60, 62], "other": [58, 60], "both": [61, 63]}
    study = read(four(tmp_path, right), tmp_path)
    found = interaction(study, Comparison(study, rng()))
    assert found
    each = [points(right["both"][s]) - points(right["one"][s]) - points(right["other"][s]) + points(right["neither"][s])
            for s in (0, 1)]  # fmt: skip
    assert found.table.loc["clean", "interaction"] == pytest.approx(np.mean(each))
    assert found.table.loc["clean", "high"] < 0 and found.shown.rows[0][1][2].value == "less than the sum"


def test_an_interaction_takes_four_rows_that_exist():
    rows = {"a": {}, "b": {"masking.ratio": 0.3}}
    with pytest.raises(ValueError, match="four rows"):
        Sweep(title="?", base=config, variants=rows, seeds=(0,), interaction=("a", "b"))
    with pytest.raises(ValueError, match="'c' is no variant"):
        Sweep(title="?", base=config, variants=rows, seeds=(0,), interaction=("a", "b", "a", "c"))


# ---------------------------------------------------------------------------------------------- data sets


def test_home_and_away_are_scored_on_the_same_classes():
    """A prediction of KP's classes, stored whole at home, scores as the mapping to MF's shared classes says."""
    rows = rng()
    label, guess = (rows.integers(0, KP.num_classes, 4000).astype(np.uint8) for _ in range(2))
    guess = np.where(rows.random(4000) < 0.7, label, guess).astype(np.uint8)
    whole = confusion_matrix(label, guess, KP.num_classes, 255)[None]
    shared = mapping(MF, KP)
    assert shared
    by_label = np.array([shared.labels[i] for i in range(KP.num_classes)])
    small = confusion_matrix(by_label[label], by_label[guess], len(shared.classes), 255)
    nothing = (np.array(["a"]), np.array([False]), None)
    home = Evaluation(whole, *nothing, {"classes": list(KP.classes)})
    away = Evaluation(small[None], *nothing, {"classes": list(shared.classes)})
    common = ["car", "person", "bike"]
    expected = float(np.mean(iou(small)[1:]))
    assert shared_miou(home, "kp", common) == pytest.approx(expected)
    assert shared_miou(away, "kp", common) == pytest.approx(expected)


def test_nothing_evaluated_elsewhere_and_no_wish_for_it_is_no_matrix(tmp_path):
    assert cross(read(by_ratio(), tmp_path)) is None
    assert cross(read(replace(by_ratio(), also_on=("synthetic",)), tmp_path)) is None


# ---------------------------------------------------------------------------------------------- cost, groups


def test_costs_are_set_against_the_baselines(tmp_path):
    sweep = by_ratio((0.0, 0.5), measured=True)
    numbers = {"parameters": 2e6, "multiply_adds": 3e9, "latency_seconds": 0.01, "inference_bytes": None,
               "training_bytes": None, "batch": 4, "size": [64, 96], "device": "cpu", "threads": 1}  # fmt: skip
    assert cost(read(sweep, tmp_path)) is None
    for cell in sweep.cells():
        times = 1 if cell.variant == "ratio 0" else 3
        made = {**numbers, "training_operations": times * 1e10, "step_seconds": times * 0.2}
        write_json(trained(tmp_path, cell) / "overhead.json", made)
    found = cost(read(sweep, tmp_path))
    assert found and "inference: memory, GiB" not in found.shown.head, "a CPU's memory is not measured"
    row = dict(zip(found.shown.head, (entry.value for entry in found.shown.rows[1][1]), strict=True))
    assert row["training: step, s"] == "0.6 (3.00 ×)" and row["parameters, M"] == "2 (1.00 ×)"


def test_groups_are_compared_within_themselves_and_may_have_other_images(tmp_path):
    """Two groups of frames of other sizes: their images are others, and so are what gains are measured against."""
    wide = {"data.size": (64, 96), "data.test_images": 6}
    rows = {"A, base": {**wide, "masking.ratio": 0.1}, "A, more": {**wide, "masking.ratio": 0.2},
            "B, base": {"masking.ratio": 0.3}, "B, more": {"masking.ratio": 0.4}}  # fmt: skip
    groups = {"A": ["A, base", "A, more"], "B": ["B, base", "B, more"]}
    sweep = Sweep(title="Groups?", base=config, variants=rows, seeds=(0, 1), suite="missing", groups=groups)
    good = {"A, base": 0.5, "A, more": 0.6, "B, base": 0.85, "B, more": 0.95}
    fabricate(tmp_path / "runs", sweep, {row: Invented(clean, 0.2, 0.2) for row, clean in good.items()})
    page = report("groups", sweep, tmp_path / "runs", tmp_path / "out").read_text()
    table = pd.read_csv(tmp_path / "out/groups/table.csv").set_index("variant")
    assert list(table["group"]) == ["A", "A", "B", "B"]
    assert table["clean.gain"].notna().tolist() == [False, True, False, True]
    assert "A: “A, more”" in page and "B: “B, more”" in page
    assert "Data, A" in page and "6 images" in page and "8 images" in page
    assert (tmp_path / "out/groups/table.md").read_text().count("## ") == 2


def test_rows_that_are_left_out_are_told_on_the_page(tmp_path):
    sweep = replace(by_ratio((0.0, 0.5)), left_out={"ratio 2": "there is no <such> ratio"})
    fabricate(tmp_path / "runs", sweep, {row: Invented(0.8, 0.2, 0.2) for row in sweep.variants})
    page = report("left", sweep, tmp_path / "runs", tmp_path / "out").read_text()
    assert "ratio 2: there is no &lt;such&gt; ratio" in page
    assert (tmp_path / "out/left/dose.csv").exists() and "Where it breaks" in page


def test_groups_must_hold_every_row_once():
    rows = {"a": {}, "b": {"masking.ratio": 0.3}}
    with pytest.raises(ValueError, match="every variant once"):
        Sweep(title="?", base=config, variants=rows, seeds=(0,), groups={"A": ["a"]})
