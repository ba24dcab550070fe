"""From a search's winner to evidence: a sweep with fresh seeds."""

from collections.abc import Mapping
from typing import Any

from crm.config import Config, difference
from crm.search import POOL, Search


def written(
    study: str, search: Search, winners: Mapping[int, Mapping[str, Any]], seeds: str, experiments: Mapping[str, Config]
) -> str:
    """The source of a module with a sweep: the base, and a row for each winner.

    Args:
        winners: trial -> what it changes.
        seeds: as in 0,1,2; ValueError for one that tuning has used.
        experiments: by name, to say in words what the base is.
    """
    if search.calculated:
        raise ValueError(f"{study} calls a function: there is nothing to train")
    try:
        fresh = tuple(int(seed) for seed in seeds.split(","))
    except ValueError:
        raise ValueError(f"--seeds takes different whole numbers, as in 0,1,2, not {seeds!r}") from None
    if any(seed >= POOL or seed < 0 for seed in fresh):
        raise ValueError(f"seeds from {POOL} on are tuning's own, which the winner was chosen on; take others")
    from crm.recipes import RECIPES

    for name, config in experiments.items():
        for recipe, change in RECIPES.items():
            if change(config) == search.base:
                return _module(study, search, winners, fresh, name, recipe, {})
    near = min(experiments, key=lambda name: len(difference(search.base, experiments[name])))
    return _module(study, search, winners, fresh, near, "clean", difference(search.base, experiments[near]))


def _module(
    study: str, search: Search, winners: Mapping[int, Mapping[str, Any]], seeds: tuple[int, ...], experiment: str,
    recipe: str, changes: Mapping[str, Any],
) -> str:  # fmt: skip
    imports = [f"from experiments.{experiment} import config"]
    base = "config"
    if recipe != "clean":
        imports.insert(0, "from crm.recipes import RECIPES")
        base = f"RECIPES[{recipe!r}](config)"
    if changes:
        imports.insert(0, "from crm.config import override")
        base = f"override(config, {dict(changes)!r})"
    rows = "".join(f"        'trial {number}': {dict(settings)!r},\n" for number, settings in winners.items())
    labels = "; ".join(search.labels)
    return f'''"""Does what the study {study} found hold with fresh seeds, on test?

Chosen on the validation split ({labels}) among many trials, the winner looked better there than it is.
Here it is trained anew beside the base, with seeds that no trial had. Written by `crm tune promote {study}`.
"""

{chr(10).join(imports[:-1])}{chr(10) if imports[:-1] else ""}from crm.sweep import Sweep
{imports[-1]}

sweep = Sweep(
    title="Does what the study {study} found hold with fresh seeds?",
    base={base},
    variants={{
        'base': {{}},
{rows}    }},
    seeds={seeds!r},
    suite="missing",
    selection={search.selection!r},
)
'''
