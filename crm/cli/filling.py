"""crm sweep --for: what the paper's tables lack, sweep by sweep through the same commands that a person types."""

import io
import json as plain_json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TypeAlias

import typer

from crm.cli import options

Work: TypeAlias = Any  # of analysis.paper.lacking, which the command alone may load
Start = Callable[[Work], None]  # crm sweep, or crm evaluate, with the options that were given
NOTHING_TO_DO = 3


def fill(name: str, small: bool, runs: Path, start: Start, later: bool, json: bool) -> None:
    """Starts what a table lacks, or all tables one after another; each is looked at when its turn comes.

    Exits with 1 if something failed, and with 3 if nothing was to do.

    Args:
        later: what is started is done by a scheduler, later; what needs trained runs has to wait.
    """
    from analysis.paper.contents import tables as contents
    from crm.cli.tables import built_tables
    from crm.names import chosen

    known = contents(small)
    if name != "all":
        chosen("table", name, known)
    started: dict[str, None] = {}
    documents: list[Any] = []
    failed = False
    for table in [*known] if name == "all" else [name]:
        for work in built_tables([table], small, runs)[0].work:
            if work.command in started:
                continue
            if later and any(before.split("+")[0] == f"crm sweep {work.sweep}" for before in started):
                say(f"{table}: when {work.sweep} is trained: {work.command}", json)
                continue
            started[work.command] = None
            say(f"{table}: {work.command}", json)
            code, printed = _run(start, work, json)
            failed |= code not in (0, NOTHING_TO_DO)
            documents += [{"command": work.command, "exit": code, "printed": printed}] * json
    if json:
        options.echo_json(documents)
    if failed:
        raise typer.Exit(1)
    if not started:
        say("nothing to do: the tables lack nothing, or it is on its way", json)
        raise typer.Exit(NOTHING_TO_DO)


def say(text: str, json: bool) -> None:
    if not json:
        typer.echo(f"\n{text}" if ": crm" in text else text)


def _run(start: Start, work: Work, json: bool) -> tuple[int, Any]:
    """Exit code, and under --json what was printed."""
    into = io.StringIO()
    try:
        if json:
            with redirect_stdout(into):
                start(work)
        else:
            start(work)
    except typer.Exit as end:
        return end.exit_code, _parsed(into.getvalue())
    return 0, _parsed(into.getvalue())


def _parsed(text: str) -> Any:
    try:
        return plain_json.loads(text) if text.strip() else None
    except ValueError:
        return text
