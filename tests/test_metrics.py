"""Every metric against scikit-learn's and the released code's, calibration against its definition, and slices."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn import metrics

from crm.calibration import BINS, ece, histogram
from crm.confusion import (
    Evaluation,
    class_mean,
    confusion_matrix,
    load_evaluation,
    pixel_accuracy,
    precision,
    recall,
    released_mean,
    save_evaluation,
)
from crm.data.specs import MF
from crm.evaluate import answer

IGNORED = MF.ignore_index
K = MF.num_classes
GUARDRAIL = MF.classes.index("guardrail")


def images(count: int = 6, absent: tuple[int, ...] = (), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, some pixels ignored, and predictions that are right in about half of them; (n, h, w)."""
    rng = np.random.default_rng(seed)
    label = rng.choice([i for i in range(K) if i not in absent], size=(count, 20, 30))
    prediction = np.where(rng.random(label.shape) < 0.5, label, rng.choice(label.ravel(), label.shape))
    label[rng.random(label.shape) < 0.1] = IGNORED
    return label.astype(np.uint8), prediction.astype(np.uint8)


def evaluated(label: np.ndarray, prediction: np.ndarray, confidence: np.ndarray | None = None) -> Evaluation:
    """As `crm.evaluate` stores it; every second image is by night."""
    number = range(len(label))
    counted = label != IGNORED
    right = label == prediction
    return Evaluation(
        confusion=np.stack([confusion_matrix(label[i], prediction[i], K, IGNORED) for i in number]).astype(np.int32),
        names=np.array([f"{i:05d}{'DN'[i % 2]}" for i in number]),
        night=np.array([i % 2 == 1 for i in number]),
        predictions=None,
        meta={"condition": "test", "dataset": "mf", "classes": list(MF.classes)},
        calibration=None if confidence is None else np.stack(
            [histogram(confidence[i][counted[i]], right[i][counted[i]]) for i in number]
        ),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- scikit-learn


@pytest.mark.parametrize("absent", [(), (GUARDRAIL,), (0, 3, 8)])
def test_every_metric_equals_scikit_learns(absent):
    label, prediction = images(absent=absent)
    found = evaluated(label, prediction).scores()
    kept = label != IGNORED
    truth, guess = label[kept], prediction[kept]
    there = [i for i in range(K) if i not in absent]
    for key, theirs in (
        ("iou", metrics.jaccard_score(truth, guess, labels=there, average=None)),
        ("precision", metrics.precision_score(truth, guess, labels=there, average=None)),
        ("recall", metrics.recall_score(truth, guess, labels=there, average=None)),
    ):
        ours = [found["classes"][MF.classes[i]][key] for i in there]
        np.testing.assert_allclose(ours, 100 * theirs, rtol=1e-12)
    mean = 100 * metrics.jaccard_score(truth, guess, average="macro")
    assert found["miou"] == pytest.approx(mean)
    assert found["released_miou"] == pytest.approx(mean * len(there) / K)
    assert found["pixel_accuracy"] == pytest.approx(100 * metrics.accuracy_score(truth, guess))
    assert found["mean_accuracy"] == pytest.approx(100 * metrics.balanced_accuracy_score(truth, guess))
    assert found["mean_precision"] == pytest.approx(100 * metrics.precision_score(truth, guess, average="macro"))
    above = [i for i in there if i]
    mean = 100 * metrics.jaccard_score(truth, guess, labels=above, average="macro")
    assert found["miou_without_0"] == pytest.approx(mean)
    assert found["released_miou_without_0"] == pytest.approx(mean * len(above) / (K - 1))
    assert found["absent"] == [MF.classes[i] for i in absent]
    assert found["classes"]["car"]["pixels"] == (truth == 1).sum()


def test_a_class_predicted_but_never_labelled_lowers_the_mean_and_one_never_predicted_has_no_precision():
    matrix = np.array([[8, 2, 0], [0, 0, 0], [4, 0, 0]])
    np.testing.assert_allclose(precision(matrix), [100 * 8 / 12, 0, np.nan])
    np.testing.assert_array_equal(recall(matrix), [80, np.nan, 0])
    assert class_mean(recall(matrix)) == 40
    assert released_mean(recall(matrix)) == pytest.approx(80 / 3)
    assert pixel_accuracy(matrix) == pytest.approx(100 * 8 / 14)
    assert np.isnan(pixel_accuracy(np.zeros((3, 3), int)))


def test_metrics_of_stacked_matrices_are_those_of_each():
    stack = np.random.default_rng(0).integers(0, 9, (4, 2, 5, 5))
    for metric in (precision, recall, pixel_accuracy):
        np.testing.assert_array_equal(metric(stack)[3, 1], metric(stack[3, 1]))


# ---------------------------------------------------------------------------------------------- the released code


@pytest.mark.parametrize("group", ["c9", "c5", "c19"])
def test_means_over_a_data_set_equal_the_released_ones(golden, group):
    if not (golden / "metrics.npz").is_file():
        pytest.skip(f"no metrics in {golden}")
    about = json.loads((golden / "metrics.json").read_text())
    with np.load(golden / "metrics.npz") as stored:
        parts = [stored[name] for name in sorted(stored) if name.startswith(f"{group}.") and name.endswith(".conf")]
        total = stored[f"{group}.total.conf"]
    each = np.stack([matrix for matrix in parts if (matrix != total).any()])
    assert (each.sum(axis=0) == total).all()
    names = [str(i) for i in range(len(total))]
    meta = {"condition": "test", "dataset": "mf", "classes": names}
    found = Evaluation(each, np.arange(len(each)), np.zeros(len(each), bool), None, meta).scores()
    wanted = about[f"{group}.total"]
    assert found["released_miou"] == pytest.approx(100 * wanted["mean_iou"], rel=1e-12)
    assert found["released_mean_accuracy"] == pytest.approx(100 * wanted["mean_recall"], rel=1e-12)
    assert found["released_mean_precision"] == pytest.approx(100 * wanted["mean_precision"], rel=1e-12)


# ---------------------------------------------------------------------------------------------- slices


def test_day_and_night_are_scored_apart_from_the_same_evaluation():
    label, prediction = images()
    whole = evaluated(label, prediction)
    for time, there in (("day", whole.night == 0), ("night", whole.night == 1)):
        part = whole.part(time)
        assert part.names.tolist() == whole.names[there].tolist()
        kept = label[there] != IGNORED
        theirs = metrics.jaccard_score(label[there][kept], prediction[there][kept], average="macro")
        assert part.miou == pytest.approx(100 * theirs)


def test_a_subset_that_is_not_known_or_empty_is_refused():
    found = evaluated(*images())
    with pytest.raises(ValueError, match="Did you mean 'night'"):
        found.part("nigt")
    with pytest.raises(ValueError, match="PST900 does not say which images are by day"):
        replace(found, meta={**found.meta, "dataset": "pst900"}).part("day")
    with pytest.raises(ValueError, match="none of the 3 images of test is of night"):
        found.part("day").part("night")


def test_without_a_class_the_others_keep_their_iou_and_its_pixels_still_count_against_them():
    label, prediction = images()
    found = evaluated(label, prediction)
    whole, rest = found.scores(), found.scores(["guardrail"])
    assert rest["classes"] == whole["classes"]
    others = [values["iou"] for name, values in whole["classes"].items() if name != "guardrail"]
    assert rest["miou"] == pytest.approx(np.mean(others))
    assert rest["miou_without_0"] == pytest.approx(np.mean(others[1:]))
    assert "guardrail" not in rest["scored"] and rest["pixel_accuracy"] == whole["pixel_accuracy"]


def test_without_a_class_that_there_is_not_or_without_all_is_refused():
    found = evaluated(*images())
    with pytest.raises(ValueError, match="Did you mean 'guardrail'"):
        found.scores(["guard_rail"])
    with pytest.raises(ValueError, match="nothing is left"):
        found.scores(MF.classes)


# ---------------------------------------------------------------------------------------------- calibration


def direct_ece(confidence: np.ndarray, right: np.ndarray) -> float:
    """By the definition, bin by bin, in per cent."""
    confidence, total = confidence.astype(float), 0.0
    for i in range(BINS):
        low, high = i / BINS, (i + 1) / BINS
        inside = (confidence >= low) & ((confidence < high) if i < BINS - 1 else (confidence <= 1))
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return 100 * total


def test_the_ece_of_any_subset_equals_the_direct_computation():
    label, prediction = images(seed=5)
    confidence = np.random.default_rng(1).beta(4, 2, label.shape).astype(np.float32)
    whole = evaluated(label, prediction, confidence)
    for found, there in (
        (whole, slice(None)),
        (whole.part("night"), whole.night),
        (replace(whole, calibration=whole.calibration[[2, 4]], names=whole.names[[2, 4]]), [2, 4]),
    ):
        kept = label[there] != IGNORED
        right = (label[there] == prediction[there])[kept]
        assert found.scores()["ece"] == pytest.approx(direct_ece(confidence[there][kept], right), rel=1e-6)


def test_the_ece_of_what_is_known_without_counting():
    sure = np.ones(10)
    assert ece(histogram(sure, np.zeros(10, bool))) == 100
    assert ece(histogram(sure, np.ones(10, bool))) == 0
    assert ece(histogram(np.full(10, 0.75), np.arange(10) < 6)) == pytest.approx(15)
    assert histogram(np.array([0.0, 1.0]), np.array([False, True]))[[0, -1]].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert np.isnan(ece(histogram(np.zeros(0), np.zeros(0, bool))))
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000)
    assert ece(histogram(confidence, rng.random(200_000) < confidence)) < 1, "right as often as it is confident"


def test_an_evaluation_of_an_older_version_has_no_ece(tmp_path):
    label, prediction = images()
    for confidence in (None, np.full(label.shape, 0.5, np.float32)):
        save_evaluation(tmp_path / "test.npz", evaluated(label, prediction, confidence))
        again = load_evaluation(tmp_path / "test.npz")
        assert (again.calibration is None) == (again.scores()["ece"] is None) == (confidence is None)


def test_confidence_is_the_share_of_the_best_score():
    scores = torch.rand(5, 8, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    classes, confidence = answer(scores)
    ours = torch.from_numpy(confidence)
    assert torch.equal(torch.from_numpy(classes).long(), scores.argmax(0))
    assert torch.equal(ours, (scores / scores.sum(0)).amax(0))
    np.testing.assert_allclose(answer(3 * scores)[1], confidence)
    nothing = answer(torch.zeros(5, 2, 2))[1]
    assert (nothing == 0).all(), "no query claims the pixel"
