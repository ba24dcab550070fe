"""The coordinator: alone at the study, it asks, has trials computed, and tells; it may be killed at any time.

What it knows stands in the study and in the run folders. A trial whose worker died is told to have failed and asked
again (`retry_of`), and its run goes on from its last checkpoint. The number of trials is the total that was asked for:
those that were asked again count once, as what came of them.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from crm import failures
from crm.cluster.folder import SweepFolder
from crm.records import State
from crm.search import Search
from crm.tracking.listing import list_study, listed
from crm.tuning.folder import BESIDE, Asked, asked_now, stay
from crm.tuning.methods import RESOURCES, distributions, grid, pruner, sampler
from crm.tuning.storage import open_storage, shown
from crm.tuning.work import Look, Work

POLL = 0.2  # seconds between looks
IDLE = 5  # times in a row that a trial is asked again without having come a step further
BREAKER = 2  # trials that failed with the same traceback, after which the study stops
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

Show = Callable[[dict[str, State]], None]


@dataclass
class Summary:
    """What a study has come to."""

    trials: int = 0  # that count
    complete: int = 0
    pruned: int = 0
    failed: int = 0
    reused: int = 0
    retried: int = 0
    hours: float = 0.0
    stopped: str = ""  # why it ended before its time
    reasons: dict[int, str] = field(default_factory=dict)  # of trials that failed


def open_study(name: str, asked: Asked, search: Search, write: bool = False) -> Study:
    """The Optuna study; made if it is new and `write`."""
    storage = open_storage(asked.storage, write)
    if not write:
        return optuna.load_study(study_name=name, storage=storage)
    direction = StudyDirection.MINIMIZE if search.minimise else StudyDirection.MAXIMIZE
    study = optuna.create_study(
        study_name=name, storage=storage, load_if_exists=True, directions=[direction] * len(search.objectives)
    )
    study.set_user_attr("objectives", list(search.labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(list(search.objectives))  # for optuna-dashboard
    return study


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those that were asked for: it has ended, and was not asked again."""
    return trial.state in ENDED and "lost" not in trial.user_attrs


class Coordinator:
    def __init__(
        self, folder: SweepFolder, asked: Asked, search: Search, work: Work, workers: int,
        say: Callable[[str], object] = print, show: Show = lambda states: None,
    ) -> None:  # fmt: skip
        self.folder, self.asked, self.search, self.work, self.workers = folder, asked, search, work, workers
        self.say, self.show = say, show
        self.runs = folder.path.parents[1]
        self.handles: dict[int, Trial] = {}
        self.cost: dict[int, float] = {}
        self.tracebacks: dict[str, dict[str, Any]] = {}

    def run(self, stop: Callable[[], bool] = lambda: False, patience: float = 0.0) -> Summary:
        """Works until all trials that were asked for have ended, the hours are spent, or `stop` says so.

        Raises Busy if another coordinator is at the study for `patience` seconds, OSError if its storage fails.
        """
        with self.folder.lease(patience):
            self.study = open_study(self.folder.name, self.asked, self.search, write=True)
            self.study.pruner = pruner(self.asked.pruner, self.search.base)
            self._first()
            interrupted = True
            try:
                why = self._loop(stop)
                interrupted = False
            except (StorageInternalError, SQLAlchemyError) as error:
                where = shown(self.asked.storage)
                raise OSError(f"the study's storage {where} fails: {error}; later the same command goes on") from error
            finally:
                self.work.close(interrupted)
            found = self.summary()
            found.stopped = why
            return found

    def _loop(self, stop: Callable[[], bool]) -> str:
        while True:
            stay(self.folder)
            self.asked = asked_now(self.folder, self.asked)
            looks = {trial.number: self._look(trial) for trial in self._in(TrialState.RUNNING)}
            self._ask_again()
            trials = self.study.get_trials(deepcopy=False)
            active = [trial for trial in trials if trial.state == TrialState.RUNNING]
            counted = [trial for trial in trials if counts(trial)]
            why = self._enough(counted)
            self.show(self._states(counted, looks))
            if not active and (why or len(counted) >= self.asked.trials):
                return why
            if stop():
                return "stopped; the same command goes on"
            asked = 0
            while not why and len(active) + asked < min(self.workers, self.asked.trials - len(counted)):
                asked += 1
                if self._ask():  # answered at once: look again
                    break
            if not asked:
                time.sleep(POLL)

    # ------------------------------------------------------------------------------------------ asking

    def _first(self) -> None:
        """What a new study begins with: where the base itself is, or the whole grid."""
        if self.study.get_trials(deepcopy=False):
            if self.asked.sampler == "grid":
                self._grid()
            return
        if (start := self.search.start()) is not None:
            self.study.enqueue_trial(start, user_attrs={"origin": "base"})
        if self.asked.sampler == "grid":
            self._grid()

    def _grid(self) -> None:
        there = len(self.study.get_trials(deepcopy=False))
        for params in list(grid(self.search))[: max(0, self.asked.trials - there)]:
            self.study.enqueue_trial(params, user_attrs={"origin": "grid"}, skip_if_exists=True)

    def _ask(self) -> bool:
        """Begins a trial; whether it was answered at once."""
        number = sum("lost" not in trial.user_attrs for trial in self.study.get_trials(deepcopy=False))
        self.study.sampler = sampler(self.asked.sampler, self.asked.seed * 1_000_003 + number)
        trial = self.study.ask(distributions(self.search))
        self.handles[trial.number] = trial
        try:
            trial.set_user_attr("settings", self.search.settings(trial.params))
            if not self.search.calculated:
                trial.set_user_attr("runs", [config._id for config in self.search.configs(trial.params)])
                if (name := f"{BESIDE}{self.folder.name}") in listed(self.runs):
                    list_trials(self.runs, name, self.search, self.study)
            if self.work.answered(trial.params) and "retry_of" not in trial.user_attrs:
                trial.set_user_attr("reused", True)
            else:
                self.work.start(trial.number, trial.params)
                return False
        except ValueError as error:  # values that cannot be together, or a folder of moved defaults
            self._fail(trial.number, Look(name="failed", reason=str(error)))
            return True
        self._settle(trial.number, self.work.look(trial.number, trial.params))
        return True

    def _ask_again(self) -> None:
        """Asks every lost trial again that has no successor yet."""
        trials = self.study.get_trials(deepcopy=False)
        followed = {trial.user_attrs.get("retry_of") for trial in trials}
        for trial in trials:
            known = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            if trial.state == TrialState.FAIL and trial.user_attrs.get("lost") and trial.number not in followed:
                if set(known) != set(self.search.space):
                    continue  # it was killed before its parameters were drawn: nothing is lost with it
                idle = trial.user_attrs.get("idle", 0)
                self.study.enqueue_trial(known, user_attrs={"retry_of": trial.number, "idle": idle,
                                                            "step": trial.user_attrs.get("step", 0)})  # fmt: skip

    # ------------------------------------------------------------------------------------------ looking

    def _look(self, trial: FrozenTrial) -> Look:
        """How a running trial stands; tells the study what has come to its end."""
        if set(trial.params) != set(self.search.space):
            look = Look(name="lost", reason="the coordinator was killed while it asked")
        else:
            try:
                look = self.work.look(trial.number, trial.params)
            except ValueError as error:
                look = Look(name="failed", reason=str(error))
        if "pruned" in trial.user_attrs and look.name != "done":  # a worker that has obeyed looks lost
            if self.work.stop(trial.number, trial.params):
                self.study.tell(trial.number, state=TrialState.PRUNED, skip_if_finished=True)
        elif look.name in ("running", "waiting"):
            self._report(trial, look)
        else:
            self._settle(trial.number, look)
        return look

    def _handle(self, number: int) -> Trial:
        """The trial to write to, also one of a coordinator that is gone."""
        if number not in self.handles:
            trial_id = self.study.get_trials(deepcopy=False)[number]._trial_id
            self.study.sampler = sampler("random", 0)
            self.handles[number] = Trial(self.study, trial_id)
        return self.handles[number]

    def _report(self, trial: FrozenTrial, look: Look) -> bool:
        """Hands on what a pruner may go by; whether it says that the trial is to end."""
        if self._says_enough(trial, look.reports):
            self._handle(trial.number).set_user_attr("pruned", f"at {max(look.reports)}")
            self.work.stop(trial.number, trial.params)
            return True
        return False

    def _says_enough(self, trial: FrozenTrial, reports: Mapping[int, float]) -> bool:
        """Tells the pruner what is new of a trial, and returns whether it says that the trial is to end."""
        new = {place: value for place, value in reports.items() if place not in trial.intermediate_values}
        if self.asked.pruner == "none" or len(self.search.objectives) > 1 or not new:
            return False
        handle, enough = self._handle(trial.number), False
        for place, value in sorted(new.items()):
            handle.report(value, place)
            if isinstance(self.study.pruner, RESOURCES):  # it takes what it is told last for the value of each rung
                enough = handle.should_prune()
        return bool(enough or (not isinstance(self.study.pruner, RESOURCES) and handle.should_prune()))

    def _settle(self, number: int, look: Look) -> None:
        if look.name == "done":
            trial = self.study.get_trials(deepcopy=False)[number]
            self._says_enough(trial, look.reports)  # for the trials after it
            self._handle(number).set_user_attr("hours", round(self._hours(number, trial.params), 6))
            self.study.tell(number, list(look.values), skip_if_finished=True)
        elif look.name == "failed":
            self._fail(number, look)
        elif look.name == "lost":
            self._lose(number, look)

    def _fail(self, number: int, look: Look) -> None:
        self._handle(number).set_user_attr("reason", look.reason)
        if look.traceback:
            self.tracebacks[str(number)] = {"kind": "code", "reason": look.reason, "traceback": look.traceback}
        self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        self.say(f"trial {number} failed: {look.reason}")

    def _lose(self, number: int, look: Look) -> None:
        """Reaps a trial whose worker died; it is asked again unless that has come to nothing again and again."""
        trial = self.study.get_trials(deepcopy=False)[number]
        handle = self._handle(number)
        idle = 0 if look.step > trial.user_attrs.get("step", -1) else trial.user_attrs.get("idle", 0) + 1
        if idle > IDLE:
            self._fail(number, Look(name="failed", reason=f"{look.reason}, {idle} times without a step in between"))
            return
        for name, value in (("step", look.step), ("idle", idle), ("lost", look.reason)):
            handle.set_user_attr(name, value)
        self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        self.say(f"trial {number}: {look.reason}; it is asked again")

    # ------------------------------------------------------------------------------------------ the whole

    def _in(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def _hours(self, number: int, params: dict[str, Any]) -> float:
        return self.work.seconds(number, params) / 3600

    def _enough(self, counted: list[FrozenTrial]) -> str:
        """Why nothing more is to be asked, "" if there is no reason."""
        if len(failures.outbreak(self.tracebacks, BREAKER)) >= BREAKER:
            first = next(iter(self.tracebacks.values()))
            return f"{BREAKER} trials failed with the same traceback: {first['reason']}"
        if self.asked.hours and (hours := self._spent()) >= self.asked.hours:
            return f"the budget of {self.asked.hours:g} h is spent ({hours:.2f} h, {len(counted)} trials)"
        return ""

    def _spent(self) -> float:
        """Hours of all trials so far, each run once; what was reused costs nothing."""
        seen: dict[str, float] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.user_attrs.get("reused") or set(trial.params) != set(self.search.space):
                continue
            if trial.state in ENDED and trial.number not in self.cost:
                self.cost[trial.number] = self._hours(trial.number, trial.params)
            key = str(trial.user_attrs.get("runs", trial.number))
            hours = self.cost.get(trial.number)
            seen[key] = max(seen.get(key, 0.0), self._hours(trial.number, trial.params) if hours is None else hours)
        return float(sum(seen.values()))

    def _states(self, counted: list[FrozenTrial], looks: dict[int, Look]) -> dict[str, State]:
        """Every trial that was asked for, as the board shows it."""
        shown = {f"trial {trial.number}": State(name="failed" if trial.state == TrialState.FAIL else "done",
                 reason=trial.user_attrs.get("reason", ""),
                 miou=trial.values[0] if trial.values and not self.search.calculated else None)
                 for trial in counted}  # fmt: skip
        for number, look in looks.items():
            if look.name in ("running", "waiting"):
                shown[f"trial {number}"] = look.state or State(name="running")
        for i in range(max(0, self.asked.trials - len(shown))):
            shown[f"to come {i}"] = State(name="missing")
        return shown

    def summary(self) -> Summary:
        return summary(self.study, self._spent())


def list_trials(runs: Path, name: str, search: Search, study: Study, report: Path | None = None) -> None:
    """Tells the mirror which runs the trials have; one that was asked again has those of its first time."""
    cells = {
        id: {"variant": f"trial {trial.number}", "seed": seed, "id": id}
        for trial in study.get_trials(deepcopy=False)
        for seed, id in zip(search.seeds, trial.user_attrs.get("runs", ()), strict=False)
    }
    list_study(runs, name, search.title, search.selection, list(cells.values()), report)


def summary(study: Study, hours: float | None = None) -> Summary:
    """What the trials of a study have come to."""
    trials = study.get_trials(deepcopy=False)
    counted = [trial for trial in trials if counts(trial)]
    states = [trial.state for trial in counted]
    return Summary(
        trials=len(counted),
        complete=states.count(TrialState.COMPLETE),
        pruned=states.count(TrialState.PRUNED),
        failed=states.count(TrialState.FAIL),
        reused=sum("reused" in trial.user_attrs for trial in counted),
        retried=sum("lost" in trial.user_attrs for trial in trials),
        hours=sum((trial.user_attrs.get("hours", 0.0) for trial in counted), 0.0) if hours is None else hours,
        reasons={
            trial.number: trial.user_attrs.get("reason", "") for trial in counted if trial.state == TrialState.FAIL
        },
    )


def tune(search: Search, folder: SweepFolder, asked: Asked, work: Work, workers: int = 1, **more: Any) -> Summary:
    """Carries a search out as far as is asked, from where it stands; for programs, and for `crm tune`."""
    from crm.tuning.folder import ask
    from crm.tuning.methods import refuse_pruner

    refuse_pruner(search, asked.pruner)
    sampler(asked.sampler, 0)
    ask(folder, asked)
    return Coordinator(folder, asked, search, work, workers, **more).run()
