"""What a report says about robustness where its suite has more than missing modalities: metrics, curves, a grid, bars.

Every number is computed from stored evaluations (`crm.robustness`). Two bands tell two questions apart: the filled one
spans the seeds, the dashed lines are the 95 % interval over test images at the mean of the seeds.

s = seeds, n = test images, b = bootstrap draws
"""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.figures import INK, NARROW, PAPER, QUIET, WIDE, colours, markers, style, tick_labels
from analysis.load import Study
from analysis.stats import LEVEL, Summary, bootstrap_miou, image_draws, summary
from analysis.tables import Entry, Shown, percent, plus_minus
from crm import robustness
from crm.conditions import CLEAN_TEST, Condition
from crm.robustness import Family

DRAWS = 300  # of test images, for a band
SIDES = ("rgb", "thermal", "both", "complementary")  # in this order
USUAL = ("patch_dropout", "gaussian_noise")  # families that every report has curves of
CAPTION = (
    "The axis need not begin at 0. Line: mean over seeds. Filled band: from the lowest to the highest seed. Dashed: "
    "95 % interval over test images, at the mean of the seeds."
)
GRID_CAPTION = (
    "Mean mIoU over seeds, per cent; one scale of colours. The first row and the first column are one modality "
    "degraded alone."
)
BARS_CAPTION = (
    "Mean over seeds; a dot is a seed. E(p): the expected score if each modality is missing with probability p."
)


def unusual(conditions: Sequence[Condition]) -> dict[Family, list[tuple[float, Condition]]]:
    """The families of a suite that no other figure of a report shows."""
    found = {family: steps for family, steps in robustness.families(conditions).items() if family.kind not in USUAL}
    return dict(sorted(found.items(), key=lambda item: SIDES.index(item[0].side)))


# ---------------------------------------------------------------------------------------------- metrics


def metrics(study: Study) -> pd.DataFrame:
    """Every metric of `crm.robustness.summary`, a row per finished run; mCD is against the reference row at its seed.

    A run that lacks a condition of the suite is left out: a mean over other conditions would be another number.
    """
    scores = _scores(study)
    rows = {}
    for cell in study.cells:
        own = scores.get((cell.variant, cell.seed), {})
        if len(own) < len(study.sweep.conditions):
            continue
        reference = scores.get((study.sweep.reference, cell.seed), {})
        complete = reference if len(reference) == len(own) else None
        single = _single(study, scores, cell.seed)
        rows[cell.variant, cell.seed] = robustness.summary(own, complete, single) | _by_time(
            study, cell.variant, cell.seed
        )
    index = pd.MultiIndex.from_tuples(rows, names=["variant", "seed"]) if rows else None
    return pd.DataFrame(list(rows.values()), index=index, dtype=float)


def _single(study: Study, scores: Mapping[tuple[str, int], Mapping[Condition, float]], seed: int) -> float | None:
    """The best clean score of the sweep's networks of one modality at a seed; None where it has none."""
    alone = {cell.variant for cell in study.cells if cell.config.model.inputs in ("rgb", "thermal")}
    found = [scores[variant, seed][CLEAN_TEST] for variant in alone if CLEAN_TEST in scores.get((variant, seed), {})]
    return max(found, default=None)


def _scores(study: Study) -> dict[tuple[str, int], dict[Condition, float]]:
    named = {condition.name: condition for condition in study.sweep.conditions}
    found: dict[tuple[str, int], dict[Condition, float]] = {}
    for (variant, seed, name), evaluation in study.evidence.items():
        found.setdefault((variant, seed), {})[named[name]] = evaluation.miou
    return found


def _by_time(study: Study, variant: str, seed: int) -> dict[str, float]:
    """The reliance gap by day and at night, where images are of both."""
    own = {c: study.evidence[variant, seed, c.name] for c in robustness.MISSING if c in study.sweep.conditions}
    if len(own) < 2 or len({bool(night) for night in next(iter(own.values())).night}) < 2:
        return {}
    return {
        f"reliance gap, {time}": robustness.reliance_gap(robustness.scores_of(own, time)) for time in ("day", "night")
    }


def shown_metrics(table: pd.DataFrame, study: Study) -> Shown:
    """The metrics in words, a row each: mean ± sd over seeds; of what lies beyond a curve, in how many runs it does."""
    variants = [variant for variant in study.sweep.variants if variant in table.index.get_level_values(0)]
    rows = []
    for name in table.columns:
        entries = []
        for variant in variants:
            values = table.loc[variant][name]
            total = summary(values)
            beyond = int(values.isna().sum())
            text = plus_minus(total) if abs(total.mean) >= 2 or not total.n else f"{total.mean:.2f}"
            entries.append(Entry(f"{text}{f' ({beyond} of {len(values)} never)' if beyond and total.n else ''}"))
        rows.append((name, entries))
    notes = [
        "mPC: mean over corruptions and severities; retention: as a share of the clean score; mCD, rCD: against "
        f"“{study.sweep.reference}” at the same seed, below 100 is more robust. EMM, RMM: mean over the intact case "
        "and each modality hit alone; E(p): the expectation if each is hit with probability p, and never both. area: "
        "under the curve, as a share of a flat one; kept: up to where the clean score is kept so far; crossing: from "
        "where on the best network of one modality would do better, or, where the sweep has none, the network's own "
        "better branch alone. A dash: not within the curve."
    ]
    return Shown(variants, rows, notes, first="metric")


def by_family(study: Study) -> pd.DataFrame:
    """Of every family the mean over its severities, for each variant `.mean .sd .n` over seeds."""
    pivot = study.records.pivot_table(index=["variant", "seed"], columns="condition", values="miou")
    rows = {}
    for family, steps in unusual(study.sweep.conditions).items():
        names = [condition.name for x, condition in steps if x]
        row: dict[str, float] = {}
        for variant in study.sweep.variants:
            known = variant in pivot.index.get_level_values(0)
            means = pivot.loc[variant].reindex(columns=names).mean(axis=1, skipna=False) if known else np.array([])
            total = summary(means)
            row |= {f"{variant}.mean": total.mean, f"{variant}.sd": total.sd, f"{variant}.n": total.n}
        rows[str(family)] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("family")


def by_grid(study: Study) -> pd.DataFrame:
    """Of every whole grid its mean and its worst place, for each variant; mean over seeds."""
    means = study.records.groupby(["variant", "condition"])["miou"].mean()
    rows = {}
    for (rgb, thermal), places in grids(study.sweep.conditions).items():
        names = [condition.name for condition in places.values()]
        for what, reduce in (("mean", np.mean), ("worst", np.min)):
            values = {v: [means.get((v, name), np.nan) for name in names] for v in study.sweep.variants}
            rows[f"{rgb} x {thermal}, {what}"] = {v: float(reduce(each)) for v, each in values.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("grid")


def shown_families(table: pd.DataFrame, study: Study) -> Shown:
    variants = list(study.sweep.variants)
    rows = [
        (
            str(name),
            [Entry(plus_minus(Summary(row[f"{v}.mean"], row[f"{v}.sd"], int(row[f"{v}.n"])))) for v in variants],
        )
        for name, row in table.iterrows()
    ]
    return Shown(variants, rows, ["mIoU in per cent, mean over the severities, ± sd over seeds."], first="family")


def shown_grids(table: pd.DataFrame) -> Shown:
    rows = [(str(name), [Entry(percent(value)) for value in row]) for name, row in table.iterrows()]
    return Shown(list(table.columns), rows, ["mIoU in per cent, mean over seeds."], first="grid")


# ---------------------------------------------------------------------------------------------- figures


def multiples(study: Study, narrow: bool = False) -> Figure | None:
    """mIoU against severity, a small panel per family, with a band over seeds and one over images.

    None where the suite has no family of its own.
    """
    panels = unusual(study.sweep.conditions)
    if not panels or not study.evidence:
        return None
    columns = 2 if narrow else 5
    rows = -(-(len(panels) + 1) // columns)
    colour, marker = colours(study.sweep), markers(study.sweep)
    with style():
        figure = Figure(figsize=(NARROW if narrow else WIDE, 1.32 * rows + 0.2), layout="constrained")
        grid = np.ravel(figure.subplots(rows, columns, sharey=True, squeeze=False))
        for axes, (family, steps) in zip(grid, panels.items(), strict=False):
            axes.set_title(textwrap.fill(_title(family), 21), fontsize=6.5)
            axes.tick_params(labelsize=6)
            x = [at for at, _ in steps]
            axes.set_xticks(x, tick_labels(x, room=0.17))
            axes.grid(axis="x", visible=False)
            for variant in study.sweep.variants:
                found = _bands(study, variant, steps)
                if found is None:
                    continue
                at, seeds, low, high = found
                axes.fill_between(at, seeds.min(axis=0), seeds.max(axis=0), color=colour[variant], alpha=0.2, lw=0)
                for edge in (low, high):
                    axes.plot(at, edge, color=colour[variant], lw=0.6, ls=(0, (3, 2)))
                axes.plot(at, seeds.mean(axis=0), color=colour[variant], lw=1.3, marker=marker[variant], ms=2.2,
                          mec=PAPER, mew=0.3)  # fmt: skip
        for axes in grid[::columns]:
            axes.set_ylabel("mIoU, %")
        low, high = grid[0].get_ylim()
        grid[0].set_ylim(max(0.0, 10 * np.floor(low / 10)), high)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        lines = [
            Line2D([], [], color=colour[v], marker=marker[v], lw=1.3, ms=3, label=textwrap.fill(v, 18))
            for v in study.sweep.variants
        ]
        bands = [
            Patch(color=QUIET, alpha=0.3, lw=0, label="seeds"),
            Line2D([], [], color=QUIET, lw=0.8, ls=(0, (3, 2)), label="test images"),
        ]
        place = grid[len(panels)]
        place.legend(handles=[*lines, *bands], loc="center left", frameon=False, borderaxespad=0, fontsize=6)
    return figure


def _title(family: Family) -> str:
    side = "RGB" if family.side == "rgb" else family.side
    return f"{side}: {family.kind.replace('_', ' ')}"


def _bands(
    study: Study, variant: str, steps: Sequence[tuple[float, Condition]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """x, the score of every seed (s, x), and the interval over images at the mean of the seeds; None without a run."""
    named = [(x, condition.name) for x, condition in steps]
    seeds = [s for s in study.sweep.seeds if all((variant, s, name) in study.evidence for _, name in named)]
    if not seeds:
        return None
    rng = np.random.default_rng(0)
    found = [[study.evidence[variant, seed, name] for _, name in named] for seed in seeds]
    counts = image_draws(len(found[0][0].names), DRAWS, rng)
    drawn = np.array([[bootstrap_miou(one.confusion, counts) for one in by_seed] for by_seed in found]).mean(axis=0)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    scores = np.array([[one.miou for one in by_seed] for by_seed in found])
    return np.array([x for x, _ in named]), scores, low, high


def grids(conditions: Sequence[Condition]) -> dict[tuple[str, str], dict[tuple[float, float], Condition]]:
    """Whole grids of RGB x thermal severities in a suite: the two kinds, and each place's condition."""
    crossed = [c for c in conditions if c.rgb.severity and c.thermal.severity and c.rgb.kind != c.thermal.kind]
    found: dict[tuple[str, str], dict[tuple[float, float], Condition]] = {}
    for condition in conditions:
        for rgb, thermal in {(one.rgb.kind, one.thermal.kind) for one in crossed}:
            if condition.rgb.kind in (rgb, "clean") and condition.thermal.kind in (thermal, "clean"):
                place = (condition.rgb.severity, condition.thermal.severity)
                found.setdefault((rgb, thermal), {})[place] = condition
    return {kinds: places for kinds, places in found.items() if _whole(places)}


def _whole(places: Mapping[tuple[float, float], Condition]) -> bool:
    rgb, thermal = ({place[i] for place in places} for i in (0, 1))
    return len(rgb) > 2 and len(thermal) > 2 and len(places) == len(rgb) * len(thermal)


def heat_map(study: Study, narrow: bool = False) -> Figure | None:
    """mIoU over a grid of severities of both modalities, a map per variant; None where the suite has no whole grid."""
    found = grids(study.sweep.conditions)
    if not found:
        return None
    (kinds, places) = next(iter(found.items()))
    x, y = (sorted({place[i] for place in places}) for i in (1, 0))
    means = study.records.groupby(["variant", "condition"])["miou"].mean()
    inside = means[means.index.isin([condition.name for condition in places.values()], level="condition")]
    low, high = (10 * to(end / 10) for to, end in ((np.floor, inside.min()), (np.ceil, inside.max())))
    variants = list(study.sweep.variants)
    columns = 1 if narrow else min(3, len(variants))
    rows = -(-len(variants) // columns)
    width = NARROW if narrow else WIDE
    with style():
        figure = Figure(figsize=(width, rows * (0.82 * width / columns + 0.25)), layout="constrained")
        grid = np.ravel(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False))
        for axes, variant in zip(grid, variants, strict=False):
            values = np.array([[means.get((variant, places[r, t].name), np.nan) for t in x] for r in y])
            axes.imshow(values, vmin=low, vmax=max(low + 10, high), cmap="viridis", aspect="auto")
            for row, column in np.argwhere(~np.isnan(values)):
                value = values[row, column]
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6.5,
                          color=INK if value > low + 0.55 * (high - low) else PAPER)  # fmt: skip
            axes.set_title(textwrap.fill(variant, 30))
            axes.set_xticks(range(len(x)), [f"{level:g}" for level in x])
            axes.set_yticks(range(len(y)), [f"{level:g}" for level in y])
            axes.grid(visible=False)
        for axes in grid[-columns:]:
            axes.set_xlabel(f"thermal: {kinds[1].replace('_', ' ')}")
        for axes in grid[::columns]:
            axes.set_ylabel(f"RGB: {kinds[0].replace('_', ' ')}")
        for axes in grid[len(variants) :]:
            axes.set_axis_off()
    return figure


def bars(study: Study, table: pd.DataFrame, narrow: bool = False) -> Figure | None:
    """Averages and expectations over subsets of modalities, a group of bars each; None where none was evaluated."""
    names = [name for name in table.columns if name.endswith(" average") or name == "EMM E(0.1)"]
    variants = [v for v in study.sweep.variants if v in table.index.get_level_values(0)]
    if not names or not variants:
        return None
    colour = colours(study.sweep)
    with style():
        height = 0.5 + 0.13 * len(names) * (len(variants) + 1)
        figure = Figure(figsize=(NARROW if narrow else WIDE, height), layout="constrained")
        axes = figure.subplots()
        for group, name in enumerate(names):
            for row, variant in enumerate(variants):
                values = table.loc[variant][name].dropna().to_numpy()
                at = group * (len(variants) + 1) + row
                axes.barh(at, values.mean(), height=0.9, color=colour[variant], alpha=0.75, lw=0)
                axes.plot(values, [at] * len(values), "o", color=INK, ms=1.6, mew=0)
                axes.text(values.max() + 0.8, at, percent(values.mean()), va="center", fontsize=5.5)
        middle = (len(variants) - 1) / 2
        axes.set_yticks([group * (len(variants) + 1) + middle for group in range(len(names))], names)
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.set_xlabel("mIoU, %")
        axes.set_xlim(0, min(100.0, float(table[names].max().max()) + 8))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", labelcolor=INK, labelsize=6.5)
        handles = [Patch(color=colour[v], alpha=0.75, lw=0, label=v) for v in variants]
        figure.legend(
            handles=handles, loc="outside upper left", ncols=min(3, len(handles)), frameon=False, fontsize=6.5
        )
    return figure


def wanted(study: Study) -> bool:
    """Whether a suite has something that no other part of a report shows."""
    return bool(unusual(study.sweep.conditions) or grids(study.sweep.conditions)) and CLEAN_TEST in (
        study.sweep.conditions
    )
