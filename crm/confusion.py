"""Per-image confusion matrices: the stored evidence, and every metric computed from it.

numpy only. n = images, k = classes; a matrix has labels in rows and predictions in columns, counts of pixels.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from crm.calibration import ece
from crm.config import SCHEMA
from crm.data.specs import DATASETS
from crm.names import chosen
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


# ---------------------------------------------------------------------------------------------- metrics
# All take matrices (..., k, k), summed over the images that are meant, and give per cent.


def iou(matrix: np.ndarray) -> np.ndarray:
    """IoU per class (..., k); NaN for a class in neither labels nor predictions."""
    hit = np.diagonal(matrix, axis1=-2, axis2=-1)
    return _share(hit, matrix.sum(axis=-1) + matrix.sum(axis=-2) - hit)


def precision(matrix: np.ndarray) -> np.ndarray:
    """Per class (..., k), the share of the pixels predicted so that are so; NaN for a class never predicted."""
    return _share(np.diagonal(matrix, axis1=-2, axis2=-1), matrix.sum(axis=-2))


def recall(matrix: np.ndarray) -> np.ndarray:
    """Per class (..., k), the share of its pixels that is found; NaN for a class in no label.

    The field calls it class accuracy, and its mean over the classes mean accuracy.
    """
    return _share(np.diagonal(matrix, axis1=-2, axis2=-1), matrix.sum(axis=-1))


def pixel_accuracy(matrix: np.ndarray) -> np.ndarray | float:
    """The share of all counted pixels whose class is right; NaN without a pixel."""
    return _share(np.trace(matrix, axis1=-2, axis2=-1), matrix.sum(axis=(-2, -1)))


def miou(matrix: np.ndarray) -> np.ndarray | float:
    """Mean IoU over the classes that occur.

    The released code counts an absent class as 0; here it is left out.
    """
    return class_mean(iou(matrix))


def released_miou(matrix: np.ndarray) -> np.ndarray | float:
    """Mean IoU as the released code has it: over all k classes, one that occurs nowhere counting 0."""
    return released_mean(iou(matrix))


def class_mean(values: np.ndarray) -> np.ndarray | float:
    """Mean over classes (..., k) of those that are not NaN; NaN if all are."""
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)[()]


def released_mean(values: np.ndarray) -> np.ndarray | float:
    """Mean over all classes (..., k), NaN counting 0 [released code]."""
    return np.nan_to_num(values).mean(axis=-1)[()]


def _share(part: Any, whole: Any) -> Any:
    """In per cent; NaN where there is nothing to share."""
    return 100 * np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole > 0))


# ---------------------------------------------------------------------------------------------- evaluations


@dataclass(frozen=True)
class Evaluation:
    """One trained run under one condition, image by image."""

    confusion: np.ndarray  # (n, k, k) int32
    names: np.ndarray  # (n,) image names
    night: np.ndarray  # (n,) bool
    predictions: np.ndarray | None  # (n, h, w) uint8, where the condition keeps pictures
    meta: dict[str, Any]  # condition, selection, step, checkpoint hash, data set, classes, seconds
    calibration: np.ndarray | None = None  # (n, m, 3), see crm.calibration; older files lack it

    @property
    def miou(self) -> float:
        """Mean IoU of the whole split in per cent, from the sum of the matrices."""
        return self.scores()["miou"]

    @property
    def released_miou(self) -> float:
        """The same number by the released code's rule for absent classes."""
        return self.scores()["released_miou"]

    def part(self, time: str) -> "Evaluation":
        """The images of `day` or `night` alone; ValueError where the data set does not say which is which."""
        spec = DATASETS.get(self.meta["dataset"])
        wanted = chosen("subset", time, {"day": False, "night": True})
        if spec is not None and not spec.night_pattern:
            raise ValueError(f"{spec.title} does not say which images are by day and which at night")
        there = self.night == wanted
        if not there.any():
            raise ValueError(f"none of the {len(there)} images of {self.meta['condition']} is of {time}")
        arrays = {name: getattr(self, name) for name in ("confusion", "names", "night", "predictions", "calibration")}
        return replace(self, **{name: None if array is None else array[there] for name, array in arrays.items()})

    def scores(self, without: Sequence[str] = ()) -> dict[str, Any]:
        """Every metric of all images together, in per cent; NaN where there is nothing to divide by.

        Classes in `without`, and those that the record calls unscored, are left out of every mean over classes; their
        pixels stay, so that whoever takes one for another class is wrong. `pixel_accuracy` and `ece` are over all
        pixels. A `released_` mean counts a class without a value as 0, the others leave it out. ValueError for a class
        that there is not, and if none is left.
        """
        classes: list[str] = self.meta["classes"]
        for name in without:
            chosen("class", name, dict.fromkeys(classes))
        dropped = {*without, *self.meta.get("unscored", ())}
        kept = [i for i, name in enumerate(classes) if name not in dropped]
        if not kept:
            raise ValueError("without all of its classes nothing is left to score")
        whole = self.confusion.sum(axis=0, dtype=np.int64)
        values = {"iou": iou(whole), "precision": precision(whole), "recall": recall(whole)}
        above = [i for i in kept if i]
        return {
            "images": len(self.names),
            "miou": float(class_mean(values["iou"][kept])),
            "released_miou": float(released_mean(values["iou"][kept])),
            "miou_without_0": float(class_mean(values["iou"][above])) if above else float("nan"),
            "released_miou_without_0": float(released_mean(values["iou"][above])) if above else float("nan"),
            "pixel_accuracy": float(pixel_accuracy(whole)),
            "mean_accuracy": float(class_mean(values["recall"][kept])),
            "mean_precision": float(class_mean(values["precision"][kept])),
            "released_mean_accuracy": float(released_mean(values["recall"][kept])),
            "released_mean_precision": float(released_mean(values["precision"][kept])),
            "ece": None if self.calibration is None else float(ece(self.calibration.sum(axis=0))),
            "scored": [classes[i] for i in kept],
            "absent": [classes[i] for i in kept if np.isnan(values["iou"][i])],
            "classes": {
                name: {**{what: float(each[i]) for what, each in values.items()}, "pixels": int(whole[i].sum())}
                for i, name in enumerate(classes)
            },
        }


def save_evaluation(path: Path, evaluation: Evaluation) -> str:
    """Writes atomically, so that the file's existence means that the evaluation is complete; SHA-256 of the file."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"confusion": evaluation.confusion, "names": evaluation.names, "night": evaluation.night}
    for name in ("predictions", "calibration"):
        if (array := getattr(evaluation, name)) is not None:
            arrays[name] = array
    np.savez_compressed(buffer, meta=np.array(json.dumps({"schema": SCHEMA, **evaluation.meta})), **arrays)
    write_bytes(path, buffer.getvalue())
    return sha256(buffer.getvalue()).hexdigest()


def load_evaluation(path: Path, predictions: bool = False) -> Evaluation:
    """Reads one evaluation, without its prediction maps unless asked for; never unpickles."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            maps = stored["predictions"] if predictions and "predictions" in stored else None
            meta = json.loads(str(stored["meta"]))
            calibration = stored.get("calibration")
            return Evaluation(stored["confusion"], stored["names"], stored["night"], maps, meta, calibration)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged; delete it, and it is computed anew") from error


def load_meta(path: Path) -> dict[str, Any]:
    """What an evaluation says of itself, without its matrices."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return json.loads(str(stored["meta"]))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged; delete it, and it is computed anew") from error
