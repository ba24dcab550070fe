"""Tables as pages: every number opens the chain behind it, nothing is asked of a network, everything is escaped."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from analysis.paper.result import Built, Cell, Run, column_id, row_id
from analysis.paper.spec import Column, Row
from analysis.paper.words import column_groups, notes, row_groups, slug, sources, state, words
from analysis.tables import bracket, signed, templates

Figures = Sequence[tuple[str, Markup]]  # "wide" or "narrow" and the SVG for it
SHORT = {"commit": 12, "diff": 12, "data": 12, "checkpoint": 12}  # hexadecimal digits shown


def element(built: Built) -> Markup:
    """The table element with its notes and the chains that its numbers open."""
    table = built.table
    bodies, chains = [], []
    for i, (group, rows) in enumerate(row_groups(built)):
        lines = []
        for j, row in enumerate(rows):
            cells = [_cell(built, row, c, f"{slug(table.name)}-{i}-{j}-{k}") for k, c in enumerate(table.columns)]
            chains += [cell for cell in cells if cell["chain"]]
            lines.append({"label": row.label, "cells": cells})
        bodies.append((group, lines))
    groups = [(name, len(members)) for name, members in column_groups(built)]
    page = templates().get_template("paper_table.html.j2").render(
        name=table.name,
        first="row",
        grouped=any(name for name, _ in groups),
        groups=groups,
        head=[column.label for column in table.columns],
        bodies=bodies,
        chains=chains,
        notes=notes(built),
        sources=sources(built),
    )  # fmt: skip
    return Markup(page)


def page(
    built: Sequence[Built],
    elements: Mapping[str, Markup],
    figures: Mapping[str, Figures],
    costs: Mapping[str, Any] | None = None,
) -> str:
    """One page for these tables.

    Args:
        elements: of `element`, by name of the table.
        figures: by name of the table.
        costs: what was spent on what: label to a number of hours, or label to several numbers by their names.
    """
    single = len(built) == 1
    return templates().get_template("paper.html.j2").render(
        title=built[0].table.title if single else "All tables",
        kicker=_kicker(built),
        parts=[_part(one, elements[one.table.name], figures.get(one.table.name, ())) for one in built],
        costs=_costs(costs) if costs else None,
        provenance=_provenance(built),
        footer="The same tables as LaTeX, Markdown and CSV, unrounded, lie in this folder.",
    )  # fmt: skip


def _part(built: Built, shown: Markup, figure: Figures) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for cell in built.cells.values():
        counts[cell.state] = counts.get(cell.state, 0) + 1
    lead = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
    return {
        "name": slug(built.table.name),
        "title": built.table.title,
        "lead": f"{len(built.cells)} cells: {lead}.",
        "element": shown,
        "figure": figure,
        "caption": "Every small sign is one seed, the large sign their mean, the bar its 95 % interval over new seeds.",
        "commands": built.commands,
    }


def _kicker(built: Sequence[Built]) -> str:
    tiny = any(one.form == "tiny" for one in built)
    names = ", ".join(one.table.name for one in built)
    return f"Tables: {names}" + (" · tiny synthetic form: the numbers mean nothing" if tiny else "")


def _cell(built: Built, row: Row, column: Column, ident: str) -> dict[str, Any]:
    cell, said = built.cell(row, column), words(built, row, column)
    value = cell.mean if cell.mean is not None else cell.published.value if said.borrowed and cell.published else None
    chain = _chain(cell, column)
    return {
        "id": ident,
        "title": f"{row_id(row)} / {column_id(column)}",
        "state": cell.state,
        "words": said,
        "raised": said.mark + (said.tag if said.borrowed else ""),
        "sort": "" if value is None else repr(float(value)),
        "hint": "; ".join(f"{term}: {what}" for term, what in chain[:4]),
        "chain": chain if cell.runs or cell.published else [],
        "runs": _aligned([_run(run) for run in cell.runs]),
    }


def _chain(cell: Cell, column: Column) -> list[tuple[str, str]]:
    """What is known about a number: term and words."""
    digits = column.decimals
    said = [("state", state(cell))]
    if cell.mean is not None:
        sd = f", sd {cell.sd:.6g}" if cell.sd is not None and cell.n > 1 else ""
        said.append(("value", f"{cell.mean:.6g}{sd}, n = {cell.n} of {cell.wanted} seeds"))
    if cell.interval:
        low, high = f"{cell.interval.low:.6g}", f"{cell.interval.high:.6g}"
        said.append(("interval", f"[{low}, {high}] over {cell.interval.over}; {cell.interval.method}"))
    if gain := cell.gain:
        p = f", p = {gain.p:.3g}" if gain.p is not None else ""
        text = f"{signed(gain.mean, digits + 1)} {bracket(gain.interval, digits + 1)}".strip()
        said.append(("gain", f"{text} over “{gain.reference}”, {gain.n} paired seeds{p}: {gain.verdict}"))
        if gain.interval:
            said.append(("gain's interval", f"over {gain.interval.over}; {gain.interval.method}"))
        if gain.more_seeds is not None:
            hours = f", {gain.cost_hours:.3g} hours" if gain.cost_hours is not None else ""
            said.append(("to decide", f"{gain.more_seeds} more seed{'s' * (gain.more_seeds != 1)}{hours}"))
    if theirs := cell.published:
        said.append(("published", f"{theirs.value:g}, {theirs.source}; {theirs.protocol}"))
        if theirs.verdict:
            said.append(("verdict", theirs.verdict))
    said += [(term, what) for term, what in (("protocol", cell.protocol), ("waived", cell.waived)) if what]
    return said


def _run(run: Run) -> dict[str, str]:
    """A run as a row of words."""
    value = "" if run.value is None else f"{run.value:.6g}"
    words_ = {"seed": str(run.seed), "value": value, "state": run.state + (f": {run.reason}" if run.reason else "")}
    chain = {term: _said(run.chain[term])[: SHORT.get(term)] for term in run.chain}
    return {**words_, "run": run.id, **chain}


def _said(what: Any) -> str:
    if isinstance(what, Mapping):
        return ", ".join(f"{key}: {_said(each)}" for key, each in what.items())
    if isinstance(what, list | tuple):
        return ", ".join(map(_said, what))
    return "" if what is None else str(what)


def _provenance(built: Sequence[Built]) -> list[dict[str, str]]:
    """Every run that a table counts on, once."""
    found: dict[tuple[str, str], Run] = {}
    for one in built:
        for cell in one.cells.values():
            found.update({(run.sweep, run.id): run for run in cell.runs})
    rows = [{"sweep": run.sweep, "variant": run.variant, **_run(run)} for run in found.values()]
    rows.sort(key=lambda row: (row["sweep"], row["variant"], int(row["seed"]), row["run"]))
    return _aligned([{term: said for term, said in row.items() if term != "value"} for row in rows])  # that is a cell's


def _aligned(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same columns in every row."""
    terms = dict.fromkeys(term for row in rows for term in row)
    return [{term: row.get(term, "") for term in terms} for row in rows]


def _costs(costs: Mapping[str, Any]) -> dict[str, Any]:
    rows = {label: dict(what) if isinstance(what, Mapping) else {"hours": what} for label, what in costs.items()}
    terms = list(dict.fromkeys(term for what in rows.values() for term in what))
    shown = [(label, [_amount(what.get(term)) for term in terms]) for label, what in rows.items()]
    return {"head": ["", *terms], "rows": shown}


def _amount(what: Any) -> tuple[str, str]:
    """As people read it, and as it is sorted."""
    if isinstance(what, float):
        return f"{what:,.1f}", repr(what)
    return ("—", "") if what is None else (_said(what), _said(what))
