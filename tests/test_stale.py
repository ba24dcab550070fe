"""Whether a run would come out otherwise now: drifted defaults, changed code, and how it is trained anew."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crm import fingerprint
from crm.conditions import CLEAN_TEST
from crm.config import override
from crm.fingerprint import FILE, changed, code_parts, modules, parts, training_code
from crm.records import Moved, claim, open_run, read_json, state, write_json
from crm.stale import SUPERSEDED, due, stale, supersede
from crm.sweep import Cell
from experiments.synthetic_small import config

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------------------------------------- which code counts


def test_training_passes_through_the_modules_that_a_real_import_loads():
    """Compared with what Python loads: every module of ours that it has, and that is not set apart, counts."""
    code = "import sys, crm.train; print(*(name for name in sys.modules if name.startswith('crm.')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    apart = {f"crm.{name}" for name in fingerprint.APART}
    packages = {name for name in loaded if (ROOT / name.replace(".", "/")).is_dir()}
    wanted = {name for name in loaded if ".".join(name.split(".")[:2]) not in apart}
    assert wanted - packages <= set(modules())
    assert {"crm.step", "crm.losses", "crm.model.fusion", "crm.data.transforms"} <= set(modules())
    assert not {"crm.diagnose", "crm.predict", "crm.records", "crm.cli", "crm.mirror"} & set(modules())


def test_modules_for_type_checkers_alone_do_not_count_and_lazy_ones_do(tmp_path):
    (tmp_path / "crm").mkdir()
    (tmp_path / "crm/train.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from crm import seen\n"
        "def train():\n    from crm.used import f\n"
    )
    for name in ("seen", "used", "never"):
        (tmp_path / f"crm/{name}.py").write_text("")
    assert modules(tmp_path) == ["crm.train", "crm.used"]


BEFORE = '''
"""A module."""
import math
from os import path
LIMIT = 3
FORMS = {"one": math.sin, "two": lambda x: x + 1}
def f(x: int) -> int:
    """What it does."""
    return x * 2  # doubled
class Net:
    """A net."""
    def forward(self): return 1
'''


def touched(before: str, after: str) -> set[str]:
    return set(fingerprint.differing(parts(before), parts(after)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# doubled", "# twice as much"),
        ('"""What it does."""', '"""Other words."""'),
        ('    """A net."""\n', ""),
        ("return x * 2", "return (x *\n            2)"),
        ("def forward(self): return 1", "def forward(self):\n        return 1"),
        ('"two": lambda x: x + 1', '"two": lambda x: x + 1, "three": math.cos'),
        ("class Net", "def g():\n    return 0\nclass Net"),
        ("from os import path\n", ""),
        ('"""A module."""', ""),
    ],
)
def test_comments_docstrings_formatting_and_new_alternatives_change_nothing(old, new):
    assert old in BEFORE and touched(BEFORE, BEFORE.replace(old, new)) == set()


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("x * 2", "x * 3", "f"),
        ("return 1", "return 2", "Net"),
        ("LIMIT = 3", "LIMIT = 4", "LIMIT"),
        ("x + 1", "x + 2", "FORMS['two']"),
        ("from os import path", "from posix import path", "import of path"),
        ("class Net", "f(3)\nclass Net", "its statements"),
        ("class Net", "def f(x): return x\nclass Net", "f"),
        ("LIMIT = 3\n", "", "LIMIT"),
    ],
)
def test_what_can_change_a_number_is_named(old, new, part):
    assert touched(BEFORE, BEFORE.replace(old, new)) == {part}


# ---------------------------------------------------------------------------------------------- a run and its code


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the code, to be edited."""
    shutil.copytree(ROOT / "crm", tmp_path / "copy/crm", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


def edited(copy: Path, name: str, old: str, new: str) -> None:
    path = copy / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    fingerprint.forget()


@pytest.fixture
def cell() -> Cell:
    return Cell(variant="CRM", seed=0, config=config)


@pytest.fixture
def folder(tmp_path, copy, cell) -> Path:
    """A run that was trained by the copied code."""
    made = open_run(tmp_path / "runs", cell.config)
    write_json(made / "provenance.json", {"training_code": training_code(copy)})
    write_json(made / FILE, code_parts(copy))
    write_json(made / "result.json", {"steps": config.steps})
    return made


def test_a_run_names_the_code_that_has_changed_since(folder, cell, copy):
    assert not stale(folder, cell, root=copy)
    edited(copy, "crm/losses.py", "import torch", "# nothing but words\nimport torch")
    assert not stale(folder, cell, root=copy)
    edited(copy, "crm/optim.py", "return ", "return 0.5 * ")
    found = stale(folder, cell, root=copy)
    assert found and str(found).startswith("the code has changed since: crm.optim.")
    edited(copy, "crm/records.py", "def open_run", "def new_name")
    assert str(stale(folder, cell, root=copy)) == str(found), "what only records does not count"


def test_a_module_that_is_gone_is_a_change(folder, cell, copy):
    (copy / "crm/optim.py").unlink()
    fingerprint.forget()
    assert "crm.optim." in str(stale(folder, cell, root=copy))


def test_a_run_from_before_code_was_kept_is_not_called_stale(folder, cell, copy):
    edited(copy, "crm/optim.py", "return ", "return 0.5 * ")
    (folder / FILE).unlink()
    assert changed(folder, read_json(folder / "provenance.json")["training_code"], copy) is None
    write_json(folder / "provenance.json", {"commit": "0123"})
    found = stale(folder, cell, root=copy)
    assert found.code is None and not found


def drift(folder: Path) -> None:
    written = read_json(folder / "config.json")
    write_json(folder / "config.json", {**written, "config": {**written["config"], "optim.weight_decay": 0.01}})


def test_a_run_whose_default_moved_names_the_setting_and_refuses_to_open(folder, cell):
    drift(folder)
    assert "optim.weight_decay (was 0.01, now 0.05)" in stale(folder, cell).drifted
    with pytest.raises(Moved, match="--rerun drifted"):
        open_run(folder.parent, cell.config)


# ---------------------------------------------------------------------------------------------- run again


def seeds(runs: Path, *kinds: str) -> list[Cell]:
    """Cells with runs of these kinds: done, failed, drifted, evaluation (failed in it), missing."""
    cells = []
    for seed, kind in enumerate(kinds):
        cells.append(Cell(variant="CRM", seed=seed, config=override(config, {"seed": seed})))
        if kind == "missing":
            continue
        folder = open_run(runs, cells[-1].config)
        if kind in ("done", "drifted", "evaluation"):
            write_json(folder / "result.json", {})
        if kind in ("failed", "evaluation"):
            write_json(folder / "failure.json", {"reason": "ValueError: odd", "step": 3, "token": "t"})
        if kind == "drifted":
            drift(folder)
    return cells


KINDS = ("done", "failed", "drifted", "evaluation", "missing")


@pytest.mark.parametrize(("which", "moved"), [("stale", {2}), ("drifted", {2}), ("failed", {1}), ("all", {0, 1, 2, 3})])
def test_run_again_moves_what_was_asked_for_and_keeps_all_of_it(tmp_path, which, moved):
    cells = seeds(tmp_path, *KINDS)
    files = {cell.id: sorted(path.name for path in (tmp_path / cell.id).glob("*")) for cell in cells}
    assert set(due(tmp_path, cells, which)) == {cells[seed].id for seed in moved}
    kept = supersede(tmp_path, cells, which)
    assert set(kept) == {cells[seed].id for seed in moved}
    for id, place in kept.items():
        assert place == tmp_path / SUPERSEDED / f"{id}.1" and not (tmp_path / id).exists()
        assert sorted(path.name for path in place.glob("*") if path.name != ".claim.lock") == files[id]
    assert {cells[seed].id for seed in range(4) if seed not in moved} == {path.name for path in tmp_path.glob("[!.]*")}
    if moved == {2}:
        assert state(tmp_path, cells[2].config, "last", [CLEAN_TEST]).name == "missing"


def test_run_again_and_again_keeps_every_one(tmp_path):
    (cell,) = seeds(tmp_path, "done")
    for number in (1, 2, 3):
        open_run(tmp_path, cell.config)
        assert supersede(tmp_path, [cell], "all")[cell.id].name == f"{cell.id}.{number}"
    assert len(list((tmp_path / SUPERSEDED).iterdir())) == 3


def test_a_run_that_is_worked_on_is_never_moved(tmp_path):
    running, done = seeds(tmp_path, "done", "done")
    mine = claim(tmp_path / running.id, "t")
    assert mine and set(supersede(tmp_path, [running, done], "all")) == {done.id}
    mine.check()


HOLD = "import sys; from pathlib import Path; from crm.records import claim\n"
HOLD += "claim(Path(sys.argv[1]), 'dead'); print(flush=True); sys.stdin.read()"


def test_a_run_whose_process_has_died_can_be_run_again(tmp_path):
    (cell,) = seeds(tmp_path, "done")
    command = [sys.executable, "-c", HOLD, str(tmp_path / cell.id)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        assert supersede(tmp_path, [cell], "all") == {}
        holder.kill()
    (place,) = supersede(tmp_path, [cell], "all").values()
    assert (place / "attempts/dead.json").exists() and not (place / "claim.json").exists()


def test_an_unknown_way_to_run_again_is_refused_with_those_that_exist(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'stale'"):
        due(tmp_path, [], "stael")
