"""Conditions, their names, and the confusion matrices and metrics that are stored per condition."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics

from crm.conditions import CLEAN, CLEAN_TEST, DEGRADATIONS, PICTURED, SUITES, Condition, Degradation, condition, suite
from crm.confusion import Evaluation, confusion_matrix, iou, load_evaluation, miou, save_evaluation

# ---------------------------------------------------------------------------------------------- conditions

VALUES = {
    "ALWAYS": st.just(0.0),
    "SHARES": st.floats(0.001, 0.999),
    "AMOUNTS": st.floats(0.001, 1e6),
    "THREE": st.sampled_from([1.0, 2.0, 3.0]),
    "LEVELS": st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0]),
}
degradations = st.sampled_from(sorted(DEGRADATIONS)).flatmap(
    lambda kind: st.builds(
        Degradation,
        kind=st.just(kind),
        severity=VALUES[DEGRADATIONS[kind]],
    )
)


def possible(rgb, thermal):
    both_missing = rgb.kind.startswith("missing") and thermal.kind.startswith("missing")
    return not both_missing and not rgb.kind == thermal.kind == "shift_with_label"


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_begins_with_the_clean_condition_and_names_each_condition_once(name):
    conditions = suite(name)
    assert conditions[0] == CLEAN_TEST
    assert len({one.name for one in conditions}) == len(conditions)


@pytest.mark.parametrize("name", SUITES)
def test_a_condition_of_a_suite_is_found_by_its_name(name):
    assert [condition(one.name) for one in suite(name)] == list(suite(name))


@given(
    split=st.sampled_from(["val", "test", "test_night"]),
    rgb=degradations,
    thermal=degradations,
    seed=st.integers(0, 10**6),
)
def test_two_conditions_never_share_a_name(split, rgb, thermal, seed):
    # The name is a file name and a column: a name that loses a digit would let one evaluation pass for another.
    if possible(rgb, thermal):
        one = Condition(split=split, rgb=rgb, thermal=thermal, seed=0 if rgb == thermal == CLEAN else seed)
        assert condition(one.name) == one
        assert re.fullmatch(r"[\w.=+-]+", one.name), "a file name anywhere"


def test_names_of_old_mean_what_they_meant():
    assert [one.name for one in SUITES["robustness"]] == [
        "test", "test.rgb=missing_mean", "test.thermal=missing_mean", "test.rgb=missing_zero",
        "test.thermal=missing_zero", "test.rgb=missing_token", "test.thermal=missing_token", "test.rgb=missing_route",
        "test.thermal=missing_route", "test.rgb=patch_dropout-0.25", "test.rgb=patch_dropout-0.5",
        "test.rgb=patch_dropout-0.75", "test.thermal=patch_dropout-0.25", "test.thermal=patch_dropout-0.5",
        "test.thermal=patch_dropout-0.75", "test.rgb=gaussian_noise-10", "test.rgb=gaussian_noise-25",
        "test.rgb=gaussian_noise-50", "test.thermal=gaussian_noise-10", "test.thermal=gaussian_noise-25",
        "test.thermal=gaussian_noise-50", "test.rgb=gaussian_noise-10.thermal=gaussian_noise-10",
        "test.rgb=gaussian_noise-25.thermal=gaussian_noise-25", "test.rgb=gaussian_noise-50.thermal=gaussian_noise-50",
    ]  # fmt: skip


def test_the_paper_suite_holds_all_others():
    assert all(set(conditions) <= set(SUITES["paper"]) for conditions in SUITES.values())


def test_names_are_read_without_the_library_of_corruptions():
    from crm.corruptions import CORRUPTIONS

    assert list(DEGRADATIONS) == list(CORRUPTIONS)
    code = "import sys, crm.conditions; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_the_name_leaves_clean_parts_out():
    assert CLEAN_TEST.name == "test"
    assert Condition(split="val", thermal=Degradation(kind="missing_mean")).name == "val.thermal=missing_mean"
    assert condition("test.rgb=clean") == CLEAN_TEST


def test_every_suite_but_the_plain_one_holds_the_conditions_that_are_pictured():
    assert all(set(PICTURED) <= set(suite(name)) for name in SUITES if name != "clean")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kind": "gaussian_nois"}, "Did you mean 'gaussian_noise'"),
        ({"kind": "gaussian_noise"}, "needs a severity: the severity is an amount above 0"),
        ({"kind": "fog", "severity": 6.0}, "fog-6: the severity is a whole number from 1 to 5"),
        ({"kind": "fog", "severity": 2.5}, "whole number from 1 to 5"),
        ({"kind": "nm", "severity": 4.0}, "1, 2 or 3"),
        ({"kind": "missing_mean", "severity": 1.0}, "has no severity"),
        ({"kind": "patch_dropout", "severity": 1.0}, "below 1"),
        ({"kind": "gaussian_noise", "severity": -3.0}, "above 0"),
    ],
)
def test_a_degradation_that_means_nothing_is_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Degradation(**settings)


def test_a_condition_cannot_take_both_modalities_away():
    with pytest.raises(ValueError, match="both modalities"):
        Condition(rgb=Degradation(kind="missing_mean"), thermal=Degradation(kind="missing_zero"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test.rgb=fogg-2", "no degradation 'fogg'"),
        ("test.rgb=patch_dropout-much", "patch_dropout-much"),
        ("test.rbg=fog-2", "Did you mean 'rgb'"),
        ("rgb=fog-2", "begins with a split"),
        ("../x.rgb=fog-2", "begins with a split"),
        ("test.rgb=fog-1.rgb=fog-2", "says twice what is done to rgb"),
        ("test.rgb=fog-1.seed=x", "seed is a whole number"),
        ("test.seed=1", "a clean condition draws nothing"),
        ("test.rgb=shift_with_label-1.thermal=shift_with_label-1", "a label can move with one modality"),
    ],
)
def test_a_misspelt_condition_is_refused_naming_it(name, reason):
    with pytest.raises(ValueError, match=reason):
        condition(name)


# ---------------------------------------------------------------------------------------------- confusion

CLASSES, IGNORED = 5, 255
labels = arrays(np.uint8, (6, 7), elements=st.sampled_from([0, 1, 2, 3, 4, IGNORED]))
predictions = arrays(np.uint8, (6, 7), elements=st.integers(0, CLASSES - 1))


@given(label=labels, prediction=predictions)
def test_the_matrix_counts_what_scikit_learn_counts(label, prediction):
    ours = confusion_matrix(label, prediction, CLASSES, IGNORED)
    kept = label != IGNORED
    assert ours.sum() == kept.sum()
    if kept.any():
        theirs = metrics.confusion_matrix(label[kept], prediction[kept], labels=range(CLASSES))
        assert (ours == theirs).all()


@given(label=labels, prediction=predictions)
def test_iou_is_the_jaccard_score_and_an_absent_class_is_left_out_of_the_mean(label, prediction):
    kept = label != IGNORED
    scores = iou(confusion_matrix(label, prediction, CLASSES, IGNORED))
    present = sorted({*label[kept].tolist(), *prediction[kept].tolist()})
    assert np.isnan(np.delete(scores, present)).all()
    if present:
        settings = {"labels": present, "average": None, "zero_division": 0.0}
        theirs = 100 * metrics.jaccard_score(label[kept], prediction[kept], **settings)
        assert scores[present] == pytest.approx(theirs)
        assert miou(confusion_matrix(label, prediction, CLASSES, IGNORED)) == pytest.approx(theirs.mean())


def test_a_class_that_is_predicted_but_never_there_counts_as_zero():
    matrix = confusion_matrix(np.array([0, 0]), np.array([0, 2]), 3, IGNORED)
    assert miou(matrix) == pytest.approx((50 + 0) / 2)  # class 1 occurs nowhere


def test_an_image_without_a_single_counted_pixel_has_no_miou():
    assert np.isnan(miou(np.zeros((3, 3), int)))


def test_metrics_of_a_stack_of_matrices_are_those_of_each():
    stack = np.random.default_rng(0).integers(0, 9, (4, 2, CLASSES, CLASSES))
    stack[1, 0] = 0
    assert iou(stack).shape == (4, 2, CLASSES)
    assert miou(stack).shape == (4, 2)
    assert miou(stack)[2, 1] == miou(stack[2, 1])
    assert np.isnan(miou(stack)[1, 0])


@pytest.mark.parametrize(("label", "prediction", "what"), [(7, 0, "label"), (0, 7, "prediction"), (0, IGNORED, "pred")])
def test_an_id_that_is_no_class_is_refused(label, prediction, what):
    with pytest.raises(ValueError, match=f"{what}.*but there are 5 classes"):
        confusion_matrix(np.array([label]), np.array([prediction]), CLASSES, IGNORED)


@pytest.fixture
def evaluation():
    rng = np.random.default_rng(3)
    return Evaluation(
        confusion=rng.integers(0, 99, (2, 3, 3)).astype(np.int32),
        names=np.array(["00001D", "00002N"]),
        night=np.array([False, True]),
        predictions=rng.integers(0, 3, (2, 4, 6)).astype(np.uint8),
        meta={"condition": "test", "step": 20, "classes": ["a", "b", "c"]},
    )


def test_an_evaluation_reads_back_as_it_was_written(tmp_path, evaluation):
    save_evaluation(tmp_path / "evals" / "test.npz", evaluation)
    again = load_evaluation(tmp_path / "evals" / "test.npz", predictions=True)
    for part in ("confusion", "names", "night", "predictions"):
        kept, read = getattr(evaluation, part), getattr(again, part)
        assert kept.dtype == read.dtype
        assert (kept == read).all()
    assert again.meta.items() >= evaluation.meta.items()
    assert again.miou == evaluation.miou == miou(evaluation.confusion.sum(axis=0))


def test_prediction_maps_are_read_only_when_asked_for(tmp_path, evaluation):
    save_evaluation(tmp_path / "test.npz", evaluation)
    assert load_evaluation(tmp_path / "test.npz").predictions is None


def test_the_same_evaluation_is_the_same_file(tmp_path, evaluation):
    for name in ("one.npz", "two.npz"):
        save_evaluation(tmp_path / name, evaluation)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
