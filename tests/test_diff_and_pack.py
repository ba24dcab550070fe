"""What two runs, variants or tables differ in; and a study in one file that names nobody and renders without torch."""

import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from analysis.diff import Side, compare, compare_tables
from analysis.load import frame, load
from crm.capsule import Hide
from crm.cli import app
from crm.cli.options import find_sweep
from crm.conditions import CLEAN_TEST
from crm.confusion import iou, load_evaluation, miou, save_evaluation
from crm.records import append, evaluation, read_json, write_json
from tests.analysis_fixture import Invented, fabricate

ROOT = Path(__file__).parents[1]
NAME, SWEEP = find_sweep("demo@tiny")
SWEEP = replace(SWEEP, seeds=(0, 1))
ROWS = list(SWEEP.variants)
WHO = {"host": "gpu17.cluster.example", "user": "jdoe", "home": "/" + "home/jdoe"}


def crm(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, done.output + repr(done.exception)
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Invented runs of a real sweep, in two seeds, that name a host, a user and places."""
    home = tmp_path_factory.mktemp("home")
    quality = {row: Invented(0.7 + 0.1 * place, 0.3, 0.1 + place) for place, row in enumerate(ROWS)}
    fabricate(home / "runs", SWEEP, quality)
    for cell in SWEEP.cells():
        folder = home / "runs" / cell.id
        made = read_json(folder / "provenance.json")
        made |= {"versions": {"torch": "2.8" if cell.variant == ROWS[0] else "2.9"}, "hardware": {"device": "cpu"}}
        made |= {"command": [f"{WHO['home']}/project/.venv/bin/crm", "sweep", "demo", "--data", "/big/lab-7/mf"]}
        write_json(folder / "provenance.json", made)
        write_json(folder / "code.json", {"crm.losses": {"f": "1" if cell.variant == ROWS[0] else "2", "g": "0"}})
        holder = {"token": "t", "host": WHO["host"], "boot": "b-1", "pid": 1, "started": 1, "time": 1.0}
        write_json(folder / "attempts/t.json", {**holder, "job": {"name": "j", "task": 0, "user": WHO["user"]}})
        append(folder, "end", outcome="failed", reason=f"FileNotFoundError: {WHO['home']}/project/x.png on gpu17")
        (folder / "log.txt").write_text(f"{WHO['user']}@cluster.example: /big/{WHO['user']}/a b/c.txt is missing\n")
    write_json(home / "runs/.sweeps" / NAME / "asked.json", {
        "name": NAME, "title": "", "cells": [{"variant": c.variant, "seed": c.seed, "id": c.id} for c in SWEEP.cells()],
        "selection": "last", "conditions": [], "cluster": "local", "resources": {}, "snapshot": "", "seeds": [0, 1],
        "machine": {"runs": f"{WHO['home']}/project/runs"}, "changes": {},
    })  # fmt: skip
    write_json(home / "reports/tables/main.json", {"cells": {"CRM/MF": {"mean": 1.0, "runs": [SWEEP.cells()[0].id]}}})
    return home


def sides(home: Path, *rows: str) -> list[Side]:
    cells = SWEEP.cells()
    return [Side(row, {c.seed: home / "runs" / c.id for c in cells if c.variant == row}) for row in rows]


# ---------------------------------------------------------------------------------------------- diff


def test_two_variants_differ_in_what_was_planted(home):
    found = compare(*sides(home, ROWS[0], ROWS[-1]))
    assert found["seeds"] == [0, 1] and "seed" not in found["configuration"]
    wanted = {path for row in (ROWS[0], ROWS[-1]) for path in SWEEP.variants[row]}
    assert set(found["configuration"]) <= wanted and found["configuration"]
    assert found["code"]["training"] == ["crm.losses.f"] and found["code"]["evaluation"] is None
    assert found["environment"] == {"version of torch": ["2.8", "2.9"]}
    assert found["cost"]["seconds_per_step"] == [0.1, 0.1 + len(ROWS) - 1]


def test_gains_are_those_of_the_stored_matrices_paired_at_equal_seed(home):
    a, b = sides(home, ROWS[0], ROWS[-1])
    found = compare(a, b)["gains"]
    whole = {side.label: [load_evaluation(evaluation(folder, "last", CLEAN_TEST)).confusion.sum(axis=0)
                          for folder in side.folders.values()] for side in (a, b)}  # fmt: skip
    for place, name in enumerate(name for name in found if name != "miou"):
        each = [np.mean([iou(matrix)[place] for matrix in whole[side.label]]) for side in (a, b)]
        assert (found[name]["a"], found[name]["b"]) == pytest.approx(each, nan_ok=True)
    gain = np.mean([miou(two) - miou(one) for one, two in zip(whole[a.label], whole[b.label], strict=True)])
    assert found["miou"]["gain"] == pytest.approx(gain)
    assert found["miou"]["low"] < gain < found["miou"]["high"] and found["miou"]["verdict"] == "gain"


def test_a_run_beside_itself_differs_in_nothing(home):
    (one,) = sides(home, ROWS[0])
    found = compare(one, one)
    assert not found["configuration"] and not found["environment"] and not found["data"]
    assert found["code"] == {"training": [], "evaluation": None}
    assert {each["gain"] for each in found["gains"].values() if each["gain"] == each["gain"]} == {0.0}
    assert all(each["pixels"] == 0 for each in found["flipped"])


def test_the_image_that_was_changed_is_the_one_that_flipped_most(home, tmp_path):
    folder = sides(home, ROWS[0])[0].first
    changed = tmp_path / "runs" / folder.name
    path = evaluation(changed, "last", CLEAN_TEST)
    stored = load_evaluation(evaluation(folder, "last", CLEAN_TEST), predictions=True)
    assert stored.predictions is not None
    other = stored.predictions.copy()
    other[2] = (other[2] + 1) % len(stored.meta["classes"])
    save_evaluation(path, replace(stored, predictions=other))
    for name in ("config.json", "provenance.json", "result.json"):
        (changed / name).write_bytes((folder / name).read_bytes())
    first = compare(Side("a", {0: folder}), Side("b", {0: changed}))["flipped"][0]
    assert first["image"] == str(stored.names[2]) and first["pixels"] == 100


def test_other_images_have_no_gains(home, tmp_path):
    folder = sides(home, ROWS[0])[0].first
    stored = load_evaluation(evaluation(folder, "last", CLEAN_TEST))
    changed = tmp_path / "runs" / folder.name
    save_evaluation(evaluation(changed, "last", CLEAN_TEST), replace(stored, names=stored.names[::-1]))
    found = compare(Side("a", {0: folder}), Side("b", {0: changed}))
    assert found["gains"] == {} and "other images" in found["why"]


def test_the_command_compares_runs_rows_and_tables(home, tmp_path):
    runs = ("--runs", str(home / "runs"))
    told = json.loads(crm("diff", f"{NAME}:{ROWS[0]}", f"{NAME}:{ROWS[-1]}", "--json", *runs))
    assert told["seeds"] == [0, 1]
    assert "crm.losses.f" in crm("diff", f"{NAME}:{ROWS[0]}/0", SWEEP.cells()[-1].id, *runs)
    cells = {"a/x": {"mean": 1.0, "n": 3}, "b/x": {"mean": 2.0, "n": 3}, "c/x": {"mean": 1.0}}
    after = {"a/x": {"mean": 1.5, "n": 2}, "b/x": {"mean": 2.0, "n": 3}, "d/x": {}}
    write_json(tmp_path / "one.json", {"cells": cells})
    write_json(tmp_path / "two.json", {"cells": after})
    text = crm("diff", str(tmp_path / "one.json"), str(tmp_path / "two.json"))
    assert "+0.50" in text and "only in A: c/x" in text and "only in B: d/x" in text and "1 cells are the same" in text
    assert compare_tables(cells, after)["changed"]["a/x"]["fields"] == {"mean": [1.0, 1.5], "n": [3, 2]}


# ---------------------------------------------------------------------------------------------- pack


@pytest.fixture
def me(home, monkeypatch):
    monkeypatch.setenv("LOGNAME", WHO["user"])
    monkeypatch.setenv("HOME", WHO["home"])
    monkeypatch.setenv("CRM_HOME", str(home))


def packed(home: Path, place: Path, *more: str) -> Path:
    crm("pack", NAME, "main", str(place / "study.tar.gz"), "--runs", str(home / "runs"), *more)
    return place / "study.tar.gz"


def unpacked(file: Path) -> Path:
    with tarfile.open(file) as archive:
        archive.extractall(file.parent / "out", filter="data")
    return file.parent / "out"


def test_an_anonymous_capsule_names_no_host_user_or_place(home, tmp_path, me):
    folder = unpacked(packed(home, tmp_path, "--anonymous"))
    secret = (b"gpu17", b"jdoe", WHO["home"].encode(), b"cluster.example", b"lab-7", b'b-1"', str(home).encode())
    own = ("code/tests/test_diff_and_pack.py",)  # says what is planted
    found = [
        (path.relative_to(folder).as_posix(), word)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in own
        for word in secret
        if word in path.read_bytes()
    ]
    assert not found
    for path in folder.glob("runs/*/*.json"):
        json.loads(path.read_text())
    assert not (folder / "code/code.bundle").exists(), "its history names who wrote it"


def test_a_capsule_has_the_records_and_no_checkpoints_and_the_same_bytes_each_time(home, tmp_path, me):
    first = packed(home, tmp_path / "one")
    assert first.read_bytes() == packed(home, tmp_path / "two").read_bytes()
    folder = unpacked(first)
    assert (folder / "reports/tables/main.json").exists() and (folder / "environment/constraints.txt").exists()
    assert not list(folder.rglob("*.safetensors"))
    for cell in SWEEP.cells():
        for name in ("config.json", "result.json", "journal.jsonl", "evals/last/test.npz"):
            own = home / "runs" / cell.id / name
            assert (folder / "runs" / cell.id / name).read_bytes() == own.read_bytes()
    code = list((folder / "code").iterdir())
    assert code
    if (bundle := folder / "code/code.bundle").exists():
        subprocess.run(["git", "clone", "-q", str(bundle), str(folder / "source")], check=True, capture_output=True)
        assert (folder / "source/crm/records.py").exists()


BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "mlflow", "optuna", "submitit"):
            raise ModuleNotFoundError(f"no module named {name} on this laptop", name=name)
sys.meta_path.insert(0, Absent())
from crm.cli import main
import crm.records
assert crm.records.__file__.startswith(sys.argv.pop(1)), crm.records.__file__
main()
"""


def test_a_capsule_renders_without_torch(home, tmp_path, me):
    """By the code that it holds, in another process, without the runs that it was made from."""
    folder = unpacked(packed(home, tmp_path, "--anonymous"))
    environment = {**os.environ, "PYTHONPATH": str(folder / "code"), "CRM_HOME": str(folder), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(folder / "code"), "report", NAME, "--runs", str(folder / "runs"), "--json"],
        cwd=folder / "code", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (folder / "reports" / NAME / "table.csv").read_text()
    assert all(row in text for row in ROWS)
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(folder / "code"), "tables", "losses", "--runs", str(folder / "runs")],
        cwd=folder / "code", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "reports/tables/losses.tex").exists()


def test_what_cannot_be_packed_is_refused_in_words(home):
    for arguments, words in (
        (["pack", "demo"], "FILE.tar.gz"), (["pack", "dmo", "x.tar.gz"], "Did you mean 'demo'"),
    ):  # fmt: skip
        done = CliRunner().invoke(app, [*arguments, "--runs", str(home / "runs")])
        assert isinstance(done.exception, ValueError) and words in str(done.exception)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("at /big/jdoe/a b/c.py, line 3", "at <place>/c.py, line 3"),
        ("sqlite:////big/x/mlflow.db", "sqlite:///<place>/mlflow.db"),
        ("node9: lost; NODE9 again, node91 not", "anonymous: lost; anonymous again, node91 not"),
        ('{"host": "h1", "token": "t"}', '{"host": "anonymous", "token": "t"}'),
        ("a.b@uni.example wrote", "anonymous wrote"),
        ("demo@tiny 1/2 and/or <b>x</b>", "demo@tiny 1/2 and/or <b>x</b>"),
    ],
)
def test_texts_are_stripped_of_names_and_places_alone(text, wanted):
    assert Hide(["node9", "root"], [WHO["home"]])("log.txt", text.encode()).decode() == wanted


# ---------------------------------------------------------------------------------------------- notebooks


def test_a_sweep_is_a_frame_by_its_name(home):
    found = frame(NAME, runs=home / "runs")
    plain = load(find_sweep(NAME)[1], home / "runs")
    assert found.equals(plain) and set(found["variant"]) == set(ROWS)
    assert found.loc[found["seed"] < 2, "miou"].notna().all()
    with pytest.raises(ValueError, match="Did you mean 'demo'"):
        frame("dmo")
