"""What a table asks for, cell by cell: which runs of which sweep, evaluated how. Reads the sweeps and no record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from analysis.paper.metrics import parse
from analysis.paper.result import column_id, row_id
from analysis.paper.spec import Column, Row, Table
from crm.cli.options import find_sweep
from crm.conditions import Condition, condition
from crm.names import unknown
from crm.sweep import Cell, Sweep, refuse_selection

TINY = "tiny"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Of one cell."""

    row: Row
    column: Column
    name: str = ""  # the sweep with its form; "" where no run of ours is meant
    sweep: Sweep | None = None
    variant: str = ""
    cells: Sequence[Cell] = ()  # a run per seed
    why_not: str = ""  # why this form of the table has no such runs

    @property
    def selection(self) -> str:
        return self.column.selection or (self.sweep.selection if self.sweep else "")

    @cached_property
    def conditions(self) -> Sequence[Condition]:
        """That runs are evaluated under; none for what is measured of the run itself."""
        return [] if parse(self.column.metric).file else [condition(name) for name in self.column.conditions]

    def on(self, cell: Cell) -> str:
        """The data set that a run is evaluated on where that is not its own, else ""."""
        return "" if self.column.on == cell.config.data.dataset else self.column.on


@dataclass(frozen=True, kw_only=True)
class Form:
    """A sweep in the form that is meant."""

    name: str
    sweep: Sweep
    cells: Mapping[str, Sequence[Cell]]  # by variant


class Sweeps:
    """The sweeps of tables, each loaded and expanded once."""

    def __init__(self, form: str = "", known: Mapping[tuple[str, str], Form] | None = None) -> None:
        """`known` are sweeps by name and recipe that need not be looked up."""
        self.form = form
        self._known = dict(known or {})

    def find(self, name: str, recipe: str = "") -> Form:
        if (name, recipe) not in self._known:
            small = self.form == TINY
            known, found = find_sweep(name, recipe="" if small else recipe, small=small)
            cells: dict[str, list[Cell]] = {}
            for cell in found.cells():
                cells.setdefault(cell.variant, []).append(cell)
            self._known[name, recipe] = Form(name=known, sweep=found, cells=cells)
        return self._known[name, recipe]


def wanted(table: Table, sweeps: Sweeps) -> dict[tuple[str, str], Wanted]:
    """By ids of row and column. ValueError names a row whose variant the sweep has not, and what it has."""
    return {
        (row_id(row), column_id(column)): _wanted(table, row, column, sweeps)
        for row in table.rows
        for column in table.columns
    }


def _wanted(table: Table, row: Row, column: Column, sweeps: Sweeps) -> Wanted:
    if not row.sweep:
        return Wanted(row=row, column=column)
    found = sweeps.find(row.sweep, column.recipe)
    variant = row.variant.replace("{}", column.key)
    about = {"row": row, "column": column, "name": found.name, "sweep": found.sweep, "variant": variant}
    if variant in found.sweep.left_out:
        return Wanted(**about, why_not=found.sweep.left_out[variant])
    if variant not in found.cells:
        raise ValueError(
            f"table {table.name}, row {row_id(row)!r}: {unknown('row of ' + row.sweep, variant, found.cells)}"
        )
    cells = found.cells[variant]
    try:
        refuse_selection(column.selection or found.sweep.selection, cells[0].config)
    except ValueError as error:
        return Wanted(**about, why_not=str(error))
    return Wanted(**about, cells=cells)
