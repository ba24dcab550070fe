"""The figures of a study: history, importance, slices, Pareto front, parallel coordinates."""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from analysis.figures import BASELINE, INK, NARROW, OTHERS, PAPER, QUIET, RULE, SUBJECT, WIDE, style
from analysis.tuning import ENOUGH, Tuned
from crm.search import Choice, Weight

DOT = {"s": 16, "linewidths": 0, "zorder": 3}


def figures(tuned: Tuned) -> Mapping[str, Figure]:
    """All that this study allows, by the stem of the file."""
    made: dict[str, Callable[[], Figure]] = {"history": lambda: history(tuned), "slices": lambda: slices(tuned)}
    if len(tuned.complete) >= ENOUGH and len(tuned.search.space) > 1:
        made["importance"] = lambda: importance(tuned)
    if len(tuned.search.objectives) > 1:
        made["pareto"] = lambda: pareto(tuned)
    if len(tuned.search.space) > 1:
        made["parallel"] = lambda: parallel(tuned)
    with style():
        return {name: draw() for name, draw in made.items()}


def _special(tuned: Tuned, objective: int) -> dict[int, tuple[str, str]]:
    """The trials that have a colour and a name of their own: the base and the best."""
    found = {} if tuned.base is None else {tuned.base: (BASELINE, "the base")}
    best = tuned.best(objective)
    return {**found, best: (SUBJECT, "the best" if best != tuned.base else "the base, which is the best")}


def _dots(ax: Axes, tuned: Tuned, x: np.ndarray, y: np.ndarray, objective: int) -> None:
    """One dot for each complete trial; base and best stand out."""
    special = _special(tuned, objective)
    numbers = tuned.complete["trial"].to_numpy(int)
    plain = ~np.isin(numbers, list(special))
    ax.scatter(x[plain], y[plain], color=OTHERS[0], alpha=0.75, **DOT)
    for number, (colour, _) in special.items():
        at = numbers == number
        ax.scatter(x[at], y[at], color=colour, marker="D", edgecolors="white", **{**DOT, "s": 34, "linewidths": 0.6,
                                                                               "zorder": 4})  # fmt: skip


def _legend(figure: Figure, tuned: Tuned, objective: int, more: list[Line2D] | None = None) -> None:
    handles = [Line2D([], [], color=OTHERS[0], marker="o", linestyle="", markersize=4, label="a trial")]
    handles += [Line2D([], [], color=colour, marker="D", linestyle="", markersize=5, label=words)
                for colour, words in _special(tuned, objective).values()]  # fmt: skip
    figure.legend(handles=[*handles, *(more or [])], loc="outside upper left", ncols=5, frameon=False, fontsize=7,
                  labelcolor=INK, handletextpad=0.2, columnspacing=1.2)  # fmt: skip


def history(tuned: Tuned) -> Figure:
    """Every trial in its order, and the best so far; a row for each objective."""
    names, labels = tuned.search.objectives, tuned.search.labels
    figure = Figure(figsize=(WIDE, 0.5 + 1.9 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    frame = tuned.complete
    rest = tuned.trials[tuned.trials["state"] != "complete"]
    x = frame["trial"].to_numpy(float)
    for i, ax in enumerate(axes):
        y = frame[names[i]].to_numpy(float)
        _dots(ax, tuned, x, y, i)
        best = np.minimum.accumulate(y) if tuned.search.minimise else np.maximum.accumulate(y)
        ax.step(x, best, where="post", color=SUBJECT, linewidth=1)
        floor = y.max() if tuned.search.minimise else y.min()
        for state, marker in (("pruned", "|"), ("failed", "x"), ("fail", "x")):
            at = rest[rest["state"] == state]["trial"]
            ax.scatter(at, np.full(len(at), floor), marker=marker, color=QUIET, s=20, linewidths=1)
        ax.set_title(labels[i])
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("trial, in the order in which they were asked")
    line = [Line2D([], [], color=SUBJECT, linewidth=1, label="best so far")]
    if len(rest):
        line.append(Line2D([], [], color=QUIET, marker="|", linestyle="", label="pruned (|) or failed (×)"))
    _legend(figure, tuned, 0, line)
    return figure


def importance(tuned: Tuned) -> Figure:
    """Share of the variance that each parameter explains, with its interval; a panel for each objective."""
    names, labels = tuned.search.objectives, tuned.search.labels
    height = 0.75 + 0.32 * len(tuned.search.space)
    figure = Figure(figsize=(WIDE, height * len(names)), layout="constrained")
    for i, ax in enumerate(figure.subplots(len(names), 1, squeeze=False)[:, 0]):
        frame = tuned.importance(i).iloc[::-1]
        at = np.arange(len(frame))
        ax.barh(at, frame["importance"], height=0.55, color=OTHERS[0], alpha=0.8)
        ax.hlines(at, frame["low"], frame["high"], color=INK, linewidth=1.2, zorder=4)
        ax.set_yticks(at, list(frame["parameter"]))
        ax.grid(False, axis="y")
        ax.set_xlim(0, 1)
        ax.set_title(labels[i])
    ax.set_xlabel("share of the variance explained by the parameter alone (fANOVA); line: 95 % interval over trials")
    return figure


def slices(tuned: Tuned) -> Figure:
    """The objective against each parameter by itself: a row for each objective."""
    space, names = tuned.search.space, tuned.search.objectives
    columns = min(len(space), 4)
    per = -(-len(space) // columns)
    figure = Figure(figsize=(WIDE, 0.5 + 1.9 * len(names) * per), layout="constrained")
    axes = figure.subplots(len(names) * per, columns, squeeze=False, sharey=len(names) == 1)
    for i, name in enumerate(names):
        y = tuned.complete[name].to_numpy(float)
        for j, parameter in enumerate(space):
            ax = axes[i * per + j // columns, j % columns]
            _dots(ax, tuned, tuned.units[parameter].to_numpy(float), y, i)
            _axis(ax, tuned, parameter)
            ax.set_xlabel(parameter)
        axes[i * per, 0].set_title(tuned.search.labels[i])
        for j in range(len(space), per * columns):
            axes[i * per + j // columns, j % columns].set_visible(False)
    _legend(figure, tuned, 0)
    return figure


def _axis(ax: Axes, tuned: Tuned, name: str, vertical: bool = False) -> None:
    """The axis of a parameter, from 0 to 1, with its own values as ticks; what is off is shaded."""
    places, words, off = _ticks(tuned, name)
    if vertical:
        ax.set_yticks(places, words)
        ax.set_ylim(-0.03, 1.03)
        return
    ax.set_xticks(places, words)
    ax.set_xlim(-0.03, 1.03)
    if off:
        ax.axvspan(-0.03, off, color=RULE, alpha=0.5, linewidth=0, zorder=0)


def _ticks(tuned: Tuned, name: str) -> tuple[list[float], list[str], float]:
    """Places from 0 to 1, what they are called, and where what is off ends."""
    parameter = tuned.search.space[name]
    if isinstance(parameter, Choice):
        return [parameter.unit(each) for each in parameter.options], [str(each) for each in parameter.options], 0.0
    log = isinstance(parameter, Weight) or parameter.log
    if log:
        powers = range(int(np.ceil(np.log10(parameter.low) - 1e-9)), int(np.floor(np.log10(parameter.high) + 1e-9)) + 1)
        values = [10.0**power for power in powers] or [parameter.low, parameter.high]
    else:
        values = list(np.linspace(parameter.low, parameter.high, 3))
    places, words = [parameter.unit(value) for value in values], [f"{value:g}" for value in values]
    if isinstance(parameter, Weight) and parameter.off:
        return [parameter.off / 2, *places], ["off", *words], parameter.off
    return places, words, 0.0


def pareto(tuned: Tuned) -> Figure:
    """The first two objectives against each other, and the front."""
    first, second = tuned.search.objectives[:2]
    figure = Figure(figsize=(NARROW * 1.35, NARROW * 1.15), layout="constrained")
    ax = figure.subplots()
    frame, front = tuned.complete, tuned.front()
    ax.scatter(frame[first], frame[second], color=OTHERS[0], alpha=0.5, **DOT)
    ax.plot(front[first], front[second], color=SUBJECT, linewidth=1, zorder=3)
    ax.scatter(front[first], front[second], color=SUBJECT, **{**DOT, "s": 24})
    for row in front[["trial", first, second]].itertuples(index=False):
        ax.annotate(str(row[0]), row[1:], xytext=(4, 3), textcoords="offset points", fontsize=6.5, color=INK)
    handles = [Line2D([], [], color=OTHERS[0], marker="o", linestyle="", markersize=4, label="a trial"),
               Line2D([], [], color=SUBJECT, marker="o", markersize=4, label="no trial is better in both")]  # fmt: skip
    if tuned.base is not None:
        row = frame[frame["trial"] == tuned.base]
        ax.scatter(
            row[first], row[second], color=BASELINE, marker="D", s=34, edgecolors="white", linewidths=0.6, zorder=5
        )
        handles.append(Line2D([], [], color=BASELINE, marker="D", linestyle="", markersize=5, label="the base"))
    ax.set_xlabel(tuned.search.labels[0])
    ax.set_ylabel(tuned.search.labels[1])
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=7, handletextpad=0.3)
    return figure


def parallel(tuned: Tuned) -> Figure:
    """Each complete trial as a line over the parameters' axes, coloured by the first objective."""
    names = list(tuned.search.space)
    y = tuned.complete[tuned.search.objectives[0]].to_numpy(float)
    rank = pd.Series(y).rank(pct=True, ascending=not tuned.search.minimise).to_numpy()
    best = int(np.argmax(rank))
    figure = Figure(figsize=(WIDE, 2.6), layout="constrained")
    ax = figure.subplots()
    at = np.arange(len(names))
    units = tuned.units.to_numpy(float)
    good = rank > 0.75
    for i in np.argsort(rank):
        colour = SUBJECT if i == best else OTHERS[0] if good[i] else BASELINE
        ax.plot(at, units[i], color=colour, alpha=1 if i == best else 0.8 if good[i] else 0.3,
                linewidth=1.8 if i == best else 1.0, zorder=3 + rank[i])  # fmt: skip
    for j, name in enumerate(names):
        ax.axvline(j, color=RULE, linewidth=1, zorder=1)
        places, words, _ = _ticks(tuned, name)
        for place, word in zip(places, words, strict=True):
            ax.annotate(word, (j, place), xytext=(-3, 0), textcoords="offset points", ha="right", va="center",
                        fontsize=6.5, color=QUIET, zorder=9,
                        path_effects=[withStroke(linewidth=2.5, foreground=PAPER)])  # fmt: skip
    ax.set_xticks(at, names)
    ax.set_yticks([])
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_xlim(-0.35, len(names) - 0.9)
    ax.set_ylim(-0.05, 1.05)
    handles = [Line2D([], [], color=SUBJECT, linewidth=1.8, label="the best trial"),
               Line2D([], [], color=OTHERS[0], label="the other trials of the best quarter"),
               Line2D([], [], color=BASELINE, alpha=0.5, label="the others")]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=7)
    return figure
