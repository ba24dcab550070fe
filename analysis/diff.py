"""What two runs, two variants or two tables differ in: settings, code, data, environment, cost, scores, images.

Gains are of the second over the first. Variants are paired at equal seed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.stats import DRAWS, gain_interval, image_draws
from crm.conditions import CLEAN_TEST
from crm.confusion import Evaluation, iou, load_evaluation, miou
from crm.evaluated import code_file, index
from crm.fingerprint import FILE as CODE
from crm.records import evaluation, read_json

FLIPPED = 10  # images that are named
NOTHING = "absent"


@dataclass(frozen=True)
class Side:
    """One run, or the runs of a variant."""

    label: str
    folders: Mapping[int, Path]  # by seed
    selection: str = "last"

    @property
    def first(self) -> Path:
        return self.folders[min(self.folders)]


Pair = tuple[Path, Path]


def compare(a: Side, b: Side) -> dict[str, Any]:
    """All of it, as plain values; ValueError if the two have no seed in common."""
    pairs = paired(a, b)
    one, other = pairs[min(pairs)]
    made = [read_json(folder / "provenance.json") or {} for folder in (one, other)]
    settings = [(read_json(folder / "config.json") or {}).get("config", {}) for folder in (one, other)]
    changed = differences(*settings)
    if len(pairs) > 1:
        changed.pop("seed", None)
    places = [environment(folder, each) for folder, each in zip((one, other), made, strict=True)]
    return {
        "a": a.label, "b": b.label, "seeds": sorted(pairs), "configuration": changed,
        "code": code((one, other), made, (a.selection, b.selection)),
        "data": data((one, other), made, (a.selection, b.selection)),
        "environment": differences(*places),
        "cost": {what: [cost(a, what), cost(b, what)] for what in COSTS},
        **scores(a, b, pairs),
    }  # fmt: skip


def paired(a: Side, b: Side) -> dict[int, Pair]:
    """Folders of equal seed; two single runs are a pair whatever their seeds."""
    if len(a.folders) == len(b.folders) == 1:
        return {min(a.folders): (a.first, b.first)}
    common = sorted(a.folders.keys() & b.folders.keys())
    if not common:
        raise ValueError(f"{a.label} and {b.label} have no finished seed in common, so nothing can be paired")
    return {seed: (a.folders[seed], b.folders[seed]) for seed in common}


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Keys whose values differ, with both."""
    return {key: [a.get(key, NOTHING), b.get(key, NOTHING)] for key in sorted({*a, *b}) if a.get(key) != b.get(key)}


# ---------------------------------------------------------------------------------------------- where they come from


def code(folders: Pair, made: list[dict[str, Any]], selections: tuple[str, str]) -> dict[str, Any]:
    """Commits, and the parts that differ of the code that trained and of the code that evaluated clean test frames."""
    trained = [_parts(read_json(folder / CODE)) for folder in folders]
    scored = []
    for folder, selection in zip(folders, selections, strict=True):
        hash = _metas(folder, selection).get(CLEAN_TEST.name, {}).get("code")
        scored.append(_parts((read_json(code_file(folder, selection, hash)) or {}).get("parts") if hash else None))
    found: dict[str, Any] = {}
    for name in ("commit", "dirty"):
        if made[0].get(name) != made[1].get(name):
            found[name] = [made[0].get(name), made[1].get(name)]
    for name, (one, other) in (("training", trained), ("evaluation", scored)):
        known = one is not None and other is not None
        found[name] = sorted(differences(one, other)) if known else None  # None: nobody knows
    return found


def _metas(folder: Path, selection: str) -> dict[str, dict[str, Any]]:
    """What evaluations say of themselves, by the name of the condition."""
    return {name: line["meta"] for name, line in index(folder / "evals" / selection).items()}


def _parts(stored: Mapping[str, Mapping[str, str]] | None) -> dict[str, str] | None:
    """module.part -> hash."""
    if stored is None:
        return None
    return {f"{module}.{part}": tree for module, parts in stored.items() for part, tree in parts.items()}


def data(folders: Pair, made: list[dict[str, Any]], selections: tuple[str, str]) -> dict[str, list[Any]]:
    """Hashes of frames and of initial weights that differ."""
    seen = []
    for folder, each, selection in zip(folders, made, selections, strict=True):
        hashes = {split: one.get("sha256") for split, one in each.get("data", {}).items()}
        evaluated = {f"evaluated on {name}": one.get("data_sha256") for name, one in _metas(folder, selection).items()}
        seen.append({**hashes, **evaluated, "initial weights": (each.get("weights") or {}).get("sha256")})
    both = {key for key in seen[0] if key in seen[1] or not key.startswith("evaluated")}
    return {key: value for key, value in differences(*seen).items() if key in both or not key.startswith("evaluated")}


def environment(folder: Path, made: Mapping[str, Any]) -> dict[str, Any]:
    versions = {f"version of {name}": value for name, value in (made.get("versions") or {}).items()}
    return {**versions, **(made.get("hardware") or {}), **(read_json(folder / "numerics.json") or {})}


COSTS = ("train_seconds", "seconds_per_step", "parameters", "attempts")


def cost(side: Side, what: str) -> float | None:
    """Mean over the runs that are trained."""
    results = [read_json(folder / "result.json") or {} for folder in side.folders.values()]
    known = [result[what] for result in results if result.get(what) is not None]
    return float(np.mean(known)) if known else None


# ---------------------------------------------------------------------------------------------- what they score


def scores(a: Side, b: Side, pairs: Mapping[int, Pair]) -> dict[str, Any]:
    """Gain of b over a on clean test frames, over all classes and in each, with intervals; what flipped most.

    Empty where one of the two has not been evaluated there.
    """
    found: list[tuple[Evaluation, Evaluation]] = []
    for one, other in pairs.values():
        paths = evaluation(one, a.selection, CLEAN_TEST), evaluation(other, b.selection, CLEAN_TEST)
        if all(path.exists() for path in paths):
            found.append((load_evaluation(paths[0], True), load_evaluation(paths[1], True)))
    if not found:
        return {"gains": {}, "flipped": [], "why": "not both are evaluated on clean test frames"}
    first = found[0][0]
    for each in (each for both in found for each in both):
        if list(each.names) != list(first.names) or each.meta["classes"] != first.meta["classes"]:
            why = "they were evaluated on other images or classes, so no difference of scores means anything"
            return {"gains": {}, "flipped": [], "why": why}
    return {"gains": gains(found, first.meta["classes"]), "flipped": flipped(found)}


def gains(found: list[tuple[Evaluation, Evaluation]], classes: list[str]) -> dict[str, dict[str, Any]]:
    """By class and for `miou`: both values, the gain in points, its 95 % interval and the verdict."""
    images = len(found[0][0].names)
    counts = image_draws(images, DRAWS, np.random.default_rng(0))
    values = [[_scores(each.confusion.sum(axis=0, dtype=np.int64)[None])[0] for each in both] for both in found]
    drawn = [[_scores(_summed(each.confusion, counts)) for each in both] for both in found]
    result = {}
    for place, name in enumerate(("miou", *classes)):
        one, other = (float(np.mean([both[side][place] for both in values])) for side in (0, 1))
        moved = np.stack([both[1][:, place] - both[0][:, place] for both in drawn])  # (s, b)
        # a draw without a pixel of a class says nothing about it
        moved = moved[:, ~np.isnan(moved).any(axis=0)]
        each = np.array([both[1][place] - both[0][place] for both in values])  # of every seed
        enough = moved.shape[1] and (len(found) > 1 or images > 1)
        interval = gain_interval(each, moved, images) if enough else None
        result[name] = {
            "a": one, "b": other, "gain": other - one, "seeds": len(found),
            "low": interval and interval.low, "high": interval and interval.high, "over": interval and interval.over,
            "verdict": interval.verdict if interval else "unknown",
        }  # fmt: skip
    return result


def _summed(confusion: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The matrix of each draw (b, k, k), from those of the images (n, k, k) and how often each is drawn (b, n)."""
    images, classes, _ = confusion.shape
    return (counts.astype(float) @ confusion.reshape(images, -1).astype(float)).reshape(-1, classes, classes)


def _scores(matrices: np.ndarray) -> np.ndarray:
    """mIoU, then the IoU of each class, in per cent (..., 1 + k)."""
    return np.concatenate([np.asarray(miou(matrices))[..., None], iou(matrices)], axis=-1)


def flipped(found: list[tuple[Evaluation, Evaluation]]) -> list[dict[str, Any]]:
    """The images whose pixels changed their class most, mean over seeds, with what that did to their mIoU.

    From the prediction maps; where there are none, at least so many pixels as the confusion matrices differ by.
    """
    share, gain = [], []
    for one, other in found:
        maps = (one.predictions, other.predictions)
        if maps[0] is not None and maps[1] is not None and maps[0].shape == maps[1].shape:
            share.append((maps[0] != maps[1]).mean(axis=(1, 2)))
        else:
            moved = np.abs(one.confusion.astype(np.int64) - other.confusion).sum(axis=(1, 2)) / 2
            share.append(moved / np.maximum(1, one.confusion.sum(axis=(1, 2))))
        gain.append(np.asarray(miou(other.confusion)) - np.asarray(miou(one.confusion)))
    mean, gained = np.mean(share, axis=0), np.mean(gain, axis=0)
    order = sorted(range(len(mean)), key=lambda i: (-mean[i], i))[:FLIPPED]
    names = found[0][0].names
    return [{"image": str(names[i]), "pixels": 100 * float(mean[i]), "gain": float(gained[i])} for i in order]


# ---------------------------------------------------------------------------------------------- tables


def ledgers(path: Path) -> dict[str, dict[str, Any]]:
    """The cells of a ledger file, or of every ledger in a folder under `TABLE:ROW/COLUMN`; ValueError if it is none."""
    if path.is_file():
        return _cells(path)
    found = {}
    for file in sorted(path.glob("*.json")):
        if isinstance(value := read_json(file), dict) and "cells" in value:
            found |= {f"{file.stem}:{name}": cell for name, cell in _cells(file).items()}
    if not found:
        raise ValueError(f"{path} holds no ledger: a ledger is a JSON file with cells")
    return found


def _cells(path: Path) -> dict[str, dict[str, Any]]:
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("cells"), dict):
        raise ValueError(f"{path} is no ledger: it has no cells")
    return value["cells"]


def compare_tables(a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Cells of which one has no counterpart, and what differs in the others."""
    changed = {}
    for name in (name for name in a if name in b):
        if moved := differences(a[name], b[name]):
            means = [each.get("mean") for each in (a[name], b[name])]
            gain = means[1] - means[0] if None not in means else None
            changed[name] = {"gain": gain, "fields": {key: json.loads(json.dumps(both)) for key, both in moved.items()}}
    return {
        "only a": [name for name in a if name not in b],
        "only b": [name for name in b if name not in a],
        "changed": changed,
        "same": sum(name in b and name not in changed for name in a),
    }
