"""A search: which values of some settings are best, as data. Its trials are ordinary runs. Optuna- and torch-free.

    search = Search(config, {"loss.masked": Weight(0.03, 30)}, "missing", title="How much masked supervision?")

A module `sweeps/search_<name>.py` holds one, `search`, and `crm tune <name>` carries it out (`crm.tuning`).
Every value it looks at is one of the validation split. The best of many trials looks better than it is, since it was
chosen for looking good; so its runs have seeds of their own (from `POOL` on), and `tuning_run` tells them from others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crm.conditions import CLEAN_TEST, MISSING, Condition
from crm.config import Config, flatten, override
from crm.data.specs import DATASETS
from crm.names import chosen, unknown
from crm.records import read_json
from crm.sweep import refuse_selection

POOL = 1_000_000  # the first seed of tuning runs; no sweep comes near it
MARK = "tuning.json"  # in a run's folder: the studies that have a trial of it
DIGITS = 3  # of a weight or number that was drawn: two trials that differ by less are one run


# ---------------------------------------------------------------------------------------------- parameters


Real = int | float


@dataclass(frozen=True)
class Weight:
    """A weight of the loss, on a logarithmic scale, or off.

    Samplers see one axis, from `floor` to `high`: what lies below `low` is off, weight 0. A switch beside the weight
    would make the weight a parameter that half of the trials lack, which GP, CMA-ES and TPE of several parameters then
    draw at random.
    """

    low: Real
    high: Real
    sets: Sequence[str] = ()  # settings that it is the value of; none: the one it is named after
    off: Real = 0.2  # share of the axis that is off; 0: it cannot be switched off

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"a weight needs 0 < low < high, not {self.low} and {self.high}")
        if not 0 <= self.off < 1:
            raise ValueError(f"off is a share of the axis, from 0 to below 1, not {self.off}")

    @property
    def floor(self) -> float:
        """Where the axis begins."""
        return self.low * (self.low / self.high) ** (self.off / (1 - self.off))

    def value(self, at: Real) -> Real:
        """The weight at a place of the axis."""
        return 0.0 if at < self.low else _rounded(at)

    def place(self, value: Real) -> Real | None:
        """Where a weight lies on the axis; None outside of it. Off is the middle of what is off."""
        if value == 0 and self.off:
            return math.sqrt(self.floor * self.low)
        return float(value) if self.low <= value <= self.high else None

    def grid(self, points: int) -> list[Real]:
        """Off, and weights at equal ratios from low to high."""
        steps = points - bool(self.off)
        found = [self.low * (self.high / self.low) ** (i / max(1, steps - 1)) for i in range(steps)]
        middle = [math.sqrt(self.floor * self.low)] if self.off else []
        return [*middle, *(min(max(each, self.low), self.high) for each in found)]

    def unit(self, at: Real) -> float:
        """The place as a share of the axis, from 0 to 1."""
        return math.log(at / self.floor) / math.log(self.high / self.floor)


@dataclass(frozen=True)
class Number:
    """A number between two others, whole if both are whole."""

    low: Real
    high: Real
    sets: Sequence[str] = ()
    log: bool = False

    def __post_init__(self) -> None:
        if not (self.low < self.high and (self.low > 0 or not self.log)):
            raise ValueError(f"a number needs low < high, above 0 if log, not {self.low} and {self.high}")

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def value(self, at: Real) -> Real:
        return at if self.whole else min(max(_rounded(at), self.low), self.high)

    def place(self, value: Real) -> Real | None:
        return value if self.low <= value <= self.high else None

    def grid(self, points: int) -> list[Real]:
        shares = [i / max(1, points - 1) for i in range(points)]
        if self.log:
            found = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            found = [self.low + (self.high - self.low) * share for share in shares]
        return list(dict.fromkeys(round(each) if self.whole else each for each in found))

    def unit(self, at: Real) -> float:
        if self.log:
            return math.log(at / self.low) / math.log(self.high / self.low)
        return (at - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Choice:
    """One of several values, which have no order."""

    options: Sequence[Any]
    sets: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(set(self.options)) < 2:
            raise ValueError(f"a choice needs two different options, not {list(self.options)}")

    def value(self, at: Any) -> Any:
        return at

    def place(self, value: Any) -> Any:
        return value if value in self.options else None

    def grid(self, points: int) -> list[Any]:
        return list(self.options)

    def unit(self, at: Any) -> float:
        return list(self.options).index(at) / (len(self.options) - 1)


Parameter = Weight | Number | Choice


def _rounded(value: Real) -> float:
    return float(f"{value:.{DIGITS}g}")


# ---------------------------------------------------------------------------------------------- objectives


@dataclass(frozen=True)
class Objective:
    """What is made of a run's mIoU under some conditions, in per cent."""

    label: str
    conditions: Sequence[Condition]
    reduce: Callable[[Sequence[Any]], Any]  # mIoU of the conditions, numbers or arrays of draws, to one


def mean(values: Sequence[Any]) -> Any:
    return sum(values) / len(values)


def _worst(values: Sequence[Any]) -> Any:
    """The smallest, of numbers or place by place of arrays, without numpy."""
    first, *others = values
    for each in others:
        first = (first + each - abs(first - each)) / 2
    return first


VAL_CLEAN = replace(CLEAN_TEST, split="val")
VAL_MISSING = tuple(replace(condition, split="val") for condition in MISSING)
CONDITIONS = (VAL_CLEAN, *VAL_MISSING)  # under which every trial is evaluated, whatever its objective
OBJECTIVES = {
    "clean": Objective("clean val mIoU", (VAL_CLEAN,), mean),
    "missing": Objective("val mIoU, mean over missing modalities", VAL_MISSING, mean),
    "worst": Objective("val mIoU, worst missing modality", VAL_MISSING, _worst),
}
Calculation = Callable[[dict[str, Any]], float | Sequence[float]]  # values of the parameters to what is sought


# ---------------------------------------------------------------------------------------------- the search


@dataclass(frozen=True)
class Search:
    base: Config  # what the trials change
    space: Mapping[str, Parameter]  # name, which is a setting where the parameter names none, to what it may be
    # keys of OBJECTIVES, all to be made large; or a function, at the top of a module, for what is no training
    objective: str | Sequence[str] | Calculation = "missing"
    title: str = field(default="", kw_only=True)  # the question, one line
    trials: int = field(default=40, kw_only=True)
    replicates: int = field(default=1, kw_only=True)  # seeds of a trial; its value is their mean
    sampler: str = field(default="tpe", kw_only=True)  # see crm.tuning.methods
    pruner: str = field(default="none", kw_only=True)
    selection: str = field(default="last", kw_only=True)  # one of crm.sweep.SELECTIONS, but test_best
    minimise: bool = field(default=False, kw_only=True)  # a function's values are to be made small
    values: int = field(default=1, kw_only=True)  # how many a function returns
    tiny: Mapping[str, Any] = field(default_factory=dict, kw_only=True)  # changed settings of the tiny form's base

    def __post_init__(self) -> None:
        if not self.space:
            raise ValueError("a search needs at least one parameter")
        if min(self.trials, self.replicates, self.values) < 1:
            raise ValueError("trials, replicates and values must be at least 1")
        if self.calculated:
            return
        if not self.objectives or len(set(self.objectives)) != len(self.objectives):
            raise ValueError(f"objectives are one or more different ones, not {list(self.objectives)}")
        for name in self.objectives:
            chosen("objective", name, OBJECTIVES)
        known, taken = flatten(self.base), []
        for name in self.space:
            for path in self.paths(name):
                if path not in known:
                    raise unknown("setting", path, known)
                if path in taken or path == "seed":
                    raise ValueError(f"{path} cannot be searched: two parameters set it, or it is the seed")
                taken.append(path)
        if self.selection == "test_best" or self.base.test_best:
            raise ValueError("a search looks at val only, and test_best chooses on test")
        refuse_selection(self.selection, self.base)
        refuse_no_val(self.base)

    @property
    def calculated(self) -> bool:
        """Whether the objective is a function, so that nothing is trained."""
        return callable(self.objective)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of what is sought."""
        if callable(self.objective):
            return ("value",) if self.values == 1 else tuple(f"value {i + 1}" for i in range(self.values))
        return (self.objective,) if isinstance(self.objective, str) else tuple(self.objective)

    @property
    def labels(self) -> tuple[str, ...]:
        """The objectives in words."""
        return self.objectives if self.calculated else tuple(OBJECTIVES[name].label for name in self.objectives)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(POOL, POOL + self.replicates))

    def paths(self, name: str) -> Sequence[str]:
        """The settings that a parameter is the value of."""
        return self.space[name].sets or (name,)

    def values_at(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the parameters, by their names, at places of their axes."""
        return {name: parameter.value(params[name]) for name, parameter in self.space.items()}

    def settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What a trial changes in the base; for a function the values of the parameters."""
        values = self.values_at(params)
        if self.calculated:
            return values
        return {path: value for name, value in values.items() for path in self.paths(name)}

    def configs(self, params: Mapping[str, Any]) -> list[Config]:
        """The runs of a trial, one for each seed; ValueError for values that cannot be together."""
        changed = override(self.base, self.settings(params))
        return [override(changed, {"seed": seed}) for seed in self.seeds]

    def start(self) -> dict[str, Any] | None:
        """Where the base itself lies, as a trial to compare the others with; None if it is outside of the space."""
        if self.calculated:
            return None
        now = flatten(self.base)
        found = {}
        for name, parameter in self.space.items():
            values = {now[path] for path in self.paths(name)}
            place = parameter.place(values.pop()) if len(values) == 1 else None
            if place is None:
                return None
            found[name] = place
        return found


def refuse_no_val(config: Config) -> None:
    """ValueError if the data set has no val split to search on."""
    spec = DATASETS[config.data.dataset]
    if "val" not in spec.splits and not config.data.carve_val:
        raise ValueError(
            f"{spec.title} has no val split, and a search never looks at test: data.carve_val=True holds one out of "
            "train"
        )


def tuning_run(runs: Path, id: str) -> str:
    """The study that made a run for tuning, "" for any other run: such a run is no evidence in a table.

    It was trained to be chosen among others, so its scores are too good by what luck there was in the choice. The same
    settings at a sweep's own seeds are another run, and evidence.
    """
    return ", ".join((read_json(runs / id / MARK) or {}).get("studies", []))
