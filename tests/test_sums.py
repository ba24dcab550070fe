"""The lines beside evaluations: what they say is what the per-image matrices sum to, and losing them loses nothing."""

import json

import numpy as np
import pytest

from crm import sums
from crm.conditions import CLEAN_TEST, MISSING
from crm.evaluated import INDEX
from tests.analysis_fixture import evaluated

BOTH = (CLEAN_TEST, MISSING[0])


@pytest.fixture
def run(tmp_path):
    rng = np.random.default_rng(0)
    made = {one.name: rng.integers(0, 9, (6, 3, 3)) for one in BOTH}
    for one in BOTH:
        evaluated(tmp_path, one, made[one.name])
    return tmp_path, made


def test_they_are_the_sums_of_the_matrices_by_day_and_night(run, monkeypatch):
    folder, made = run
    monkeypatch.setattr(np, "load", None)  # no per-image file is opened
    found = sums.read(folder, "last", BOTH)
    assert list(found) == [one.name for one in BOTH]
    for name, one in found.items():
        assert (one.whole == made[name].sum(axis=0)).all()
        assert (one.night == made[name][1::2].sum(axis=0)).all()  # every other name ends with N
        assert (one.images, one.at_night, one.edited) == (6, 3, False)
        assert one.meta["classes"] == ["background", "road", "car"]


def test_without_the_lines_the_evaluations_are_read(run):
    folder, made = run
    before = sums.read(folder, "last", BOTH)
    (folder / "evals/last" / INDEX).unlink()
    after = sums.read(folder, "last", BOTH)
    for name, one in after.items():
        assert (one.whole == made[name].sum(axis=0)).all() and one.names == before[name].names
        assert one.sha256 == "" and not one.edited
    assert not (folder / "evals/last" / INDEX).exists()  # reading writes nothing


def test_the_last_line_counts_and_a_torn_one_spoils_no_other(run):
    folder, _ = run
    path = folder / "evals/last" / INDEX
    with path.open("ab") as file:
        file.write(b'{"condition": "test", "sha')
    again = np.full((6, 3, 3), 7)
    evaluated(folder, MISSING[0], again)
    found = sums.read(folder, "last", BOTH)
    assert (found[MISSING[0].name].whole == 42).all() and not found[MISSING[0].name].edited
    assert (found["test"].whole > 0).any()


def test_a_file_that_is_not_the_one_written_is_read_and_said_to_be_edited(run):
    folder, _ = run
    lines = (folder / "evals/last" / INDEX).read_text()
    evaluated(folder, CLEAN_TEST, np.arange(12 * 9).reshape(12, 3, 3))
    (folder / "evals/last" / INDEX).write_text(lines)
    one = sums.read(folder, "last", [CLEAN_TEST])["test"]
    assert one.edited and one.images == 12
    assert one.sha256 == json.loads(lines.splitlines()[0])["sha256"]


def test_a_condition_that_was_not_evaluated_is_left_out(run):
    folder, _ = run
    (folder / "evals/last" / f"{MISSING[0].name}.npz").unlink()
    assert list(sums.read(folder, "last", BOTH)) == ["test"]
