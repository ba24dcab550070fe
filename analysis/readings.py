"""What some sweeps' reports show besides: a dose with its breaking point, an interaction, a matrix of data sets, costs.

Each is a function of the study and returns None where the sweep does not ask for it or nothing has been run. Numbers
come from the same records and the same bootstrap draws as the tables.

v = rows along the dose, s = seeds, b = bootstrap draws
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import robustness_figures as robust
from analysis.figures import dose_curve
from analysis.load import Study
from analysis.stats import LEVEL, broken_stick, dose_at, dose_axis, seed_means, summary
from analysis.tables import HEADLINE, Comparison, Entry, Measure, Shown, bracket, measures, plus_minus, signed, values
from crm import elsewhere
from crm.conditions import CLEAN_TEST, MISSING, Condition, Degradation
from crm.config import flatten
from crm.confusion import Evaluation, iou, load_evaluation
from crm.data.mapping import CONCEPTS
from crm.data.specs import DATASETS
from crm.records import evaluation, read_json

# the head fed one modality's features alone: the other one is routed around
HEADS = [
    Measure("rgb_head", "head on RGB alone", [Condition(thermal=Degradation(kind="missing_route"))]),
    Measure("thermal_head", "head on thermal alone", [Condition(rgb=Degradation(kind="missing_route"))]),
]
NARROW_ENOUGH = 2  # doses beyond the best that a broken line needs: with one, any break fits


@dataclass(frozen=True)
class Reading:
    key: str  # name of its files
    title: str
    lead: str
    shown: Shown
    table: pd.DataFrame
    figures: list[Figure | None] = field(default_factory=list)  # wide, narrow
    caption: str = "Means over seeds. Dashed: the breaking point, with its interval shaded."


# ---------------------------------------------------------------------------------------------- dose


def dose(study: Study, compare: Comparison, name: str = "") -> Reading | None:
    """Scores against the setting that the rows vary, and where each begins to break.

    Args:
        name: of the group, where there are several.
    """
    path = study.sweep.dose
    if not path:
        return None
    level = {cell.variant: float(flatten(cell.config)[path]) for cell in study.cells}
    order = sorted(level, key=lambda variant: level[variant])
    given = set(study.sweep.conditions)
    wanted = [m for m in measures(study.sweep.conditions) if m.key in ("clean", HEADLINE)]
    wanted += [head for head in HEADS if set(head.conditions) <= given]
    rows, table, lines = [], {}, []
    for measure in wanted:
        drawn = {variant: compare.draws(measure, variant) for variant in order}
        done = [variant for variant in order if drawn[variant]]
        if len(done) < 2:
            continue
        found = _breaking(compare, measure, done, level, drawn)
        table[measure.key] = found
        lines.append((measure.label, [level[v] for v in done], [found[f"mean.{level[v]:g}"] for v in done], found))
        rows.append((measure.label, [Entry(_at(found["best"])), Entry(_range(found)), Entry(_at(found["below"]))]))
    if not rows:
        return None
    notes = [
        f"Best: the {path} with the highest mean. Breaking point: the bend of a line that is level from the best on "
        "and then falls, fitted by least squares to the means over seeds; its 95 % interval is over training seeds and "
        "test images together (over test images alone where there is one seed), by percentiles of bootstrap draws, "
        "which with few seeds are rather too near together. The line is straight on the "
        "figure's axis, logarithmic where the values spread over more than a factor of ten. A bend between the last "
        "two values cannot be told from one at the first of them, so an interval that reaches it goes to the last. A "
        f"dash: fewer than {NARROW_ENOUGH} values beyond the best, or no fall that the draws agree on. Below the best: "
        "the first value beyond it whose paired loss against it has an interval below 0."
    ]
    shown = Shown(["best", "breaking point", "first below the best"], rows, notes, first="mIoU")
    pictures = [dose_curve(lines, path, narrow) for narrow in (False, True)]
    title = f"Where it breaks{': ' + name if name else ''}"
    frame = pd.DataFrame.from_dict(table, orient="index").rename_axis("measure")
    return Reading(_slug("dose", name), title, f"mIoU against {path}.", shown, frame, pictures)


def _breaking(
    compare: Comparison, measure: Measure, order: Sequence[str], level: dict[str, float], drawn: dict[str, dict]
) -> dict[str, float]:
    """Best dose, breaking point with its interval, first dose that is significantly below the best; NaN for none."""
    runs = values(compare.study.records, measure)
    means = np.array([runs[variant].mean() for variant in order])
    best = int(means.argmax())
    beyond = order[best:]
    found = {f"mean.{level[v]:g}": float(mean) for v, mean in zip(order, means, strict=True)}
    found |= {"best": level[order[best]], "break": math.nan, "low": math.nan, "high": math.nan, "below": math.nan}
    for variant in beyond[1:]:
        if compare.gain(measure, variant, order[best]).verdict == "loss":
            found["below"] = level[variant]
            break
    shared = sorted(set.intersection(*(set(drawn[variant]) for variant in beyond)))
    if len(beyond) <= NARROW_ENOUGH or not shared:
        return found
    doses = np.array(list(level.values()))
    x = dose_axis(np.array([level[variant] for variant in beyond]), doses)
    curve = seed_means(np.stack([[drawn[v][seed] for seed in shared] for v in beyond]), compare.rng)
    at, slope = broken_stick(x, curve)
    if np.quantile(slope, (1 - LEVEL) / 2) <= 0:  # some draws do not fall
        return found
    point, _ = broken_stick(x, means[best:, None])
    low, high = np.quantile(at, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if high == x[-2]:
        high = x[-1]
    places = dose_at(np.array([point[0], low, high]), doses)
    return {**found, **dict(zip(("break", "low", "high"), places.tolist(), strict=True))}


def _at(value: float) -> str:
    return "—" if math.isnan(value) else f"{value:g}"


def _range(found: dict[str, float]) -> str:
    if math.isnan(found["break"]):
        return "—"
    return f"{found['break']:.3g} [{found['low']:.3g},\u00a0{found['high']:.3g}]"


# ---------------------------------------------------------------------------------------------- interaction


def interaction(study: Study, compare: Comparison) -> Reading | None:
    """Whether two parts of the method add up: both - the one - the other + neither, at equal seed."""
    if not study.sweep.interaction:
        return None
    neither, one, other, both = study.sweep.interaction
    signs = {both: 1, one: -1, other: -1, neither: 1}
    entries, table = [], {}
    for measure in measures(study.sweep.conditions):
        runs = values(compare.study.records, measure)
        pairs = sum(sign * runs[variant] for variant, sign in signs.items()).dropna()
        if pairs.empty:
            continue
        total = compare.estimate(measure, signs, pairs)
        gain = total.interval()
        if gain is None:  # one run on one image
            continue
        table[measure.label] = {"interaction": total.mean, "low": gain.low, "high": gain.high, "seeds": total.n}
        verdict = {"gain": "more than the sum", "loss": "less than the sum", "within noise": "within noise"}
        entries.append((measure.label, [Entry(signed(total.mean)), Entry(bracket(gain)), Entry(verdict[gain.verdict])]))
    if not entries:
        return None
    notes = [
        f"Points of mIoU that “{both}” has beyond what “{one}” and “{other}” gain each over “{neither}”, at equal "
        "seed. Below 0: they do the same work, or stand in each other's way."
    ]
    frame = pd.DataFrame.from_dict(table, orient="index").rename_axis("measure")
    lead = f"Two parts of the method: neither (“{neither}”), each alone (“{one}”, “{other}”), both (“{both}”)."
    shown = Shown(["interaction", "95 % interval", ""], entries, notes, first="mIoU")
    return Reading("interaction", "Do the parts add up?", lead, shown, frame)


# ---------------------------------------------------------------------------------------------- data sets


def cross(study: Study) -> Reading | None:
    """The train x test matrix: every network on every data set, on the classes that all of them have."""
    if not study.sweep.also_on:
        return None
    trained = [cell.config.data.dataset for cell in study.cells]
    targets = list(dict.fromkeys((*study.sweep.also_on, *trained)))
    common = [name for name in dict.fromkeys(CONCEPTS[targets[0]].values())
              if all(name in CONCEPTS[target].values() for target in targets)]  # fmt: skip
    wanted = {"clean": [CLEAN_TEST], "one missing": MISSING}
    wanted = {name: conditions for name, conditions in wanted.items() if set(conditions) <= set(study.sweep.conditions)}
    rows, table = [], {}
    for variant in study.sweep.variants:
        entries, numbers = [], {}
        for target in targets:
            for name, conditions in wanted.items():
                total = summary(np.array([_on(study, cell, target, conditions, common)
                                          for cell in study.cells if cell.variant == variant]))  # fmt: skip
                numbers |= {f"{target}.{name}.{part}": getattr(total, part) for part in ("mean", "sd", "n")}
                entries.append(
                    Entry(plus_minus(total) + (f" (n={total.n})" if total.n < len(study.sweep.seeds) else ""))
                )
        rows.append((variant, entries))
        table[variant] = numbers
    if not any(entry.value[0] != "—" for _, entries in rows for entry in entries):
        return None
    head = [f"{DATASETS[target].title}, {name}" for target in targets for name in wanted]
    notes = [
        f"mIoU in per cent over the classes that all of these data sets have ({', '.join(common)}), at home too, so "
        "that a column can be read from top to bottom; mean ± standard deviation over seeds. Everything else counts as "
        "one class that is not scored (crm/data/mapping.py)."
    ]
    frame = pd.DataFrame.from_dict(table, orient="index").rename_axis("trained on")
    shown = Shown(head, rows, notes, first="trained on")
    return Reading("cross", "On other data sets", "A row is trained on its data set, a column tested.", shown, frame)


def _on(study: Study, cell, target: str, conditions: Sequence[Condition], common: Sequence[str]) -> float:
    """Mean over conditions of the mIoU over the common classes; NaN where it was not evaluated."""
    folder, selection = study.runs / cell.id, study.sweep.selection
    if target != cell.config.data.dataset:
        folder, selection = elsewhere.on(folder, selection, target), "last"
    paths = [evaluation(folder, selection, condition) for condition in conditions] if folder else []
    if not paths or not all(path.exists() for path in paths):
        return math.nan
    return float(np.mean([shared_miou(load_evaluation(path), target, common) for path in paths]))


def shared_miou(found: Evaluation, target: str, common: Sequence[str]) -> float:
    """mIoU in per cent over the common classes; all others together are one class without a score."""
    own = CONCEPTS[target]
    concepts = [own.get(name, name) for name in found.meta["classes"]]  # an import's classes are concepts already
    place = np.array([common.index(name) + 1 if name in common else 0 for name in concepts])
    small = np.zeros((len(common) + 1, len(common) + 1), np.int64)
    np.add.at(small, (place[:, None], place[None, :]), found.confusion.sum(axis=0, dtype=np.int64))
    return float(np.nanmean(iou(small)[1:]))


# ---------------------------------------------------------------------------------------------- cost

COSTS = {  # what is measured: its name, its unit, the value of that
    "parameters": ("parameters", "M", 1e6),
    "multiply_adds": ("inference: multiply-adds", "G", 1e9),
    "latency_seconds": ("inference: latency", "ms", 1e-3),
    "inference_bytes": ("inference: memory", "GiB", 2**30),
    "training_operations": ("training: operations", "G", 1e9),
    "step_seconds": ("training: step", "s", 1.0),
    "training_bytes": ("training: memory", "GiB", 2**30),
}


def cost(study: Study) -> Reading | None:
    """What every row costs in training and afterwards, and how many times the baseline's that is."""
    if not study.sweep.measured:
        return None
    found = {}
    for variant in study.sweep.variants:
        made = [read_json(study.runs / cell.id / "overhead.json") for cell in study.cells if cell.variant == variant]
        known = [one for one in made if one]
        if known:
            found[variant] = {
                name: np.mean([one[name] for one in known]) if all(one[name] is not None for one in known) else math.nan
                for name in COSTS
            } | {name: known[0][name] for name in ("batch", "size", "device", "threads")}
    if not found:
        return None
    first = found.get(study.sweep.reference)
    columns = [name for name in COSTS if not any(math.isnan(row[name]) for row in found.values())]
    rows = []
    for variant, row in found.items():
        entries = []
        for name in columns:
            value = f"{row[name] / COSTS[name][2]:.3g}"
            entries.append(Entry(f"{value} ({row[name] / first[name]:.2f} ×)" if first else value))
        rows.append((variant, entries))
    one = next(iter(found.values()))
    where = f"{one['device']}, {one['threads']} threads" if one["device"] == "cpu" else one["device"]
    notes = [
        f"Inference: one image of {one['size'][0]} × {one['size'][1]} pixels, padding included. Training: one step of "
        f"{one['batch']} images, forward and backward. Operations are those of matrix products, convolutions and "
        f"attention; a multiply-add is two. Measured on {where}; times are medians, and other work on the machine is "
        f"in them. In brackets, the multiple of “{study.sweep.reference}”."
    ]
    head = [f"{COSTS[name][0]}, {COSTS[name][1]}" for name in columns]
    frame = pd.DataFrame.from_dict(found, orient="index").rename_axis("variant")
    return Reading("cost", "What it costs", "Training costs more; inference must not.", Shown(head, rows, notes), frame)


# ---------------------------------------------------------------------------------------------- robustness


def robustness(study: Study, name: str = "") -> list[Reading]:
    """Metrics, curves of all families and maps of whole grids, where the suite has more than missing modalities."""
    if not robust.wanted(study) or not study.evidence:
        return []
    after = f": {name}" if name else ""
    found = []
    if len(table := robust.metrics(study)):
        found.append(Reading(
            _slug("robustness_metrics", name), f"Robustness in numbers{after}", "Averages, expectations and curves.",
            robust.shown_metrics(table, study), table, [robust.bars(study, table, narrow) for narrow in (False, True)],
            robust.BARS_CAPTION,
        ))  # fmt: skip
    if len(table := robust.by_family(study)):
        found.append(Reading(
            _slug("robustness_families", name), f"Corruption by corruption{after}", "What each does as it grows.",
            robust.shown_families(table, study), table, [robust.multiples(study, narrow) for narrow in (False, True)],
            robust.CAPTION,
        ))  # fmt: skip
    if len(table := robust.by_grid(study)):
        found.append(Reading(
            _slug("robustness_grid", name), f"Both modalities at once{after}", "Every pair of severities.",
            robust.shown_grids(table), table, [robust.heat_map(study, narrow) for narrow in (False, True)],
            robust.GRID_CAPTION,
        ))  # fmt: skip
    return found


def readings(parts: dict[str, tuple[Study, Comparison]], whole: Study) -> list[Reading]:
    """All that the sweep asks for and that its runs allow."""
    found = [dose(study, compare, name) for name, (study, compare) in parts.items()]
    found += [interaction(study, compare) for study, compare in parts.values()]
    found += [one for name, (study, _) in parts.items() for one in robustness(study, name)]
    found += [cross(whole), cost(whole)]
    return [one for one in found if one is not None]


def _slug(key: str, name: str) -> str:
    return "_".join(part for part in (key, "".join(c if c.isalnum() else "_" for c in name.lower())) if part)
