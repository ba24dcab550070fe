"""A built table in words, before any markup: what every rendering says in the same way."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from analysis.paper.result import Built, Cell, column_id, row_id
from analysis.paper.spec import Column, Row
from analysis.tables import bracket, percent, signed

DASH = "—"
# What stands beside a number that may not be used as it is, or beside the dash where there is none.
MARKS = {"partial": "†", "stale": "‡", "failed": "§", "running": "¶", "queued": "¶"}
WAIVED = "*"
MEANING = {
    "missing": f"{DASH} no number yet.",
    "partial": "† not all seeds are there; their number stands beside the mark.",
    "stale": "‡ stale: something the number rests on has changed since.",
    "failed": "§ a run failed.",
    "running": "¶ runs are queued or running.",
    "queued": "¶ runs are queued or running.",
}


@dataclass(frozen=True, kw_only=True)
class Words:
    """One cell as people read it; "" for what there is not."""

    value: str  # a dash where there is no number
    sd: str = ""  # without the ±
    mark: str = ""  # † 2/3
    gain: str = ""
    interval: str = ""  # of the gain
    verdict: str = ""  # of the gain
    best: bool = False
    borrowed: bool = False  # whether the value itself is another paper's
    published: str = ""  # the published number that stands beside ours
    tag: str = ""  # letter of the source, of `value` or of `published`
    reproduced: str = ""  # verdict against the published number, in a word or two


def words(built: Built, row: Row, column: Column) -> Words:
    """What stands in a cell."""
    cell, digits = built.cell(row, column), column.decimals
    tag = tags(built).get(cell.published.source, "") if cell.published else ""
    if cell.mean is None and cell.state == "published only" and cell.published:
        return Words(value=number(cell.published.value, digits), borrowed=True, tag=tag, best=cell.best)
    if cell.mean is None:
        beside = number(cell.published.value, digits) if cell.published else ""
        return Words(value=DASH, mark=mark(cell), published=beside, tag=tag)
    gain = cell.gain if column.gain and built.table.compare != "none" else None
    return Words(
        value=number(cell.mean, digits),
        sd=number(cell.sd, digits) if cell.sd is not None and cell.n > 1 else "",
        mark=mark(cell),
        gain=signed(gain.mean, digits) if gain else "",
        interval=bracket(gain.interval, digits) if gain else "",
        verdict=gain.verdict if gain else "",
        best=cell.best,
        published=number(cell.published.value, digits) if cell.published else "",
        tag=tag,
        reproduced=cell.published.verdict.partition(":")[0] if cell.published else "",
    )


def number(value: float, decimals: int) -> str:
    """With thousands kept apart from five digits on, a true minus."""
    text = percent(value, decimals)
    whole, point, rest = text.partition(".")
    return (f"{int(whole):,}" if whole.isdecimal() and len(whole) > 4 else whole) + point + rest


def mark(cell: Cell) -> str:
    """`† 2/3`, `‡`, `*` for a waived cell, or nothing."""
    sign = WAIVED if cell.waived else MARKS.get(cell.state, "")
    fewer = cell.mean is not None and 0 < cell.n < cell.wanted
    return f"{sign} {cell.n}/{cell.wanted}".strip() if fewer else sign


def state(cell: Cell) -> str:
    """A cell's state as in `running 40 %`, `partial 2 of 3`, `failed (out of memory)`."""
    if cell.state == "running":
        live = [run.share for run in cell.runs]
        return f"running {100 * sum(live) / max(cell.wanted, len(live), 1):.0f} %"
    if cell.state == "partial":
        return f"partial {cell.n} of {cell.wanted}"
    if cell.state in ("failed", "stale") and cell.reason:
        return f"{cell.state} ({cell.reason})"
    return f"{cell.state}, waived" if cell.waived else cell.state


def tags(built: Built) -> dict[str, str]:
    """Source of published numbers to a letter, in the order of reading: a, b, ... z, aa."""
    found: dict[str, str] = {}
    for row in built.table.rows:
        for column in built.table.columns:
            reference = built.cell(row, column).published
            if reference and reference.source not in found:
                found[reference.source] = _letter(len(found))
    return found


def _letter(place: int) -> str:
    return (_letter(place // 26 - 1) if place >= 26 else "") + chr(ord("a") + place % 26)


def keys(built: Built) -> dict[str, list[str]]:
    """Source to the keys in published.csv of the numbers from it."""
    found: dict[str, list[str]] = {source: [] for source in tags(built)}
    for row in built.table.rows:
        for column in built.table.columns:
            reference = built.cell(row, column).published
            key = row.published.get(column.label) or row.published.get(column_id(column))
            if reference and key and key not in found[reference.source]:
                found[reference.source].append(key)
    return found


def cells(built: Built) -> list[tuple[Row, Column, Cell]]:
    return [(row, column, built.cell(row, column)) for row in built.table.rows for column in built.table.columns]


def compared(built: Built) -> bool:
    """Whether any gain is shown."""
    return any(words(built, row, column).gain for row, column, _ in cells(built))


def row_groups(built: Built) -> list[tuple[str, Sequence[Row]]]:
    """Neighbouring rows that share a group."""
    return [(name, list(rows)) for name, rows in groupby(built.table.rows, key=lambda row: row.group)]


def column_groups(built: Built) -> list[tuple[str, Sequence[Column]]]:
    """Neighbouring columns that share a group."""
    return [(name, list(columns)) for name, columns in groupby(built.table.columns, key=lambda column: column.group)]


def notes(built: Built) -> list[str]:
    """How to read it, the table's own notes, what the marks in it mean, and why a cell is not as it should be."""
    said = [_reading(built), *built.notes]
    said += dict.fromkeys(_meaning(row, cell) for row, _, cell in cells(built))
    said += [f"{where}: {why}." for why, where in _reasons(built).items()]
    return [note for note in said if note]


def _meaning(row: Row, cell: Cell) -> str:
    if cell.mean is None and not row.sweep:
        return "" if cell.published else f"{DASH} not reported there."
    return "" if cell.waived else MEANING.get(cell.state, "")


def sources(built: Built) -> list[tuple[str, str]]:
    """Letter and source of the published numbers, with the protocol where all numbers of the source share it."""
    protocols: dict[str, set[str]] = {}
    for _, _, cell in cells(built):
        if cell.published:
            protocols.setdefault(cell.published.source, set()).add(cell.published.protocol)
    return [
        (letter, source + (f" ({shared})" if (shared := "; ".join(sorted(protocols[source] - {""}))) else ""))
        for source, letter in tags(built).items()
    ]


def _reading(built: Built) -> str:
    every = [cell for _, _, cell in cells(built)]
    said = []
    if any(cell.sd is not None and cell.n > 1 for cell in every):
        counts = sorted({cell.n for cell in every if cell.n > 1})
        seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        said.append(f"Mean ± standard deviation over {seeds} training seeds.")
    if any(cell.best for cell in every):
        said.append("Bold: the best of its group, and what is not significantly worse.")
    if compared(built):
        over = dict.fromkeys(cell.gain.reference for cell in every if cell.gain)
        who = f"“{next(iter(over))}”" if len(over) == 1 else "the first row of its group"
        level = " with its 95 % interval" if any(cell.gain and cell.gain.interval for cell in every) else ""
        said.append(f"Small: gain over {who} at equal seed{level}.")
    return " ".join(said)


def _reasons(built: Built) -> Mapping[str, str]:
    """Reason to the cells that share it, in words."""
    found: dict[str, list[str]] = {}
    for row, column, cell in cells(built):
        reason = f"accepted although stale: {cell.waived}" if cell.waived else cell.reason
        if reason and cell.state not in ("missing", "published only"):
            sign = WAIVED if cell.waived else MARKS.get(cell.state, "")
            found.setdefault(reason.rstrip("."), []).append(f"{sign} {row_id(row)} / {column_id(column)}".strip())
    several = 3  # named one by one
    return {
        why: ", ".join(where[:several]) + (f" and {len(where) - several} more" if len(where) > several else "")
        for why, where in found.items()
    }


def slug(text: str) -> str:
    """For ids and file names: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
