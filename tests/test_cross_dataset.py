"""A network trained on one data set, evaluated on another: which classes count, and how."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from crm.cli import app, main
from crm.conditions import CLEAN_TEST
from crm.confusion import Evaluation, confusion_matrix, load_evaluation
from crm.data.dataset import open_split
from crm.data.files import write_kp, write_mf
from crm.data.frames import Frame
from crm.data.mapping import CONCEPTS, OTHER, mapping
from crm.data.specs import DATASETS, KP, MF, PST900, SYNTHETIC
from crm.data.transforms import to_input
from crm.evaluate import answer, evaluate
from crm.model.segmenter import semantic_scores
from crm.records import evaluation, read_json
from tests.network_file import imported, network

# ---------------------------------------------------------------------------------------------- the declaration


@pytest.mark.parametrize("name", DATASETS)
def test_only_classes_that_there_are_have_concepts(name):
    assert not CONCEPTS[name].keys() - set(DATASETS[name].classes)


@pytest.mark.parametrize(
    ("trained", "target", "shared"),
    [
        (MF, KP, ["person", "car", "bike"]),
        (KP, MF, ["car", "person", "bike"]),
        (SYNTHETIC, MF, ["car", "person", "cone"]),
        (SYNTHETIC, KP, ["road", "person", "car"]),
    ],
)
def test_shared_classes_stand_in_the_order_of_the_target_after_other(trained, target, shared):
    found = mapping(trained, target)
    assert found and list(found.classes) == [OTHER, *shared]


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_of_the_same_classes_needs_no_mapping(name):
    assert mapping(DATASETS[name], DATASETS[name]) is None


@pytest.mark.parametrize(("trained", "target"), [(PST900, KP), (MF, PST900), (SYNTHETIC, PST900)])
def test_without_a_shared_class_it_is_refused_with_the_classes_of_both(trained, target):
    with pytest.raises(ValueError, match="share no class") as refused:
        mapping(trained, target)
    assert all(name in str(refused.value) for name in (*trained.classes, *target.classes))


# ---------------------------------------------------------------------------------------------- what counts


def ids(spec, *names: str) -> np.ndarray:
    return np.array([spec.ignore_index if name == "ignored" else spec.classes.index(name) for name in names], np.uint8)


def test_a_hand_made_example_is_counted_as_said():
    """Ten pixels of KP as a network of MF sees them."""
    shared = mapping(MF, KP)
    assert shared
    label = ids(KP, "car", "car", "person", "rider", "bicycle", "road", "sky", "truck", "ignored", "car")
    guess = ids(MF, "car", "bump", "person", "person", "unlabeled", "curve", "car", "unlabeled", "car", "person")
    matrix = confusion_matrix(shared.labels[label], shared.predictions[guess], len(shared.classes), shared.ignore_index)
    order = [shared.classes.index(name) for name in ("other", "car", "person", "bike")]
    assert matrix[np.ix_(order, order)].tolist() == [
        [2, 1, 0, 0],  # road as curve and truck as unlabeled are both "other"; sky taken for a car is wrong
        [1, 1, 1, 0],  # a car found, one taken for a bump and so missed, one taken for a person
        [0, 0, 2, 0],  # a rider is a person
        [1, 0, 0, 0],  # a bicycle missed
    ]
    meta = {"condition": "test", "dataset": "kp", "classes": list(shared.classes), "unscored": [OTHER]}
    scores = Evaluation(matrix[None], np.array(["a"]), np.array([False]), None, meta).scores()
    assert scores["miou"] == pytest.approx(100 * (1 / 4 + 2 / 3 + 0) / 3)
    assert scores["miou"] == scores["miou_without_0"] and scores["scored"] == ["person", "car", "bike"]
    assert scores["mean_accuracy"] == pytest.approx(100 * (1 / 3 + 1 + 0) / 3)


def test_an_ignored_class_id_stays_ignored():
    target = replace(MF, ignore_index=0)  # as where "unlabeled" is not counted
    shared = mapping(KP, target)
    assert shared and shared.labels[0] == shared.ignore_index and shared.labels[4] == 0


def test_the_network_chooses_among_its_own_classes_and_the_confidence_is_of_all_that_count_as_the_same():
    shared = mapping(KP, MF)
    assert shared
    scores = torch.full((KP.num_classes, 1, 2), 0.01)
    person, rider, sky, wall = (KP.classes.index(name) for name in ("person", "rider", "sky", "wall"))
    scores[[person, rider, sky], 0, 0] = torch.tensor([0.4, 0.3, 0.5])  # sky is best, though person and rider are more
    scores[[person, rider, wall], 0, 1] = torch.tensor([0.4, 0.3, 0.1])
    classes, confidence = answer(scores, shared)
    assert [shared.classes[i] for i in classes[0]] == [OTHER, "person"]
    other = [i for i, name in enumerate(KP.classes) if name not in CONCEPTS["kp"] or name == "road"]
    wanted = [float(scores[other, 0, 0].sum() / scores[:, 0, 0].sum()), 0.7 / float(scores[:, 0, 1].sum())]
    assert confidence[0].tolist() == pytest.approx(wanted)


# ---------------------------------------------------------------------------------------------- from end to end


@pytest.fixture(scope="module")
def scenes() -> list[Frame]:
    """A scene by day and one at night, under the names of KP."""
    drawn = open_split("synthetic", "test", size=(96, 128), limit=2)
    names = {False: "set00_V000_I00001", True: "set03_V000_I00001"}
    frames = [replace(frame, name=names[frame.night]) for frame in drawn]
    assert [frame.night for frame in frames] == [False, True]
    return frames


@pytest.fixture(scope="module")
def data(scenes, tmp_path_factory) -> Path:
    """A folder with both as KP, and as MF."""
    folder = tmp_path_factory.mktemp("data")
    write_kp({"test": scenes}, folder / "kp")
    write_mf({"test": scenes}, folder / "mfnet")
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CRM_HOME", str(tmp_path))
    return tmp_path


def crm(*arguments: str) -> dict:
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code in (0, 3), done.output
    return json.loads(done.stdout)


def test_a_run_is_evaluated_on_a_data_set_of_more_classes_and_kept(data, home):
    run = imported(home / "runs", "mf", MF.num_classes)
    more = ["--suite", "clean", "--data", str(data), "--threads", "1"]
    said = crm("evaluate", run.name, "--on", "kp", *more)
    assert said["run"] != run.name and said["dataset"] == "kp"
    assert said["mapping"] == {"car": "car", "person": "person", "bike": "bike"}
    assert said["metrics"]["test"]["scored"] == ["person", "car", "bike"]
    folder = home / "runs" / said["run"]
    stored = load_evaluation(evaluation(folder, "last", CLEAN_TEST))
    assert stored.miou == said["miou"]["test"] and stored.meta["trained_on"] == "mf"
    assert read_json(folder / "provenance.json")["imported"]["source"] == f"{run.name} last"
    assert crm("evaluate", said["run"], *more)["miou"] == said["miou"], "it is a run like any other"
    assert crm("evaluate", run.name, "--on", "kp", *more)["run"] == said["run"], "made once"
    back = crm("evaluate", said["run"], "--on", "mf", *more)
    assert back["mapping"] is None and len(back["metrics"]["test"]["scored"]) == MF.num_classes


def test_what_is_counted_is_what_the_network_says_under_its_own_normalisation(data, scenes):
    """A network of synthetic scenes sees KP with the mean and deviation of synthetic scenes."""
    model = network(SYNTHETIC.num_classes)
    split = open_split("kp", "test", data_root=data, size=(96, 128))
    ((_, found),) = evaluate(model, split, [CLEAN_TEST], 2, "cpu", SYNTHETIC)
    shared = mapping(SYNTHETIC, KP)
    assert shared
    for i, frame in enumerate(split):
        with torch.no_grad():
            scores = semantic_scores(model(to_input(frame, SYNTHETIC).image), (96, 128))
        guess = shared.predictions[scores.argmax(1)[0].numpy()]
        matrix = confusion_matrix(shared.labels[frame.label], guess, len(shared.classes), shared.ignore_index)
        np.testing.assert_array_equal(found.confusion[i], matrix)
        assert found.calibration[i, :, 0].sum() == matrix.sum()


def test_no_shared_class_is_refused_and_leaves_nothing(data, home, monkeypatch, capsys):
    run = imported(home / "runs", "pst900", PST900.num_classes)
    before = sorted((home / "runs").iterdir())
    monkeypatch.setattr(sys, "argv", ["crm", "evaluate", run.name, "--on", "kp", "--data", str(data)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "PST900 and KP share no class" in capsys.readouterr().err
    assert sorted((home / "runs").iterdir()) == before
