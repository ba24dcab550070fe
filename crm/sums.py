"""The sum of an evaluation beside it, so that tables of thousands of runs open no per-image file.

    evals/<selection>/sums.jsonl   a line per evaluation written, the last of a condition counts: what is known of its
                                   file, what it says of itself, its images, and its confusion matrices summed, over
                                   all images and over those at night

`crm.confusion.save_evaluation` writes it. The .npz stays the evidence. A line that is missing, torn or about another
file is no loss: the .npz is read instead.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crm.conditions import Condition
from crm.confusion import SUMS, load_evaluation, summed


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
    lines = dict(_lines(place / SUMS, {condition.name for condition in conditions}))
    found = {}
    for condition in conditions:
        path = place / f"{condition.name}.npz"
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            continue
        line = lines.get(condition.name)
        if line is None:
            found[condition.name] = _sums({**summed(load_evaluation(path)), "bytes": size})
        elif line["bytes"] != size:
            now = summed(load_evaluation(path))
            found[condition.name] = _sums({**now, "bytes": size, "sha256": line["sha256"]}, edited=True)
        else:
            found[condition.name] = _sums(line)
    return found


def _lines(path: Path, wanted: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole lines about these conditions, oldest first; others are not parsed."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    starts = tuple(f'{{"condition": {json.dumps(name)},'.encode() for name in wanted)
    for line in content.split(b"\n"):
        if line.startswith(starts):
            try:
                value = json.loads(line)
            except ValueError:
                continue  # torn
            yield value["condition"], value


def _sums(line: dict[str, Any], edited: bool = False) -> Sums:
    matrices = {name: np.array(line[name], dtype=np.int64) for name in ("whole", "night")}
    return Sums(**{**line, **matrices}, edited=edited)
