"""A table for a terminal: its numbers, or the states of its cells."""

import sys
from collections.abc import Sequence

from analysis.paper.result import Built, Cell
from analysis.paper.spec import Column, Row
from analysis.paper.words import column_groups, notes, row_groups, sources, state, words

# For terminals that know nothing beyond ASCII.
ASCII = str.maketrans({
    "—": "-", "–": "-", "−": "-", "─": "-", "±": "+-", "†": "!", "‡": "!!", "§": "!F", "¶": "...", "×": "x",
    "“": '"', "”": '"', "\u2018": "'", "\u2019": "'", "\u00a0": " ", "…": "...", "·": ".", "Δ": "d",
})  # fmt: skip


def text(built: Built, states: bool = False, encoding: str | None = None) -> str:
    """The table in lines of plain text.

    Args:
        states: the state of every cell in place of its number, and the reasons below.
        encoding: of where it is printed; standard output's unless given. What it lacks is written in ASCII.
    """
    table = built.table
    columns, groups = table.columns, column_groups(built)
    body: list[list[str]] = []
    for group, rows in row_groups(built):
        if group:
            body.append([group, *[""] * len(columns)])
        for row in rows:
            shown = [_state(built.cell(row, c)) if states else _number(built, row, c) for c in columns]
            body.append([("  " if group else "") + row.label, *shown])
    head = ["", *(column.label for column in columns)]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    place = 1
    for name, members in groups:  # a heading wider than its columns makes the last of them wider
        inside = sum(widths[place : place + len(members)]) + 2 * (len(members) - 1)
        widths[place + len(members) - 1] += max(0, len(name) - inside)
        place += len(members)
    lines = [table.title + (f" ({built.form} form)" if built.form else ""), ""]
    if any(name for name, _ in groups):
        lines += _headings(groups, widths)
    lines += [_line(head, widths), "─" * (sum(widths) + 2 * (len(widths) - 1)), *(_line(line, widths) for line in body)]
    told = [_summary(built)] if states else [*_notes(built), *(f"({tag}) {source}" for tag, source in sources(built))]
    lines += ["", *told, *(_reasons(built) if states else [])]
    if built.commands:
        lines += ["", "What is lacking:", *(f"  {command}" for command in built.commands)]
    return _printable("\n".join(lines) + "\n", encoding or sys.stdout.encoding or "ascii")


def _headings(groups: list[tuple[str, Sequence[Column]]], widths: list[int]) -> list[str]:
    first, second, place = " " * widths[0], " " * widths[0], 1
    for name, members in groups:
        inside = sum(widths[place : place + len(members)]) + 2 * (len(members) - 1)
        first += "  " + name.center(inside)
        second += "  " + ("─" if name else " ") * inside
        place += len(members)
    return [first.rstrip(), second.rstrip()]


def _line(cells: list[str], widths: list[int]) -> str:
    right = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *right]).rstrip()


def _notes(built: Built) -> list[str]:
    """The notes, where a terminal has neither bold nor small type."""
    return [note.replace("Bold: ", "^: ").replace("Small: ", "In brackets: ") for note in notes(built)]


def _number(built: Built, row: Row, column: Column) -> str:
    each = words(built, row, column)
    value = ("^" if each.best else "") + each.value + (f" ± {each.sd}" if each.sd else "")
    gain = f" ({each.gain})" if each.gain else ""
    tag = f" ({each.tag})" if each.borrowed else ""
    return value + gain + tag + (f" {each.mark}" if each.mark else "")


def _summary(built: Built) -> str:
    cells: list[Cell] = list(built.cells.values())
    usable = sum(cell.usable for cell in cells)
    counts: dict[str, int] = {}
    for cell in cells:
        counts[cell.state] = counts.get(cell.state, 0) + 1
    return f"{usable} of {len(cells)} cells usable: " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))


def _state(cell: Cell) -> str:
    """Without the reason, which stands below the table once for all cells that share it."""
    return state(cell).partition(" (")[0] if cell.wanted or cell.state != "missing" else ""


def _reasons(built: Built) -> list[str]:
    """Why cells are not fresh, equal words once."""
    cells: dict[str, list[str]] = {}
    for cell in built.cells.values():
        if cell.reason:
            why = f"{cell.state}: {cell.reason}" if cell.wanted else f"not wanted: {cell.reason}"
            cells.setdefault(why, []).append(f"{cell.row}/{cell.column}")
    return [f"{why} ({_few(names)})" for why, names in cells.items()]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _printable(lines: str, encoding: str) -> str:
    try:
        lines.encode(encoding)
    except UnicodeEncodeError:
        return lines.translate(ASCII).encode("ascii", "replace").decode("ascii")
    return lines
