"""How a cell's number is taken from a run: from the summed matrices of an evaluation, or from what was measured of it.

Metrics of evaluations are in per cent, of dataset-level matrices summed over the images that are meant. A mean over
classes leaves out what the evaluation calls unscored, and classes that occur neither in labels nor in predictions;
`released_` means count those as 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from crm.confusion import class_mean, iou, pixel_accuracy, recall, released_mean
from crm.names import chosen
from crm.sums import Sums

Of = Callable[[Any, str], float]  # of Sums, or of a file's values; and of what stands behind the colon


@dataclass(frozen=True, kw_only=True)
class Metric:
    title: str
    of: Of
    file: str = ""  # the file in the run folder that is read; "" is an evaluation
    bootstrapped: bool = False  # whether gains of it are told from per-image matrices: mIoU of all images


def value(metric: str, found: Any) -> float:
    """A metric by its name, as in `miou`, `miou:night` or `iou:guardrail`; NaN where there is nothing to divide by.

    Args:
        found: Sums, or the values of the metric's file.
    """
    _, _, argument = metric.partition(":")
    return float(parse(metric).of(found, argument))


def parse(metric: str) -> Metric:
    """ValueError names the metrics that there are."""
    return chosen("metric", metric.partition(":")[0], METRICS)


def bootstrapped(metric: str) -> bool:
    return parse(metric).bootstrapped and ":" not in metric


def matrix(found: Sums, time: str) -> np.ndarray:
    """(k, k) of all images, or of those by `day` or at `night`."""
    parts = {"": found.whole, "night": found.night, "day": found.whole - found.night}
    return chosen("subset", time, parts)


def scored(found: Sums) -> list[int]:
    """The classes that count in means."""
    unscored = found.meta.get("unscored", ())
    return [number for number, name in enumerate(found.meta["classes"]) if name not in unscored]


def _mean(per_class: Callable[[np.ndarray], np.ndarray], mean: Callable[[np.ndarray], Any], first: int = 0) -> Of:
    def of(found: Sums, time: str) -> float:
        kept = [number for number in scored(found) if number >= first]
        return mean(per_class(matrix(found, time))[kept])

    return of


def _class_iou(found: Sums, name: str) -> float:
    classes = {known: number for number, known in enumerate(found.meta["classes"])}
    return iou(found.whole)[chosen("class", name, classes)]


def _of_file(name: str, unit: float) -> Of:
    def of(values: Mapping[str, Any], _: str) -> float:
        found = values.get(name)
        return float("nan") if found is None else found / unit

    return of


COST, RESULT = "overhead.json", "result.json"
METRICS: dict[str, Metric] = {
    "miou": Metric(title="mIoU, %", of=_mean(iou, class_mean), bootstrapped=True),
    "released_miou": Metric(title="mIoU, an absent class counting 0, %", of=_mean(iou, released_mean)),
    "miou_without_0": Metric(title="mIoU without class 0, %", of=_mean(iou, class_mean, first=1)),
    "mean_accuracy": Metric(title="mean class accuracy, %", of=_mean(recall, class_mean)),
    "pixel_accuracy": Metric(
        title="pixel accuracy, %", of=lambda found, time: float(pixel_accuracy(matrix(found, time)))
    ),
    "iou": Metric(title="IoU of a class, %", of=_class_iou),
    "parameters": Metric(title="parameters, M", of=_of_file("parameters", 1e6), file=RESULT),
    "train_hours": Metric(title="training, hours", of=_of_file("train_seconds", 3600), file=RESULT),
    "multiply_adds": Metric(title="multiply-adds, G", of=_of_file("multiply_adds", 1e9), file=COST),
    "training_operations": Metric(title="operations of a step, G", of=_of_file("training_operations", 1e9), file=COST),
    "latency": Metric(title="latency, ms", of=_of_file("latency_seconds", 1e-3), file=COST),
    "step_seconds": Metric(title="a training step, s", of=_of_file("step_seconds", 1.0), file=COST),
}
