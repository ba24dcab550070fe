"""Whether evaluations would come out otherwise now, edited results, and waivers: on a real run with planted faults."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from crm import evaluated, fingerprint, waivers
from crm import stale as stale_module
from crm.cli import app
from crm.conditions import CLEAN_TEST, Condition, Degradation, condition
from crm.config import override
from crm.confusion import load_evaluation, save_evaluation
from crm.evaluated import INDEX, index
from crm.records import evaluation, open_run, raw_lines, read_json, write_json
from crm.stale import evaluation_stale, evaluations_stale, stale
from crm.sums import note
from crm.sweep import Cell
from crm.worker import DONE, attempt
from tests.tiny import TINY, machine

ROOT = Path(__file__).parents[1]
FOG = Condition(rgb=Degradation(kind="fog", severity=3.0))
STRIPES = Condition(thermal=Degradation(kind="stripes", severity=3.0))
CONDITIONS = [CLEAN_TEST, FOG, STRIPES]
CELL = Cell(variant="CRM", seed=0, config=override(TINY, {"steps": 2, "val_every": 2}))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run that was trained, and evaluated with both of its checkpoints."""
    runs = tmp_path_factory.mktemp("made")
    folder = open_run(runs, CELL.config)
    for selection in ("last", "val_best"):
        code = attempt(folder, machine(runs), selection, selection, CONDITIONS, lambda: False, lambda progress: None)
        assert code == DONE, (folder / "failure.json").read_text()
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of that run, to be tampered with."""
    return Path(shutil.copytree(made, tmp_path / "runs" / made.name))


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the code, to be edited."""
    shutil.copytree(ROOT / "crm", tmp_path / "copy/crm", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


def edit(copy: Path, name: str, old: str, new: str) -> None:
    path = copy / "crm" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    forget()


def forget() -> None:
    fingerprint.forget()
    evaluated.forget()
    stale_module.corruptions_version.cache_clear()


def states(folder: Path, root: Path = ROOT, selection: str = "last", content: bool = False) -> dict[str, str]:
    """What is said of each evaluation; "" is fresh."""
    found = evaluations_stale(folder, CELL, selection, CONDITIONS, root=root, content=content)
    assert all(not one.unknown for one in found.values())
    return {name: str(one) for name, one in found.items()}


def crm(*arguments: str, runs: Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*arguments, "--runs", str(runs)])
    assert done.exit_code == code, done.output + repr(done.exception)
    return done.stdout


# ---------------------------------------------------------------------------------------------- fresh


def test_a_new_run_is_fresh_and_everything_is_known(folder):
    for selection in ("last", "val_best"):
        assert set(states(folder, selection=selection, content=True).values()) == {""}
    trained = stale(folder, CELL, content=True)
    assert not trained and trained.unknown == ()
    told = json.loads(crm("why", folder.name, "--json", runs=folder.parent))
    assert told["state"] == "fresh" and len(told["runs"][0]["evaluations"]) == 6
    assert "6 evaluations" in crm("why", folder.name, runs=folder.parent)


def test_many_evaluations_share_one_file_of_code_and_their_hashes_are_those_of_the_files(folder):
    assert len(list((folder / "evals/last").glob("code-*.json"))) == 1
    lines = {(one["selection"], one["condition"]): one for one in raw_lines(folder / "journal.jsonl")
             if one["event"] == "evaluate"}  # fmt: skip
    for name, one in index(folder / "evals/last").items():
        path = evaluation(folder, "last", condition(name))
        assert one["sha256"] == lines["last", name]["sha256"] == stale_module.file_hash(path)
        assert load_evaluation(path).meta == {"schema": 1, **one["meta"]}


def test_no_evaluation_is_opened_where_there_is_an_index(folder):
    for path in (folder / "evals/last").glob("*.npz"):
        path.write_bytes(b"x" * path.stat().st_size)
    assert set(states(folder).values()) == {""}
    assert all("edited" in said for said in states(folder, content=True).values())


# ---------------------------------------------------------------------------------------------- code


def test_evaluation_code_makes_evaluations_stale_and_trainings_not(folder, copy):
    edit(copy, "evaluate.py", "scores.max(dim=0)", "scores.min(dim=0)")
    assert set(states(folder, copy).values()) == {"the code has changed since: crm.evaluate.answer"}
    assert not stale(folder, CELL, root=copy), "what was trained stays what it is"
    chosen = states(folder, copy, "val_best").values()
    assert all("val_best was chosen by other code: crm.evaluate.answer" in said for said in chosen)


def test_training_code_makes_trainings_stale_and_evaluations_not(folder, copy):
    edit(copy, "optim.py", "return ", "return 0.5 * ")
    assert "crm.optim." in str(stale(folder, CELL, root=copy))
    assert set(states(folder, copy).values()) == {""}


def test_what_both_pass_through_makes_both_stale(folder, copy):
    edit(copy, "model/fusion.py", "torch.maximum(", "torch.minimum(")
    assert "crm.model.fusion." in str(stale(folder, CELL, root=copy))
    assert all("crm.model.fusion." in said for said in states(folder, copy).values())


def test_comments_formatting_and_a_new_corruption_change_nothing(folder, copy):
    edit(copy, "evaluate.py", "AT_ONCE = 16  #", "AT_ONCE  =  16  # words:")
    edit(copy, "corruptions/__init__.py", '    "fog": rgb.fog,', '    "fog": rgb.fog,\n    "rain": rgb.rain,')
    edit(copy, "corruptions/__init__.py", '"rotation": camera.rotation,', '"rotation": camera.rotation,  # turned')
    edit(copy, "corruptions/__init__.py", "TOGETHER = (", 'TOGETHER = ("rain", ')
    edit(
        copy,
        "corruptions/rgb.py",
        "def fog(",
        "def rain(pixels, mean, severity, rng):\n    return pixels\n\n\ndef fog(",
    )
    edit(copy, "conditions.py", '"fog", "snow"', '"fog", "rain", "snow"')
    assert set(states(folder, copy).values()) == {""}
    assert not stale(folder, CELL, root=copy)


def test_a_corruption_concerns_its_own_conditions_alone(folder, copy):
    text = (copy / "crm/corruptions/rgb.py").read_text()
    body = text[text.index("def fog(") :]
    edit(copy, "corruptions/rgb.py", body, body.replace("return ", "return 0.5 * ", 1))
    assert states(folder, copy) == {
        "test": "", FOG.name: "the code has changed since: crm.corruptions.rgb.fog", STRIPES.name: ""
    }  # fmt: skip


def test_an_old_corruption_with_another_treatment_is_another_corruption(folder, copy):
    edit(copy, "corruptions/__init__.py", 'FROZEN = ("column_noise"', 'FROZEN = ("stripes", "column_noise"')
    found = states(folder, copy)
    assert "crm.corruptions.FROZEN['stripes']" in found[STRIPES.name] and not found["test"] and not found[FOG.name]


def test_what_is_around_the_corruptions_concerns_all_of_them(folder, copy):
    edit(copy, "corruptions/__init__.py", "np.rint(made", "np.floor(made")
    assert all("crm.corruptions.apply" in said for said in states(folder, copy).values())


def test_an_older_version_of_the_corruptions_is_stale_where_something_was_corrupted(folder, copy):
    edit(copy, "corruptions/__init__.py", "VERSION = 2", "VERSION = 3")
    found = states(folder, copy)
    assert found["test"] == "" and found[FOG.name] == "it has version 2 of the corruptions, now there is 3"


# ---------------------------------------------------------------------------------------------- checkpoint and data


def test_an_evaluation_of_another_checkpoint_is_stale(folder):
    result = read_json(folder / "result.json")
    result["checkpoints"]["last"]["sha256"] = "f" * 64
    write_json(folder / "result.json", result)
    assert all("the run's is ffffffffffff" in said for said in states(folder).values())
    assert set(states(folder, selection="val_best").values()) == {""}


def test_other_frames_make_training_and_evaluations_stale(folder):
    other = replace(CELL, config=override(CELL.config, {"data.test_images": 4, "data.train_images": 9}))
    assert "its frames were" in str(evaluation_stale(folder, other, "last", CLEAN_TEST))
    assert "the frames of train were" in str(stale(folder, other))


def test_real_frames_are_read_only_where_they_are_asked_for(folder):
    real = replace(CELL, config=override(CELL.config, {"data.dataset": "mf"}))
    found = evaluation_stale(folder, real, "last", CLEAN_TEST)
    assert not found and found.unknown == ("data",)


# ---------------------------------------------------------------------------------------------- edited


def test_an_edited_evaluation_is_told(folder):
    path = evaluation(folder, "last", FOG)
    stored = load_evaluation(path, predictions=True)
    better = np.stack([np.diag(matrix.sum(axis=1)) for matrix in stored.confusion]).astype(np.int32)
    save_evaluation(path, replace(stored, confusion=better))
    found = states(folder, content=True)
    assert found == {"test": "", FOG.name: "its file was edited after it was written", STRIPES.name: ""}
    assert "edited" in crm("why", folder.name, runs=folder.parent, code=1)


def test_an_edited_result_and_an_edited_checkpoint_are_told(folder):
    write_json(folder / "result.json", {**read_json(folder / "result.json"), "miou": 99.0})
    assert str(stale(folder, CELL, content=True)) == "result.json was edited after it was written"
    path = folder / "checkpoints/last.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert "the checkpoint last was edited" in str(stale(folder, CELL, content=True))


def test_old_records_are_unknown_and_never_wrong(folder):
    for path in (folder / "evals/last").glob("*.npz"):
        stored = load_evaluation(path, predictions=True)
        old = ("selection", "step", "code", "checkpoint_sha256", "data_sha256", "corruptions")
        save_evaluation(path, replace(stored, meta={k: v for k, v in stored.meta.items() if k not in old}))
    for path in (folder / "evals/last").glob("code-*"):
        path.unlink()
    (folder / "evals/last" / INDEX).unlink()
    lines = list(raw_lines(folder / "journal.jsonl"))
    gone = ("sha256", "result_sha256")
    kept = [{key: value for key, value in line.items() if key not in gone} for line in lines]
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    for content in (False, True):
        found = evaluations_stale(folder, CELL, "last", CONDITIONS, content=content)
        assert not any(found.values())
        assert set(found["test"].unknown) == {"code", "checkpoint", "data", "edited"}
    assert stale(folder, CELL, content=True).unknown == ("edited",)
    assert "unknown" in crm("why", folder.name, runs=folder.parent)


def test_a_torn_line_of_the_index_spoils_no_other(folder):
    path = folder / "evals/last" / INDEX
    path.write_bytes(path.read_bytes() + b'{"condition": "te')
    kept = evaluation(folder, "last", CLEAN_TEST)
    again = load_evaluation(kept, predictions=True)
    hash = save_evaluation(kept, again)
    note(kept, again, hash)
    assert set(index(folder / "evals/last")) == {one.name for one in CONDITIONS}
    assert index(folder / "evals/last")["test"]["sha256"] == hash


def test_a_drifted_default_is_named_old_and_new(folder):
    written = read_json(folder / "config.json")
    write_json(folder / "config.json", {**written, "config": {**written["config"], "optim.weight_decay": 0.01}})
    assert "optim.weight_decay (was 0.01, now 0.05)" in str(stale(folder, CELL))


# ---------------------------------------------------------------------------------------------- evaluated again


def test_stale_evaluations_are_computed_again_and_the_old_ones_kept(folder):
    path = evaluation(folder, "last", CLEAN_TEST)
    right = load_evaluation(path)
    save_evaluation(path, replace(right, confusion=right.confusion + 1))
    edited = path.read_bytes()
    crm("evaluate", folder.name, "--suite", "clean", "--rerun", "stale", "--threads", "1", runs=folder.parent)
    np.testing.assert_array_equal(load_evaluation(path).confusion, right.confusion)
    assert (folder / "evals/.superseded/last/test.1.npz").read_bytes() == edited
    assert set(states(folder, content=True).values()) == {""}
    again = ("evaluate", folder.name, "--suite", "clean", "--rerun", "stale", "--threads", "1")
    crm(*again, runs=folder.parent, code=3)


# ---------------------------------------------------------------------------------------------- waivers


@pytest.fixture
def spoilt(folder) -> Path:
    """With a result.json that was edited."""
    write_json(folder / "result.json", {**read_json(folder / "result.json"), "miou": 99.0})
    return folder


def test_a_waiver_is_dry_until_confirmed_and_says_exactly_what(spoilt):
    runs = spoilt.parent
    assert "--yes" in crm("accept", spoilt.name, "--because", "a typo", runs=runs)
    assert waivers.decisions(spoilt) == []
    crm("accept", spoilt.name, "--because", "a typo", "--yes", runs=runs)
    (line,) = waivers.decisions(spoilt)
    assert line["because"] == "a typo" and line["time"] and set(line) == {"time", "decision", "because", "waived"}
    assert [(one["what"], one["kind"]) for one in line["waived"]] == [("training", "edited")]
    assert "accepted, because a typo: result.json was edited" in crm("why", spoilt.name, runs=runs)
    crm("accept", spoilt.name, "--because", "again", "--yes", runs=runs, code=3)


def test_a_further_change_is_stale_again(spoilt):
    crm("accept", spoilt.name, "--because", "a typo", "--yes", runs=spoilt.parent)
    write_json(spoilt / "result.json", {**read_json(spoilt / "result.json"), "miou": 98.0})
    crm("why", spoilt.name, runs=spoilt.parent, code=1)


def test_a_waiver_of_changed_code_ends_when_the_same_part_changes_again(folder, copy):
    edit(copy, "evaluate.py", "scores.max(dim=0)", "scores.min(dim=0)")
    (reason,) = evaluation_stale(folder, CELL, "last", CLEAN_TEST, root=copy).reasons
    waivers.accept(folder, [{"what": "last/test", "mark": reason.mark}], "it is the same by hand")
    found = evaluation_stale(folder, CELL, "last", CLEAN_TEST, root=copy)
    assert not found and found.waived == (reason,) and found.because == "it is the same by hand"
    assert evaluation_stale(folder, CELL, "last", FOG, root=copy), "another evaluation was not accepted"
    edit(copy, "evaluate.py", "scores.min(dim=0)", "scores.median(dim=0)")
    again = evaluation_stale(folder, CELL, "last", CLEAN_TEST, root=copy)
    assert str(again) == reason.words and again.reasons[0].mark != reason.mark


def test_a_waiver_can_be_withdrawn(spoilt):
    runs = spoilt.parent
    crm("accept", spoilt.name, "--because", "a typo", "--yes", runs=runs)
    crm("accept", spoilt.name, "--withdraw", runs=runs)
    crm("why", spoilt.name, runs=runs)
    crm("accept", spoilt.name, "--withdraw", "--yes", runs=runs)
    crm("why", spoilt.name, runs=runs, code=1)
    crm("accept", spoilt.name, "--withdraw", "--yes", runs=runs, code=3)


def test_a_waiver_without_a_reason_is_refused(spoilt):
    done = CliRunner().invoke(app, ["accept", spoilt.name, "--runs", str(spoilt.parent)])
    assert isinstance(done.exception, ValueError) and "--because" in str(done.exception)


def test_verifying_records_what_is_the_same_and_refuses_what_is_not(folder):
    runs, path = folder.parent, evaluation(folder, "last", FOG)
    stored = load_evaluation(path, predictions=True)
    save_evaluation(path, replace(stored, meta={**stored.meta, "seconds": 0.0}))  # other bytes, the same evidence
    crm("accept", folder.name, "--because", "only its seconds", "--verify", "2", "--yes", runs=runs)
    assert waivers.decisions(folder)[0]["verified"] == {"images": 3, "evaluations": 1, "differing": 0}
    save_evaluation(path, replace(stored, confusion=stored.confusion + 1))
    crm("accept", folder.name, "--because", "hoping", "--verify", "2", "--yes", runs=runs, code=1)
    assert len(waivers.decisions(folder)) == 1
