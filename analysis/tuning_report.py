"""The page of a study: what was sought, what was found, and what that is worth. It asks no server for anything."""

import re
from pathlib import Path

from markupsafe import Markup

from analysis.figures import INK, PAPER, QUIET, RULE, written
from analysis.tables import templates
from analysis.tuning import ENOUGH, Tuned
from analysis.tuning_figures import figures
from crm.records import write_bytes
from crm.tuning.storage import shown

CAPTIONS = {
    "history": ("How it went", "Each trial by its number. The line is the best value so far; it can only rise, by luck "
                "too."),
    "slices": ("What the settings do", "Each dot is a trial; one of its settings is on the axis, the others differ "
               "too. Shaded: the weight is off."),
    "importance": ("Which settings matter", "fANOVA on the axes as they are searched: the share of the variance among "
                   "trials that a setting explains by itself. Intervals from drawing the trials with replacement; with "
                   "few trials they are wide, and two that overlap are not told apart."),
    "pareto": ("What one objective costs in the other", "The number of each trial that no other one beats in both."),
    "parallel": ("The best settings together", "A line for each trial through its settings."),
}  # fmt: skip


def report(tuned: Tuned, out: Path) -> Path:
    """Writes figures, trials.csv and index.html into `out/tune-<study>`; ValueError before any trial is complete."""
    verdicts = tuned.verdicts()
    folder = out / f"tune-{tuned.name}"
    drawn = []
    for name, figure in figures(tuned).items():
        forms = written(figure)
        for suffix, content in forms.items():
            write_bytes(folder / f"{name}{suffix}", content)
        title, caption = CAPTIONS[name]
        drawn.append({"title": title, "caption": caption, "svg": _inline(forms[".svg"].decode(), name)})
    write_bytes(folder / "trials.csv", tuned.trials.to_csv(index=False).encode())
    search, asked, found = tuned.search, tuned.asked, tuned.summary
    values = [*search.objectives, *search.space]
    rows = [
        {
            "trial": row["trial"], "state": row["state"], **{name: _text(row[name]) for name in values},
            "runs": row["runs"], "note": ", ".join(part for part in (row["origin"], "reused" if row["reused"] else "",
                                                                    row["reason"]) if part),
        }
        for _, row in tuned.trials.iterrows()
    ]  # fmt: skip
    told = [
        ("Sought", "; ".join(search.labels) + (", to be made small" if search.minimise else "")),
        ("Evaluated on", "nothing: a function was called" if search.calculated else
         "the validation split alone; no trial has seen test"),
        ("Trials", f"{found.trials} of {asked.trials}: {found.complete} complete, {found.pruned} pruned, "
         f"{found.failed} failed, {found.reused} reused; {found.retried} were asked again after a worker had died"),
        ("Cost", f"{found.hours:.2f} hours of training"),
        ("Method", f"sampler {asked.sampler}, pruner {asked.pruner}, seed {asked.seed}"),
        ("Seeds", "none" if search.calculated else f"{', '.join(map(str, search.seeds))}, which no sweep has"),
        *[(f"Searched: {name}", f"{type(one).__name__.lower()} {_range(one)}") for name, one in search.space.items()],
        ("Study", f"{tuned.name} in {shown(asked.storage)}"),
    ]  # fmt: skip
    if len(tuned.complete) < ENOUGH:
        told.append(("Not shown", f"importances, which say nothing with less than {ENOUGH} complete trials"))
    page = templates().get_template("tuning.html.j2").render(
        title=search.title or tuned.name, name=tuned.name, verdicts=verdicts, figures=drawn, told=told,
        columns=list(rows[0]) if rows else [], rows=rows, calculated=search.calculated,
        changes=asked.changes or {}, text=_text,
    )  # fmt: skip
    write_bytes(folder / "index.html", page.encode())
    return folder / "index.html"


def _range(one: object) -> str:
    options = getattr(one, "options", None)
    if options is not None:
        return f"of {', '.join(map(str, options))}"
    low, high = getattr(one, "low", 0), getattr(one, "high", 0)
    scale = "on a logarithmic scale" if getattr(one, "log", True) else ""
    off = ", or off" if getattr(one, "off", 0) else ""
    return f"from {low:.3g} to {high:.3g} {scale}{off}".strip()


def _text(value: object) -> str:
    if isinstance(value, float):
        return "—" if value != value else f"{value:.4g}"
    return str(value)


def _inline(svg: str, name: str) -> Markup:
    """The SVG for a page: without its header, ids of its own, and the colours of text and paper those of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'id="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    for colour, word in ((INK, "ink"), (QUIET, "quiet"), (RULE, "rule"), (PAPER, "paper")):
        svg = svg.replace(colour, f"var(--{word})")
    return Markup(svg)
