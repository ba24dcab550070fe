"""One run: training, resuming, stopping, failing, evaluating."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from crm.checkpoint import load_checkpoint, newest_checkpoint
from crm.conditions import MISSING, PICTURED, SUITES, Condition, condition
from crm.config import Config, override
from crm.confusion import load_evaluation
from crm.evaluate import evaluate
from crm.records import Superseded, claim, evaluation, journal, open_run, read_json, retire, state
from crm.step import RunFailed
from crm.train import train
from crm.worker import DONE, FAILED, STOPPED, attempt
from tests.tiny import TINY, machine

CONDITIONS = [Condition(), *MISSING]


def never() -> bool:
    return False


def finish(config: Config, runs: Path, stop=never, tell=lambda progress: None) -> Path:
    """The folder after one attempt."""
    folder = open_run(runs, config)
    attempt(folder, machine(runs), "t" + str(len(list(folder.glob("attempts/*")))), "last", CONDITIONS, stop, tell)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """One finished run, shared by the tests that only read it."""
    return finish(TINY, tmp_path_factory.mktemp("runs"))


def values(folder: Path, event: str) -> list[dict]:
    """Journal lines without what may differ between two attempts: times, and hashes of files that hold times."""
    return [
        {key: value for key, value in line.items() if key not in ("time", "seconds", "sha256")}
        for line in journal(folder)
        if line["event"] == event
    ]


def test_a_finished_run_has_result_checkpoints_provenance_and_evaluations(trained):
    result = read_json(trained / "result.json")
    assert result["steps"] == TINY.steps
    assert 0 <= result["miou"] <= 100
    assert result["val_best"]["miou"] >= result["miou"]
    assert {"last", "val_best"} == set(result["checkpoints"])
    assert state(trained.parent, TINY, "last", CONDITIONS).name == "done"
    record = read_json(trained / "provenance.json")
    assert record["data"]["train"]["count"] == 8
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert len(values(trained, "train")) == TINY.steps


def test_evaluations_hold_every_test_image_once_with_its_pixels(trained):
    stored = load_evaluation(evaluation(trained, "last", Condition()), predictions=True)
    assert stored.confusion.shape == (3, 6, 6)
    assert (stored.confusion.sum(axis=(1, 2)) == 64 * 96).all()
    assert len(set(stored.names)) == 3
    assert stored.predictions is not None
    assert stored.predictions.shape == (3, 64, 96)
    assert stored.meta["checkpoint_sha256"] == read_json(trained / "result.json")["checkpoints"]["last"]["sha256"]


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_resumed_run_ends_bit_for_bit_where_an_undisturbed_one_does(trained, tmp_path, stop_at):
    seen = []
    finish(TINY, tmp_path, stop=lambda: len(seen) == stop_at, tell=seen.append)
    assert state(tmp_path, TINY, "last", CONDITIONS).name == "interrupted"
    resumed = finish(TINY, tmp_path)
    one, two = (load_checkpoint(folder / "checkpoints/last.safetensors") for folder in (trained, resumed))
    assert one.weights.keys() == two.weights.keys()
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
    assert all(torch.equal(one.optimizer[name], two.optimizer[name]) for name in one.optimizer)
    for event in ("train", "val", "evaluate"):
        assert values(trained, event) == values(resumed, event)
    assert read_json(resumed / "result.json")["attempts"] == 2


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    seen = []
    folder = finish(TINY, tmp_path, stop=lambda: len(seen) == 4, tell=seen.append)
    path = folder / "checkpoints/last.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    found = newest_checkpoint(folder)
    assert found is not None
    assert found.meta["step"] == 2


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_terms(tmp_path):
    config = override(TINY, {"optim.lr": 1e12, "optim.clip": 1e12})
    folder = open_run(tmp_path, config)
    assert attempt(folder, machine(tmp_path), "t", "last", [], never, lambda progress: None) == FAILED
    reason = read_json(folder / "failure.json")["reason"]
    assert "finite" in reason
    assert "step" in reason
    assert state(tmp_path, config, "last", []).name == "failed"
    assert not (folder / "result.json").exists()


def test_terms_are_named_when_the_loss_itself_overflows(tmp_path):
    config = override(TINY, {"loss.complementary": 1e39})
    folder = open_run(tmp_path, config)
    mine = claim(folder, "t")
    assert mine is not None
    with pytest.raises(RunFailed, match=r"the loss is not finite at step 0: fused .*, complementary inf"):
        train(config, machine(tmp_path), mine, never, lambda progress: None)


def test_an_attempt_that_was_taken_over_writes_nothing_more(tmp_path):
    folder = open_run(tmp_path, TINY)
    mine = claim(folder, "first")
    assert mine is not None

    def lose(progress):
        if progress.step == 2:
            retire(folder, "first")
            assert claim(folder, "second") is not None

    with pytest.raises(Superseded):
        train(TINY, machine(tmp_path), mine, never, lose)
    assert not (folder / "checkpoints/last.safetensors").exists()
    assert not (folder / "result.json").exists()


def test_a_run_in_other_hands_is_not_touched(tmp_path):
    folder = open_run(tmp_path, TINY)
    assert claim(folder, "other") is not None
    before = sorted(path.name for path in folder.iterdir())
    assert attempt(folder, machine(tmp_path), "mine", "last", [], never, lambda progress: None) not in (DONE, STOPPED)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_evaluation_does_not_depend_on_the_batch_size(trained):
    from crm.data.dataset import open_run_split
    from crm.model.segmenter import build_segmenter

    split = open_run_split(TINY.data, "test", None)
    model = build_segmenter(TINY.model, split.spec.num_classes)
    model.load_state_dict(load_checkpoint(trained / "checkpoints/last.safetensors").weights)
    conditions = [
        condition("test.rgb=patch_dropout-0.5"),
        condition("test.rgb=gaussian_noise-25.thermal=gaussian_noise-25"),
    ]
    by_batch = [dict(evaluate(model, split, conditions, batch, "cpu")) for batch in (1, 3)]
    for each in conditions:
        one, two = (results[each].confusion for results in by_batch)
        assert np.abs(one - two).sum() <= 4  # a pixel on the border of two classes may turn with the rounding


def test_every_condition_of_every_suite_can_be_evaluated(trained):
    from crm.data.dataset import open_run_split
    from crm.model.segmenter import build_segmenter

    kinds = {tuple((how.kind, bool(how.severity)) for how in (one.rgb, one.thermal)): one for one in SUITES["paper"]}
    conditions = [*kinds.values()]  # one of each kind: their severities are tested where they are defined
    split = open_run_split(TINY.data, "test", None)
    model = build_segmenter(TINY.model, split.spec.num_classes)
    results = dict(evaluate(model, split, conditions, 3, "cpu"))
    assert list(results) == conditions
    assert all((result.predictions is not None) == (each in PICTURED) for each, result in results.items())


def test_branches_are_computed_once_per_degradation(trained):
    from crm.data.dataset import open_run_split
    from crm.model.segmenter import build_segmenter

    split = open_run_split(TINY.data, "test", None)
    model = build_segmenter(TINY.model, split.spec.num_classes)
    calls = []
    inner = model.branch
    model.branch = lambda side, image, hidden=None: calls.append(side) or inner(side, image, hidden)
    kinds = ["", ".rgb=missing_mean", ".rgb=missing_zero", ".thermal=missing_mean", ".thermal=missing_zero"]
    list(evaluate(model, split, [condition(f"test{kind}") for kind in kinds], 3, "cpu"))
    assert sorted(calls) == ["rgb"] * 3 + ["thermal"] * 3


def test_the_journal_is_one_json_object_per_line(trained):
    for line in (trained / "journal.jsonl").read_text().splitlines():
        assert {"event", "time"} <= json.loads(line).keys()
