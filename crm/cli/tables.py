"""The paper's tables: regenerated from records, cell by cell, and what they lack."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from crm.cli import options
from crm.cli.options import Json, Runs
from crm.machine import home
from crm.names import chosen

Built: TypeAlias = Any  # of analysis.paper.result, which the command alone may load
Cell: TypeAlias = Any
AllTiny = Annotated[bool, typer.Option("--tiny", help="From the tiny forms of the sweeps.")]


def add_to(app: typer.Typer) -> None:
    for command in (tables, cell):
        app.command()(command)


def tables(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Tables. [default: all]")] = None,
    final: Annotated[
        bool, typer.Option("--final", help="Fail where a cell is missing, partial, stale or failed; say what fills it.")
    ] = False,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="With --final: mark such cells instead.")
    ] = False,
    small: AllTiny = False,
    runs: Runs = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder. [default: reports/tables]")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read evaluations whole, to see whether one was edited since.")
    ] = False,
    venue: Annotated[str, typer.Option(help="Whose column width figures have: ieee, cvpr or neurips.")] = "ieee",
    json: Json = False,
) -> None:
    """Writes the paper's tables from the records, each with its ledger, and says how their cells stand."""
    from analysis.paper import ledger
    from analysis.paper.figures import WIDTHS
    from analysis.paper.render import index, write
    from analysis.spent import costs

    chosen("venue", venue, WIDTHS)
    place, folder = out or home() / "reports" / ("tables-tiny" if small else "tables"), options.runs_folder(runs)
    built = built_tables(names, small, folder, check)
    for one in built:
        ledger.write(one, place)
        write(one, place, venue, home() / "cache" / "figures")
    index(built, place, costs(folder, {one.table.name: _run_ids(one) for one in built}))
    lacking = {one.table.name: [cell for cell in one.cells.values() if cell.lacking] for one in built}
    commands = list(dict.fromkeys(command for one in built for command in one.commands))
    if json:
        options.echo_json({
            "out": str(place), "commands": commands,
            "tables": {one.table.name: [ledger.entry(cell) for cell in one.cells.values()] for one in built},
        })  # fmt: skip
    else:
        typer.echo(options.table([_counts(one) for one in built], ["table", "cells", "states"]))
        typer.echo(f"\nwritten to {place}")
    if not final or not any(lacking.values()):
        return
    count = sum(map(len, lacking.values()))
    if not json:
        typer.echo(f"\n{count} cells lack runs that count. What fills them (crm sweep --for all does the first kind):")
        typer.echo("\n".join(f"  {command}" for command in commands) or "  nothing: what is on its way will")
    if not allow_partial:
        if not json:
            _told(lacking)
        raise typer.Exit(1)


def cell(
    address: Annotated[str, typer.Argument(metavar="TABLE:ROW/COLUMN", help="As in 'main: Swin-T: CRM/MF: mIoU'.")],
    small: AllTiny = False,
    runs: Runs = None,
    check: Annotated[bool, typer.Option("--check", help="Read evaluations whole.")] = False,
    json: Json = False,
) -> None:
    """One cell with everything its number rests on: runs, code, data, checkpoints, jobs, down to the log."""
    from analysis.paper import ledger
    from analysis.paper.contents import tables as contents

    name, rest = ledger.table_of(address, contents(small))
    built = built_tables([name], small, options.runs_folder(runs), check)[0]
    found = ledger.find(built, rest.strip())
    if json:
        options.echo_json(ledger.entry(found))
    else:
        typer.echo(ledger.chain_text(built, found))


def built_tables(names: Sequence[str] | None, small: bool, runs: Path, check: bool = False) -> list[Built]:
    """The tables of these names, all if none is named; ValueError names those that there are."""
    from analysis.paper.cells import build_all
    from analysis.paper.contents import tables as contents

    known = contents(small)
    asked = [chosen("table", name, known) for name in names] if names else [*known.values()]
    return build_all(asked, runs, "tiny" if small else "", home() / "cache" / "statistics", check)


def items_of_cell(name: str, small: bool, runs: Path, address: str) -> list[tuple[Path, Any, str, Any]]:
    """Of each run behind ROW/COLUMN of a table: its folder, its cell, the checkpoint and the conditions that count."""
    from analysis.paper import ledger
    from analysis.paper.wanted import Sweeps, wanted

    built = built_tables([name], small, runs)[0]
    found = ledger.find(built, address.strip())
    want = wanted(built.table, Sweeps(built.form))[found.row, found.column]
    begun = [one for one in want.cells if (runs / one.id / "config.json").exists()]
    if not begun:
        raise ValueError(f"{name}:{address} rests on no run yet: it is {ledger.told(found)}")
    return [(runs / one.id, one, want.selection, [] if want.on(one) else want.conditions) for one in begun]


def status_of_tables(name: str, small: bool, runs: Path, json: bool) -> None:
    """What `crm status --table` prints."""
    from analysis.paper import ledger
    from analysis.paper.text import text

    built = built_tables(None if name == "all" else [name], small, runs)
    if json:
        found = {one.table.name: [ledger.entry(cell) for cell in one.cells.values()] for one in built}
        options.echo_json(found)
    else:
        typer.echo("\n\n".join(text(one, states=True) for one in built))


def _run_ids(built: Built) -> list[str]:
    return [run.id for cell in built.cells.values() for run in cell.runs]


def _counts(built: Built) -> list[str]:
    return [built.table.name, str(len(built.cells)), _summary(built)]


def _summary(built: Built) -> str:
    states = [cell.state if cell.wanted or cell.state != "missing" else "not wanted" for cell in built.cells.values()]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _told(lacking: dict[str, Any]) -> None:
    """The first few cells of every table, on stderr, for a log of continuous integration."""
    for name, cells in lacking.items():
        for one in cells[:5]:
            why = f": {one.reason}" if one.reason else ""
            typer.echo(f"crm: {name}: {one.row}/{one.column} is {one.state}{why}", err=True)
        if len(cells) > 5:
            typer.echo(f"crm: {name}: and {len(cells) - 5} more", err=True)
