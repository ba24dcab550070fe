"""What a study says: its trials as a frame, importance with intervals, and what the winner is worth honestly."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.importance import FanovaImportanceEvaluator
from optuna.study import Study
from optuna.trial import TrialState, create_trial

from analysis.stats import bootstrap_miou, image_draws
from crm.confusion import load_evaluation
from crm.records import evaluation, read_config, state
from crm.search import CONDITIONS, OBJECTIVES, Search
from crm.tuning.coordinator import Summary, counts, open_study, summary
from crm.tuning.folder import Asked

DRAWS = 1000  # of validation images
RESAMPLES = 40  # of trials, for the intervals of the importances
ENOUGH = 8  # complete trials, below which importances say nothing
SEED = 0


@dataclass(frozen=True)
class Honest:
    """What the winner gains over the base on val, in points."""

    apparent: float  # as it looks: of the trial that was chosen for it
    value: float  # chosen on drawn images and scored on those that were not drawn, mean over draws
    low: float  # 95 % interval of that
    high: float
    again: float  # share of the draws in which the same trial was chosen
    images: int

    @property
    def verdict(self) -> str:
        return "within noise" if self.low <= 0 <= self.high else "gain" if self.low > 0 else "loss"


@dataclass(frozen=True)
class Tuned:
    """A study, read once."""

    name: str
    asked: Asked
    search: Search
    runs: Path
    study: Study

    @cached_property
    def summary(self) -> Summary:
        return summary(self.study)

    @cached_property
    def trials(self) -> pd.DataFrame:
        """One row per trial that counts: its values, the values of its parameters, and what became of it."""
        rows = []
        for trial in self.study.get_trials(deepcopy=False):
            if not counts(trial) or set(trial.params) != set(self.search.space):
                continue
            values = trial.values if trial.values else [float("nan")] * len(self.search.objectives)
            rows.append(
                {
                    "trial": trial.number, "state": trial.state.name.lower(),
                    **dict(zip(self.search.objectives, values, strict=True)), **self.search.values_at(trial.params),
                    "origin": trial.user_attrs.get("origin", ""), "reused": bool(trial.user_attrs.get("reused")),
                    "hours": trial.user_attrs.get("hours", 0.0), "runs": " ".join(trial.user_attrs.get("runs", [])),
                    "reason": trial.user_attrs.get("reason", ""),
                }
            )  # fmt: skip
        columns = ["trial", "state", *self.search.objectives, *self.search.space]
        return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)

    @property
    def complete(self) -> pd.DataFrame:
        return self.trials[self.trials["state"] == "complete"]

    @cached_property
    def units(self) -> pd.DataFrame:
        """(trial, parameter) where each complete trial lies on the axes, from 0 to 1; indexed by trial."""
        params = {t.number: t.params for t in self.study.get_trials(deepcopy=False)}
        rows = {n: {name: one.unit(params[n][name]) for name, one in self.search.space.items()}
                for n in self.complete["trial"]}  # fmt: skip
        return pd.DataFrame.from_dict(rows, orient="index", columns=list(self.search.space))

    @property
    def base(self) -> int | None:
        """The trial of the base's own settings."""
        found = self.complete[self.complete["origin"] == "base"] if len(self.complete) else self.complete
        return int(found["trial"].iloc[0]) if len(found) else None

    def best(self, objective: int) -> int:
        """The trial that is best in one objective; ValueError where none is complete."""
        if not len(self.complete):
            raise ValueError(f"no trial of {self.name} is complete yet: crm tune status {self.name}")
        values = self.complete.set_index("trial")[self.search.objectives[objective]].astype(float)
        return int(values.idxmin() if self.search.minimise else values.idxmax())

    def settings(self, trial: int) -> dict[str, Any]:
        """What a trial changes; ValueError for one that is not complete."""
        if trial not in set(self.complete["trial"]):
            raise ValueError(f"trial {trial} is no complete trial of {self.name}: crm tune export {self.name}")
        return self.search.settings(self.study.get_trials(deepcopy=False)[trial].params)

    def front(self) -> pd.DataFrame:
        """The complete trials that no other one beats, by the first objective."""
        self.best(0)
        numbers = {trial.number for trial in self.study.best_trials}
        frame = self.complete[self.complete["trial"].isin(numbers)]
        return frame.sort_values(self.search.objectives[0], ascending=self.search.minimise)

    def running(self) -> list[dict[str, Any]]:
        """What the trials that are not over are at."""
        lines = []
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            ids = [] if self.search.calculated else trial.user_attrs.get("runs", [])
            stands = [state(self.runs, read_config(self.runs / id), self.search.selection, CONDITIONS)
                      for id in ids if (self.runs / id / "config.json").exists()]  # fmt: skip
            now = next((one for one in stands if one.name != "done"), stands[-1] if stands else None)
            lines.append({"trial": trial.number, "state": now.name if now else "asked", "step": now.step if now else 0,
                          "steps": now.steps if now else 0})  # fmt: skip
        return lines

    # ------------------------------------------------------------------------------------------ statistics

    def importance(self, objective: int) -> pd.DataFrame:
        """Share of the objective's variance that each parameter explains (fANOVA), with 95 % intervals over trials.

        On the axes as they are searched, logarithms for weights. Trees see less in trials that are drawn twice, so an
        interval is widened where it would not hold the share itself. ValueError for less than ENOUGH complete trials.
        """
        if len(self.complete) < ENOUGH:
            raise ValueError(
                f"{self.name} has {len(self.complete)} complete trials; importances need at least {ENOUGH}"
            )
        y = self.complete[self.search.objectives[objective]].to_numpy(float)
        rng = np.random.default_rng(SEED)
        whole = self._fanova(np.arange(len(y)), y)
        drawn = np.array([list(self._fanova(rng.integers(len(y), size=len(y)), y).values()) for _ in range(RESAMPLES)])
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        share = np.array(list(whole.values()))
        low, high = np.minimum(low, share), np.maximum(high, share)
        frame = pd.DataFrame({"parameter": list(whole), "importance": share, "low": low, "high": high})
        return frame.sort_values("importance", ascending=False, ignore_index=True)

    def _fanova(self, rows: np.ndarray, y: np.ndarray) -> dict[str, float]:
        """Of these complete trials, in the order of the space."""
        study = optuna.create_study(direction="maximize")
        spaces = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in self.search.space}
        for row in rows:
            params = {name: float(self.units[name].iloc[row]) for name in self.search.space}
            study.add_trial(create_trial(params=params, distributions=spaces, value=float(y[row])))
        if np.ptp(y[rows]) == 0:
            return dict.fromkeys(self.search.space, 0.0)
        found = FanovaImportanceEvaluator(n_trees=32, seed=SEED).evaluate(study)
        return {name: found.get(name, 0.0) for name in self.search.space}

    def honest(self, objective: int) -> Honest | None:
        """What choosing the best trial is worth against the base, free of the luck in the choice.

        The choice is repeated on validation images drawn with replacement, and what it chose is scored on the images
        that were not drawn (out of bag). The interval is over images; it says nothing about other training seeds. None
        without training, without the base among the trials, or with one trial.
        """
        if self.search.calculated or (base := self.base) is None or len(self.complete) < 2:
            return None
        numbers = [int(n) for n in self.complete["trial"]]
        scores = [self._scores(n, objective) for n in numbers]
        whole, inside, outside = (np.stack([one[i] for one in scores]) for i in range(3))
        chosen, at = inside.argmax(axis=0), numbers.index(base)
        draws = np.arange(inside.shape[1])
        gains = outside[chosen, draws] - outside[at]
        gains = gains[~np.isnan(gains)]
        best = int(whole.argmax())
        low, high = np.quantile(gains, [0.025, 0.975])
        return Honest(
            apparent=float(whole[best] - whole[at]), value=float(gains.mean()), low=float(low), high=float(high),
            again=float((chosen == best).mean()), images=self._images,
        )  # fmt: skip

    @cached_property
    def _draws(self) -> np.ndarray:
        return image_draws(self._images, DRAWS, np.random.default_rng(SEED))

    @cached_property
    def _images(self) -> int:
        first = self.complete["runs"].iloc[0].split()[0]
        return len(load_evaluation(evaluation(self.runs / first, self.search.selection, CONDITIONS[0])).names)

    def _scores(self, number: int, objective: int) -> tuple[float, np.ndarray, np.ndarray]:
        """An objective of a trial: on all images, on those of each draw, on those outside of each draw."""
        wanted = OBJECTIVES[self.search.objectives[objective]]
        ids = self.complete.set_index("trial").loc[number, "runs"].split()
        parts = (np.ones((1, self._images)), self._draws, (self._draws == 0).astype(int))
        found: list[list[np.ndarray]] = [[], [], []]
        for id in ids:
            stored = [load_evaluation(evaluation(self.runs / id, self.search.selection, one)).confusion
                      for one in wanted.conditions]  # fmt: skip
            for i, counted in enumerate(parts):
                with np.errstate(invalid="ignore"):
                    found[i].append(wanted.reduce([bootstrap_miou(matrices, counted) for matrices in stored]))
        whole, inside, outside = (np.mean(each, axis=0) for each in found)
        return float(whole[0]), inside, outside

    def verdicts(self) -> list[dict[str, Any]]:
        """Of each objective: the best trial, its settings, and what may be said of it."""
        said = []
        for i, label in enumerate(self.search.labels):
            best = self.best(i)
            row = self.complete.set_index("trial").loc[best]
            values = {name: row[name] for name in self.search.space}
            value = float(row[self.search.objectives[i]])
            found = self.honest(i)
            said.append({"objective": label, "trial": best, "value": value, "settings": values,
                         "words": self._words(best, found), "honest": vars(found) if found else None})  # fmt: skip
        return said

    def _words(self, best: int, found: Honest | None) -> list[str]:
        count = len(self.complete)
        if self.search.calculated:
            return [f"the best of {count} values"]
        if found is None:
            return [f"the best of {count} trials on val, chosen there: it looks better than it is"]
        if best == self.base:
            return [f"the base itself is the best of {count} trials: the search found nothing better"]
        noise = {"within noise": "no gain has been shown", "gain": "a gain", "loss": "a loss"}[found.verdict]
        return [
            f"{found.apparent:+.1f} points over the base (trial {self.base}) as it looks, the best of {count} trials",
            f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}] when it is chosen on some of the {found.images} "
            f"val images and scored on the others: {noise}",
            f"the same trial wins in {found.again:.0%} of the draws; other training seeds are not in the interval",
            f"crm tune promote {self.name} writes the sweep that tells, with fresh seeds and on test",
        ]


def read(name: str, asked: Asked, search: Search, runs: Path) -> Tuned:
    """The study as it stands; changes nothing in it."""
    return Tuned(name, asked, search, runs, open_study(name, asked, search))
