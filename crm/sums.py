"""What is known of evaluations without opening them, so that tables of thousands of runs open no per-image file.

The index beside them (`crm.evaluated`) has their matrices summed, over all images and over those at night.
The run that evaluates writes it, and nobody else. The .npz stays the evidence: a line that is missing or torn is no
loss, for the .npz is read instead, and one about a file of another size says that the .npz was edited.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from crm.conditions import Condition
from crm.confusion import Evaluation, load_evaluation
from crm.evaluated import INDEX, index
from crm.records import append_line


@dataclass(frozen=True, kw_only=True)
class Sums:
    """One evaluation, without its images."""

    condition: str
    sha256: str  # of its file as it was written; "" where no line tells
    bytes: int  # of its file now
    images: int
    at_night: int  # of these
    names: str  # hash of the image names in their order
    meta: dict[str, Any]  # the evaluation's own
    whole: np.ndarray  # (k, k) int64
    night: np.ndarray  # (k, k) int64, of the images at night
    edited: bool = False  # whether its file is not the one that was written


def read(folder: Path, selection: str, conditions: Sequence[Condition]) -> dict[str, Sums]:
    """The sums of a run's evaluations by name of the condition; those it has not been evaluated under are left out.

    Writes nothing. ValueError where there is no line that fits and the evaluation itself is damaged.
    """
    place = folder / "evals" / selection
    lines = index(place, [condition.name for condition in conditions])
    found = {}
    for condition in conditions:
        path = place / f"{condition.name}.npz"
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            continue
        line = lines.get(condition.name)
        if line is None:
            found[condition.name] = _sums({**line_of(load_evaluation(path)), "bytes": size})
        elif line["bytes"] != size:
            now = line_of(load_evaluation(path))
            found[condition.name] = _sums({**now, "bytes": size, "sha256": line["sha256"]}, edited=True)
        else:
            found[condition.name] = _sums(line)
    return found


def note(path: Path, evaluation: Evaluation, content: str) -> None:
    """Writes the line of an evaluation that has just been saved; `content` is the SHA-256 of its file."""
    append_line(path.parent / INDEX, {**line_of(evaluation), "sha256": content, "bytes": path.stat().st_size})


def line_of(evaluation: Evaluation) -> dict[str, Any]:
    """What the index says of an evaluation, but for its file."""
    night = evaluation.night.astype(bool)
    names = sha256("\n".join(str(name) for name in evaluation.names).encode()).hexdigest()[:16]
    return {
        "condition": evaluation.meta["condition"],
        "sha256": "",
        "bytes": 0,
        "images": len(evaluation.names),
        "at_night": int(night.sum()),
        "names": names,
        "meta": evaluation.meta,
        "whole": evaluation.confusion.sum(axis=0, dtype=np.int64).tolist(),
        "night": evaluation.confusion[night].sum(axis=0, dtype=np.int64).tolist(),
    }


def _sums(line: dict[str, Any], edited: bool = False) -> Sums:
    matrices = {name: np.array(line[name], dtype=np.int64) for name in ("whole", "night")}
    return Sums(**{**line, **matrices}, edited=edited)
