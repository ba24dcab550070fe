"""A sweep: one question as data, and the designs that write its variants.

Torch-free. `Sweep.cells()` is pure: variant x seed, each a complete Config with its run id. Variant labels are the rows
of the table. A cell that two sweeps share is one run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import product
from typing import Any, Protocol, TypeVar, runtime_checkable

from crm.conditions import Condition, suite
from crm.config import Config, difference, override, run_id, seeded
from crm.data.specs import DATASETS
from crm.names import chosen, unknown

Overrides = Mapping[str, Any]  # dotted paths to values
Variants = Mapping[str, Overrides]  # row label to what it changes

SELECTIONS = ("last", "val_best", "test_best")  # which checkpoint of a run is evaluated


@dataclass(frozen=True, kw_only=True)
class Cell:
    variant: str
    seed: int
    config: Config

    @cached_property
    def id(self) -> str:
        return run_id(self.config)

    @property
    def label(self) -> str:
        return f"{self.variant}/{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    title: str  # the question, one line
    base: Config
    variants: Variants
    seeds: Sequence[int]
    suite: str = "robustness"  # a key of crm.conditions.SUITES
    selection: str = "last"  # one of SELECTIONS
    baseline: str = ""  # the row gains are measured against; "" is the first
    method: str = ""  # the row the panels compare with the baseline; "" is the last
    budget: Sequence[str] = field(default=())  # settings of the training budget that this sweep varies on purpose
    # rows that are compared with each other, under a name, each against the first of them; none: all with all
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    also_on: Sequence[str] = ()  # data sets on which every run is evaluated too, on the classes that both have
    measured: bool = False  # also measures every run's cost: operations, latency, memory (crm.overhead)
    dose: str = ""  # the setting whose amount the rows vary: where does the score break?
    interaction: Sequence[str] = ()  # four rows: neither, the one, the other, both; do they add up?
    # what rows set in the tiny form, where that is not the same; text is why a row has none
    tiny: Mapping[str, Overrides | str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)  # rows that this form of the sweep lacks, and why

    def __post_init__(self) -> None:
        if not self.variants or not self.seeds:
            raise ValueError("a sweep needs at least one variant and one seed")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds repeat: {list(self.seeds)}")
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, not {self.selection!r}")
        grouped = [row for rows in self.groups.values() for row in rows]
        if len(self.interaction) not in (0, 4):
            raise ValueError(
                f"an interaction is of four rows: neither, the one, the other, both; not {self.interaction}"
            )
        for row in (self.baseline, self.method, *self.tiny, *grouped, *self.interaction):
            if row and row not in self.variants and row not in self.left_out:
                raise ValueError(f"{row!r} is no variant of this sweep; there is: {', '.join(self.variants)}")
        if self.groups and sorted(grouped) != sorted(self.variants):
            raise ValueError("groups must hold every variant once")
        for name in self.also_on:
            chosen("data set", name, DATASETS)
        for label, changes in self.variants.items():
            if "seed" in changes:
                raise ValueError(f"variant {label!r} sets seed; seeds are replicates, given by the sweep's seeds")
        suite(self.suite)

    @property
    def reference(self) -> str:
        """The label of the row that gains are measured against."""
        return self.baseline or next(iter(self.variants))

    @property
    def subject(self) -> str:
        """The label of the row that the pictures set against the reference."""
        return self.method or list(self.variants)[-1]

    @property
    def conditions(self) -> Sequence[Condition]:
        return suite(self.suite)

    def parts(self) -> "dict[str, Sweep]":
        """Its groups as sweeps of their own, by name; the whole sweep under "" where it has none."""
        if not self.groups:
            return {"": self}
        return {
            name: replace(
                self, variants={row: self.variants[row] for row in rows}, baseline=rows[0], method=rows[-1],
                groups={}, tiny={}, left_out={},
            )
            for name, rows in self.groups.items()
        }  # fmt: skip

    def cells(self, changes: Overrides | None = None) -> list[Cell]:
        """Variant x seed in order; `changes` apply to every cell, on top of its variant.

        Raises ValueError for a setting that does not exist, for two rows that are the same run, and for rows that
        train on unequal budgets (`lint`).
        """
        if "seed" in (changes or {}):
            raise ValueError(f"a sweep has its own seeds, {list(self.seeds)}; seed cannot be set")
        configs = {label: self._config(label, changes or {}) for label in self.variants}
        lint(configs, self.budget, [list(part.variants) for part in self.parts().values()])
        for config in configs.values():
            refuse_selection(self.selection, config)
        return [
            Cell(variant=label, seed=seed, config=seeded(config, seed))
            for label, config in configs.items()
            for seed in self.seeds
        ]

    def _config(self, label: str, changes: Overrides) -> Config:
        """Of a row; a ValueError says which row it is that stands against the changes, where the base takes them."""
        try:
            return override(self.base, {**self.variants[label], **changes})
        except ValueError as error:
            override(self.base, changes)  # raises by itself if the changes are wrong for any row
            raise ValueError(f"row {label!r}: {error}") from error


@runtime_checkable
class Labelled(Protocol):
    """What has a label `row/seed`."""

    @property
    def label(self) -> str: ...


T = TypeVar("T", bound=Labelled)


def only(cells: Sequence[T], patterns: Sequence[str] | None) -> list[T]:
    """The cells that a pattern names, in their order: a row, `row/seed`, or either with * ? []; all without patterns.

    ValueError for a pattern that names none, with the rows that there are.
    """
    if not patterns:
        return list(cells)
    chosen: set[str] = set()
    for pattern in patterns:
        plain = {cell.label for cell in cells if pattern in (_row(cell), cell.label)}
        found = plain or {cell.label for cell in cells if _fits(cell, pattern)}
        if not found:
            rows = dict.fromkeys(_row(cell) for cell in cells)
            own = [cell.label for cell in cells if pattern.rpartition("/")[0] == _row(cell)]
            raise unknown("cell" if own else "row", pattern, own or rows)
        chosen |= found
    return [cell for cell in cells if cell.label in chosen]


def _fits(cell: Labelled, pattern: str) -> bool:
    return fnmatchcase(_row(cell), pattern) or fnmatchcase(cell.label, pattern)


def _row(cell: Labelled) -> str:
    return cell.label.rpartition("/")[0]


def refuse_selection(selection: str, config: Config) -> None:
    """ValueError if a run of this config has no such checkpoint."""
    chosen("selection", selection, dict.fromkeys(SELECTIONS))
    spec = DATASETS[config.data.dataset]
    if selection == "val_best" and "val" not in spec.splits and not config.data.carve_val:
        raise ValueError(
            f"{spec.title} has no val split, so there is no val_best; data.carve_val=True holds one out of train"
        )
    if selection == "test_best" and not config.test_best:
        raise ValueError("test_best is only kept by runs with test_best=True: --set test_best=True")


BUDGET = ("steps", "batch", "data.train_images", "data.dataset")  # what must be equal for a gain to mean anything


def lint(
    configs: Mapping[str, Config], declared: Sequence[str] = (), groups: Sequence[Sequence[str]] | None = None
) -> None:
    """Refuses a design whose rows cannot be compared: two rows that are one run, or unequal training budgets.

    Args:
        groups: rows that are compared with each other; None: all with all.
    """
    seen: dict[str, str] = {}
    for label, config in configs.items():
        if (twin := seen.setdefault(run_id(config), label)) != label:
            raise ValueError(f"variants {twin!r} and {label!r} are the same run: they differ in nothing")
    for first, *others in groups or [list(configs)]:
        for label in others:
            changed = difference(configs[label], configs[first])
            if unequal := [path for path in changed if path in BUDGET and path not in declared]:
                raise ValueError(
                    f"variant {label!r} trains on another budget than {first!r}: {', '.join(unequal)} differ. "
                    f"If that is the question, declare it: budget={unequal!r}"
                )


# ---------------------------------------------------------------------------------------------- other forms


def moved(sweep: Sweep, base: Config) -> Sweep:
    """The sweep on another base: another data set, backbone or recipe.

    A row that the base refuses is left out, with the reason that it gives, and so is one that is the same run as
    another there. One that the sweep's own base refuses too is an error.
    """
    rows: dict[str, Overrides | str] = dict.fromkeys(sweep.variants, "")
    seen: dict[str, str] = {}
    firsts = [part.reference for part in sweep.parts().values()]
    for label in sorted(sweep.variants, key=lambda label: label not in firsts):
        override(sweep.base, sweep.variants[label])
        try:
            twin = seen.setdefault(run_id(override(base, sweep.variants[label])), label)
            rows[label] = sweep.variants[label] if twin == label else f"it is the same run as {twin!r} here"
        except ValueError as error:
            rows[label] = str(error)
    return _with_rows(replace(sweep, base=base), rows)


def tiny(sweep: Sweep, base: Config) -> Sweep:
    """The sweep's tiny form, to try everything out: a tiny base, seeds 0 and 1, rows as `Sweep.tiny` says."""
    rows = {label: sweep.tiny.get(label, changes) for label, changes in sweep.variants.items()}
    also_on = (base.data.dataset,) if sweep.also_on else ()
    seeds = range(min(2, len(sweep.seeds)))
    return _with_rows(replace(sweep, base=base, seeds=tuple(seeds), also_on=also_on, tiny={}), rows)


def leave_out(sweep: Sweep, rows: Sequence[str]) -> Sweep:
    """The sweep without these rows; ValueError names those that there are."""
    for row in rows:
        if row not in sweep.variants:
            raise unknown("row", row, sweep.variants)
    return _with_rows(sweep, {**sweep.variants, **dict.fromkeys(rows, "not asked for (--without)")})


def _with_rows(sweep: Sweep, rows: Mapping[str, Overrides | str]) -> Sweep:
    """The sweep with these rows; text leaves one out for that reason, and with it what was compared with it alone."""
    left_out = {**sweep.left_out, **{label: why for label, why in rows.items() if isinstance(why, str)}}
    if not sweep.groups and sweep.reference in left_out:
        raise ValueError(f"the baseline {sweep.reference!r} is not possible here: {left_out[sweep.reference]}")
    for first, *others in sweep.groups.values():
        if first in left_out:
            left_out |= {row: f"its baseline is left out: {left_out[first]}" for row in others if row not in left_out}
    kept = {label: changes for label, changes in rows.items() if label not in left_out and not isinstance(changes, str)}
    if not kept:
        raise ValueError(f"no row of this sweep is possible here: {next(iter(left_out.values()))}")
    groups = {name: [row for row in members if row in kept] for name, members in sweep.groups.items()}
    return replace(
        sweep,
        variants=kept,
        baseline=sweep.reference if sweep.reference in kept else "",
        method=sweep.subject if sweep.subject in kept else "",
        groups={name: members for name, members in groups.items() if members},
        interaction=() if set(sweep.interaction) & set(left_out) else sweep.interaction,
        left_out=left_out,
    )


# Designs. Each returns variants: row label -> overrides, in the order of the table.


def grid(factors: Mapping[str, Sequence[Any]], where: Callable[[dict[str, Any]], bool] | None = None) -> Variants:
    """Every combination of the values of every path; `where` keeps the combinations it is true for."""
    rows = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    return _labelled(row for row in rows if where is None or where(row))


def zipped(factors: Mapping[str, Sequence[Any]]) -> Variants:
    """The first values of all paths together, then the second ones: paths that change in step."""
    lengths = {path: len(values) for path, values in factors.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"zipped paths need equally many values, got {lengths}")
    return _labelled(dict(zip(factors, values, strict=True)) for values in zip(*factors.values(), strict=True))


def one_factor(path: str, values: Sequence[Any]) -> Variants:
    """One path, a row per value."""
    return grid({path: values})


def leave_one_out(components: Variants, full: str = "full") -> Variants:
    """The full method, then a row without each component; a component maps to the overrides that switch it off."""
    return {full: {}, **{f"w/o {name}": off for name, off in components.items()}}


def cumulative(steps: Variants) -> Variants:
    """A row per step, each with all overrides up to its own: the usual component table."""
    rows: dict[str, Overrides] = {}
    so_far: dict[str, Any] = {}
    for label, overrides in steps.items():
        so_far |= overrides
        rows[label] = dict(so_far)
    return rows


def factorial(factors: Mapping[str, Variants]) -> Variants:
    """Every combination of named levels: factor -> level -> overrides. Refuses factors that set the same path."""
    paths = [path for levels in factors.values() for path in {path for level in levels.values() for path in level}]
    if repeated := sorted({path for path in paths if paths.count(path) > 1}):
        raise ValueError(f"two factors set {', '.join(repeated)}: their levels would overwrite each other")
    rows: dict[str, Overrides] = {}
    for levels in product(*factors.values()):
        label = ", ".join(f"{name} {level}" for name, level in zip(factors, levels, strict=True))
        parts = [factors[name][level] for name, level in zip(factors, levels, strict=True)]
        rows[label] = {path: value for part in parts for path, value in part.items()}
    return rows


def _labelled(rows: Iterable[Overrides]) -> Variants:
    """Rows under labels such as `patch 32, ratio 0.5`: the last part of each path and its value."""
    labels: dict[str, Overrides] = {}
    for row in rows:
        label = ", ".join(f"{path.rpartition('.')[2]} {value}" for path, value in row.items())
        if label in labels:
            raise ValueError(f"the design has two rows {label!r}")
        labels[label] = row
    if not labels:
        raise ValueError("the design has no row: its filter is true for no combination")
    return labels
