"""The report of a sweep: tables, figures, panels, and one HTML page that answers the sweep's question.

The page holds everything it shows and asks no server for anything. All files are functions of the run folders alone:
rendered twice, they are the same bytes.
"""

import base64
import importlib
import importlib.util
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image

from analysis import figures, tables
from analysis.load import Study, read
from analysis.panels import Panel, as_image, fitted, panels
from analysis.readings import Reading, readings
from analysis.spent import costs
from analysis.tables import HEADLINE, Comparison, Gain, Measure, bracket, describe, measures, percent, signed
from crm.conditions import CLEAN_TEST
from crm.corruptions import meaning
from crm.data.specs import DATASETS
from crm.records import read_json, state, write_bytes
from crm.sweep import Sweep

SEED = 0  # of the bootstrap draws: the same evidence gives the same intervals


def report(
    name: str,
    sweep: Sweep,
    runs: Path,
    out: Path,
    data_root: Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the report of sweep `name` into `out/name` and returns its index.html.

    What has not been run is shown as a hole and counted. ValueError if nothing at all has been evaluated yet.
    """
    study = read(sweep, runs, changes)
    if not study.evidence:
        raise ValueError(
            f"no run of {name} below {runs} has been evaluated yet, so there is nothing to report; "
            f"`crm sweep {name}` runs it and `crm status {name}` shows how far it is"
        )
    folder = out / name
    # rows of one group are compared with each other; all draw the same test images where they have the same
    parts = {part: (one, Comparison(one, np.random.default_rng(SEED))) for part, one in study.parts().items()}
    parts = {part: (one, compare) for part, (one, compare) in parts.items() if one.evidence}
    first, compare = next(iter(parts.values()))
    ablations = {part: tables.ablation(one, compare) for part, (one, compare) in parts.items()}
    robustnesses = {part: tables.robustness(one) for part, (one, _) in parts.items()}
    shown = {
        "table": {part: tables.shown_ablation(ablations[part], one) for part, (one, _) in parts.items()},
        "robustness": {part: tables.shown_robustness(robustnesses[part], one) for part, (one, _) in parts.items()},
    }
    shown["table"] = {part: with_chains(table, parts[part][0]) for part, table in shown["table"].items()}
    for stem, frames in (("table", ablations), ("robustness", robustnesses)):
        for suffix, text in tables.written(shown[stem], frames).items():
            write_bytes(folder / f"{stem}{suffix}", text.encode())
    more = readings(parts, study)
    for reading in more:
        for suffix, text in tables.written({"": reading.shown}, {"": reading.table}).items():
            title = f"## {reading.title}\n\n" if suffix == ".md" else ""
            write_bytes(folder / f"{reading.key}{suffix}", (title + text).encode())
    try:
        pictured, no_panels = panels(first, data_root), ""
    except (FileNotFoundError, ValueError) as error:
        pictured, no_panels = [], str(error)
    for panel in pictured:
        write_bytes(folder / f"panels_{panel.key}_missing.png", _png(as_image(panel)))
    page = tables.templates().get_template("report.html.j2").render(
        title=sweep.title,
        name=name,
        about=_about(name),
        synthetic=_synthetic(study),
        sweep=sweep,
        answer=_answers(parts),
        tiles=tiles(first, compare) if len(parts) == 1 else [],
        holes=holes(study),
        left_out=sweep.left_out,
        table=Markup(tables.pages(shown["table"])),
        robustness=Markup(tables.pages(shown["robustness"])),
        dots=_of_parts(folder, "dots", parts, figures.dots),
        curves=_of_parts(folder, "curves", parts, figures.curves),
        readings=[_read(folder, reading) for reading in more],
        seeds=len(sweep.seeds),
        panels=[_web(panel) for panel in pictured],
        no_panels=no_panels,
        conditions=_conditions(study),
        method=_methods(parts),
        runs=provenance(study),
        costs=_spent(study),
        changes=changes or {},
    )  # fmt: skip
    write_bytes(folder / "index.html", page.encode())
    return folder / "index.html"


Parts = Mapping[str, tuple[Study, Comparison]]  # group to its study, "" for a sweep without groups


# ---------------------------------------------------------------------------------------------- words from numbers


@dataclass(frozen=True)
class Ranking:
    """Who leads on the headline measure, among the variants that have a number at all."""

    measure: Measure
    order: list[str]  # best first
    mean: dict[str, float]
    n: dict[str, int]


def rank(study: Study) -> Ranking:
    """Variants by the mean of the missing modalities, or by the clean score where the suite has no missing modality."""
    known = {measure.key: measure for measure in measures(study.sweep.conditions)}
    measure = known.get(HEADLINE) or known["clean"]
    runs = tables.values(study.records, measure)
    totals = {variant: tables.summary(runs[variant]) for variant in study.sweep.variants}
    order = sorted((v for v in totals if totals[v].n), key=lambda v: -totals[v].mean)
    return Ranking(measure, order, {v: t.mean for v, t in totals.items()}, {v: t.n for v, t in totals.items()})


def _answers(parts: Parts) -> list[str]:
    """The answer of every group, the group first."""
    said = []
    for name, (study, compare) in parts.items():
        first, *others = answer(study, compare)
        said += [f"{name}: {first}" if name else first, *others]
    return said


def answer(study: Study, compare: Comparison) -> list[str]:
    """The answer in sentences, every one of them made from the numbers; the first is the one to remember."""
    ranking, reference = rank(study), study.sweep.reference
    where = "with one modality missing" if ranking.measure.key == HEADLINE else "on clean test images"
    if not ranking.order:
        return [f"No variant has been evaluated {where} yet, so nothing can be said."]
    best = ranking.order[0]
    if reference not in ranking.order:
        first = f"“{best}” has the highest mIoU {where} so far ({percent(ranking.mean[best])} %), but the baseline "
        return [f"{first}“{reference}” has not been run, so no gain can be stated."]
    if len(ranking.order) == 1:
        return [f"Only “{best}” has been evaluated {where} so far: {percent(ranking.mean[best])}\u00a0% mIoU. "
                "There is nothing to compare it with yet."]  # fmt: skip
    said = _leader(study, compare, ranking, where)
    said += _clean(study, compare, best if best != reference else ranking.order[1], ranking)
    return said


def _leader(study: Study, compare: Comparison, ranking: Ranking, where: str) -> list[str]:
    reference, best, mean = study.sweep.reference, ranking.order[0], ranking.mean
    if best == reference:
        other = ranking.order[1]
        gain = compare.gain(ranking.measure, other, reference)
        within = " That difference is within noise." if gain.verdict == "within noise" else ""
        return [
            f"Nothing beats the baseline: “{reference}” keeps {percent(mean[reference])}\u00a0% mIoU {where}, and the "
            f"closest, “{other}”, has {_points(gain)}.{within} {_basis(gain)}"
        ]
    gain = compare.gain(ranking.measure, best, reference)
    if not gain.n:
        kept = f"{percent(mean[best])}\u00a0% mIoU {where}"
        return [f"“{best}” leads with {kept}, but shares no finished seed with the baseline."]
    lead = (
        f"“{best}” keeps {percent(mean[best])}\u00a0% mIoU {where}, the baseline “{reference}” "
        f"{percent(mean[reference])}\u00a0%: {signed(gain.mean)} points at equal seed."
    )
    verdict = {
        "gain": "",
        "within noise": " The interval includes 0: this is within noise, and no gain has been shown.",
        "loss": " At equal seed it is worse, although its mean is higher: the seeds that are done differ.",
    }[gain.verdict]
    said = [lead + verdict, _basis(gain)]
    if (second := ranking.order[1]) != reference:
        over = compare.gain(ranking.measure, best, second)
        if over.n:
            tail = ", which is within noise: the two are not told apart" if over.verdict == "within noise" else ""
            behind = f"“{second}” with {percent(mean[second])}\u00a0%"
            said.append(f"Over the second, {behind}, it gains {_points(over)}{tail}.")
    return said


def _clean(study: Study, compare: Comparison, variant: str, ranking: Ranking) -> list[str]:
    """What the variant does to the clean score, and what it costs."""
    said = []
    clean = next(m for m in measures(study.sweep.conditions) if m.key == "clean")
    gain = compare.gain(clean, variant, study.sweep.reference)
    if gain.n and ranking.measure.key == HEADLINE:
        price = {
            "gain": f"With both modalities at hand “{variant}” gains too: {_points(gain)}.",
            "loss": f"With both modalities at hand “{variant}” pays for that: {_points(gain)}.",
            "within noise": f"With both modalities at hand the difference is within noise: {_points(gain)}.",
        }
        said.append(price[gain.verdict])
    ratio = _cost_ratio(study, variant)
    if not math.isnan(ratio):
        said.append(f"A training step of “{variant}” takes {ratio:.1f} times as long as one of the baseline.")
    return said


def _points(gain: Gain) -> str:
    return f"{signed(gain.mean)} points {bracket(gain.interval)}".strip()


def _basis(gain: Gain) -> str:
    """What a gain rests on."""
    seeds = f"{gain.n} paired seeds" if gain.n > 1 else "one seed, so it says nothing about another one"
    return f"95 % interval {bracket(gain.interval)} over {gain.interval.over}; {seeds}." if gain.interval else ""


def _cost_ratio(study: Study, variant: str) -> float:
    costs = study.costs.set_index(["variant", "seed"])["seconds_per_step"].astype(float)
    return float((costs[variant] / costs[study.sweep.reference]).mean())


def tiles(study: Study, compare: Comparison) -> list[dict[str, str]]:
    """The key numbers: the leading variant against the baseline, and how much of the sweep is done."""
    ranking, reference = rank(study), study.sweep.reference
    rivals = [variant for variant in ranking.order if variant != reference]
    made = []
    if rivals and reference in ranking.order:
        for measure in measures(study.sweep.conditions):
            if measure.key == "worst":
                continue
            gain = compare.gain(measure, rivals[0], reference)
            if gain.n:
                tile = {"label": measure.label, "value": signed(gain.mean), "unit": "points"}
                tile |= {"note": bracket(gain.interval), "verdict": gain.verdict}
                made.append(tile)
        made.sort(key=lambda tile: tile["label"] != ranking.measure.label)  # the headline first, else as they were
        if not math.isnan(ratio := _cost_ratio(study, rivals[0])):
            cost = {"label": "training cost", "value": f"{ratio:.1f} ×", "unit": "", "note": "time per step"}
            made.append({**cost, "verdict": ""})
    return [{**tile, "who": f"{rivals[0]} against {reference}"} for tile in made]


def holes(study: Study) -> list[str]:
    """What is missing, one line per variant; empty for a complete sweep."""
    lines = []
    for variant in study.sweep.variants:
        mine = study.records[study.records["variant"] == variant].groupby("seed", sort=False)
        lacking = {int(seed): rows for seed, rows in mine if rows["miou"].isna().any()}
        words = [
            f"seed {seed} {rows['state'].iloc[0]} ({int(rows['miou'].notna().sum())} of {len(rows)} conditions)"
            for seed, rows in lacking.items()
        ]
        if words:
            lines.append(f"{variant}: {', '.join(words)}")
    return lines


def _about(name: str) -> list[Markup]:
    """The paragraphs of the sweep module's docstring, `code` as such; none for a sweep that is no module."""
    module = f"sweeps.{name.partition('@')[0]}"
    if importlib.util.find_spec(module) is None:
        return []
    text = str(escape((importlib.import_module(module).__doc__ or "").strip()))
    return [Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", part)) for part in re.split(r"\n\s*\n", text)]


def _synthetic(study: Study) -> bool:
    spec = DATASETS.get(study.meta["dataset"])
    return spec is not None and spec.layout == "generated"


def _conditions(study: Study) -> list[tuple[str, str, str]]:
    """Each kind of degradation in the suite: its name, what it does, and how many conditions use it."""
    used = [how.kind for c in study.sweep.conditions for how in {c.rgb, c.thermal} if how.kind != "clean"]
    kinds = ["clean", *dict.fromkeys(used)]
    return [(kind, meaning(kind), ", ".join(_examples(study, kind))) for kind in kinds]


def _examples(study: Study, kind: str) -> Sequence[str]:
    if kind == "clean":
        return [describe(CLEAN_TEST)]
    return [describe(c) for c in study.sweep.conditions if kind in (c.rgb.kind, c.thermal.kind)]


def _methods(parts: Parts) -> list[tuple[str, str]]:
    """How the numbers were made; what is not the same for all groups is said for each."""
    by_term: dict[str, dict[str, str]] = {}
    for name, (study, _) in parts.items():
        for term, words in _method(study):
            by_term.setdefault(term, {})[name] = words
    lines = []
    for term, words in by_term.items():
        if len(set(words.values())) == 1:
            lines.append((term, next(iter(words.values()))))
        else:
            lines += [(f"{term}, {name}", each) for name, each in words.items()]
    return lines


def _method(study: Study) -> list[tuple[str, str]]:
    """How the numbers were made: term and description."""
    meta, sweep = study.meta, study.sweep
    first = next(iter(study.evidence.values()))
    night = int(first.night.sum())
    chosen = {
        "last": "the weights after the last training step; nothing was selected",
        "val_best": "the weights with the highest mIoU on the validation split; the test split was not looked at",
    }
    spec = DATASETS.get(meta["dataset"])
    ignored = f"pixels labelled {meta['ignore_index']} are not counted" if "ignore_index" in meta else ""
    height, width = meta.get("size", ("?", "?"))
    return [
        ("Data", f"{spec.title if spec else meta['dataset']}, {meta['split']} split: {len(first.names)} images "
                 f"({len(first.names) - night} by day, {night} at night) of {height} × {width} pixels, height first"),
        ("Checkpoint", f"{sweep.selection}: {chosen.get(sweep.selection, '')}"),
        ("Seeds", f"{len(sweep.seeds)} per variant ({', '.join(map(str, sweep.seeds))}); at equal seed all variants "
                  "see the same images and augmentations, so gains are taken seed by seed"),
        ("Metric", "mIoU in per cent: one confusion matrix summed over all test images, IoU per class, mean over the "
                   f"{len(meta['classes'])} classes ({', '.join(meta['classes'])}); a class in neither labels nor "
                   f"predictions is left out{'; ' + ignored if ignored else ''}; one scale, no flip"),
        ("Intervals", "95 %, for other training seeds and other test images of the same kind: t, from the variance of "
                      "the paired gains over seeds and from that of test images drawn with replacement (or of whole "
                      f"recordings, where that is larger), {tables.DRAWS} draws, the same for all networks. A class "
                      "that a draw of images lacks is left out for both. With one seed over test images alone"),
        ("Budget", f"{study.cells[0].config.steps} steps of {study.cells[0].config.batch} images"
                   + (f"; varied on purpose: {', '.join(sweep.budget)}" if sweep.budget else ", equal for all")),
        ("Training cost", "mean seconds per training step as the runs recorded them; runs that shared a machine slowed "
                          "each other down"),
    ]  # fmt: skip


def provenance(study: Study) -> list[dict[str, str]]:
    """Where every number came from: one row per cell."""
    rows = []
    for cell in study.cells:
        folder = study.runs / cell.id
        made, result = read_json(folder / "provenance.json") or {}, read_json(folder / "result.json") or {}
        checkpoint = result.get("checkpoints", {}).get(study.sweep.selection, {}).get("sha256", "")
        steps, seconds = result.get("steps"), result.get("train_seconds")
        rows.append({
            "variant": cell.variant,
            "seed": str(cell.seed),
            "run": cell.id,
            "state": state(study.runs, cell.config, study.sweep.selection, study.sweep.conditions).name,
            "commit": made.get("commit", "")[:12] + (" + changes" if made.get("dirty") else ""),
            "code": str(made.get("code", ""))[:12],
            "data": _manifest_hash(made["data"]) if made.get("data") else "",
            "checkpoint": checkpoint[:12],
            "steps": "" if steps is None else str(steps),
            "trained": "" if seconds is None else f"{seconds:.0f} s",
            "parameters": f"{result['parameters']:,}" if "parameters" in result else "",
        })  # fmt: skip
    return rows


def with_chains(shown: tables.Shown, study: Study) -> tables.Shown:
    """The ablation table with the runs behind each of its numbers."""
    runs = provenance(study)
    known = {measure.label: tables.values(study.records, measure) for measure in measures(study.sweep.conditions)}
    rows = []
    for label, entries in shown.rows:
        mine = [run for run in runs if run["variant"] == label]
        chained = []
        for head, entry in zip(shown.head, entries, strict=True):
            values = known[head][label] if head in known else None
            chain = [] if values is None else [_link(run, values.get(int(run["seed"]))) for run in mine]
            chained.append(replace(entry, chain=chain))
        rows.append((label, chained))
    return replace(shown, rows=rows)


def _link(run: Mapping[str, str], value: float | None) -> dict[str, str]:
    """A run behind a number, and what it says."""
    said = "" if value is None or math.isnan(value) else f"{value:.6g}"
    return {
        "seed": run["seed"],
        "value": said,
        **{term: run[term] for term in ("state", "run", "commit", "checkpoint")},
    }


def _spent(study: Study) -> list[dict[str, str]]:
    """What each variant has cost so far, a row of words each; none where no attempt was recorded."""
    ids: dict[str, list[str]] = {}
    for cell in study.cells:
        ids.setdefault(cell.variant, []).append(cell.id)
    found = costs(study.runs, ids)
    if not any(row["attempts"] for row in found.values()):
        return []
    units = dict.fromkeys(term for row in found.values() for term in row)
    words = {
        variant: {term: f"{row.get(term, 0):.3g}" if term != "attempts" else str(row[term]) for term in units}
        for variant, row in found.items()
    }
    return [{"variant": variant, **row} for variant, row in words.items()]


def _manifest_hash(manifest: Any) -> str:
    """Twelve hex digits over the manifest of all splits a run used."""
    return sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------- pictures


def _of_parts(folder: Path, stem: str, parts: Parts, draw: Callable[..., Figure | None]) -> list[tuple[str, Markup]]:
    """The figure of every group."""
    shown = []
    for number, (study, _) in enumerate(parts.values(), 1):
        name = stem if number == 1 else f"{stem}_{number}"
        shown += _drawn(folder, name, [draw(study.records, study.sweep, narrow) for narrow in (False, True)])
    return shown


def _read(folder: Path, reading: Reading) -> dict[str, Any]:
    """A reading for the page."""
    figures_ = _drawn(folder, reading.key, list(reading.figures)) if reading.figures else []
    table = Markup(tables.html(reading.shown))
    words = {"title": reading.title, "lead": reading.lead, "caption": reading.caption}
    return {**words, "table": table, "figures": figures_}


def _drawn(folder: Path, stem: str, drawn: list[Figure | None]) -> list[tuple[str, Markup]]:
    """Writes the wide and the narrow figure; returns them for the page, each with its class."""
    shown = []
    for kind, figure in zip(("wide", "narrow"), drawn, strict=True):
        if figure is None:
            continue
        name = stem if kind == "wide" else f"{stem}_narrow"
        forms = figures.written(figure)
        for suffix, content in forms.items():
            write_bytes(folder / f"{name}{suffix}", content)
        shown.append((kind, figures.inline_svg(forms[".svg"].decode(), name)))
    return shown


def _web(panel: Panel) -> dict[str, Any]:
    """A panel for the page: small pictures the browser enlarges without smoothing, large ones made smaller."""
    examples = []
    for example in panel.examples:
        pictures = [
            {"title": p.title, "note": p.note, "missing": p.missing, "source": _data_url(fitted(p.pixels, least=0))}
            for p in example.pictures
        ]
        night = "night" if example.night else "day"
        words = {"name": example.name, "night": night, "why": example.why, "gain": signed(example.gain)}
        examples.append({**words, "pictures": pictures})
    legend = [
        {"name": name, "colour": "#{:02x}{:02x}{:02x}".format(*colour), "remark": remark}
        for name, colour, remark in panel.legend
    ]
    return {"key": panel.key, "title": panel.title, "rule": panel.rule, "examples": examples, "legend": legend}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(image)).decode()
