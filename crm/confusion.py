"""Per-image confusion matrices: the stored evidence, and every metric computed from it.

numpy only. n = images, k = classes; a matrix has labels in rows and predictions in columns, counts of pixels.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crm.config import SCHEMA
from crm.records import write_bytes


def confusion_matrix(label: np.ndarray, prediction: np.ndarray, num_classes: int, ignore_index: int) -> np.ndarray:
    """The (k, k) int64 matrix of one image; pixels labelled `ignore_index` are left out.

    ValueError for a label or a prediction that is no class.
    """
    kept = label != ignore_index
    rows, columns = label[kept].astype(np.int64), prediction[kept].astype(np.int64)
    for what, ids in (("label", rows), ("prediction", columns)):
        wrong = ids[(ids < 0) | (ids >= num_classes)]
        if wrong.size:
            raise ValueError(f"{what} holds class {wrong[0]}, but there are {num_classes} classes")
    return np.bincount(rows * num_classes + columns, minlength=num_classes**2).reshape(num_classes, num_classes)


def iou(matrix: np.ndarray) -> np.ndarray:
    """IoU per class in per cent from matrices (..., k, k); NaN for a class in neither labels nor predictions."""
    hit = np.diagonal(matrix, axis1=-2, axis2=-1).astype(float)
    union = matrix.sum(axis=-1) + matrix.sum(axis=-2) - hit
    return 100 * np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0)


def miou(matrix: np.ndarray) -> np.ndarray | float:
    """Mean IoU in per cent over the classes that occur, from matrices (..., k, k) already summed over images.

    The released code counts an absent class as 0; here it is left out.
    """
    values = iou(matrix)
    present = ~np.isnan(values)
    total, count = np.where(present, values, 0.0).sum(axis=-1), present.sum(axis=-1)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)[()]


def released_miou(matrix: np.ndarray) -> np.ndarray | float:
    """Mean IoU in per cent as the released code has it: over all k classes, one that occurs nowhere counting 0."""
    return np.nan_to_num(iou(matrix)).mean(axis=-1)[()]


@dataclass(frozen=True)
class Evaluation:
    """One trained run under one condition, image by image."""

    confusion: np.ndarray  # (n, k, k) int32
    names: np.ndarray  # (n,) image names
    night: np.ndarray  # (n,) bool
    predictions: np.ndarray | None  # (n, h, w) uint8, where the condition keeps pictures
    meta: dict[str, Any]  # condition, selection, step, checkpoint hash, data set, classes, seconds

    @property
    def miou(self) -> float:
        """Mean IoU of the whole split in per cent, from the sum of the matrices."""
        return float(miou(self.confusion.sum(axis=0)))

    @property
    def released_miou(self) -> float:
        """The same number by the released code's rule for absent classes."""
        return float(released_miou(self.confusion.sum(axis=0)))


def save_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Writes atomically; the file's existence means that the evaluation is complete."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"confusion": evaluation.confusion, "names": evaluation.names, "night": evaluation.night}
    if evaluation.predictions is not None:
        arrays["predictions"] = evaluation.predictions
    np.savez_compressed(buffer, meta=np.array(json.dumps({"schema": SCHEMA, **evaluation.meta})), **arrays)
    write_bytes(path, buffer.getvalue())


def load_evaluation(path: Path, predictions: bool = False) -> Evaluation:
    """Reads one evaluation, without its prediction maps unless asked for; never unpickles."""
    with np.load(path, allow_pickle=False) as stored:
        maps = stored["predictions"] if predictions and "predictions" in stored else None
        meta = json.loads(str(stored["meta"]))
        return Evaluation(stored["confusion"], stored["names"], stored["night"], maps, meta)
