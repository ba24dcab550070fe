"""Samplers and pruners by name: ours, or any that Optuna has."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    SuccessiveHalvingPruner,
    WilcoxonPruner,
)
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler

from crm.config import Config
from crm.names import unknown
from crm.search import Choice, Parameter, Search, Weight

GRID_POINTS = 4  # values of a parameter in a grid

# A grid is asked for in advance (`grid`), so its sampler only draws what a longer search asks for beyond it.
SAMPLERS: dict[str, Callable[..., BaseSampler]] = {
    "tpe": TPESampler,
    "gp": GPSampler,
    "nsga2": NSGAIISampler,
    "random": RandomSampler,
    "grid": RandomSampler,
}
PRUNERS: dict[str, Callable[..., BasePruner]] = {
    "none": NopPruner,
    "median": MedianPruner,  # at the validations of training, against the median of the trials before
    "hyperband": HyperbandPruner,  # at the validations: many trials a little, the best of them further
    "wilcoxon": WilcoxonPruner,  # between the seeds of a trial: image by image against the best trial
}
RESOURCES = (HyperbandPruner, SuccessiveHalvingPruner)  # that count in steps of training


def sampler(name: str, seed: int) -> BaseSampler:
    """A sampler for one question to the study.

    It is made anew for each: what it goes by stands in the study, so one that was killed is continued by another.

    Args:
        seed: of what it draws; QMC counts along one sequence, whose seed stays.
    """
    make = SAMPLERS.get(name) or _of_optuna("sampler", name, optuna.samplers, BaseSampler, SAMPLERS)
    options = {"seed": 0 if make is optuna.samplers.QMCSampler else seed}
    takes = inspect.signature(make).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _made("sampler", name, make, {key: value for key, value in options.items() if key in takes})


def pruner(name: str, base: Config) -> BasePruner:
    """A pruner for trials of this base, whose first validation is the least that can be told apart."""
    make = PRUNERS.get(name) or _of_optuna("pruner", name, optuna.pruners, BasePruner, PRUNERS)
    options: dict[str, Any] = {"min_resource": base.val_every or base.steps} if make in RESOURCES else {}
    if make is HyperbandPruner:
        options["max_resource"] = max(base.steps, options["min_resource"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _made("pruner", name, make, options)


def _of_optuna(kind: str, name: str, module: Any, base: type, ours: Any) -> Callable[..., Any]:
    theirs = {
        each: found
        for each in module.__all__
        if inspect.isclass(found := getattr(module, each)) and issubclass(found, base) and not inspect.isabstract(found)
    }
    if name not in theirs:
        raise unknown(kind, name, [*ours, *theirs])
    return theirs[name]


def _made(kind: str, name: str, make: Callable[..., Any], options: dict[str, Any]) -> Any:
    try:
        return make(**options)
    except TypeError as error:
        raise ValueError(f"{kind} {name} cannot be taken by its name alone: {error}") from error
    except ImportError as error:
        raise ValueError(f"{kind} {name} needs another package: {error}") from error


def refuse_pruner(search: Search, name: str) -> None:
    """ValueError for a pruner that this search leaves nothing to prune by."""
    found = pruner(name, search.base)
    if isinstance(found, NopPruner):
        return
    if len(search.objectives) > 1:
        raise ValueError(
            f"--pruner {name} with {len(search.objectives)} objectives: a trial that is behind in one may be ahead in "
            "another, and Optuna refuses it too; leave out --pruner, or seek one --objective"
        )
    if search.calculated:
        raise ValueError(f"--pruner {name}: a function says nothing before its end that could be pruned by")
    if isinstance(found, WilcoxonPruner) and search.replicates < 2:
        raise ValueError(
            f"--pruner {name} compares image by image what the first seeds of a trial came to, and spares it the "
            "others: --replicates 2 or more"
        )


def pruner_note(search: Search, name: str) -> str:
    """What is worth knowing about pruning this search; "" if nothing is."""
    chosen = pruner(name, search.base)
    if isinstance(chosen, (NopPruner, WilcoxonPruner)) or search.objectives == ("clean",):
        return ""
    return (
        f"--pruner {name} goes by the validations of training, which are of clean images: a stand-in for "
        f"{search.labels[0]}"
    )


# ---------------------------------------------------------------------------------------------- space


def distribution(parameter: Parameter) -> BaseDistribution:
    """What Optuna draws a parameter from."""
    if isinstance(parameter, Weight):
        return FloatDistribution(parameter.floor, parameter.high, log=True)
    if isinstance(parameter, Choice):
        return CategoricalDistribution(tuple(parameter.options))
    if parameter.whole:
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def distributions(search: Search) -> dict[str, BaseDistribution]:
    return {name: distribution(parameter) for name, parameter in search.space.items()}


def grid(search: Search, points: int = GRID_POINTS) -> Sequence[dict[str, Any]]:
    """Every combination of `points` values of each parameter, in an order that jumps about, the same each time.

    A grid that is stopped half-way has then seen all corners.
    """
    from itertools import product
    from random import Random

    rows = [
        dict(zip(search.space, values, strict=True))
        for values in product(*(parameter.grid(points) for parameter in search.space.values()))
    ]
    Random(0).shuffle(rows)
    return rows
