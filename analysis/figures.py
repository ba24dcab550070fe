"""The figures: they draw what they are given and compute nothing. One style, one colour per variant everywhere.

Text, rules and paper have colours of their own (INK, QUIET, RULE, PAPER), which a page may exchange for a dark theme's.
"""

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import matplotlib as mpl
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.stats import dose_at, dose_axis
from analysis.tables import HEADLINE, measures, values
from crm.conditions import CLEAN_TEST, MISSING, Condition
from crm.sweep import Sweep

INK, QUIET, RULE, PAPER = "#1c2127", "#66707b", "#dfe3e8", "#fffffe"  # no data is drawn in one of these
BASELINE = "#8a929c"  # the baseline is grey in every figure: what the others are seen against
SUBJECT = "#d55e00"  # the method under study
OTHERS = ("#2f8fd0", "#0f9f78", "#c77cb5", "#b8950f", "#7d6fd6", "#a05a2c", "#3aa6a6")  # after Okabe and Ito
MARKERS = "osD^vPXph"  # a second sign beside colour

CROWD = 6  # variants; more than so many are drawn with less ink

NARROW, WIDE = 3.5, 7.1  # inches: a paper column or a phone; a paper page or a desktop

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 6,
    "axes.labelsize": 7.5,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": RULE,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "figure.facecolor": PAPER,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "path",  # looks the same everywhere
    "svg.hashsalt": "crm",  # the same figure is the same file
    "pdf.fonttype": 42,  # TrueType: what publishers accept
}

# Without what changes from one time to the next.
METADATA = {
    ".svg": {"Date": None, "Creator": None},
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


@contextmanager
def style() -> Iterator[None]:
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def colours(sweep: Sweep) -> dict[str, str]:
    """Variant to colour, the same in all figures: the baseline grey, the subject orange, the others in their order."""
    others = [v for v in sweep.variants if v not in (sweep.reference, sweep.subject)]
    chosen = {variant: OTHERS[i % len(OTHERS)] for i, variant in enumerate(others)}
    return {v: BASELINE if v == sweep.reference else chosen.get(v, SUBJECT) for v in sweep.variants}


def markers(sweep: Sweep) -> dict[str, str]:
    return {variant: MARKERS[i % len(MARKERS)] for i, variant in enumerate(sweep.variants)}


def written(figure: Figure, suffixes: Sequence[str] = (".svg", ".png")) -> Mapping[str, bytes]:
    """The figure as SVG, PNG or PDF: file suffix to content, the same bytes each time."""
    forms = {}
    for suffix in suffixes:
        metadata = METADATA[suffix]
        buffer = io.BytesIO()
        with style():
            figure.savefig(buffer, format=suffix[1:], dpi=220, metadata=metadata)
        forms[suffix] = buffer.getvalue()
    return forms


def inline_svg(svg: str, name: str) -> Markup:
    """An SVG as part of a page: its colours of paper and ink follow the page's theme, its ids are its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    # width and height in points would fix its size; the viewBox keeps its shape
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r'<svg\1 aria-hidden="true"', svg, count=1)
    themes = {INK: "ink", QUIET: "quiet", RULE: "rule", PAPER: "paper"}
    for colour, role in themes.items():
        svg = svg.replace(colour, f"var(--{role})")
    return Markup(svg)


# ---------------------------------------------------------------------------------------------- robustness curves


@dataclass(frozen=True)
class Family:
    """One panel of the robustness curves: conditions along a severity."""

    title: str
    axis: str
    steps: Sequence[tuple[float, Condition]]  # severity, condition


def families(conditions: Sequence[Condition]) -> list[Family]:
    """The curves these conditions allow; each begins at the clean condition and has a severity in between."""
    missing_rgb, missing_thermal = MISSING
    sides = {
        "RGB": lambda c, kind: c.rgb.kind == kind and c.thermal.kind == "clean" and c.rgb.severity,
        "thermal": lambda c, kind: c.thermal.kind == kind and c.rgb.kind == "clean" and c.thermal.severity,
        "RGB and thermal": lambda c, kind: c.rgb == c.thermal and c.rgb.kind == kind and c.rgb.severity,
    }
    kinds = {
        "patch_dropout": ("hidden patches", "share of patches hidden"),
        "gaussian_noise": ("noise", "noise sd, grey levels"),
    }
    found = []
    for kind, (words, axis) in kinds.items():
        for side, severity in sides.items():
            steps = [(severity(c, kind), c) for c in conditions if c.split == CLEAN_TEST.split and severity(c, kind)]
            if not steps:
                continue
            ends = {"RGB": [(1.0, missing_rgb)], "thermal": [(1.0, missing_thermal)]} if kind == "patch_dropout" else {}
            steps += [end for end in ends.get(side, []) if end[1] in conditions]
            steps += [(0.0, CLEAN_TEST)] if CLEAN_TEST in conditions else []
            found.append(Family(f"{side}: {words}", axis, sorted(steps, key=lambda step: step[0])))
    return found


def curves(records: pd.DataFrame, sweep: Sweep, narrow: bool = False) -> Figure | None:
    """mIoU against severity, a panel per family: mean over seeds, each seed, and the band from worst to best seed.

    With more than CROWD variants the means alone, and the legend below. None where the suite has no severities.
    """
    panels = families(sweep.conditions)
    if not panels:
        return None
    crowded = len(sweep.variants) > CROWD
    places = len(panels) + (not crowded)  # one more for the legend
    columns = min(2 if narrow else 3, places)
    rows = -(-places // columns)
    below = 0.17 * -(-len(sweep.variants) // (1 if narrow else 3)) if crowded else 0.0  # inches of the legend
    with style():
        figure = Figure(figsize=(NARROW if narrow else WIDE, 1.85 * rows + 0.1 + below), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.07, w_pad=0.04, hspace=0.04)
        grid = np.ravel(figure.subplots(rows, columns, sharey=True, squeeze=False))
        for axes, family in zip(grid, panels, strict=False):
            _curve(axes, records, sweep, family, spread=not crowded)
            axes.set_title(family.title)
            axes.set_xlabel(family.axis)
        for axes in grid[::columns]:
            axes.set_ylabel("mIoU, %")
        grid[0].set_ylim(0, _ceiling(records["miou"]))
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        if crowded:
            loc, ncols = "outside lower left", 1 if narrow else 3
            figure.legend(handles=_handles(sweep, 80), loc=loc, frameon=False, ncols=ncols, fontsize=7)
        else:
            grid[len(panels)].legend(handles=_handles(sweep, 22), loc="center left", frameon=False, borderaxespad=0)
    return figure


def _curve(axes: Axes, records: pd.DataFrame, sweep: Sweep, family: Family, spread: bool) -> None:
    colour, marker = colours(sweep), markers(sweep)
    names = [condition.name for _, condition in family.steps]
    x = np.array([severity for severity, _ in family.steps])
    for variant in sweep.variants:
        mine = records[records["variant"] == variant]
        seeds = mine.pivot(index="seed", columns="condition", values="miou").reindex(columns=names).dropna(how="all")
        if seeds.empty:
            continue
        y = seeds.to_numpy()
        with_value = ~np.isnan(y).all(axis=0)
        at, y = x[with_value], y[:, with_value]
        if len(y) > 1 and spread:
            axes.fill_between(at, np.nanmin(y, axis=0), np.nanmax(y, axis=0), color=colour[variant], alpha=0.18, lw=0)
            for one in y:
                axes.plot(at, one, color=colour[variant], lw=0.5, alpha=0.6)
        axes.plot(
            at, np.nanmean(y, axis=0), color=colour[variant], lw=1.7, marker=marker[variant], ms=3.4, mec=PAPER, mew=0.5
        )
    axes.set_xticks(x, tick_labels(x))
    axes.grid(axis="x", visible=False)


def tick_labels(x: Sequence[float], room: float = 0.1) -> list[str]:
    """Of ascending places, those labels that do not run into one another; first and last are there.

    Args:
        room: that a label needs, as a share of the axis.
    """
    room *= x[-1] - x[0]
    labels, free = [], x[0]
    for value in x:
        fits = value == x[-1] or free <= value <= x[-1] - room
        labels.append(f"{value:g}" if fits else "")
        free = value + room if fits else free
    return labels


def _handles(sweep: Sweep, width: int) -> list[Line2D]:
    """A sign and the name of every variant, for a legend; names are broken at `width` letters."""
    colour, marker = colours(sweep), markers(sweep)
    return [
        Line2D(
            [], [], color=colour[v], marker=marker[v], lw=1.7, ms=4, mec=PAPER, mew=0.5, label=textwrap.fill(v, width)
        )
        for v in sweep.variants
    ]


def _ceiling(miou: pd.Series) -> float:
    """The end of the mIoU axis: the next multiple of ten with a little air."""
    top = miou.max()
    return 100.0 if np.isnan(top) else min(100.0, 10 * np.ceil((top + 2) / 10))


# ---------------------------------------------------------------------------------------------- dots


def dots(records: pd.DataFrame, sweep: Sweep, narrow: bool = False) -> Figure:
    """Clean, RGB missing, thermal missing: every seed a dot, the mean a bar with its number."""
    panels = [m for m in measures(sweep.conditions) if m.key not in ("worst", HEADLINE)]
    colour, marker = colours(sweep), markers(sweep)
    variants = list(sweep.variants)
    labels = [textwrap.fill(v, 18 if narrow else 24) for v in variants]
    lines = sum(label.count("\n") + 1 for label in labels)
    height = 0.3 + 0.19 * max(lines, 1.45 * len(variants))
    with style():
        shape = (len(panels), 1) if narrow else (1, len(panels))
        size = (NARROW, 0.25 + (height + 0.2) * len(panels)) if narrow else (WIDE, height + 0.45)
        figure = Figure(figsize=size, layout="constrained")
        grid = np.ravel(figure.subplots(*shape, sharex=True, sharey=True, squeeze=False))
        for axes, measure in zip(grid, panels, strict=True):
            runs = values(records, measure)
            for row, variant in enumerate(variants):
                y = runs[variant].dropna().to_numpy()
                if not y.size:
                    axes.text(1, row, "not run yet", va="center", color=QUIET, style="italic")
                    continue
                at = row + np.linspace(-0.16, 0.16, y.size) if y.size > 1 else [row]  # apart, so that equal seeds show
                axes.plot(y, at, marker[variant], color=colour[variant], ms=3.8, mec=PAPER, mew=0.4)
                axes.plot([y.mean()] * 2, [row - 0.34, row + 0.34], color=colour[variant], lw=1.6, zorder=1.9)
                axes.annotate(
                    f"{y.mean():.1f}", (y.max(), row), (6, 0), textcoords="offset points", va="center", fontsize=7.5
                )
            axes.set_title(measure.label)
            axes.grid(axis="y", visible=False)
            axes.spines["left"].set_visible(False)
        grid[0].set_yticks(range(len(variants)), labels)
        grid[0].set_ylim(len(variants) - 0.4, -0.6)
        grid[0].set_xlim(0, min(108, _ceiling(records["miou"]) + 8))  # room for the number beside the last dot
        for axes in grid[-1:] if narrow else grid:
            axes.set_xlabel("mIoU, %")
        for axes in grid:
            axes.tick_params(axis="y", labelcolor=INK)
    return figure


# ---------------------------------------------------------------------------------------------- dose


def dose_curve(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float], Mapping[str, float]]], axis: str, narrow: bool = False
) -> Figure:
    """mIoU against the setting that a sweep varies, a line per measure, with its breaking point and interval.

    Args:
        lines: label, doses, means, and "break", "low", "high" where there is one (else NaN).
    """
    every = sorted({x for _, doses, _, _ in lines for x in doses})
    with style():
        figure = Figure(figsize=(NARROW if narrow else WIDE, 2.6), layout="constrained")
        axes = figure.subplots()
        for number, (label, doses, means, found) in enumerate(lines):
            colour = (SUBJECT, *OTHERS)[number % (len(OTHERS) + 1)]
            axes.plot(doses, means, color=colour, marker=MARKERS[number], lw=1.5, ms=4, mec=PAPER, mew=0.5, label=label)
            if not np.isnan(found["break"]):
                axes.axvspan(found["low"], found["high"], color=colour, alpha=0.1, lw=0)
                axes.axvline(found["break"], color=colour, lw=1, ls=(0, (4, 2)))
        doses = np.array(every)
        axes.set_xscale("function", functions=(partial(dose_axis, doses=doses), partial(dose_at, doses=doses)))
        axes.set_xticks(every, [f"{x:g}" for x in every])
        axes.minorticks_off()
        axes.set_xlabel(axis)
        axes.set_ylabel("mIoU, %")
        axes.set_ylim(0, _ceiling(pd.Series([mean for _, _, means, _ in lines for mean in means])))
        if narrow:
            axes.legend(frameon=False)
        else:
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
