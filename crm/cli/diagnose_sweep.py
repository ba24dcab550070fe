"""crm diagnose SWEEP: the diagnoses of a sweep's runs side by side, a row per variant."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import typer

from crm.cli import options
from crm.machine import Machine
from crm.records import read_json, write_json
from crm.sweep import Cell, Sweep
from crm.verdicts import ACROSS, FILE, OTHER, RULES, Row

Found = dict[str, Any]  # a diagnosis as it is written


class Progress:
    """Parts done and time to go: rewritten in place on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, quiet: bool, what: str = "diagnosing") -> None:
        self.quiet, self.what, self.live = quiet, what, sys.stderr.isatty()
        self.began = self.told = time.monotonic()

    def __call__(self, done: int, parts: int) -> None:
        now = time.monotonic()
        if self.quiet or (not self.live and now - self.told < 10):
            return
        self.told = now
        left = options.duration((now - self.began) / done * (parts - done))
        text = f"{self.what}: {done} of {parts} parts, {left} to go"
        if self.live:
            text = "\r\033[K" + (text if done < parts else "")
        print(text, end="" if self.live else "\n", file=sys.stderr, flush=True)


def diagnose_sweep(
    name: str,
    found: Sweep,
    cells: Sequence[Cell],
    machine: Machine,
    json: bool,
    split: str | None,
    images: int | None,
    draws: int,
    selection: str,
) -> dict[str, str]:
    """Diagnoses what is not diagnosed yet, prints the table, and returns what failed: label -> reason.

    A stored diagnosis counts if it is of the run's present checkpoint, split, number of images and draws; where split
    and images are not given, those of most stored ones are taken, so that all rows are of the same images.
    """
    results = {cell.label: read_json(machine.runs / cell.id / "result.json") for cell in cells}
    trained = [cell for cell in cells if results[cell.label]]
    if not trained:
        raise ValueError(f"no run of {name} below {machine.runs} is trained yet; `crm sweep {name}` trains them")
    stored = {}
    for cell in trained:
        before, checkpoint = read_json(machine.runs / cell.id / FILE), results[cell.label]["checkpoints"].get(selection)
        if checkpoint is None:
            has = ", ".join(results[cell.label]["checkpoints"])
            raise ValueError(f"run {cell.id} ({cell.label}) has no checkpoint {selection!r}; it has {has}")
        of = {"selection": selection, "checkpoint_sha256": checkpoint["sha256"], "draws": draws}
        if before and all(before.get(key) == value for key, value in of.items()):
            stored[cell.label] = before
    if split is None and images is None and stored:
        ((split, images), _), *_ = Counter((one["split"], one["images"]) for one in stored.values()).most_common()
    stored = {
        label: one for label, one in stored.items() if split in (None, one["split"]) and images in (None, one["images"])
    }
    todo = [cell for cell in trained if cell.label not in stored]
    failed = _measure(todo, machine, selection, split, images, draws, stored, json) if todo else {}
    rows = {variant: _row([stored[cell.label] for cell in cells if cell.variant == variant and cell.label in stored])
            for variant in found.variants}  # fmt: skip
    rows = {variant: row for variant, row in rows.items() if row is not None}
    signs = _signs(found, rows)
    missing = [cell.label for cell in cells if cell.label not in stored]
    if json:
        plain = {variant: {**row.written(), "across": signs[variant]} for variant, row in rows.items()}
        options.echo_json({"sweep": name, "rows": plain, "without": missing, "failed": failed})
    elif rows:
        typer.echo("\n".join(_screen(name, found, rows, signs, next(iter(stored.values())))))
    for label, reason in failed.items():
        typer.echo(f"{label} could not be diagnosed: {reason}", err=True)
    if left := [label for label in missing if label not in failed]:
        typer.echo(f"not trained, so not in the table: {', '.join(left)}", err=True)
    return failed


def _measure(
    todo: Sequence[Cell],
    machine: Machine,
    selection: str,
    split: str | None,
    images: int | None,
    draws: int,
    stored: dict[str, Found],
    quiet: bool,
) -> dict[str, str]:
    """Diagnoses cells one after another, into `stored` and their folders; what failed, and why."""
    from crm.diagnose import diagnose

    machine.take_process()
    failed, began = {}, time.monotonic()
    for number, cell in enumerate(todo, 1):
        folder = machine.runs / cell.id
        tell = Progress(quiet, f"diagnosing {cell.label} ({number} of {len(todo)})")
        try:
            found = diagnose(folder, machine, selection, split, images, draws, tell).written()
            write_json(folder / FILE, found)
            stored[cell.label] = found
        except (OSError, ValueError, RuntimeError) as error:
            failed[cell.label] = str(error)
        if not quiet:
            left = options.duration((time.monotonic() - began) / number * (len(todo) - number))
            print(f"{number} of {len(todo)} diagnosed, {left} to go: {cell.label}", file=sys.stderr, flush=True)
    return failed


def _row(found: Sequence[Found]) -> Row | None:
    """Means over the seeds of one variant; None where no run is diagnosed."""
    if not found:
        return None
    measures = [one["measures"] for one in found]

    def mean(*path: str) -> float | None:
        values = list(measures)
        for key in path:
            values = [value.get(key) if value else None for value in values]
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    sides = {key: {side: mean(key, side) for side in OTHER} for key in ("missing", "retention", "head")}
    rules = Counter(finding["rule"] for one in found for finding in one["findings"])
    return Row(
        runs=len(found),
        clean=mean("clean"),
        gap=mean("gap"),
        masked=mean("masked"),
        agreement=mean("agreement"),
        cosine=mean("cosine"),
        distillation=mean("distillation"),
        findings=dict(rules),
        problems=sum(not one["healthy"] for one in found),
        **sides,
    )


def _signs(found: Sweep, rows: dict[str, Row]) -> dict[str, list[str]]:
    """What a row shows only beside its baseline: names of ACROSS, by variant."""
    baseline = {row: part.reference for part in found.parts().values() for row in part.variants}
    signs: dict[str, list[str]] = {}
    for variant, row in rows.items():
        first = rows.get(baseline[variant])
        compared = first is not None and variant != baseline[variant]
        signs[variant] = [name for name, shows in ACROSS.items() if compared and first and shows(row, first)]
    return signs


# ---------------------------------------------------------------------------------------------- the screen

COLUMNS = ["runs", "clean", "no RGB", "keeps", "no thermal", "keeps", "gap", "agree", "RGB head", "thermal head",
           "cosine", "distilled", "wrong"]  # fmt: skip


def _screen(name: str, found: Sweep, rows: dict[str, Row], signs: dict[str, list[str]], one: Found) -> list[str]:
    """The table, then the failure signatures with the rows that show them."""
    lines = [f"{name}: {found.title}", f"{one['selection']}, {one['dataset']} {one['split']}, {one['images']} images; "
             "means over seeds", ""]  # fmt: skip
    lines += options.table([[variant, *_cells(row)] for variant, row in rows.items()], ["", *COLUMNS]).splitlines()
    lines += [
        "",
        "mIoU without a modality, of the head on one modality's features alone; keeps: share of the clean score; gap:",
        "how many points more one missing modality costs than the other; agree: pixels that keep their class under",
        "masks; cosine: of both modalities' gradients at the head; distilled: share of the terms' gradients.",
    ]
    for title, rules in (("found", _rules(rows)), ("beside the baseline", _across(signs))):
        if rules:
            lines += ["", f"{title}:"]
            for rule, (words, who) in rules.items():
                lines += [f"  {rule}: {words}", f"    {', '.join(who)}"]
    return lines


def _cells(row: Row) -> list[str]:
    return [
        str(row.runs),
        _score(row.clean),
        _score(row.missing["rgb"]),
        _share(row.retention["rgb"]),
        _score(row.missing["thermal"]),
        _share(row.retention["thermal"]),
        _score(row.gap),
        _share(row.agreement),
        _score(row.head["rgb"]),
        _score(row.head["thermal"]),
        "-" if row.cosine is None else f"{row.cosine:.2f}",
        _share(row.distillation),
        f"{row.problems} of {row.runs}",
    ]


def _rules(rows: dict[str, Row]) -> dict[str, tuple[str, list[str]]]:
    """Rule to what it means and the rows in which it was found, with how many runs of each."""
    known = {rule: (function.__doc__ or "").partition("\n")[0] for rule, function in RULES.items()}
    shown = {}
    for rule, words in known.items():
        has = {variant: row for variant, row in rows.items() if rule in row.findings}
        if has:
            shown[rule] = (words, [f"{variant} ({row.findings[rule]} of {row.runs})" for variant, row in has.items()])
    return shown


def _across(signs: dict[str, list[str]]) -> dict[str, tuple[str, list[str]]]:
    shown = {}
    for name, function in ACROSS.items():
        if who := [variant for variant, own in signs.items() if name in own]:
            shown[name] = ((function.__doc__ or "").partition("\n")[0], who)
    return shown


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
