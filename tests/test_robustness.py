"""Metrics of robustness, each against a calculation by hand."""

from itertools import product

import numpy as np
import pytest

from crm import robustness
from crm.conditions import CLEAN_TEST, MISSING, SUITES, condition, on
from crm.confusion import Evaluation
from crm.robustness import Family

FOG = [condition(f"test.rgb=fog-{level}") for level in range(1, 6)]
NETD = [condition(f"test.thermal=netd_noise-{level}") for level in range(1, 6)]


def scored(**values: float):
    """Scores of clean, RGB missing and thermal missing."""
    names = {"clean": CLEAN_TEST, "rgb": MISSING[0], "thermal": MISSING[1]}
    return {names[name]: value for name, value in values.items()}


# ---------------------------------------------------------------------------------------------- corruptions

OWN = {CLEAN_TEST: 60.0, **dict(zip(FOG, (50.0, 40.0, 30.0, 20.0, 10.0), strict=True)),
       **dict(zip(NETD, (60.0, 55.0, 50.0, 45.0, 40.0), strict=True))}  # fmt: skip
REFERENCE = {CLEAN_TEST: 50.0, **dict(zip(FOG, (40.0, 30.0, 20.0, 10.0, 0.0), strict=True)),
             **dict(zip(NETD, [50.0] * 5, strict=True))}  # fmt: skip


def test_mpc_is_the_mean_over_corruptions_of_the_mean_over_severities():
    assert robustness.mpc(OWN) == pytest.approx((30 + 50) / 2)
    assert robustness.retention(OWN) == pytest.approx(100 * 40 / 60)
    assert np.isnan(robustness.mpc({CLEAN_TEST: 60.0}))


def test_mcd_compares_what_is_wrong_with_that_of_the_reference():
    fog = (50 + 60 + 70 + 80 + 90) / (60 + 70 + 80 + 90 + 100)
    netd = (40 + 45 + 50 + 55 + 60) / (5 * 50)
    assert robustness.mcd(OWN, REFERENCE) == pytest.approx(100 * (fog + netd) / 2)
    assert robustness.mcd(REFERENCE, REFERENCE) == pytest.approx(100)


def test_rcd_compares_what_is_lost_from_the_clean_score():
    fog_alone = {c: s for c, s in OWN.items() if c not in NETD}
    assert robustness.rcd(fog_alone, REFERENCE) == pytest.approx(
        100 * (10 + 20 + 30 + 40 + 50) / (10 + 20 + 30 + 40 + 50)
    )
    assert np.isnan(robustness.rcd(OWN, REFERENCE)), "a reference that loses nothing has no ratio"


def test_a_corruption_with_a_missing_severity_has_no_mean():
    with pytest.raises(ValueError, match=r"rgb fog: .*needs severities 1 to 5, not .1.0, 2.0, 3.0, 5.0"):
        robustness.mpc({c: s for c, s in OWN.items() if c != FOG[3]})


# ---------------------------------------------------------------------------------------------- curves

POINTS = [(0.0, 60.0), (0.5, 54.0), (1.0, 10.0)]


def test_the_area_is_that_of_trapezoids_over_the_clean_score_and_the_range():
    assert robustness.area(POINTS, 60.0) == pytest.approx(100 * (0.5 * 57 + 0.5 * 32) / 60)
    assert robustness.area([(10.0, 60.0), (50.0, 60.0)], 60.0) == pytest.approx(100)
    with pytest.raises(ValueError, match="two points"):
        robustness.area(POINTS[:1], 60.0)


def test_where_a_curve_falls_is_found_on_the_line_between_its_points():
    assert robustness.kept(POINTS, 60.0, 0.9) == pytest.approx(0.5)
    assert robustness.kept(POINTS, 60.0, 0.5) == pytest.approx(0.5 + 0.5 * (54 - 30) / 44)
    assert robustness.crossing(POINTS, 57.0) == pytest.approx(0.25)
    assert robustness.crossing(POINTS, 10.0) is None, "it only comes to that score at the end"
    assert robustness.crossing(POINTS, 61.0) == 0, "the single modality is better all along"
    assert robustness.crossing([(0.0, 60.0), (0.5, 40.0), (0.7, 58.0), (1.0, 10.0)], 50.0) == pytest.approx(0.25)


def test_a_curve_of_patches_ends_with_the_modality_missing():
    found = robustness.families(SUITES["robustness"])
    steps = found[Family("rgb", "patch_dropout")]
    assert [x for x, _ in steps] == [0, 0.25, 0.5, 0.75, 1]
    assert (steps[0][1], steps[-1][1]) == (CLEAN_TEST, MISSING[0])
    assert [x for x, _ in found[Family("both", "gaussian_noise")]] == [0, 10, 25, 50]
    complementary = robustness.families(SUITES["dropout_curve"])[Family("complementary", "dropout")]
    assert [x for x, _ in complementary] == [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1]
    assert (complementary[0][1], complementary[-1][1]) == (MISSING[1], MISSING[0])


def test_two_different_corruptions_at_once_are_in_no_family():
    grid = {one for steps in robustness.families(SUITES["grid"]).values() for _, one in steps}
    assert all(one.rgb.kind == "clean" or one.thermal.kind == "clean" for one in grid)


# ---------------------------------------------------------------------------------------------- missing modalities


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.2, 0.7])
def test_the_expectation_is_that_of_modalities_missing_at_random_but_never_all(p):
    cases = robustness.subsets(scored(clean=60.0, rgb=20.0, thermal=50.0))
    assert robustness.expectation(cases, p) == pytest.approx(((1 - p) * 60 + p * 20 + p * 50) / (1 + p))
    drawn = {}
    for gone in product((False, True), repeat=2):  # by counting all cases
        if not all(gone):
            chance = np.prod([p if out else 1 - p for out in gone])
            drawn[frozenset(np.array(["rgb", "thermal"])[list(gone)].tolist())] = chance
    total = sum(drawn[gone] * cases[gone] for gone in cases) / sum(drawn.values())
    assert robustness.expectation(cases, p) == pytest.approx(total)


def test_the_published_four_modalities_have_the_same_formula():
    """Weights of Liao et al. for 15 subsets: p^|S| (1 - p)^(4 - |S|) over their sum."""
    names = "RDEL"
    cases = {
        frozenset(name for name, out in zip(names, gone, strict=True) if out): float(7 * sum(gone) + gone[0])
        for gone in product((0, 1), repeat=4)
        if not all(gone)
    }
    weights = {gone: 0.1 ** len(gone) * 0.9 ** (4 - len(gone)) for gone in cases}
    by_hand = sum(weights[gone] * cases[gone] for gone in cases) / sum(weights.values())
    assert len(cases) == 15
    assert robustness.expectation(cases, 0.1, modalities=4) == pytest.approx(by_hand)


def test_the_average_over_subsets_has_the_clean_score_in_it():
    assert robustness.average(robustness.subsets(scored(clean=60.0, rgb=20.0, thermal=50.0))) == pytest.approx(130 / 3)


def test_a_probability_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"below 1, not 1.0"):
        robustness.expectation({frozenset(): 60.0}, 1.0)


def test_the_gap_is_between_the_two_missing_modalities():
    assert robustness.reliance_gap(scored(clean=60.0, rgb=20.0, thermal=50.0)) == 30


def test_the_worst_case_is_about_what_the_network_is_given():
    routed = {condition("test.rgb=missing_route"): 1.0, condition("test.thermal=missing_token"): 0.5}
    assert robustness.worst({**scored(clean=60.0, rgb=20.0, thermal=50.0), **routed}) == (MISSING[0], 20.0)


def test_day_and_night_are_scored_from_what_is_stored():
    right, wrong = np.array([[9, 0], [0, 9]]), np.array([[0, 9], [9, 0]])
    found = Evaluation(
        confusion=np.stack([right, wrong]), names=np.array(["a_0D", "a_1N"]), night=np.array([False, True]),
        predictions=None, meta={"dataset": "synthetic", "condition": "test", "classes": ["a", "b"]},
    )  # fmt: skip
    assert robustness.scores_of({CLEAN_TEST: found}, "day") == {CLEAN_TEST: 100}
    assert robustness.scores_of({CLEAN_TEST: found}, "night") == {CLEAN_TEST: 0}


def test_the_summary_holds_what_the_conditions_allow():
    scores = {**OWN, **scored(rgb=20.0, thermal=50.0), condition("test.rgb=missing_route"): 45.0,
              condition("test.thermal=missing_route"): 35.0,
              **dict(zip(on("rgb", "patch_dropout", (0.25, 0.5, 0.75)), (58.0, 50.0, 40.0), strict=True))}  # fmt: skip
    found = robustness.summary(scores, REFERENCE)
    assert found["EMM E(0.1)"] == pytest.approx((0.9 * 60 + 0.1 * 20 + 0.1 * 50) / 1.1)
    assert found["mPC rgb"] == 30 and found["mPC thermal"] == 50 and found["mCD thermal"] == pytest.approx(100)
    assert found["worst"] == 10 and found["reliance gap"] == 30
    assert found["crossing rgb patch_dropout"] == pytest.approx(0.5 + 0.25 * 5 / 10), "45 is the better branch alone"
    assert found["kept 50% rgb patch_dropout"] == pytest.approx(0.75 + 0.25 * 10 / 20)
    assert "RMM 0.25 average" not in found
    assert robustness.summary({CLEAN_TEST: 60.0}) == {"clean": 60.0}
