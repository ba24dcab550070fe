"""Figures of tables: they draw the cells of one and compute nothing. Every seed is shown, with the mean's interval.

Signs differ in shape and filling as well as in colour, so that they are told apart in grey.
"""

import math
import re
import textwrap
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from analysis.figures import BASELINE, INK, MARKERS, OTHERS, PAPER, QUIET, SUBJECT, style
from analysis.paper.result import Built, Cell, column_id
from analysis.paper.spec import Column, Row
from analysis.paper.words import row_groups

# Inches: of a column, and of the text across all columns.
WIDTHS = {"ieee": (3.5, 7.16), "cvpr": (3.25, 6.875), "neurips": (5.5, 5.5)}
NARROW = 4.5  # inches; a figure below that is narrow


def draw(built: Built, width: float) -> Figure | None:
    """The figure that the table asks for, `width` inches wide; None where it asks for none or has no number yet.

    ValueError for a kind that FIGURES does not have.
    """
    kind = built.table.figure
    if not kind:
        return None
    if kind not in FIGURES:
        raise ValueError(f"table {built.table.name} asks for a figure {kind!r}; there are {', '.join(FIGURES)}")
    return FIGURES[kind](built, width)


def dots(built: Built, width: float) -> Figure | None:
    """A panel per column, a line per row: every seed, the mean, and its interval."""
    columns = _with_numbers(built)
    rows = [row for row in built.table.rows if any(_value(built.cell(row, c)) is not None for c in columns)]
    if not columns:
        return None
    labels = [_label(row, width) for row in rows]
    lines = sum(max(1.4, label.count("\n") + 1.1) for label in labels)
    with style():
        across, down = _shape(len(columns), width)
        figure = Figure(figsize=(width, (0.55 + 0.155 * lines) * down), layout="constrained")
        grid = np.ravel(figure.subplots(down, across, sharey=True, squeeze=False))
        first = [row for _, members in row_groups(built) for row in members[:1] if row.sweep]
        for axes, column in zip(grid, columns, strict=False):
            for place, row in enumerate(rows):
                _dot(axes, built.cell(row, column), place, row in first)
            axes.set_title(_title(column))
            axes.grid(axis="y", visible=False)
            axes.margins(x=0.08)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", labelcolor=INK)
        for axes in grid[len(columns) :]:
            axes.set_axis_off()
        grid[0].set_yticks(range(len(rows)), labels)
        grid[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def dose(built: Built, width: float) -> Figure | None:
    """A panel per column, a line per group of rows: the measure against the number in the row's label.

    Rows without a number in their label stand beside the axis as a dashed line.
    """
    columns = _with_numbers(built)
    if not columns:
        return None
    with style():
        across, down = _shape(len(columns), width)
        figure = Figure(figsize=(width, (1.6 if across > 1 else 1.5) * down + 0.3), layout="constrained")
        grid = np.ravel(figure.subplots(down, across, squeeze=False))
        for axes, column in zip(grid, columns, strict=False):
            every: set[float] = set()
            for number, (group, rows) in enumerate(row_groups(built)):
                every |= _line(axes, built, group, rows, column, number)
            axes.set_title(_title(column))
            axes.set_xlabel(_plain(_axis(built.table.rows)))
            if len(every) > 1 and min(every) > 0 and max(every) > 10 * min(every):
                axes.set_xscale("log")
            axes.set_xticks(sorted(every), [f"{x:g}" for x in sorted(every)])
            axes.minorticks_off()
        for axes in grid[len(columns) :]:
            axes.set_axis_off()
        signs = {label: sign for axes in grid for sign, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        if signs:
            place = {"loc": "outside lower center", "ncols": 1 if width < NARROW else 3}
            figure.legend(signs.values(), signs.keys(), frameon=False, fontsize=7, **place)
    return figure


def optimism(built: Built, width: float) -> Figure | None:
    """What choosing the checkpoint by the test split adds: the same runs at every selection, a panel per data set."""
    columns = _with_numbers(built)
    sets = list(dict.fromkeys(column.group for column in columns))
    if not columns:
        return None
    rows = built.table.rows
    labels = [_label(row, width) for row in rows]
    with style():
        across, down = _shape(len(sets), width)
        height = 0.75 + 0.3 * len(rows)
        figure = Figure(figsize=(width, height * down + 0.2), layout="constrained")
        grid = np.ravel(figure.subplots(down, across, sharey=True, squeeze=False))
        for axes, name in zip(grid, sets, strict=False):
            mine = [column for column in columns if column.group == name]
            for place, row in enumerate(rows):
                means = [_value(built.cell(row, column)) for column in mine]
                known = [mean for mean in means if mean is not None]
                axes.plot(known, [place] * len(known), color=QUIET, lw=1.2, zorder=1)
            for number, column in enumerate(mine):
                colour = (BASELINE, SUBJECT, *OTHERS)[number % (len(OTHERS) + 2)]
                found = [(_value(built.cell(row, column)), place) for place, row in enumerate(rows)]
                points = [(mean, place) for mean, place in found if mean is not None]
                axes.plot(
                    [mean for mean, _ in points], [place for _, place in points], MARKERS[number], color=colour, ms=5,
                    mfc=PAPER if number == 0 else colour, label=_plain(column.label),
                )  # fmt: skip
                for row, (_, place) in zip(rows, found, strict=True):
                    seeds = _seeds(built.cell(row, column))
                    axes.plot(
                        seeds, [place + 0.22] * len(seeds), MARKERS[number], color=colour, ms=2.2, mfc="none", mew=0.6
                    )
            axes.set_title(_plain(name or built.table.name))
            axes.grid(axis="y", visible=False)
            axes.margins(x=0.1)
            axes.tick_params(axis="y", labelcolor=INK)
        for axes in grid[len(sets) :]:
            axes.set_axis_off()
        grid[0].set_yticks(range(len(rows)), labels)
        grid[0].set_ylim(len(rows) - 0.5, -0.5)
        figure.legend(
            *grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=7
        )
    return figure


def _shape(panels: int, width: float) -> tuple[int, int]:
    """How many panels stand beside and below each other."""
    across = 1 if width < NARROW else 2 if panels == 4 else min(3, panels)
    return across, -(-panels // across)


FIGURES: dict[str, Callable[[Built, float], Figure | None]] = {"dots": dots, "dose": dose, "optimism": optimism}


def _dot(axes: Axes, cell: Cell, place: float, reference: bool) -> None:
    mean = _value(cell)
    if mean is None:
        axes.plot([], [])
        return
    if cell.mean is None:  # another paper's
        axes.plot([mean], [place], "D", color=QUIET, mfc="none", ms=4)
        return
    colour = BASELINE if reference else SUBJECT
    if cell.interval:
        axes.plot([cell.interval.low, cell.interval.high], [place, place], color=colour, lw=1.3, zorder=1)
    seeds = _seeds(cell)
    axes.plot(seeds, [place + 0.24] * len(seeds), "o", color=colour, ms=2.4, mfc="none", mew=0.7)
    filling = PAPER if reference or not cell.usable else colour  # hollow: what may not be used as it is, too
    axes.plot([mean], [place], "s" if reference else "o", color=colour, mfc=filling, ms=4.6)


def _line(axes: Axes, built: Built, group: str, rows: Sequence[Row], column: Column, number: int) -> set[float]:
    """Draws one group; returns its doses."""
    colour, marker = (SUBJECT, *OTHERS)[number % (len(OTHERS) + 1)], MARKERS[number % len(MARKERS)]
    points = []
    for row in rows:
        cell, at = built.cell(row, column), _dose(row.label)
        mean = _value(cell)
        if mean is None:
            continue
        if at is None:
            axes.axhline(mean, color=BASELINE, lw=1, ls=(0, (4, 2)), label=_plain(row.label))
            continue
        points.append((at, mean))
        if cell.interval:
            axes.plot([at, at], [cell.interval.low, cell.interval.high], color=colour, lw=1)
        seeds = _seeds(cell)
        beside = axes.transData + ScaledTranslation(4 / 72, 0, axes.figure.dpi_scale_trans)
        axes.plot([at] * len(seeds), seeds, marker, color=colour, ms=2.2, mfc="none", mew=0.6, transform=beside)
    points.sort()
    style_ = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1, 1, 1)))[number % 4]
    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ls=style_, lw=1.4, ms=4, mec=PAPER, mew=0.4,
              **({"label": _plain(group)} if group else {})) if points else None  # fmt: skip
    return {at for at, _ in points}


def _dose(label: str) -> float | None:
    found = re.search(r"-?\d+(?:\.\d+)?", label)
    return float(found.group()) if found else None


def _axis(rows: Sequence[Row]) -> str:
    """What the labels have in common, without their numbers."""
    words = {re.sub(r"-?\d+(?:\.\d+)?", "", row.label).strip(" =:,") for row in rows if _dose(row.label) is not None}
    return words.pop() if len(words) == 1 else ""


def _with_numbers(built: Built) -> list[Column]:
    """The columns to draw: those whose gains matter, or all where none does."""
    known = [c for c in built.table.columns if any(built.cell(row, c).mean is not None for row in built.table.rows)]
    return [column for column in known if column.gain] or known


def _value(cell: Cell) -> float | None:
    value = cell.mean if cell.mean is not None else cell.published.value if cell.published else None
    return value if value is not None and math.isfinite(value) else None


def _seeds(cell: Cell) -> list[float]:
    return [run.value for run in cell.runs if run.value is not None] if cell.n > 1 else []


def _title(column: Column) -> str:
    return _plain(column_id(column))


def _label(row: Row, width: float) -> str:
    return _plain(textwrap.fill(row.label, 20 if width < NARROW else 26))


def _plain(text: str) -> str:
    """Without mathematics: a dollar is a dollar."""
    return text.replace("$", r"\$")
