"""Scores of evaluations, as JSON and as tables for a terminal."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from crm.cli import options

if TYPE_CHECKING:
    from crm.confusion import Evaluation

COLUMNS = {
    "mIoU": "miou",
    "released": "released_miou",
    "without 0": "miou_without_0",
    "pixel acc": "pixel_accuracy",
    "mean acc": "mean_accuracy",
    "precision": "mean_precision",
    "ECE": "ece",
}
PER_CLASS = {"IoU": "iou", "precision": "precision", "recall": "recall"}
IN_SHORT = ("clean", "worst", "EMM average", "EMM E(0.1)", "reliance gap", "mPC ", "retention ", "RMM ")  # on a screen
WIDTH = 118  # of a table, in characters


def print_scores(
    folder: Path,
    found: Mapping[str, "Evaluation"],
    without: Sequence[str],
    subset: str | None,
    per_class: bool,
    json: bool,
) -> None:
    """Every metric of a run's evaluations, by condition; ValueError for a class or subset that they do not have."""
    from crm.conditions import condition
    from crm.records import read_json
    from crm.robustness import summary

    parts = {name: each.part(subset) if subset else each for name, each in found.items()}
    scores = {name: each.scores(without) for name, each in parts.items()}
    meta = next(iter(found.values())).meta
    whole = summary({condition(name): each["miou"] for name, each in scores.items()})
    if json:
        plain = {name: _plain(each) for name, each in scores.items()}
        options.echo_json(
            {
                "run": folder.name,
                "folder": folder,
                "result": read_json(folder / "result.json"),
                "dataset": meta["dataset"],
                "mapping": meta.get("mapping"),
                "subset": subset,
                "without": list(without),
                "confidence": meta.get("confidence"),
                "miou": {name: each["miou"] for name, each in plain.items()},
                "released_miou": {name: each["released_miou"] for name, each in plain.items()},
                "metrics": plain,
                "robustness": _plain(whole),
            }
        )
        return
    images = f"{next(iter(scores.values()))['images']} {subset or 'test'} images"
    typer.echo(f"run {folder.name}  {folder}\n{meta['dataset']}, {images}, per cent")
    rows = [[name, *(number(each[key]) for key in COLUMNS.values())] for name, each in scores.items()]
    typer.echo(options.table(rows, ["condition", *COLUMNS]))
    if per_class:
        typer.echo("\n" + "\n\n".join(_class_tables(scores)))
    typer.echo("\n".join(_notes(meta, scores, without)))
    lines = [[name, number(value)] for name, value in whole.items() if name.startswith(IN_SHORT)]
    if len(lines) > 1:
        typer.echo("\n" + options.table(lines, ["robustness (more: --json)", ""]))


def _class_tables(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """IoU per class and condition, as many classes side by side as fit; of one condition alone, all that is known."""
    first = next(iter(scores.values()))
    classes = first["classes"]
    if len(scores) == 1:
        rows = [
            [name, *(number(values[key]) for key in PER_CLASS.values()), str(values["pixels"])]
            for name, values in classes.items()
        ]
        return [options.table(rows, ["class", *PER_CLASS, "labelled pixels"])]
    tables, names = [], list(classes)
    room = WIDTH - max(map(len, scores))
    while names:
        shown: list[str] = []
        while names and sum(2 + max(5, len(name)) for name in [*shown, names[0]]) <= room:
            shown.append(names.pop(0))
        shown = shown or [names.pop(0)]
        rows = [[name, *(number(each["classes"][one]["iou"]) for one in shown)] for name, each in scores.items()]
        tables.append(options.table(rows, ["IoU", *shown]))
    return tables


def _notes(meta: Mapping[str, Any], scores: Mapping[str, Mapping[str, Any]], without: Sequence[str]) -> list[str]:
    """What a reader must know to read the numbers right."""
    first = meta["classes"][0]
    notes = [f"released: mIoU with classes that occur nowhere as 0; without 0: mIoU without class 0, {first}"]
    absent = dict.fromkeys(name for each in scores.values() for name in each["absent"])
    if absent:
        notes.append(f"occurs nowhere: {', '.join(absent)}; mIoU leaves it out")
    if without:
        notes.append(f"left out of every mean: {', '.join(without)}")
    if taken := meta.get("mapping"):
        pairs = ", ".join(name if name == shared else f"{name} as {shared}" for name, shared in taken.items())
        notes.append(f"trained on {meta['trained_on']}, scored on the classes both have: {pairs}")
        notes.append("all other classes are one, 'other': taking it for one of these is wrong, and no mean holds it")
    if any(each["ece"] is None for each in scores.values()):
        notes.append("ECE -: stored by a version that kept no confidences")
    return notes


def number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def _plain(value: Any) -> Any:
    """NaN, which JSON does not know, as null."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
