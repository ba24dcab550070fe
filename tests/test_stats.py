"""What the statistics of tables promise: against SciPy and statsmodels, in planted cases, simulated."""

import os

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from analysis.load import read
from analysis.stats import (
    Cache,
    Estimate,
    against_published,
    best_rows,
    bootstrap_miou,
    fixed_miou,
    gain_interval,
    hierarchical_percentile,
    hierarchical_studentised,
    holm,
    image_draws,
    more_seeds,
    over_seeds,
    over_seeds_and_images,
    paired,
    paired_files,
    power,
    rare,
    recording_draws,
    seeds_needed,
    spread,
    stray,
)
from analysis.tables import Comparison, ablation, shown_ablation
from benchmarks.coverage import Planted, covered
from crm.conditions import CLEAN_TEST
from crm.config import override
from crm.confusion import iou, miou
from crm.data.recordings import recording
from crm.records import evaluation
from crm.sweep import Sweep
from experiments.synthetic_tiny import config
from tests.analysis_fixture import evaluated, trained

KNOWN = np.array([0.4, 0.9, -0.1, 0.7, 0.6])
FEW = np.array([0.5, 0.9, 0.7])


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def matrices(images: int = 12, classes: int = 4, seed: int = 0) -> np.ndarray:
    """Per-image matrices whose labels are the same whatever the seed."""
    label = np.random.default_rng(99).integers(20, 60, (images, classes, 1))
    share = np.random.default_rng(seed).dirichlet(np.ones(classes), (images, classes))
    return np.floor(label * share).astype(int) + 5 * np.eye(classes, dtype=int)


# ---------------------------------------------------------------------------------------------- seeds


def test_the_interval_and_p_value_over_seeds_are_students():
    theirs = scipy_stats.ttest_1samp(KNOWN, 0.2)
    found = over_seeds(KNOWN)
    interval = found.interval()
    assert interval
    assert (interval.low, interval.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert found.p(0.2) == pytest.approx(theirs.pvalue)


def test_a_paired_gain_is_tested_as_a_paired_t_test():
    subject, reference = pd.Series([60.1, 61.0, 59.7]), pd.Series([59.5, 60.7, 59.6])
    theirs = scipy_stats.ttest_rel(subject, reference)
    assert over_seeds(subject - reference).p() == pytest.approx(theirs.pvalue)


def test_one_seed_has_no_interval_over_seeds_and_speaks_of_images_alone():
    assert over_seeds([50.0]).interval() is None and np.isnan(over_seeds([50.0]).p())
    one = over_seeds_and_images([1.0], spread(rng().normal(1.0, 0.2, (1, 500)), 100))
    interval = one.interval()
    assert interval and interval.over == "test images"
    assert over_seeds([]).interval() is None


def test_what_images_change_for_all_seeds_alike_widens_the_interval_and_what_seeds_have_already_does_not():
    common, own = rng().normal(0, 0.3, 4000), rng().normal(0, 0.3, (3, 4000))
    alike = over_seeds_and_images(FEW, spread(np.tile(common, (3, 1)), 400))
    apart = over_seeds_and_images(FEW, spread(own, 400))
    assert alike.image == pytest.approx(0.09, rel=0.06)
    assert apart.image == pytest.approx(0.0, abs=0.003)
    assert alike.seed == apart.seed == pytest.approx(np.var(FEW, ddof=1) / 3)


def test_an_interval_of_two_parts_lies_between_students_for_each():
    found = Estimate(1.0, 0.4, 3, 0.05, 50, "x")
    assert scipy_stats.t.ppf(0.975, 49) < found.quantile() < scipy_stats.t.ppf(0.975, 2)
    seeds_alone = Estimate(1.0, 0.4, 3, 0.0, 50, "x")
    assert seeds_alone.quantile() == pytest.approx(scipy_stats.t.ppf(0.975, 2))


@pytest.mark.parametrize("against", [0.0, 0.9, 1.0, -3.0])
def test_a_p_value_is_the_level_whose_interval_ends_at_what_is_tested(against):
    found = Estimate(1.0, 0.4, 4, 0.02, 100, "x")
    interval = found.interval(1 - found.p(against))
    assert interval
    end = interval.low if against <= 1.0 else interval.high
    assert end == pytest.approx(against, abs=1e-6)


def test_the_larger_spread_counts_and_too_few_recordings_do_not():
    draws = rng().normal(0, 1, 500)
    small, large = spread(np.tile(0.1 * draws, (3, 1)), 300), spread(np.tile(0.4 * draws, (3, 1)), 20)
    few = spread(np.tile(2.0 * draws, (3, 1)), 4)
    assert over_seeds_and_images(FEW, small, large, few).units == 20
    assert over_seeds_and_images(FEW, small, few).units == 300
    alone = over_seeds_and_images(FEW, spread(np.tile(draws, (3, 1)), 1))
    assert np.isnan(alone.image), "one recording tells nothing of another"


def test_gains_that_are_all_the_same_are_certain():
    constant = gain_interval(np.full(3, 2.0), np.full((3, 100), 2.0), 50)
    assert (constant.low, constant.high, constant.verdict) == pytest.approx((2.0, 2.0, "gain"))
    assert over_seeds(np.full(3, 2.0)).p() == 0.0 and over_seeds(np.zeros(3)).p() == 1.0


# ---------------------------------------------------------------------------------------------- many at once


def test_holm_is_statsmodels_and_leaves_out_what_has_no_p_value():
    p = [0.01, 0.04, 0.03, 0.005, 0.8]
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([0.02, np.nan, 0.01])[[0, 2]] == pytest.approx([0.02, 0.02])
    assert np.isnan(holm([0.02, np.nan])[1])


def test_every_row_that_is_not_significantly_worse_is_best():
    means = {"a": 60.0, "b": 59.8, "c": 50.0, "hole": np.nan, "unpaired": 59.9}
    against = {"b": over_seeds([-0.5, 0.3, -0.4]), "c": over_seeds([-10.0, -10.1, -9.9])}
    assert best_rows(means, against) == ["a", "b"]
    assert best_rows({"a": np.nan}, {}) == []


def test_the_correction_keeps_a_row_that_a_single_test_would_drop():
    worse = over_seeds([-1.0, -2.0, -3.0, -1.5])  # p is about 0.02
    assert 0.01 < worse.p() < 0.05
    rows = {f"row {i}": over_seeds([-1.0, 1.1, 0.2, -0.4]) for i in range(4)}
    means = {"best": 10.0, "worse": 8.0, **dict.fromkeys(rows, 9.9)}
    assert "worse" not in best_rows({"best": 10.0, "worse": 8.0}, {"worse": worse})
    assert "worse" in best_rows(means, {"worse": worse, **rows})


# ---------------------------------------------------------------------------------------------- images


def test_the_whole_split_has_the_miou_that_records_have():
    assert fixed_miou(matrices()) == pytest.approx(miou(matrices().sum(axis=0)))


def test_a_class_predicted_and_nowhere_labelled_is_in_no_mean_and_is_told():
    confusion = np.array([[[8, 0, 2], [0, 10, 0], [0, 0, 0]]])
    assert stray(confusion) == [2] and stray(confusion[:, :2, :2]) == []
    assert fixed_miou(confusion) == pytest.approx((80 + 100) / 2)
    assert miou(confusion.sum(axis=0)) == pytest.approx((80 + 100 + 0) / 3), "records count it as 0"


def test_rare_classes_are_those_that_few_images_have_and_can_be_left_out():
    confusion = matrices(30, 3)
    confusion[:, 2, :] = 0
    confusion[4, 2, 2] = 3
    assert rare(confusion) == [2] and rare(confusion, below=1) == []
    assert rare(matrices(6, 3)) == [], "a small test set does not make every class rare"
    kept = miou(confusion.sum(axis=0)[None])
    ones = np.ones((1, 30), int)
    two = iou(confusion.sum(axis=0))[:2]
    assert bootstrap_miou(confusion, ones, without=[2])[0] == pytest.approx(np.mean(two)) != kept


def test_draws_are_those_of_the_matrices_summed_one_by_one():
    confusion, counts = matrices(), image_draws(12, 20, rng())
    slow = [miou(np.repeat(confusion, count, axis=0).sum(axis=0)) for count in counts]
    assert bootstrap_miou(confusion, counts) == pytest.approx(slow)


def test_a_recording_is_drawn_as_a_whole():
    counts = recording_draws(["a", "a", "b", "b", "b", "c"], 200, rng())
    assert (counts[:, 0] == counts[:, 1]).all() and (counts[:, 2] == counts[:, 4]).all()
    assert (counts[:, [0, 2, 5]].sum(axis=1) == 3).all()


@pytest.mark.parametrize(
    ("name", "dataset", "expected"),
    [
        ("01402D", "mf", "D70"),
        ("01419D", "mf", "D70"),
        ("01420D", "mf", "D71"),
        ("00044N_flip", "mf", "N2"),
        ("set07_V001_I00050", "kp", "set07"),
        ("31_bag1a_rect_rgb_frame0000000007", "pst900", "31_bag1a"),
        ("00003N", "synthetic", "00003N"),
        ("whatever", "a data set of one's own", "whatever"),
    ],
)
def test_a_frames_name_tells_its_recording(name, dataset, expected):
    assert recording(name, dataset) == expected


# ---------------------------------------------------------------------------------------------- pairs and the cache


def runs(shift: int = 0, seeds=(0, 1, 2)) -> dict[int, list[np.ndarray]]:
    return {seed: [matrices(seed=10 * seed + shift)] for seed in seeds}


NAMES = [f"{i}" for i in range(12)]


def test_pairs_take_seeds_that_both_rows_have_and_are_none_without():
    pairs = paired(runs(1, (0, 1, 2)), runs(2, (1, 2, 3)), NAMES)
    assert pairs and pairs.seeds == [1, 2]
    expected = [
        miou(matrices(seed=10 * s + 1).sum(axis=0)) - miou(matrices(seed=10 * s + 2).sum(axis=0)) for s in (1, 2)
    ]
    assert pairs.gains == pytest.approx(expected)
    assert paired(runs(1, (0,)), runs(2, (1,)), NAMES) is None


def test_pairs_of_one_seed_have_an_interval_over_images_alone():
    pairs = paired(runs(1, (0,)), runs(2, (0,)), NAMES)
    assert pairs and pairs.this_test_set.interval() is None
    offered = pairs.offered.interval()
    assert offered and offered.over == "test images"


def test_pairs_over_conditions_are_reduced_in_every_draw():
    both = {0: [matrices(seed=1), matrices(seed=2)]}
    other = {0: [matrices(seed=3), matrices(seed=4)]}
    worst = paired(both, other, NAMES, reduce="min")
    assert worst
    expected = min(map(fixed_miou, both[0])) - min(map(fixed_miou, other[0]))
    assert worst.gains[0] == pytest.approx(expected)


def test_a_rare_class_has_a_companion_without_it():
    rows = runs(1), runs(2)
    for row in rows:
        for run in row.values():
            run[0][:, 3, :] = 0
            run[0][2, 3, 3] = 5
    pairs = paired(*rows, NAMES)
    assert pairs and pairs.rare == [3]
    without = [fixed_miou(rows[0][s][0], [3]) - fixed_miou(rows[1][s][0], [3]) for s in (0, 1, 2)]
    assert pairs.without_rare == pytest.approx(without)


def test_a_cached_pair_opens_no_evaluation_and_changed_evidence_is_computed_anew(tmp_path):
    rows = []
    for row in ("subject", "reference"):
        for seed in (0, 1, 2):
            evaluated(tmp_path / row / str(seed), CLEAN_TEST, matrices(seed=10 * seed + len(row)))
        rows.append({s: [evaluation(tmp_path / row / str(s), "last", CLEAN_TEST)] for s in (0, 1, 2)})
    cache = Cache(tmp_path / "cache")
    first = paired_files(*rows, cache, draws=200)
    path = rows[0][0][0]
    stat = path.stat()
    with path.open("r+b") as file:  # unreadable, with the same size and time: whoever opens it fails
        file.write(b"\0" * 100)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = paired_files(*rows, cache, draws=200)
    assert first and again
    assert again.gains == pytest.approx(first.gains)
    assert again.images.covariance == pytest.approx(first.images.covariance)
    evaluated(tmp_path / "subject/0", CLEAN_TEST, matrices(seed=77))
    changed = paired_files(*rows, cache, draws=200)
    assert changed and changed.gains[0] != pytest.approx(first.gains[0])
    assert changed.gains[1:] == pytest.approx(first.gains[1:])


# ---------------------------------------------------------------------------------------------- power


@pytest.mark.parametrize(("effect", "sd", "seeds"), [(0.5, 0.41, 7), (0.3, 0.8, 20), (1.0, 0.5, 3)])
def test_power_is_that_of_statsmodels(effect, sd, seeds):
    theirs = TTestPower().power(effect / sd, seeds, 0.05, alternative="two-sided")
    assert power(effect, sd, seeds) == pytest.approx(theirs, abs=1e-6)


def test_the_seeds_needed_are_the_fewest_that_statsmodels_calls_enough():
    exact = TTestPower().solve_power(0.5 / 0.41, power=0.8, alpha=0.05, alternative="two-sided")
    assert seeds_needed(0.5, 0.41) == int(np.ceil(exact))


def test_no_number_of_seeds_decides_what_too_few_images_blur():
    found = Estimate(0.3, 0.4, 5, 0.04, 393, "x")
    more = more_seeds(found)
    assert more.seeds is None and "test images are too few" in more.why
    assert more_seeds(Estimate(0.3, 0.4, 5, float("nan"), 0, "x")).seeds == seeds_needed(0.3, 0.4) - 5
    assert more_seeds(Estimate(0.5, 0.4, 5, 0.0, 9, "x"), 0.5).seeds is None


def test_fewer_than_three_seeds_ask_for_three_first():
    assert more_seeds(over_seeds([0.5])).seeds == 2
    assert more_seeds(over_seeds([])).seeds == 3


# ---------------------------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([59.0, 59.2, 59.1], 59.1, "reproduced"),
        ([63.0, 63.2, 63.1], 59.1, "reproduced"),
        ([57.0, 59.5, 60.5], 59.1, "within noise"),
        ([50.0, 50.5, 49.5], 59.1, "not reproduced"),
        ([58.5], 59.1, "within noise"),
        ([20.0], 59.1, "not reproduced"),
        ([59.1], 59.1, "within noise"),
    ],
)
def test_the_verdict_on_a_published_number(ours, theirs, verdict):
    found = against_published(np.array(ours), theirs)
    assert found and found.verdict == verdict
    assert found.difference == pytest.approx(np.mean(ours) - theirs)


def test_another_protocol_is_not_comparable_and_says_why():
    found = against_published(np.array([59.0, 59.1]), 59.1, ["the checkpoint was chosen on test there"])
    assert found and found.verdict.startswith("not comparable") and "chosen on test" in found.why
    assert against_published(np.array([]), 59.1) is None


# ---------------------------------------------------------------------------------------------- coverage


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("planted", [Planted(seed=0.3, image=0.5), Planted(seed=0.8, image=0.2),
                                     Planted(seed=0.5, image=0.3, alike=0.1)])  # fmt: skip
def test_the_interval_that_tables_offer_covers(seeds, planted):
    shares = covered(planted, seeds, 5000, np.random.default_rng(seeds), ("offered", "this test set"))
    assert shares["offered"] >= 0.93
    assert shares["this test set"] >= 0.93


def test_a_percentile_bootstrap_of_three_seeds_does_not_cover():
    shares = covered(Planted(seed=0.8, image=0.2), 3, 300, rng(), ("percentile",))
    assert shares["percentile"] < 0.9


def test_a_studentised_interval_of_one_seed_is_over_images():
    drawn = rng().normal(1, 0.1, (1, 500))
    assert hierarchical_studentised(np.array([1.0]), drawn, 50, rng()).over == "test images"
    assert hierarchical_percentile(drawn, rng()).over == "test images"


# ---------------------------------------------------------------------------------------------- in tables


ROWS = {"a": {"loss.rgb": 0.5}, "b": {"loss.rgb": 0.6}, "c": {}}


def table_of(runs, right: dict[str, list[int]], images: int = 12, dataset: str = "synthetic"):
    """The ablation table of rows whose networks get so many of 100 pixels right, one number per seed."""
    base = override(config, {"data.test_images": images})
    sweep = Sweep(title="?", base=base, variants=ROWS, seeds=(0, 1, 2), suite="clean")
    for cell in sweep.cells():
        if cell.seed < len(right[cell.variant]):
            hits = right[cell.variant][cell.seed]
            matrix = np.array([[hits, 100 - hits], [100 - hits, hits]])
            names = [f"{i:05d}D" for i in range(images)]
            evaluated(trained(runs, cell), CLEAN_TEST, np.stack([matrix] * images), names, dataset)
    study = read(sweep, runs)
    table = ablation(study, Comparison(study, rng()))
    return table, shown_ablation(table, study)


def test_a_table_marks_all_that_are_not_worse_and_corrects_for_its_size(tmp_path):
    table, shown = table_of(tmp_path, {"a": [50, 52, 51], "b": [80, 83, 79], "c": [81, 80, 82]})
    assert table["clean.best"].tolist() == [False, True, True]
    assert [row[1][1].best for row in shown.rows] == [False, True, True]
    p = table["clean.p"].to_numpy()
    assert table["clean.p_holm"].to_numpy()[1:] == pytest.approx(multipletests(p[1:], method="holm")[1])
    assert any("Holm" in note and "2 gains" in note for note in shown.notes)


def test_a_table_without_enough_recordings_says_what_its_intervals_take_for_granted(tmp_path):
    right = {"a": [50, 52, 51], "b": [60, 61, 59], "c": [61, 60, 62]}
    _, known = table_of(tmp_path / "synthetic", right, images=30)
    _, few = table_of(tmp_path / "mf", right, images=30, dataset="mf")
    assert not any("recordings" in note for note in known.notes)
    assert any("30 test images are of 2 recordings" in note for note in few.notes)


def test_one_seed_is_never_given_a_deviation(tmp_path):
    table, shown = table_of(tmp_path, {"a": [50], "b": [60], "c": []})
    assert table["clean.sd"].isna().all()
    assert not any("±" in entry.value for _, row in shown.rows for entry in row)
    assert "test images" in table.loc["b", "clean.over"] and "seeds" not in table.loc["b", "clean.over"]


def test_one_run_on_one_image_is_no_gain(tmp_path):
    table, shown = table_of(tmp_path, {"a": [50], "b": [60], "c": []}, images=1)
    assert table.loc["b", "clean.pairs"] == 0 and table.loc["b", "clean.mean"] > 0
    assert not any(entry.gain for _, row in shown.rows for entry in row[:2])
