"""The ablation table and the robustness table: numbers first, then the same numbers as Markdown, LaTeX, CSV and HTML.

Percent with one decimal in what people read; unrounded in CSV.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, select_autoescape

from analysis.load import Study
from analysis.stats import (
    DRAWS,
    LEVEL,
    RECORDED,
    Estimate,
    Interval,
    Summary,
    best_rows,
    bootstrap_miou,
    holm,
    image_draws,
    over_seeds_and_images,
    paired_gain,
    recording_draws,
    spread,
    stray,
    summary,
)
from crm.conditions import CLEAN_TEST, DEGRADATIONS, IN_THE_NETWORK, MISSING, Condition, Degradation
from crm.data.recordings import recording

# Kinds that change what the network is given. missing_token and missing_route change the network instead, so they are
# in no worst case: a network without a trained mask token would be judged by something it was never meant to do.
INPUT_KINDS = tuple(kind for kind in DEGRADATIONS if kind not in IN_THE_NETWORK)


def templates() -> Environment:
    """The templates of this package; every value that is put into one is escaped."""
    autoescape = select_autoescape(["html", "html.j2"])
    return Environment(loader=PackageLoader("analysis"), autoescape=autoescape, trim_blocks=True, lstrip_blocks=True)


# ---------------------------------------------------------------------------------------------- words


def percent(value: float, decimals: int = 1) -> str:
    """One decimal, an em dash where there is no number."""
    return "—" if math.isnan(value) else f"{value:.{decimals}f}".replace("-", "−")


def signed(value: float, decimals: int = 1) -> str:
    """One decimal with its sign, a true minus; what rounds to zero has a plus."""
    if math.isnan(value):
        return "—"
    text = f"{value:+.{decimals}f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "+")


def plus_minus(value: Summary) -> str:
    return percent(value.mean) + (f" ± {value.sd:.1f}" if value.n > 1 else "")


def bracket(interval: Interval | None, decimals: int = 1) -> str:
    if interval is None:
        return ""
    return f"[{signed(interval.low, decimals)},\u00a0{signed(interval.high, decimals)}]"  # never broken over two lines


def describe(condition: Condition) -> str:
    """A condition in words, as in `RGB missing` or `thermal: noise sd 25`."""
    sides = [("RGB", condition.rgb), ("thermal", condition.thermal)]
    degraded = [(side, how) for side, how in sides if how.kind != "clean"]
    if not degraded:
        words = "clean"
    elif len({how for _, how in degraded}) == 1:
        words = " and ".join(side for side, _ in degraded) + _how(degraded[0][1])
    else:
        words = ", ".join(side + _how(how) for side, how in degraded)
    return words if condition.split == CLEAN_TEST.split else f"{words} ({condition.split})"


def _how(degradation: Degradation) -> str:
    words = {
        "missing_mean": " missing",
        "missing_zero": " missing (black image)",
        "missing_token": " missing (mask tokens)",
        "missing_route": " missing (routed around)",
        "patch_dropout": f": {100 * degradation.severity:g} % hidden",
        "gaussian_noise": f": noise sd {degradation.severity:g}",
    }
    return words.get(degradation.kind, f": {degradation}")


# ---------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Measure:
    """One number of a run, taken over conditions."""

    key: str
    label: str
    conditions: Sequence[Condition]
    reduce: Callable[..., Any] = np.mean  # of the conditions' mIoU, over axis 0


HEADLINE = "missing"


def measures(conditions: Sequence[Condition]) -> list[Measure]:
    """The columns of the ablation table that these conditions allow; the one with key HEADLINE is what is ranked by."""
    rgb, thermal = MISSING
    given = [how for how in conditions if how.rgb.kind in INPUT_KINDS and how.thermal.kind in INPUT_KINDS]
    columns = [
        Measure("clean", "clean", [CLEAN_TEST]),
        Measure("rgb", "RGB missing", [rgb]),
        Measure("thermal", "thermal missing", [thermal]),
        Measure(HEADLINE, "mean of both missing", [rgb, thermal]),
        Measure("worst", "worst case", given, np.min),
    ]
    if len(given) == 1:
        columns = columns[:1]  # the worst of one condition says nothing new
    return [column for column in columns if set(column.conditions) <= set(conditions)]


def values(records: pd.DataFrame, measure: Measure) -> pd.Series:
    """The measure of every run in per cent, indexed by (variant, seed); NaN where one of its conditions is missing."""
    # raises if a row is there twice
    wide = records.pivot(index=["variant", "seed"], columns="condition", values="miou")
    numbers = wide[[condition.name for condition in measure.conditions]].to_numpy()
    reduced = np.where(np.isnan(numbers).any(axis=1), np.nan, measure.reduce(numbers, axis=1))
    return pd.Series(reduced, index=wide.index, name=measure.key)


@dataclass(frozen=True)
class Gain:
    """How much better a variant is than another, in points of mIoU, at equal seed on the same images."""

    mean: float
    sd: float  # over seeds
    n: int  # seeds that both have
    interval: Interval | None  # 95 %, over training seeds and test images; None where no seed is shared
    estimate: Estimate | None = None  # what the interval is from: p-values, and how many more seeds would decide

    @property
    def verdict(self) -> str:
        return self.interval.verdict if self.interval else ""


class Comparison:
    """Gains between the variants of one study, all from the same bootstrap draws, so that they fit together."""

    def __init__(self, study: Study, rng: np.random.Generator) -> None:
        self.study = study
        self.rng = rng
        self._counts: dict[tuple[str, ...], np.ndarray] = {}  # draws of images, then of recordings, by names of images
        self._images: dict[tuple[str, ...], tuple[int, int]] = {}  # how many images and recordings each draw has
        self._drawn: dict[tuple[str, int, str], np.ndarray] = {}
        self._gains: dict[tuple[str, str, str], Gain] = {}

    def gain(self, measure: Measure, subject: str, reference: str) -> Gain:
        """The paired gain of `subject` over `reference`, with its interval; the same wherever it is asked for."""
        key = (measure.key, subject, reference)
        if key not in self._gains:
            runs = values(self.study.records, measure)
            pairs = paired_gain(runs[subject], runs[reference])
            found = None if pairs.empty else self.estimate(measure, {subject: 1, reference: -1}, pairs)
            if found is None or (interval := found.interval()) is None:  # one run on one image says nothing at all
                self._gains[key] = Gain(float("nan"), float("nan"), 0, None)
            else:
                self._gains[key] = Gain(found.mean, found.sd, found.n, interval, found)
        return self._gains[key]

    def estimate(self, measure: Measure, weights: Mapping[str, float], runs: pd.Series) -> Estimate:
        """Of a weighted sum of variants, from its value at each seed: for other training seeds and test images."""
        drawn = np.stack(
            [sum(weight * self._both(measure, v, seed) for v, weight in weights.items()) for seed in runs.index]
        )
        images, recordings = self._units(measure, next(iter(weights)), runs.index[0])
        spreads = [spread(drawn[:, :DRAWS], images), spread(drawn[:, DRAWS:], recordings)]
        return over_seeds_and_images(runs.to_numpy(), *spreads)

    def best(self, measure: Measure) -> list[str]:
        """The variants to mark: the one with the highest mean, and all that are not significantly worse (Holm)."""
        runs = values(self.study.records, measure)
        means = {variant: float(runs[variant].mean()) for variant in self.study.sweep.variants}
        known = [variant for variant in means if not math.isnan(means[variant])]
        if not known:
            return []
        best = max(known, key=lambda variant: means[variant])
        gains = {variant: self.gain(measure, variant, best).estimate for variant in known if variant != best}
        return best_rows(means, {variant: found for variant, found in gains.items() if found is not None})

    def draws(self, measure: Measure, variant: str) -> dict[int, np.ndarray]:
        """(b,) the measure of each evaluated run of a variant in each draw of test images, by seed."""
        runs = values(self.study.records, measure)[variant].dropna()
        return {seed: self._both(measure, variant, seed)[:DRAWS] for seed in runs.index}

    def _both(self, measure: Measure, variant: str, seed: int) -> np.ndarray:
        """(2 b,) the measure of one run in each draw of test images, then in each of whole recordings."""
        return measure.reduce([self._miou(variant, seed, how.name) for how in measure.conditions], axis=0)

    def _units(self, measure: Measure, variant: str, seed: int) -> tuple[int, int]:
        return self._images[tuple(self.study.evidence[variant, seed, measure.conditions[0].name].names)]

    def _miou(self, *key: Any) -> np.ndarray:
        if key not in self._drawn:
            found = self.study.evidence[key]
            if (names := tuple(found.names)) not in self._counts:
                recordings = [recording(str(name), found.meta["dataset"]) for name in names]
                drawn = image_draws(len(names), DRAWS, self.rng), recording_draws(recordings, DRAWS, self.rng)
                self._counts[names] = np.concatenate(drawn)
                self._images[names] = len(names), len(set(recordings))
            self._drawn[key] = bootstrap_miou(found.confusion, self._counts[names])
        return self._drawn[key]


def ablation(study: Study, compare: Comparison) -> pd.DataFrame:
    """One row per variant, with the training cost: `cost.ratio` to the baseline at equal seed with `.sd .n`, and
    `cost.seconds` per step. For each measure `.mean .sd .n`, `.best` if it is to be marked in its column, and against
    the baseline `.gain .low .high .pairs .verdict .over .p`, and `.p_holm`, corrected for all gains of the table.

    `seeds` is how many runs the sweep asks for, `done` how many of them are evaluated under every condition.
    """
    reference = study.sweep.reference
    columns = measures(study.sweep.conditions)
    best = {measure.key: compare.best(measure) for measure in columns}
    rows = {}
    for variant in study.sweep.variants:
        mine = study.records[study.records["variant"] == variant]
        complete = mine.groupby("seed")["miou"].apply(lambda column: column.notna().all())
        row: dict[str, Any] = {"seeds": len(complete), "done": int(complete.sum())}
        for measure in columns:
            total = summary(values(study.records, measure)[variant])
            row |= {f"{measure.key}.{name}": getattr(total, name) for name in ("mean", "sd", "n")}
            row[f"{measure.key}.best"] = variant in best[measure.key]
            if variant != reference:
                gain = compare.gain(measure, variant, reference)
                row |= {f"{measure.key}.gain": gain.mean, f"{measure.key}.pairs": gain.n}
                row |= {f"{measure.key}.{end}": getattr(gain.interval, end, None) for end in ("low", "high", "over")}
                row[f"{measure.key}.verdict"] = gain.verdict
                row[f"{measure.key}.p"] = gain.estimate.p() if gain.estimate else float("nan")
        rows[variant] = row | _cost(study, variant)
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("variant")
    tested = [f"{measure.key}.p" for measure in columns if f"{measure.key}.p" in table]
    corrected = holm(table[tested].to_numpy(float).ravel()).reshape(len(table), len(tested))
    for column, name in enumerate(tested):
        table[f"{name}_holm"] = corrected[:, column]
    return table


def _cost(study: Study, variant: str) -> dict[str, Any]:
    """Time per training step, in seconds and relative to the baseline's at equal seed."""
    costs = study.costs.set_index(["variant", "seed"])["seconds_per_step"].astype(float)
    ratio = summary(costs[variant] / costs[study.sweep.reference])
    seconds = float(costs[variant].mean())
    return {"cost.ratio": ratio.mean, "cost.sd": ratio.sd, "cost.n": ratio.n, "cost.seconds": seconds}


def robustness(study: Study) -> pd.DataFrame:
    """One row per condition, for each variant `.mean .sd .n` of mIoU over seeds."""
    groups = study.records.groupby(["condition", "variant"], sort=False)["miou"]
    totals = {key: summary(column) for key, column in groups}
    rows = {}
    for condition in study.sweep.conditions:
        row: dict[str, Any] = {"what": describe(condition)}
        for variant in study.sweep.variants:
            total = totals[condition.name, variant]
            row |= {f"{variant}.mean": total.mean, f"{variant}.sd": total.sd, f"{variant}.n": total.n}
        rows[condition.name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("condition")


# ---------------------------------------------------------------------------------------------- what is shown


@dataclass(frozen=True)
class Entry:
    """One table cell as people read it."""

    value: str
    gain: str = ""  # second line
    interval: str = ""  # third line
    verdict: str = ""
    best: bool = False
    chain: Sequence[Mapping[str, str]] = ()  # the runs behind it, a row of words each


@dataclass(frozen=True)
class Shown:
    """A table of words, before any markup."""

    head: list[str]
    rows: list[tuple[str, list[Entry]]]
    notes: list[str] = field(default_factory=list)
    first: str = "variant"


def shown_ablation(table: pd.DataFrame, study: Study) -> Shown:
    """The ablation table in words: mean ± sd, and below it the gain over the baseline with its interval."""
    columns = measures(study.sweep.conditions)
    rows, over = [], set()
    for variant, row in table.iterrows():
        entries = [Entry(f"{row['done']:.0f} of {row['seeds']:.0f}")]
        for measure in columns:
            key = measure.key
            total = Summary(row[f"{key}.mean"], row[f"{key}.sd"], int(row[f"{key}.n"]))
            counted = f" (n={total.n})" if 0 < total.n != row["done"] else ""
            gain = interval = verdict = ""
            if variant != study.sweep.reference and row[f"{key}.pairs"] > 0:
                gain, verdict = signed(row[f"{key}.gain"]), row[f"{key}.verdict"]
                interval = bracket(Interval(row[f"{key}.low"], row[f"{key}.high"], row[f"{key}.over"]))
                over.add(row[f"{key}.over"])
            best = len(table) > 1 and bool(row[f"{key}.best"])
            entries.append(Entry(plus_minus(total) + counted, gain, interval, verdict, best))
        ratio = "—" if math.isnan(row["cost.ratio"]) else f"{row['cost.ratio']:.2f} ×"
        seconds = "" if math.isnan(row["cost.seconds"]) else f"{row['cost.seconds']:.3g} s/step"
        entries.append(Entry(ratio, seconds))
        rows.append((str(variant), entries))
    return Shown(["seeds", *(c.label for c in columns), "training cost"], rows, _notes(table, study, columns, over))


def _notes(table: pd.DataFrame, study: Study, columns: Sequence[Measure], over: set[str]) -> list[str]:
    reference = study.sweep.reference
    notes = [
        "mIoU in per cent on the test split: mean ± standard deviation over training seeds. Bold: the highest mean "
        "and every row that is not significantly worse at equal seed (5 %, Holm's correction within the column)."
    ]
    if over:
        notes.append(
            f"Below it, the gain over “{reference}” at equal seed in points of mIoU, with a 95 % interval over "
            f"{' or '.join(sorted(over))}. An interval that includes 0 is within noise."
        )
    if worst := [column for column in columns if column.key == "worst"]:
        notes.append(
            f"Worst case: the lowest mIoU of a run over the {len(worst[0].conditions)} conditions that change what the "
            "network is given."
        )
    notes += _corrected(table, columns)
    notes += _recordings(study) if over else []
    every = study.evidence.values()
    if strays := sorted({found.meta["classes"][i] for found in every for i in stray(found.confusion)}):
        notes.append(
            f"Predicted somewhere and labelled nowhere: {', '.join(strays)}. Such a class counts as 0 in the mIoU of "
            "who predicts it; in the draws that intervals are from it is left out for all."
        )
    notes.append(f"Training cost: time per step relative to “{reference}” at equal seed.")
    if (table["done"] < table["seeds"]).any():
        lacking = int((table["seeds"] - table["done"]).sum())
        notes.append(
            f"{lacking} of {int(table['seeds'].sum())} runs are not fully evaluated; they are counted out. "
            "A dash is a number that does not exist yet."
        )
    return notes


def _corrected(table: pd.DataFrame, columns: Sequence[Measure]) -> list[str]:
    """Which gains are not significant any more when all gains of the table count."""
    tests = sum(int(table[f"{one.key}.p"].notna().sum()) for one in columns if f"{one.key}.p" in table)
    lost = [
        f"“{variant}” ({measure.label})"
        for measure in columns
        if f"{measure.key}.p" in table
        for variant, row in table.iterrows()
        if row[f"{measure.key}.p"] < 1 - LEVEL <= row[f"{measure.key}.p_holm"]
    ]
    if tests < 2:
        return []
    held = "every one whose interval excludes 0 holds" if not lost else f"these do not hold: {', '.join(lost)}"
    return [f"With Holm's correction over the {tests} gains of this table, {held}."]


def _recordings(study: Study) -> list[str]:
    """Whether the intervals know of neighbouring frames that are alike."""
    first = next(iter(study.evidence.values()))
    found = {recording(str(name), first.meta["dataset"]) for name in first.names}
    if len(found) >= RECORDED or len(found) == len(first.names):
        return []
    return [
        f"The {len(first.names)} test images are of {len(found)} recordings, too few to tell how these differ. The "
        "intervals take images as independent; where neighbouring frames are alike they cover less than 95 %."
    ]


def shown_robustness(table: pd.DataFrame, study: Study) -> Shown:
    """The robustness table in words: a row per condition, a column per variant."""
    rows = []
    variants = list(study.sweep.variants)
    for _, row in table.iterrows():
        best = max((row[f"{v}.mean"] for v in variants if row[f"{v}.n"]), default=None)
        entries = []
        for variant in variants:
            total = Summary(row[f"{variant}.mean"], row[f"{variant}.sd"], int(row[f"{variant}.n"]))
            partial = f" (n={total.n})" if 0 < total.n < len(study.sweep.seeds) else ""
            entries.append(Entry(plus_minus(total) + partial, best=len(variants) > 1 and total.mean == best))
        rows.append((row["what"], entries))
    notes = [
        f"mIoU in per cent: mean ± standard deviation over {len(study.sweep.seeds)} seeds, n given where fewer are "
        "done. Bold: highest mean under that condition."
    ]
    return Shown(variants, rows, notes, first="condition")


# ---------------------------------------------------------------------------------------------- markup


def markdown(table: Shown) -> str:
    """A GitHub table; gains in a second one, so that both stay narrow enough to read as text."""
    lines = _markdown([table.first, *table.head], [[label, *(_bold(e) for e in row)] for label, row in table.rows])
    gained = [i for i, name in enumerate(table.head) if any(row[i].verdict for _, row in table.rows)]
    if gained:
        rows = [
            [label, *(f"{row[i].gain} {row[i].interval} {row[i].verdict}".strip() for i in gained)]
            for label, row in table.rows
            if any(row[i].gain for i in gained)
        ]
        lines += ["", "Gain over the baseline:", ""]
        lines += _markdown([table.first, *(table.head[i] for i in gained)], rows)
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes)]) + "\n"


def _bold(entry: Entry) -> str:
    return f"**{entry.value}**" if entry.best else entry.value


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    clean = [[cell.replace("\\", "\\\\").replace("|", "\\|") for cell in row] for row in [head, *rows]]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (clean[0], rule, *clean[1:])]


def escaped(text: str) -> str:
    """`text` as Markdown shows it, whatever is in it."""
    marked = re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", " ".join(text.split()) if "\n" in text else text)
    return marked.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "—": "---", "“": "``", "”": "''", "σ": r"$\sigma$",
    "\u00a0": "~", "†": r"\textdagger{}", "‡": r"\textdaggerdbl{}", "§": r"\S{}", "¶": r"\P{}", "≥": r"$\geq$",
    "≤": r"$\leq$", "≠": r"$\neq$", "→": r"$\to$", "Δ": r"$\Delta$", "λ": r"$\lambda$", "–": "--", "…": r"\dots{}",
    "·": r"$\cdot$", "\u2018": "`", "\u2019": "'", "\n": " ", "\t": " ",
}  # fmt: skip
SET_UP = range(0xA0, 0x180)  # letters beyond ASCII that LaTeX prints without a package


def latex_text(text: str) -> str:
    """`text` as LaTeX prints it, whatever is in it."""
    return "".join(LATEX.get(letter) or _printable(letter) for letter in text)


def _printable(letter: str) -> str:
    """The letter, or the name of its place in Unicode where pdfLaTeX would stop at it."""
    return letter if (letter.isascii() and letter.isprintable()) or ord(letter) in SET_UP else f"U+{ord(letter):04X}"


def latex(table: Shown) -> str:
    """A tabular that needs only \\usepackage{booktabs}; notes are comments, for the caption."""
    lines = ["% needs \\usepackage{booktabs}", *(f"% {note}" for note in table.notes)]
    lines += [rf"\begin{{tabular}}{{l{'r' * len(table.head)}}}", r"\toprule"]
    lines += [" & ".join(latex_text(name) for name in [table.first, *table.head]) + r" \\", r"\midrule"]
    for label, row in table.rows:
        cells = [rf"\textbf{{{latex_text(e.value)}}}" if e.best else latex_text(e.value) for e in row]
        lines.append(" & ".join([latex_text(label), *cells]) + r" \\")
        if any(entry.gain for entry in row):
            # braces, since a row that began with "[" would be read as the spacing of the line above
            below = [f"{entry.gain} {entry.interval}".strip() for entry in row]
            small = [rf"{{\scriptsize {latex_text(text)}}}" if text else "" for text in below]
            lines.append(" & ".join(["", *small]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def html(table: Shown, name: str = "", ident: str = "1") -> str:
    """A table element with its notes, escaped, below the name of its group; `ident` sets its ids apart from others'."""
    return templates().get_template("table.html.j2").render(table=table, name=name, ident=ident)


def pages(shown: Mapping[str, Shown]) -> str:
    """The table elements of a sweep's groups, one below the other."""
    return "\n".join(html(table, name, str(place)) for place, (name, table) in enumerate(shown.items(), 1))


def csv(table: pd.DataFrame) -> str:
    """Every number, unrounded; an empty field where there is none."""
    return table.to_csv(lineterminator="\n")


def written(shown: Mapping[str, Shown], tables: Mapping[str, pd.DataFrame]) -> Mapping[str, str]:
    """The tables of a sweep's groups (of "" where it has none) in every form: file suffix to text."""
    named = any(shown)
    frame = pd.concat(tables, names=["group"]) if named else next(iter(tables.values()))
    headed = [(f"## {name}\n\n" if name else "") + markdown(table) for name, table in shown.items()]
    tabulars = [(f"% {name}\n" if name else "") + latex(table) for name, table in shown.items()]
    return {".md": "\n".join(headed), ".tex": "\n".join(tabulars), ".csv": csv(frame), ".html": pages(shown)}
