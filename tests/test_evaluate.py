"""Evaluation counts predictions at the labels' own size, and what `crm evaluate` prints of them."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch.nn.functional import interpolate
from typer.testing import CliRunner

from crm.calibration import ece
from crm.cli import app, main
from crm.conditions import CLEAN, CLEAN_TEST, MISSING, Condition, Degradation, both_sides, suite
from crm.confusion import load_evaluation, save_evaluation
from crm.data.dataset import open_split
from crm.data.files import write_mf
from crm.data.specs import MF, SYNTHETIC
from crm.data.transforms import to_input
from crm.evaluate import evaluate, grouped
from crm.model.segmenter import semantic_scores
from crm.records import evaluation
from tests.network_file import imported, network

OWN, SEEN = (100, 130), (50, 70)  # height, width of the files, and of what the network sees


@pytest.fixture(scope="module")
def frames() -> list:
    """Scenes by day and night, whose ids are class ids of MF too."""
    return list(open_split("synthetic", "test", size=OWN, limit=4))


@pytest.fixture(scope="module")
def mf(frames, tmp_path_factory) -> Path:
    """The same as files."""
    return write_mf({"test": frames}, tmp_path_factory.mktemp("data") / "mfnet")


def matrices(results) -> dict[Condition, np.ndarray]:
    return {condition: found.confusion for condition, found in results}


# ---------------------------------------------------------------------------------------------- the label's own size


def test_scores_are_enlarged_to_the_label_before_a_class_is_chosen(mf, frames):
    model = network(MF.num_classes)
    split = open_split("mf", "test", data_root=mf, size=SEEN)
    assert split[0].rgb.shape[:2] == SEEN
    ((_, found),) = evaluate(model, split, [CLEAN_TEST], 3, "cpu")
    for i, original in enumerate(frames):
        image = to_input(split[i], MF).image
        with torch.no_grad():
            scores = semantic_scores(model(image), (64, 96))[:, :, : SEEN[0], : SEEN[1]]
            classes = interpolate(scores, OWN, mode="bilinear", align_corners=False).argmax(1)[0].numpy()
        assert len(np.unique(classes)) > 1, "a network that says one thing shows nothing"
        theirs = metrics.confusion_matrix(original.label.ravel(), classes.ravel(), labels=range(MF.num_classes))
        np.testing.assert_array_equal(found.confusion[i], theirs)
    assert (found.confusion.sum(axis=(1, 2)) == OWN[0] * OWN[1]).all(), "every pixel of the label counts"
    assert found.predictions is not None and found.predictions.shape[1:] == SEEN, "pictures are shown beside frames"


def test_frames_of_their_own_size_have_the_label_that_they_hold(mf, frames):
    own, small = (open_split("mf", "test", data_root=mf, size=size) for size in (OWN, SEEN))
    for i, original in enumerate(frames):
        assert own.native_label(i) is own[i].label
        np.testing.assert_array_equal(small.native_label(i), original.label)
    drawn = open_split("synthetic", "test", size=SEEN, limit=1)
    assert drawn.native_label(0) is drawn[0].label, "scenes are drawn at the size asked for"


def test_shares_of_a_split_add_up_to_the_whole(mf):
    """As the processes of one run evaluate: every image once, and in any batch the same but for rounding."""
    model, split = network(MF.num_classes), open_split("mf", "test", data_root=mf, size=SEEN)
    conditions = [CLEAN_TEST, *MISSING]
    whole = dict(evaluate(model, split, conditions, 4, "cpu"))
    parts = [dict(evaluate(model, split.only(range(rank, 4, 3)), conditions, 1, "cpu")) for rank in range(3)]
    order = [0, 2, 3, 1]  # of images 0 and 3, 1, 2 in the whole
    for condition, found in whole.items():
        assert list(found.names) == list(split.names)
        joined = {
            name: np.concatenate([getattr(part[condition], name) for part in parts])[order]
            for name in ("names", "night", "confusion", "predictions", "calibration")
        }
        assert joined["names"].tolist() == found.names.tolist() and joined["night"].tolist() == found.night.tolist()
        assert np.abs(joined["confusion"] - found.confusion).sum() < 0.001 * found.confusion.sum()
        assert (joined["predictions"] != found.predictions).mean() < 0.001
        assert ece(joined["calibration"]) == pytest.approx(ece(found.calibration), abs=0.1)


DAMAGED = {
    "rgb": (CLEAN, Degradation(kind="fog", severity=3.0), Degradation(kind="missing_token")),
    "thermal": (
        CLEAN,
        Degradation(kind="stripes", severity=4.0),
        Degradation(kind="block_dropout_token", severity=0.5),
    ),
}
GRID = [Condition(rgb=rgb, thermal=thermal) for rgb in DAMAGED["rgb"] for thermal in DAMAGED["thermal"]]


def test_shared_branches_and_joined_heads_give_what_a_pass_per_condition_gives(mf):
    """Of 9 conditions on one image at a time, several go through the head together."""
    model, split = network(MF.num_classes), open_split("mf", "test", data_root=mf, size=SEEN).only([0, 1])
    conditions = [*GRID, *both_sides("missing_route")]
    shared = dict(evaluate(model, split, conditions, 1, "cpu"))
    assert list(shared) == conditions, "in the order asked for"
    for condition in conditions:
        ((_, alone),) = evaluate(model, split, [condition], 1, "cpu")
        assert np.abs(alone.confusion - shared[condition].confusion).sum() < 0.001 * alone.confusion.sum()
        np.testing.assert_allclose(alone.calibration.sum(0), shared[condition].calibration.sum(0), atol=30)
    matrices = [found.confusion for found in shared.values()]
    assert len({matrix.tobytes() for matrix in matrices}) == len(matrices), (
        "a condition that changes nothing shows nothing"
    )


def test_a_grid_costs_a_branch_pass_per_row_and_column_and_few_head_passes(mf):
    model, split = network(MF.num_classes), open_split("mf", "test", data_root=mf, size=SEEN)
    passes = {"rgb": 0, "thermal": 0, "heads": 0, "images": 0}
    branch, head = model.branch, model.head

    def counted_branch(side, image, hidden=None):
        passes[side] += 1
        return branch(side, image, hidden)

    def counted_head(maps, deep=True, with_masks=None):
        passes["heads"], passes["images"] = passes["heads"] + 1, passes["images"] + len(maps[0])
        return head(maps, deep, with_masks)

    model.branch, model.head = counted_branch, counted_head
    list(evaluate(model, split, GRID, 4, "cpu"))
    assert passes == {"rgb": 3, "thermal": 3, "heads": 5, "images": 36}


def test_a_condition_of_another_seed_has_other_draws_and_shares_what_is_not_drawn(mf):
    model, split = network(MF.num_classes), open_split("mf", "test", data_root=mf, size=SEEN)
    noisy = [Condition(rgb=Degradation(kind="gaussian_noise", severity=50.0), seed=seed) for seed in (0, 1)]
    first, second = (found.confusion for _, found in evaluate(model, split, noisy, 4, "cpu"))
    assert (first != second).any()


def test_a_label_that_moves_with_its_modality_loses_what_leaves_the_picture(mf):
    model, split = network(MF.num_classes), open_split("mf", "test", data_root=mf, size=SEEN)
    how = Degradation(kind="shift_with_label", severity=5.0)
    (_, still), (_, moved) = evaluate(model, split, [CLEAN_TEST, Condition(rgb=how)], 4, "cpu")
    assert (moved.confusion.sum(axis=(1, 2)) < still.confusion.sum(axis=(1, 2))).all()
    assert (moved.confusion.sum(axis=(1, 2)) > 0.8 * still.confusion.sum(axis=(1, 2))).all()


def test_progress_counts_images_times_conditions(mf):
    split, told = open_split("mf", "test", data_root=mf, size=SEEN), []
    list(evaluate(network(MF.num_classes), split, GRID[:3], 2, "cpu", tell=told.append))
    assert [each.done for each in told] == [2, 4, 6, 8, 10, 12] and {each.count for each in told} == {12}
    assert told[-1].eta == 0 and told[0].eta > 0


def test_a_suite_is_computed_in_groups_that_keep_rows_together():
    groups = grouped(suite("paper"))
    assert sorted(one for _, group in groups for one in group) == sorted(suite("paper"))
    assert all(len(group) <= 48 for _, group in groups)


def test_asked_to_stop_it_ends_between_two_batches_with_nothing(mf):
    """What is computed of some images alone is no evaluation."""
    asked = iter([False, True])
    split = open_split("mf", "test", data_root=mf, size=SEEN)
    found = evaluate(network(MF.num_classes), split, [CLEAN_TEST], 2, "cpu", stop=lambda: next(asked))
    assert list(found) == [] and next(asked, None) is None


# ---------------------------------------------------------------------------------------------- what is stored


def test_calibration_is_stored_for_every_image_and_condition(mf, tmp_path):
    model, split = network(MF.num_classes), open_split("mf", "test", data_root=mf)
    for condition, found in evaluate(model, split, [CLEAN_TEST, *both_sides("missing_route")], 4, "cpu"):
        save_evaluation(tmp_path / f"{condition.name}.npz", found)
        again = load_evaluation(tmp_path / f"{condition.name}.npz")
        counts, right, confidence = np.moveaxis(again.calibration, 2, 0)
        assert counts.sum(axis=1).tolist() == again.confusion.sum(axis=(1, 2)).tolist()
        assert right.sum(axis=1).tolist() == np.trace(again.confusion, axis1=1, axis2=2).tolist()
        assert (confidence <= counts + 1e-6).all() and (confidence >= 0).all()
        assert "sum of the scores of all classes" in again.meta["confidence"]


def test_ignored_pixels_are_in_no_histogram(frames):
    split = open_split("synthetic", "test", size=OWN, limit=2)
    split.spec = replace(SYNTHETIC, ignore_index=1)
    ((_, found),) = evaluate(network(SYNTHETIC.num_classes), split, [CLEAN_TEST], 2, "cpu")
    counted = [(frame.label != 1).sum() for frame in frames[:2]]
    assert found.calibration[:, :, 0].sum(axis=1).tolist() == found.confusion.sum(axis=(1, 2)).tolist() == counted


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def run(tmp_path, monkeypatch) -> str:
    """A run on three small scenes."""
    monkeypatch.setenv("CRM_HOME", str(tmp_path))
    sizes = {"data.size": (64, 96), "data.crop": (32, 48), "data.scale": (1.0, 1.0), "data.test_images": 3}
    return imported(tmp_path / "runs", "synthetic", SYNTHETIC.num_classes, sizes).name


def crm(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code in (0, 3), done.output
    return done.stdout


def test_json_holds_every_metric_of_every_condition(run, tmp_path):
    said = json.loads(crm("evaluate", run, "--suite", "missing", "--threads", "1", "--json"))
    assert said["metrics"].keys() == said["miou"].keys() == said["released_miou"].keys()
    stored = load_evaluation(evaluation(tmp_path / "runs" / run, "last", CLEAN_TEST))
    wanted = {name: value for name, value in stored.scores().items() if name != "classes"}
    assert {name: said["metrics"]["test"][name] for name in wanted} == wanted
    assert said["metrics"]["test"]["classes"].keys() == set(SYNTHETIC.classes)
    assert said["metrics"]["test"]["ece"] >= 0 and "scores of all classes" in said["confidence"]


def test_a_slice_is_scored_from_what_is_stored(run, tmp_path):
    crm("evaluate", run, "--suite", "clean", "--threads", "1")
    stored = load_evaluation(evaluation(tmp_path / "runs" / run, "last", CLEAN_TEST))
    said = json.loads(crm("evaluate", run, "--suite", "clean", "--subset", "day", "--without", "cone", "--json"))
    wanted = stored.part("day").scores(["cone"])
    assert said["miou"]["test"] == wanted["miou"] != stored.miou
    assert said["metrics"]["test"]["images"] == (~stored.night).sum()
    assert (said["subset"], said["without"]) == ("day", ["cone"])


def test_the_text_fits_a_screen_and_says_what_it_left_out(run):
    text = crm("evaluate", run, "--threads", "1", "--per-class", "--without", "vent")
    lines = text.splitlines()
    assert len(lines) < 64 and max(map(len, lines[1:])) <= 120
    assert {"mIoU", "ECE"} <= set(lines[2].split()) and "left out of every mean: vent" in text
    assert all(name in text for name in SYNTHETIC.classes)
    one = crm("evaluate", run, "--suite", "clean", "--per-class")
    assert "labelled pixels" in one


WRONG = {
    "a class": (["--without", "carr"], "Did you mean 'car'"),
    "a subset": (["--subset", "dusk"], "no subset 'dusk'"),
    "a data set": (["--on", "mff"], "Did you mean 'mf'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_refused_before_anything_is_computed(what, run, tmp_path, monkeypatch, capsys):
    more, hint = WRONG[what]
    monkeypatch.setattr(sys, "argv", ["crm", "evaluate", run, *more])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and hint in capsys.readouterr().err
    assert not (tmp_path / "runs" / run / "evals").exists()
