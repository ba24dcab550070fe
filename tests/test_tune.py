"""Searches: they find what is known to be best, survive whatever is killed, and are no evidence."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import optuna
import psutil
import pytest

from crm.cli.options import find_experiment, modules, searches
from crm.cli.tune import find_search
from crm.config import override
from crm.records import open_run, read_json
from crm.search import OBJECTIVES, POOL, Choice, Number, Search, Weight, tuning_run
from crm.tracking.listing import list_study, read_listing
from crm.tuning.coordinator import Coordinator, Summary, counts, tune
from crm.tuning.folder import Asked, ask, folder_of, signature
from crm.tuning.methods import distributions, grid, refuse_pruner, sampler
from crm.tuning.promotion import written
from crm.tuning.storage import location, mend, shown
from crm.tuning.work import LocalRuns, Look, queue_of
from tests.servers import postgres
from tests.tiny import TINY, machine
from tests.tune_case import BOWL, SLOW, SWITCH, TWO, WRONG, searched

ROOT = Path(__file__).parents[1]


def study_of(runs: Path, storage: str = "sqlite", name: str = "study") -> optuna.Study:
    """As anybody reads it, with Optuna alone."""
    path = runs / ".studies" / name
    if storage == "sqlite":
        return optuna.load_study(study_name=name, storage=f"sqlite:///{path}/study.db")
    if storage == "journal":
        backend = optuna.storages.journal.JournalFileBackend(str(path / "journal.log"))
        return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend))
    return optuna.load_study(study_name=name, storage=storage)


# ---------------------------------------------------------------------------------------------- what it finds


@pytest.mark.parametrize(
    ("method", "trials", "near"),
    [
        ("tpe", 25, 0.3),
        pytest.param("gp", 20, 0.05, marks=pytest.mark.slow),
        pytest.param("random", 25, 2, marks=pytest.mark.slow),
    ],
)
def test_it_finds_an_optimum_that_is_known(method, trials, near, tmp_path):
    found = searched(BOWL, tmp_path, trials, sampler=method)
    assert (found.complete, found.trials, found.stopped) == (trials, trials, "")
    study = study_of(tmp_path)
    assert len(study.trials) == trials and study.best_value > -near
    assert study.best_trial.user_attrs["settings"] == pytest.approx(study.best_params, rel=0.01)


def test_a_grid_is_looked_at_whole_and_off_is_found(tmp_path):
    searched(SWITCH, tmp_path, len(grid(SWITCH)), sampler="grid")
    best = study_of(tmp_path).best_trial
    assert best.user_attrs["settings"] == {"weight": 0.0, "kind": "b"} and best.value == 1.0


def test_several_objectives_give_their_front(tmp_path):
    searched(TWO, tmp_path, 20, sampler="nsga2")
    study = study_of(tmp_path)
    assert len(study.directions) == 2
    rows = [(trial.number, trial.values) for trial in study.trials]
    beaten = {
        n for n, mine in rows for _, other in rows if other[0] >= mine[0] and other[1] >= mine[1] and other != mine
    }
    assert {trial.number for trial in study.best_trials} == {n for n, _ in rows} - beaten


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_one_worker_tries_the_same_each_time(method, tmp_path):
    tried = []
    for name in ("once", "again"):
        searched(BOWL, tmp_path / name, 14, sampler=method, workers=1)  # more than a sampler's first random ones
        tried.append([(trial.params, trial.values) for trial in study_of(tmp_path / name).trials])
    assert tried[0] == tried[1]


def test_the_count_is_the_total(tmp_path):
    assert searched(BOWL, tmp_path, 4).trials == 4
    assert searched(BOWL, tmp_path, 6).trials == 6
    assert searched(BOWL, tmp_path, 6).trials == len(study_of(tmp_path).trials) == 6


def test_a_budget_ends_it(tmp_path):
    found = searched(SLOW, tmp_path, 1000, hours=2 / 3600)
    assert 2 <= found.trials < 12 and "the budget" in found.stopped


def test_what_always_fails_in_the_same_way_stops_the_study(tmp_path):
    found = searched(WRONG, tmp_path, 50)
    assert found.trials <= 4 and found.complete == 0 and "ZeroDivisionError: always" in found.stopped


# ---------------------------------------------------------------------------------------------- killed


def killed(runs: Path, storage: str, trials: int, chance: random.Random, kills: int) -> int:
    """Lets a search go on while its processes are killed at random; how many were."""
    done, deadline = 0, time.monotonic() + 200
    while True:
        command = [sys.executable, "-m", "tests.tune_case", str(runs), storage, str(trials)]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(chance.uniform(0.3, 1.5))
            if done < kills:
                own = [
                    one for one in psutil.process_iter(["cmdline"]) if str(runs) in " ".join(one.info["cmdline"] or ())
                ]
                victims = [one for one in own if one.pid != process.pid]
                victim = chance.choice(victims) if victims and chance.random() < 0.6 else psutil.Process(process.pid)
                try:
                    victim.kill()
                    done += 1
                except psutil.NoSuchProcess:
                    continue
        if process.returncode == 0:
            return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "chance"),
    [
        ("sqlite", 0),
        pytest.param("journal", 1, marks=pytest.mark.slow),
        pytest.param("sqlite", 2, marks=pytest.mark.slow),
    ],
)
def test_workers_and_coordinators_killed_at_random_leave_a_complete_study(storage, chance, tmp_path):
    assert killed(tmp_path, storage, 12, random.Random(chance), kills=6) == 6
    study = study_of(tmp_path, storage)
    assert {trial.state for trial in study.trials} <= {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL}
    kept = [trial for trial in study.trials if counts(trial)]
    assert len(kept) == 12 and all(trial.state == optuna.trial.TrialState.COMPLETE for trial in kept)
    for trial in study.trials:  # what was lost was asked again, with the same values
        if "retry_of" in trial.user_attrs:
            assert trial.params == study.trials[trial.user_attrs["retry_of"]].params
    assert [trial.number for trial in study.trials] == list(range(len(study.trials)))


def test_a_torn_last_line_of_a_journal_is_cut_and_nothing_else_is_lost(tmp_path):
    searched(BOWL, tmp_path, 5, "journal")
    path = tmp_path / ".studies/study/journal.log"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"worker_id":"x","stu')
    (path.parent / "journal.log.lock").symlink_to(path)
    os.utime(path.parent / "journal.log.lock", (0, 0), follow_symlinks=False)
    began = time.monotonic()
    assert searched(BOWL, tmp_path, 7, "journal").complete == 7
    assert path.read_bytes().startswith(whole) and len(study_of(tmp_path, "journal").trials) == 7
    assert time.monotonic() - began < 25  # Optuna alone waits 30 s for the lock of a dead writer
    mend(path)


def test_only_one_coordinator_is_at_a_study(tmp_path):
    from crm.cluster.folder import Busy

    with folder_of(tmp_path, "study").lease(), pytest.raises(Busy):
        searched(BOWL, tmp_path, 3)


# ---------------------------------------------------------------------------------------------- runs

SEARCH = Search(TINY, {"loss.masked": Weight(0.1, 10), "loss.non_local": Weight(0.1, 10)}, "missing", trials=3)


def trained(runs: Path, trials: int, search: Search = SEARCH, name: str = "tiny", **more):
    folder = folder_of(runs, name)
    asked = Asked(
        search="", storage=location(folder.path, "sqlite", "local"), trials=trials, objectives=search.objectives,
        signature=signature(search), **more,
    )  # fmt: skip
    ask(folder, asked)
    work = LocalRuns(search, name, queue_of(search, machine(runs), 2), "wilcoxon" in more.get("pruner", ""))
    return folder, asked, work


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A study of two trials that are runs, the first of which was killed once."""
    path = tmp_path_factory.mktemp("tuned")
    folder, asked, work = trained(path, 2)
    coordinator = Coordinator(folder, asked, SEARCH, work, 1)
    struck: list[int] = []

    def strike(states):
        for state in states.values():
            if state.name == "running" and state.pid and state.step and not struck:
                struck.append(state.pid)
                os.kill(state.pid, signal.SIGKILL)

    coordinator.show = strike
    found = coordinator.run()
    assert struck and found.trials == found.complete == 2 and found.retried == 1
    return path


def test_trials_are_ordinary_runs_with_seeds_of_their_own(runs):
    trials = [trial for trial in study_of(runs, name="tiny").trials if counts(trial)]
    assert len(trials) == 2
    for trial in trials:
        (id,) = trial.user_attrs["runs"]
        config = read_json(runs / id / "config.json")["config"]
        assert config["seed"] == POOL and (runs / id / "result.json").exists() and tuning_run(runs, id) == "tiny"
        assert sorted(path.stem for path in (runs / id / "evals/last").glob("*.npz")) == [
            "val", "val.rgb=missing_mean", "val.thermal=missing_mean",
        ]  # fmt: skip
    base = override(TINY, {"seed": 0})
    assert tuning_run(runs, open_run(runs, base).name) == ""


def test_the_first_trial_is_the_base(runs):
    first = next(t for t in study_of(runs, name="tiny").trials if counts(t) and t.user_attrs.get("settings") ==
                 {"loss.masked": 1.0, "loss.non_local": 1.0})  # fmt: skip
    assert first.params == {"loss.masked": 1.0, "loss.non_local": 1.0}


def test_what_a_run_answers_already_is_not_trained_again(runs):
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
    folder, asked, work = trained(runs, 2, name="again")
    list_study(runs, "tune-again", SEARCH.title, SEARCH.selection, [])  # as `crm tune` has its runs mirrored
    found = tune(SEARCH, folder, asked, work, 2)
    assert found.reused == found.complete == 2 and work.pool == []
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")} == before
    ids = [id for trial in study_of(runs, name="again").trials for id in trial.user_attrs["runs"]]
    assert tuning_run(runs, ids[0]) == "again, tiny"
    cells = read_listing(runs, "tune-again").cells
    assert [(one["variant"], one["seed"], one["id"]) for one in cells] == [
        (f"trial {number}", POOL, id) for number, id in enumerate(ids)
    ]


def test_another_search_under_the_same_name_is_refused(runs):
    with pytest.raises(ValueError, match="begun with other values of objectives"):
        trained(runs, 3, replace(SEARCH, objective="clean"))


class Told:
    """Work that reports what it is told to: trial n is n points worse than the first, at every step."""

    def __init__(self):
        self.steps: dict[int, int] = {}
        self.stopped: list[int] = []

    def start(self, number, params):
        self.steps[number] = 0

    def look(self, number, params):
        if number in self.stopped:
            return Look(name="lost", reason="its worker has left")
        self.steps[number] += 1
        values = dict.fromkeys(range(1, min(self.steps[number], 4) + 1), 50.0 - number)
        if self.steps[number] > 4:
            return Look(name="done", values=[50.0 - number], reports=values)
        return Look(name="running", reports=values)

    def stop(self, number, params):
        self.stopped.append(number)
        return True

    def seconds(self, number, params):
        return 0.0

    def answered(self, params):
        return False

    def close(self, interrupt):
        pass


def test_a_trial_that_is_behind_is_stopped_and_counts(tmp_path, monkeypatch):
    found, work = told(tmp_path, "median", 9, monkeypatch)
    assert (found.complete, found.pruned) == (5, 4) and set(work.stopped) == {5, 6, 7, 8}
    assert study_of(tmp_path).trials[8].state == optuna.trial.TrialState.PRUNED


def told(runs: Path, pruner: str, trials: int, monkeypatch) -> tuple[Summary, Told]:
    monkeypatch.setattr("crm.tuning.coordinator.POLL", 0.0)
    folder = folder_of(runs, "study")
    search = replace(SEARCH, objective="clean", replicates=2)
    asked = Asked(search="", storage=location(folder.path, "sqlite", "local"), trials=trials, pruner=pruner,
                  signature=signature(search))  # fmt: skip
    work = Told()
    return tune(search, folder, asked, work, 1), work


@pytest.mark.parametrize("pruner", ["hyperband", "wilcoxon", "PercentilePruner", "SuccessiveHalvingPruner"])
def test_each_pruner_spares_some_that_are_behind_and_never_the_best(pruner, tmp_path, monkeypatch):
    if pruner == "PercentilePruner":
        with pytest.raises(ValueError, match="cannot be taken by its name alone"):
            told(tmp_path, pruner, 9, monkeypatch)
        return
    found, work = told(tmp_path, pruner, 9, monkeypatch)
    assert found.trials == found.complete + found.pruned == 9 and found.pruned >= 3 and found.retried == 0
    assert 0 not in work.stopped and study_of(tmp_path).best_trial.number == 0


# the second value learns nothing, which its first validations show
RATE = Search(
    override(TINY, {"steps": 18, "val_every": 3, "optim.warmup": 1, "data.val_images": 6}),
    {"optim.lr": Choice((2e-3, 1e-7))}, "clean", trials=2, sampler="grid",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("pruner", "replicates"), [("hyperband", 1), ("wilcoxon", 2)])
def test_the_run_of_a_pruned_trial_is_stopped_and_nobody_asks_for_it_again(pruner, replicates, tmp_path):
    search = replace(RATE, replicates=replicates)
    folder, asked, work = trained(tmp_path, 2, search, "rated", pruner=pruner, sampler="grid")
    found = Coordinator(folder, asked, search, work, 1).run()
    assert (found.complete, found.pruned, found.retried) == (1, 1, 0)
    best, pruned = study_of(tmp_path, name="rated").trials
    assert best.params == {"optim.lr": 2e-3} and pruned.state == optuna.trial.TrialState.PRUNED
    assert not (tmp_path / pruned.user_attrs["runs"][-1] / "result.json").exists()
    assert tune(search, folder, asked, LocalRuns(search, "rated", work.queue, False), 1).trials == 2  # stays so


# ---------------------------------------------------------------------------------------------- refused


def test_a_pruner_is_refused_where_it_has_nothing_to_go_by():
    both = replace(SEARCH, objective=("clean", "worst"))
    for search, name, why in ((both, "median", "2 objectives"), (BOWL, "hyperband", "a function says nothing"),
                              (SEARCH, "wilcoxon", "--replicates 2")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            refuse_pruner(search, name)
    refuse_pruner(both, "none")
    refuse_pruner(replace(SEARCH, replicates=2), "wilcoxon")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        (lambda: sampler("tpee", 0), "tpe"),
        (lambda: sampler("CmaEsSample", 0), "CmaEsSampler"),
        (lambda: refuse_pruner(SEARCH, "medan"), "median"),
        (lambda: replace(SEARCH, objective="mising"), "missing"),
        (lambda: replace(SEARCH, space={"loss.maskd": Weight(1, 2)}), "loss.masked"),
        (lambda: find_search("distilation"), "distillation"),
        (lambda: location(Path(), "sqlit", "local"), "sqlite"),
    ],
)
def test_a_wrong_name_is_guessed(wrong, meant):
    with pytest.raises(ValueError, match=f"Did you mean '{meant}'"):
        wrong()


def test_test_is_never_looked_at():
    with pytest.raises(ValueError, match="val only"):
        replace(SEARCH, selection="test_best")
    with pytest.raises(ValueError, match="no val split"):
        replace(SEARCH, base=override(TINY, {"data.dataset": "pst900", "data.carve_val": False}))
    assert {one.split for objective in OBJECTIVES.values() for one in objective.conditions} == {"val"}


# ---------------------------------------------------------------------------------------------- space, names


def test_a_weight_is_one_axis_with_off_at_its_end():
    weight = Weight(0.1, 10, off=0.2)
    assert weight.unit(0.1) == pytest.approx(0.2) and weight.unit(weight.floor) == 0 and weight.unit(10) == 1
    assert weight.value(0.0999) == 0.0 and weight.value(0.12345) == 0.123
    assert [weight.value(at) for at in weight.grid(4)] == [0.0, 0.1, 1.0, 10.0]
    assert weight.value(weight.place(0.0)) == 0.0 and weight.place(11) is None
    assert distributions(SWITCH)["weight"].low == pytest.approx(weight.floor)
    assert Number(1, 5).value(3) == 3 and Number(1, 5).whole


def test_searches_are_listed_apart_from_sweeps():
    assert "distillation" in searches() and not [name for name in modules("sweeps") if name.startswith("search")]
    name, found = find_search("distillation@tiny")
    assert name == "distillation@tiny" and found.base.data.dataset == "synthetic" and found.start() is not None


def test_a_password_is_not_shown():
    assert "geheim" not in shown("postgresql+psycopg2://me:geheim@host/db")


@pytest.mark.slow
def test_a_study_on_postgresql_survives_its_killed_workers_and_coordinators(tmp_path):
    with postgres() as url:
        assert killed(tmp_path, url, 10, random.Random(3), kills=5) == 5
        trials = study_of(tmp_path, url).trials
        kept = [trial for trial in trials if counts(trial)]
        assert [trial.state.name for trial in kept] == ["COMPLETE"] * 10
        assert len(trials) - len(kept) == sum("retry_of" in trial.user_attrs for trial in trials)
        assert searched(SLOW, tmp_path, 11, url).complete == 11
        (server,) = [
            one for one in psutil.process_iter(["cmdline"]) if "postgres" in (one.info["cmdline"] or [""])[0]
            and url.rpartition(":")[2].partition("/")[0] in one.info["cmdline"]
        ]  # fmt: skip
        threading.Timer(1.5, server.kill).start()
        with pytest.raises(OSError, match=r"storage postgresql.* fails.*the same command goes on"):
            searched(SLOW, tmp_path, 99, url)
        with pytest.raises(OSError, match="does not open"):
            searched(SLOW, tmp_path, 99, url)


# ---------------------------------------------------------------------------------------------- the command

TINY_STUDY = ["--tiny", "--set", "steps=4", "--set", "val_every=0", "--set", "data.train_images=8"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A home with a study of nine trials by the command."""
    path = tmp_path_factory.mktemp("home")
    more = ["--trials", "9", "--workers", "2", "--yes", "--json", "--no-track"]
    done = crm(path, "start", "distillation", *TINY_STUDY, *more)
    assert json.loads(done)["complete"] == 9
    return path


def crm(home: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "crm", "tune", *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "CRM_HOME": str(home), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + (done.stderr if code else "")


@pytest.mark.slow
def test_the_verbs_say_what_was_found(home):
    study = "distillation@tiny"
    assert json.loads(crm(home, "status", study, "--json"))["trials"] == 9
    (best,) = json.loads(crm(home, "best", study, "--json"))
    rows = json.loads(crm(home, "export", study, "--json"))
    assert len(rows) == 9 and best["value"] == pytest.approx(max(row["missing"] for row in rows))
    assert best["honest"]["low"] <= best["honest"]["value"] <= best["honest"]["high"]
    shares = json.loads(crm(home, "importance", study, "--json"))["missing"]
    assert len(shares) == 4 and all(one["low"] <= one["high"] for one in shares)
    assert "trial" in crm(home, "pareto", study)
    page = Path(json.loads(crm(home, "plot", study, "--json"))["report"])
    names = {path.name for path in page.parent.iterdir()}
    for name in ("history", "importance", "slices", "parallel"):
        assert {f"{name}.png", f"{name}.svg"} <= names
    text = page.read_text()
    assert "These numbers are no evidence" in text
    colours = set(re.findall(r"var\((--[a-z-]+)\)", text))
    assert {"--ink", "--paper"} <= colours and all(f"{colour}:" in text for colour in colours)
    first = page.read_bytes()
    crm(home, "plot", study)
    assert page.read_bytes() == first
    assert "Did you mean 'distillation@tiny'" in crm(home, "best", "distillation@tin", code=2)


def test_what_is_promoted_is_a_sweep_of_base_and_winner_with_fresh_seeds():
    experiments = {"synthetic_tiny": find_experiment("synthetic_tiny"), "mf_swin_t": find_experiment("mf_swin_t")}
    for base, changes in ((experiments["mf_swin_t"], {}), (TINY, {"batch": 2})):
        search = replace(SEARCH, base=override(base, changes))
        text = written("a study", search, {7: {"loss.masked": 0.0, "loss.non_local": 2.0}}, "0,1", experiments)
        made: dict = {}
        exec(compile(text, "promoted", "exec"), made)
        rows = {(cell.variant, cell.seed): cell.config for cell in made["sweep"].cells()}
        winner = override(search.base, {"loss.masked": 0.0, "loss.non_local": 2.0})
        for seed in (0, 1):
            assert rows["base", seed] == override(search.base, {"seed": seed})
            assert rows["trial 7", seed] == override(winner, {"seed": seed})
        assert len(rows) == 4
    with pytest.raises(ValueError, match="tuning's own"):
        written("a study", SEARCH, {7: {}}, f"0,{POOL}", experiments)


@pytest.mark.slow
def test_promote_writes_a_sweep_with_fresh_seeds(home):
    path = ROOT / "sweeps" / "promoted_by_a_test.py"
    try:
        crm(home, "promote", "distillation@tiny", "--as", "promoted_by_a_test")
        code = "from sweeps.promoted_by_a_test import sweep as s; print(*(cell.seed for cell in s.cells()))"
        told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert sorted(told.stdout.split()) == sorted(["0", "1", "2"] * 2), told.stderr
        assert "tuning's own" in crm(home, "promote", "distillation@tiny", "--seeds", str(POOL), code=2)
    finally:
        path.unlink(missing_ok=True)
