"""An evaluation that is killed goes on where it was: with SIGKILL, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from crm import unfinished
from crm.conditions import CLEAN_TEST, MISSING, SUITES, Condition
from crm.confusion import load_evaluation
from crm.data.dataset import open_split
from crm.data.specs import SYNTHETIC
from crm.evaluate import evaluate, grouped
from crm.records import evaluation, journal, read_json
from crm.unfinished import Evidence, Unfinished
from crm.worker import DONE
from tests.network_file import imported, network
from tests.tiny import machine

CONDITIONS = [CLEAN_TEST, *MISSING, *SUITES["noise_curve"][3:5]]
IMAGES = 6
# Parts after every batch, and one image in a batch. Says when a batch is done.
WORKER = """
import sys
import crm.evaluate, crm.unfinished, crm.worker
crm.unfinished.EVERY, crm.evaluate.CPU_PIXELS = 0.0, 1
keep = crm.unfinished.Unfinished.keep
def counted(self, found, now=False):
    print(f"{len(next(iter(found.values())).matrices)} images", file=sys.stderr, flush=True)
    keep(self, found, now)
crm.unfinished.Unfinished.keep = counted
sys.exit(crm.worker.main(sys.argv[1:]))
"""


def run(home: Path) -> Path:
    sizes = {"data.size": (64, 96), "data.crop": (32, 48), "data.scale": (1.0, 1.0), "data.test_images": IMAGES}
    return imported(home / "runs", "synthetic", SYNTHETIC.num_classes, sizes)


def worked(folder: Path, fault: str = "") -> int:
    """The code of a worker that evaluates the run."""
    where = json.dumps(machine(folder.parent).written())
    names = [condition.name for condition in CONDITIONS]
    worker = subprocess.run(
        [sys.executable, "-c", WORKER, "--machine", where, "--conditions", *names],
        env={**os.environ, "CRM_FAULT": fault, "OMP_NUM_THREADS": "1"}, input=f"{folder}\n", capture_output=True,
        text=True, timeout=100,
    )  # fmt: skip
    return int(worker.stdout.split()[1]) if worker.stdout else worker.returncode


def stored(folder: Path) -> dict[Condition, np.ndarray]:
    return {one: load_evaluation(evaluation(folder, "last", one)).confusion for one in CONDITIONS}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[Condition, np.ndarray]:
    folder = run(tmp_path_factory.mktemp("undisturbed"))
    assert worked(folder) == DONE
    return stored(folder)


@pytest.mark.parametrize(
    ("fault", "computed"),
    [("kill test-000003.npz 1", 3), ("kill test.rgb=missing_mean.npz 1", 0)],
)
def test_sigkill_in_the_middle_of_a_suite_costs_the_images_of_one_batch(fault, computed, undisturbed, tmp_path):
    """While the fourth part is written; while an evaluation in the middle of the group is."""
    folder = run(tmp_path)
    assert worked(folder, fault) == -signal.SIGKILL
    parts = folder / "evals" / "last" / "unfinished"
    assert len(list(parts.glob("*.npz"))) == IMAGES - computed
    before = (folder / "log.txt").read_text().count(" images\n")
    assert worked(folder) == DONE
    again = (folder / "log.txt").read_text().count(" images\n") - before
    assert again == computed + 1, "a batch for each image that was lost, and one call at the end"
    for condition, confusion in stored(folder).items():
        np.testing.assert_array_equal(confusion, undisturbed[condition])
    assert not parts.exists()
    assert sorted(line["condition"] for line in journal(folder) if line["event"] == "evaluate") == sorted(
        one.name for one in CONDITIONS
    )
    assert read_json(folder / "failure.json") is None


def test_an_evaluation_asked_to_stop_keeps_what_it_has(tmp_path):
    model, split = network(SYNTHETIC.num_classes), open_split("synthetic", "test", size=(64, 96), limit=5)
    asked = iter([False, False, True])
    kept = Unfinished(tmp_path / "parts", {"split": "test"})
    assert not dict(evaluate(model, split, CONDITIONS, 2, "cpu", stop=lambda: next(asked), kept=kept))
    assert kept.images == 4

    again = Unfinished(tmp_path / "parts", {"split": "test"})
    assert again.conditions(SUITES["paper"]) == sorted(CONDITIONS, key=SUITES["paper"].index)
    told = []
    found = dict(evaluate(model, split, CONDITIONS, 2, "cpu", tell=told.append, kept=again))
    assert (told[-1].done, told[-1].count, told[0].done) == (5, 5, 1), "progress is of what is left"
    whole = dict(evaluate(model, split, CONDITIONS, 2, "cpu"))
    for condition, wanted in whole.items():
        for part in ("confusion", "calibration", "predictions", "names"):
            np.testing.assert_array_equal(getattr(found[condition], part), getattr(wanted, part), strict=True)


def evidence(images: int) -> dict[Condition, Evidence]:
    matrices = [np.full((2, 2), i, np.int32) for i in range(images)]
    return {one: Evidence(matrices, [np.zeros((15, 3))] * images, []) for one in CONDITIONS}


def test_parts_of_another_checkpoint_or_other_frames_count_for_nothing(tmp_path):
    about = {"split": "test", "checkpoint_sha256": "a", "data_sha256": "b"}
    Unfinished(tmp_path, about).keep(evidence(3), now=True)
    assert Unfinished(tmp_path, about).images == 3
    for other in ({"checkpoint_sha256": "x"}, {"data_sha256": "x"}, {"split": "val"}):
        assert Unfinished(tmp_path, {**about, **other}).images == 0


def test_a_damaged_part_ends_what_is_known(tmp_path):
    first = Unfinished(tmp_path, {"split": "test"})
    for images in (2, 3, 5):
        first.keep(evidence(images), now=True)
    (tmp_path / "test-000002.npz").write_bytes(b"half of")
    again = Unfinished(tmp_path, {"split": "test"})
    assert again.images == 2
    assert [int(matrix[0, 0]) for matrix in again.load(CONDITIONS)[CLEAN_TEST].matrices] == [0, 1]
    again.keep(evidence(5), now=True)
    assert Unfinished(tmp_path, {"split": "test"}).images == 5


def test_evidence_of_some_conditions_serves_those_alone(tmp_path):
    Unfinished(tmp_path, {"split": "test"}).keep(evidence(3), now=True)
    some = Unfinished(tmp_path, {"split": "test"})
    assert len(some.load(CONDITIONS[:2])[CONDITIONS[1]].matrices) == 3
    more = Unfinished(tmp_path, {"split": "test"})
    assert more.load([*CONDITIONS, SUITES["paper"][-1]])[CLEAN_TEST].matrices == [] and more.images == 0


def test_a_process_that_lost_its_run_writes_nothing(tmp_path):
    def lost() -> None:
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        Unfinished(tmp_path, {"split": "test"}, lost).keep(evidence(3), now=True)
    assert not list(tmp_path.iterdir())


def test_parts_are_written_no_more_often_than_stated(tmp_path, monkeypatch):
    kept = Unfinished(tmp_path, {"split": "test"})
    kept.keep(evidence(3))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    kept.keep(evidence(3))
    assert len(list(tmp_path.iterdir())) == 1


def test_groups_of_what_was_begun_are_those_it_was_begun_with():
    conditions = SUITES["paper"]
    _, first = grouped(conditions)[0]
    left = [one for one in conditions if one not in first[:7]]  # killed while the first group was written
    begun = [one for one in left if one in first]
    assert grouped(begun)[0][1] == first[7:]
