"""Run folders as the real writers leave them, holding INVENTED numbers: for tests of the analysis, never a result."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np

from crm.conditions import PICTURED, Condition, Degradation
from crm.config import Config
from crm.confusion import Evaluation, confusion_matrix, save_evaluation
from crm.data.dataset import Split, manifest, open_split
from crm.records import evaluation, open_run, write_json
from crm.sums import note
from crm.sweep import Cell, Sweep

CLASSES = ("background", "road", "car")
PRICE = {"clean": 0.0, "missing_mean": 1.0, "missing_zero": 1.1, "missing_token": 0.9, "missing_route": 0.8}


@dataclass(frozen=True)
class Invented:
    """How well a made-up variant does."""

    clean: float  # share of pixels it gets right
    loss: float  # share it loses when a modality is missing
    seconds: float  # per training step


@cache  # scenes take longer to draw than all the rest
def _split(size: tuple[int, int], limit: int) -> Split:
    return open_split("synthetic", "test", size=size, limit=limit)


def trained(runs: Path, cell: Cell, seconds: float = 0.2) -> Path:
    """A run folder of a cell that has been trained and not evaluated."""
    folder = open_run(runs, cell.config)
    checksum = sha256(cell.id.encode()).hexdigest()
    split = _split(cell.config.data.size, cell.config.data.test_images)
    made = {"schema": 1, "commit": "0123456789abcdef", "dirty": False, "code": "invented"}
    write_json(folder / "provenance.json", {**made, "data": {"test": manifest(split)}})
    write_json(
        folder / "result.json",
        {
            "schema": 1,
            "id": cell.id,
            "steps": cell.config.steps,
            "miou": 50.0,
            "checkpoints": {"last": {"file": "checkpoints/last.safetensors", "sha256": checksum}},
            "train_seconds": seconds * cell.config.steps,
            "seconds_per_step": seconds,
            "parameters": 1_234_567,
            "attempts": 1,
        },
    )
    return folder


def evaluated(
    folder: Path, condition: Condition, confusion: np.ndarray, names: Collection[str] = (), dataset: str = "synthetic"
) -> None:
    """One evaluation with given per-image matrices, without prediction maps."""
    names = np.array(list(names) or [f"{i:05d}{'N' if i % 2 else 'D'}" for i in range(len(confusion))])
    night = np.array([name.endswith("N") for name in names])
    classes = CLASSES if confusion.shape[1] == len(CLASSES) else [f"class {i}" for i in range(confusion.shape[1])]
    meta = {"condition": condition.name, "split": condition.split, "dataset": dataset, "classes": list(classes)}
    meta |= {"selection": "last", "ignore_index": 255, "size": [64, 96]}
    found = Evaluation(confusion.astype(np.int32), names, night, None, meta)
    path = evaluation(folder, "last", condition)
    note(path, found, save_evaluation(path, found))


def fabricate(runs: Path, sweep: Sweep, invented: dict[str, Invented], skip: Collection[str] = ()) -> None:
    """Every cell of the sweep but those whose label is in `skip`, with predictions worn away from the true labels."""
    for cell in sweep.cells():
        if cell.label not in skip:
            how = invented[cell.variant]
            folder = trained(runs, cell, how.seconds)
            for condition in sweep.conditions:
                _evaluate(folder, cell, condition, how)


def _evaluate(folder: Path, cell: Cell, condition: Condition, how: Invented) -> None:
    config: Config = cell.config
    split = _split(config.data.size, config.data.test_images)
    rng = np.random.default_rng([cell.seed, len(cell.variant), len(condition.name)])
    right = how.clean - how.loss * _harm(condition) + rng.normal(0, 0.012)
    maps = [_worn(frame.label, float(np.clip(right + rng.normal(0, 0.05), 0.03, 0.99)), rng) for frame in split]
    matrices = [confusion_matrix(f.label, m, len(split.spec.classes), 255) for f, m in zip(split, maps, strict=True)]
    meta = {"condition": condition.name, "split": condition.split, "dataset": "synthetic", "seconds": 1.0}
    meta |= {"classes": list(split.spec.classes), "ignore_index": 255, "size": list(split.size), "selection": "last"}
    kept = np.stack(maps) if condition in PICTURED else None
    night = np.array([frame.night for frame in split])
    found = Evaluation(np.stack(matrices).astype(np.int32), np.array(split.names), night, kept, meta)
    path = evaluation(folder, "last", condition)
    note(path, found, save_evaluation(path, found))


def _harm(condition: Condition) -> float:
    return max(_one(condition.rgb) * 0.9, _one(condition.thermal) * 1.0)


def _one(how: Degradation) -> float:
    if how.kind == "patch_dropout":
        return how.severity**1.6
    return how.severity / 75 if how.kind == "gaussian_noise" else PRICE[how.kind]


def _worn(label: np.ndarray, right: float, rng: np.random.Generator) -> np.ndarray:
    """The label with a share of 1 - `right` of its pixels, in blobs, given to a neighbouring place's class."""
    height, width = label.shape
    coarse = rng.random((height // 8 + 2, width // 8 + 2)).repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    field = coarse + 0.35 * rng.random(label.shape)
    wrong = field > np.quantile(field, right)
    other = np.roll(label, (height // 3, width // 3), axis=(0, 1)) * (rng.random() < 0.5)
    return np.where(wrong, other, label).astype(np.uint8)
