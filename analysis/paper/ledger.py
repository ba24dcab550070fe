"""The ledger beside a table: every cell with all that its number rests on. The same records give the same bytes.

No times, hosts or absolute paths stand in it; files are named below the runs folder.
"""

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from analysis.paper.result import Built, Cell, column_id, row_id
from crm.names import chosen, unknown
from crm.records import finite

SCHEMA = 1


def ledger(built: Built) -> dict[str, Any]:
    """As plain values, the cells in the order of the table."""
    rows, columns = map(row_id, built.table.rows), [*map(column_id, built.table.columns)]
    return {
        "schema": SCHEMA,
        "table": built.table.name,
        "form": built.form,
        "title": built.table.title,
        "notes": [*built.notes],
        "commands": [*built.commands],
        "cells": {f"{row}/{column}": entry(built.cells[row, column]) for row in rows for column in columns},
    }


def entry(cell: Cell) -> dict[str, Any]:
    """A cell's line: `runs` holds the chain of each, down to its log."""
    return {**_fields(cell), "lacking": cell.lacking}


def _fields(value: Any) -> Any:
    """Dataclasses as dicts; `dataclasses.asdict` would copy every chain as well."""
    if is_dataclass(value):
        return {name: _fields(getattr(value, name)) for name in value.__dataclass_fields__}
    return [_fields(one) for one in value] if isinstance(value, list | tuple) else value


def write(built: Built, folder: Path) -> Path:
    """Writes <table>.ledger.json."""
    path = folder / f"{built.table.name}.ledger.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(ledger(built)), indent=1, sort_keys=True, default=_plain, ensure_ascii=False)
    path.write_text(text + "\n")
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r} has no place in a ledger")


# ---------------------------------------------------------------------------------------------- one cell, for people


def find(built: Built, address: str) -> Cell:
    """The cell of ROW/COLUMN; ValueError names what there is, and what was probably meant.

    A row or column is named by its label alone where that is clear.
    """
    names = {f"{row}/{column}": (row, column) for row, column in built.cells}
    if address in names:
        return built.cells[names[address]]
    rows, columns = dict.fromkeys(row for row, _ in built.cells), dict.fromkeys(column for _, column in built.cells)
    splits = [(address[:at], address[at + 1 :]) for at, letter in enumerate(address) if letter == "/"]
    for row, column in splits:
        if (own := _named(row, rows)) and (other := _named(column, columns)):
            return built.cells[own, other]
    if not splits:
        raise ValueError(f"a cell is TABLE:ROW/COLUMN, not {address!r}; rows: {', '.join(rows)}")
    row, column = next((one for one in splits if _named(one[0], rows)), splits[0])
    if not _named(row, rows):
        raise unknown(f"row in table {built.table.name}", row, rows)
    raise unknown(f"column in table {built.table.name}", column, columns)


def _named(name: str, known: Mapping[str, None]) -> str:
    """The id that a name means: itself, or the only one with that label."""
    if name in known:
        return name
    ends = [one for one in known if one.rpartition(": ")[2] == name]
    return ends[0] if len(ends) == 1 else ""


def table_of(address: str, tables: Mapping[str, Any]) -> tuple[str, str]:
    """Table and ROW/COLUMN of an address."""
    name, colon, rest = address.partition(":")
    chosen("table", name, dict(tables))
    if not colon or not rest:
        raise ValueError(f"a cell is TABLE:ROW/COLUMN, not {address!r}")
    return name, rest


def chain_text(built: Built, cell: Cell) -> str:
    """The cell with everything its number rests on, down to the log of each run."""
    lines = [f"{built.table.name}: {cell.row} / {cell.column}: {number(cell)}", f"  state: {told(cell)}"]
    lines += [f"  protocol: {cell.protocol}"] * bool(cell.protocol)
    lines += [f"  accepted as it is: {cell.waived}"] * bool(cell.waived)
    if cell.interval is not None:
        lines.append(f"  mean in [{cell.interval.low:.2f}, {cell.interval.high:.2f}]: {cell.interval.method}, "
                     f"{cell.interval.over}")  # fmt: skip
    if (gain := cell.gain) is not None:
        within = "" if gain.interval is None else f" in [{gain.interval.low:+.2f}, {gain.interval.high:+.2f}]"
        p = "" if gain.p is None else f", p {gain.p:.3g} after Holm"
        lines.append(f"  gain over {gain.reference}: {gain.mean:+.2f}{within}, {gain.n} paired seeds{p} {gain.verdict}")
        if gain.more_seeds:
            cost = "" if gain.cost_hours is None else f", about {gain.cost_hours:.2g} hours"
            lines.append(f"    {gain.more_seeds} more seed{'s' * (gain.more_seeds > 1)} would probably decide{cost}")
    if (theirs := cell.published) is not None:
        lines.append(f"  published: {theirs.value} ({theirs.source}; {theirs.protocol}) {theirs.verdict}".rstrip())
    for run in cell.runs:
        value = "no value" if run.value is None else f"{run.value:.2f}"
        why = f": {run.reason}" if run.reason else ""
        lines.append(f"  seed {run.seed}: {value}, {run.state}{why}")
        lines.append(f"    run {run.id} of {run.sweep}, {run.variant}")
        lines += [f"    {name}: {_short(value)}" for name, value in run.chain.items() if value not in (None, [], {})]
    return "\n".join(lines)


def number(cell: Cell) -> str:
    """As in `61.2 ± 0.4 (n = 3)`."""
    if cell.mean is None:
        return str(cell.published.value) + " (published)" if cell.published else "no number"
    return f"{cell.mean:.2f}" + (f" ± {cell.sd:.2f}" if cell.sd is not None else "") + f" (n = {cell.n})"


def told(cell: Cell) -> str:
    """A state as people read it: `running 40 %`, `partial 2 of 3: ...`."""
    shares = [run.share for run in cell.runs if run.state == "running"]
    how = ""
    if cell.state == "running" and shares:
        how = f" {100 * sum(shares) / len(shares):.0f} %"
    elif cell.state == "partial":
        how = f" {cell.n} of {cell.wanted}"
    return f"{cell.state}{how}" + (f": {cell.reason}" if cell.reason else "")


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_short(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
